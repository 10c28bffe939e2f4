"""Heartbeat: report load on change and each second, prolong leases, learn what was taken away.

The report also tells which data set Redis is: when it is another one than we registered with, Redis
lost its data, and we register again with everything that we hold.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.node_store import NodeStore
from dispatcher.protocol.node import NodeReport
from workers_agent.services.registration import Registration
from workers_agent.state import AgentState


class Heartbeat:
    """The reports of one incarnation."""

    def __init__(
        self,
        state: AgentState,
        store: NodeStore,
        registration: Registration,
        *,
        interval_s: float,
        min_interval_s: float,
    ) -> None:
        self._state = state
        self._store = store
        self._registration = registration
        self._interval_s = interval_s
        self._min_interval_s = min_interval_s
        self._sequence = 0
        self._extended_at_s = float("-inf")

    async def run(self) -> None:
        """Report until cancelled."""
        state = self._state
        while True:
            state.changed.clear()
            await self.beat()
            await asyncio.sleep(self._min_interval_s)
            try:
                async with asyncio.timeout(self._interval_s - self._min_interval_s):
                    await state.changed.wait()
            except TimeoutError:
                pass

    async def beat(self) -> None:
        """One report, and an extension of leases when a second has passed."""
        state = self._state
        generation = await self._registration.say(lambda: self._store.report(self._report()))
        state.note_clock()
        if generation != state.generation:
            await self._registration.renew()
        now_s = state.clock.monotonic()
        if now_s - self._extended_at_s >= self._interval_s - self._min_interval_s:
            self._extended_at_s = now_s
            await self._extend()

    def _report(self) -> NodeReport:
        state = self._state
        self._sequence += 1
        running = [held for held in state.held.values() if held.ending is None]
        return NodeReport(
            node=state.identity.node,
            incarnation=state.identity.incarnation,
            sequence=self._sequence,
            running=len(running),
            waiting=sum(not held.has_token for held in running),
            held_tokens=sum(held.tokens for held in running),
            queued_uncached_tokens=sum(held.queued_tokens for held in running),
            kv_used_tokens=state.load.kv_used_tokens,
            kv_total_tokens=state.load.kv_total_tokens or state.identity.kv_total_tokens,
            engine_running=state.load.running,
            engine_waiting=state.load.waiting,
            gpu_utilisation=state.gpu.utilisation,
            gpu_memory_used=state.gpu.memory_used,
            cache_sequence=state.cache_sequence,
            cache_blocks=state.cache_blocks,
            cache_partial=state.cache_partial,
            seen_seq=state.seen_seq,
            draining=state.draining,
            engine_ok=state.engine_ok,
            left=state.left,
        )

    async def _extend(self) -> None:
        state = self._state
        jobs, checkpoints = list(state.held), state.checkpoints()
        backlog, lost = await self._registration.say(
            lambda: self._store.extend(
                state.identity.incarnation, jobs, now_iso=state.clock.now_iso(), checkpoints=checkpoints
            )
        )
        if backlog and state.free:
            state.backlog = True
        if lost and not state.awaits_adoption:
            for job in lost:
                held = state.held.get(job)
                if held is not None and held.ending is None:
                    state.metrics.lost.inc()
                    state.log.warning("attempt was taken away, aborting it", job=job)
                    state.drop(job)
