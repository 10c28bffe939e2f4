"""Which models can be asked for: those of the fleet's live nodes, as Redis knows them, or those named."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dispatcher.backends.store_view import StoreView
from dispatcher.errors import StoreRefused, StoreUnavailable
from dispatcher.protocol import codec

CACHED_S = 1.0


class Models:
    """The models of a pool. When Redis does not answer, those it told last count."""

    def __init__(
        self,
        view: StoreView | None,
        named: tuple[str, ...] = (),
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._named = named
        self._monotonic = monotonic
        self._found: tuple[str, ...] = ()
        self._read_s = float("-inf")
        self._reading = asyncio.Lock()

    async def names(self) -> tuple[str, ...]:
        """Their names, sorted; at most a second old."""
        if self._view is not None and self._monotonic() - self._read_s >= CACHED_S:
            async with self._reading:
                if self._monotonic() - self._read_s >= CACHED_S:
                    await self._read(self._view)
        return self._found or self._named

    async def _read(self, view: StoreView) -> None:
        try:
            nodes = await view.nodes(await view.node_names())
        except (StoreUnavailable, StoreRefused):
            self._read_s = self._monotonic()
            return
        found: set[str] = set()
        for node in nodes:
            if node.alive and node.fenced != node.incarnation:
                try:
                    found.update(codec.identities.decode(node.identity).models)
                except codec.MalformedRecord:
                    continue
        self._found = tuple(sorted(found))
        self._read_s = self._monotonic()
