"""Engine watch: whether the engine works, and what it says of its load.

An engine is believed by its progress: a hung one still answers its health page. When a stream stalled, the
engine gets no new work before a probe, one token of a real request, has come through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from workers_agent.engines.engine import Engine
from workers_agent.engines.gpu import GpuWatch
from workers_agent.state import AgentState

PROBE_PAUSE_S = 2.0


class EngineWatch:
    """Watches one incarnation's engine.

    Args:
        died: called when the engine is found gone: its cache is gone with it.
    """

    def __init__(
        self,
        state: AgentState,
        engine: Engine,
        gpus: GpuWatch,
        *,
        interval_s: float,
        died: Callable[[], None] = lambda: None,
    ) -> None:
        self._state = state
        self._engine = engine
        self._gpus = gpus
        self._interval_s = interval_s
        self._died = died

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> None:
        """One look."""
        state = self._state
        load = await self._engine.load()
        if load is None:
            alive = await self._engine.is_alive()
            if not alive and state.engine_ok:
                self._died()
        else:
            alive = True
            state.load = load
        state.gpu = self._gpus.read()
        if alive and state.is_suspect:
            alive = await self._probe()
        if alive != state.engine_ok:
            state.engine_ok = alive
            state.log.warning("engine works again" if alive else "engine does not work")
            state.changed.set()
        state.metrics.engine_ok.set(alive)

    async def _probe(self) -> bool:
        state = self._state
        if state.engine_ok:
            # Nothing new goes there while it is found out.
            state.engine_ok = False
            state.log.warning("engine is suspect: a stream stalled; probing it")
            state.changed.set()
        works = await self._engine.probe(state.identity.models[0] if state.identity.models else "")
        state.metrics.probes.labels("works" if works else "fails").inc()
        if works:
            state.is_suspect = False
        else:
            await asyncio.sleep(PROBE_PAUSE_S)
        return works
