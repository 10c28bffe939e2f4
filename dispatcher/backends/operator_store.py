"""What an operator says to Redis: which nodes shall get nothing new.

An operator holds no lease: the script is not fenced, and whoever leads obeys.
"""

from __future__ import annotations

from dispatcher.backends.scripts import ScriptRunner
from dispatcher.protocol.names import Names
from dispatcher.protocol.node import Wish


class OperatorStore:
    """An operator's scripts for one pool."""

    def __init__(self, runner: ScriptRunner, names: Names) -> None:
        self._runner = runner
        self.names = names

    async def wish(self, node: str, wish: Wish | None) -> str | None:
        """Note a wish (None takes it back); returns the one before or '', None for an unknown node."""
        names = self.names
        arguments = [node, wish.value if wish is not None else "", names.reports, names.node(node)]
        state, before = await self._runner.run("cordon", [names.cordons], arguments)
        return before.decode() if state == b"ok" else None
