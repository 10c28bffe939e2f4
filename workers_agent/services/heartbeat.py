"""Heartbeat: report load on change and each second, prolong leases, learn what was taken away.

The report also tells which data set Redis is: when it is another one than we registered with, Redis
lost its data, and we register again with everything that we hold.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.node_store import NodeStore
from dispatcher.protocol.node import NodeReport
from workers_agent.engines.engine import Engine
from workers_agent.services.registration import Registration
from workers_agent.state import AgentState

ENGINE_CHECK_S = 2.0


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
            held_tokens=sum(held.tokens for held in running),
            kv_total_tokens=state.identity.kv_total_tokens,
            seen_seq=state.seen_seq,
            draining=state.draining,
            engine_ok=state.engine_ok,
            left=state.left,
        )

    async def _extend(self) -> None:
        state = self._state
        jobs = list(state.held)
        backlog, lost = await self._registration.say(
            lambda: self._store.extend(state.identity.incarnation, jobs, now_iso=state.clock.now_iso())
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


class EngineWatch:
    """Tells whether the engine answers, so that a node without one gets no work."""

    def __init__(self, state: AgentState, engine: Engine) -> None:
        self._state = state
        self._engine = engine

    async def run(self) -> None:
        """Ask every two seconds until cancelled."""
        state = self._state
        while True:
            alive = await self._engine.is_alive()
            if alive != state.engine_ok:
                state.engine_ok = alive
                state.log.warning("engine answers again" if alive else "engine does not answer")
                state.changed.set()
            state.metrics.engine_ok.set(alive)
            await asyncio.sleep(ENGINE_CHECK_S)
