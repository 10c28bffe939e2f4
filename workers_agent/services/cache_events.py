"""Cache events: make the engine's cache known to the leaders, as diffs of routing blocks.

Diffs carry a sequence within the incarnation. When Redis has another one than we sent (it lost data, or we
registered anew), a reset and the whole view follow. Requests never wait for any of this.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.node_store import NodeStore
from dispatcher.errors import StoreFull
from dispatcher.protocol.node import BlockEvent, BlockEventKind
from workers_agent.cache_view import CacheView, Change
from workers_agent.engines.kv_events import chunks
from workers_agent.services.registration import Registration
from workers_agent.state import AgentState

MIN_INTERVAL_S = 0.02
MOST_HASHES = 4096
FULL_PAUSE_S = 5.0


class CacheEvents:
    """Publishes one incarnation's view. `changed` is set by whoever moved the view."""

    def __init__(
        self,
        state: AgentState,
        store: NodeStore,
        registration: Registration,
        view: CacheView,
        changed: asyncio.Event,
    ) -> None:
        self._state = state
        self._store = store
        self._registration = registration
        self._view = view
        self._changed = changed
        self._sequence = 0
        self._generation = ""

    async def run(self) -> None:
        """Publish until cancelled."""
        whole = True
        while True:
            if whole or self._generation != self._state.generation:
                self._generation = self._state.generation
                whole = not await self._publish(self._view.snapshot(), is_whole=True)
            else:
                whole = not await self._publish(self._view.take_changes(), is_whole=False)
            self._note()
            await asyncio.sleep(MIN_INTERVAL_S)
            if not whole:
                await self._wait()

    async def _wait(self) -> None:
        """Until the view moved, or a second has passed: Redis may be another one by then."""
        try:
            async with asyncio.timeout(1.0):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _note(self) -> None:
        state, view = self._state, self._view
        seen = (self._sequence, view.blocks, view.is_partial)
        if seen != (state.cache_sequence, state.cache_blocks, state.cache_partial):
            state.cache_sequence, state.cache_blocks, state.cache_partial = seen
        state.metrics.view_blocks.set(view.blocks)
        state.metrics.view_partial.set(view.is_partial)

    async def _publish(self, changes: list[Change], *, is_whole: bool) -> bool:
        """Publish; False when the whole view has to follow."""
        events = [self._event(BlockEventKind.RESET)] if is_whole else []
        for kind, medium, hashes in changes:
            events += [self._event(kind, medium.value, part) for part in chunks(hashes, MOST_HASHES)]
        if not events:
            return True
        try:
            applied = await self._registration.say(lambda: self._store.publish_blocks(events))
        except StoreFull as error:
            self._state.log.warning("cache view not published", error=str(error))
            await asyncio.sleep(FULL_PAUSE_S)
            return False
        self._state.metrics.block_events.inc(len(events))
        if applied != self._sequence:
            self._state.metrics.view_resyncs.inc()
            return False
        return True

    def _event(self, kind: BlockEventKind, medium: str = "GPU", hashes: tuple[str, ...] = ()) -> BlockEvent:
        self._sequence += 1
        identity = self._state.identity
        return BlockEvent(
            node=identity.node,
            incarnation=identity.incarnation,
            sequence=self._sequence,
            kind=kind,
            medium=medium,
            hashes=hashes,
        )
