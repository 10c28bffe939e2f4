"""Control: what the leader tells this node. A cancelled job's ending is decided already: it just stops."""

from __future__ import annotations

import asyncio

from dispatcher.backends.node_store import NodeStore
from dispatcher.errors import StoreUnavailable
from dispatcher.protocol.node import ControlKind
from workers_agent.state import AgentState

BLOCK_MS = 1000
PAUSE_S = 0.1


class Control:
    """Follows one node's control stream."""

    def __init__(self, state: AgentState, store: NodeStore) -> None:
        self._state = state
        self._store = store

    async def run(self) -> None:
        """Follow until cancelled, from the oldest entry: old ones name attempts that nobody holds."""
        cursor = b"0-0"
        while True:
            try:
                entries = await self._store.read_control(cursor, block_ms=BLOCK_MS)
            except StoreUnavailable:
                self._state.metrics.store_errors.inc()
                await asyncio.sleep(PAUSE_S)
                continue
            if entries:
                cursor = entries[-1].id
            kinds = {entry.text("kind") for entry in entries}
            for entry in entries:
                if entry.text("kind") == ControlKind.CANCEL:
                    self._state.drop(entry.text("job"))
            if ControlKind.FENCE in kinds:
                self._state.changed.set()  # the report that follows learns whether it is meant for us
