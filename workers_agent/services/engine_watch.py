"""Engine watch: whether the engine works, and what it says of its load.

An engine is believed by its progress: a hung one still answers its health page. When a stream stalled, the
engine gets no new work before a probe, one token of a real request, has come through. A health page that
says no is believed at once, and is asked whenever a request failed as it does when an engine dies: retries
come within a tenth of a second, and would all be spent on a dead engine before the next regular look. One
whose counters fell was restarted in between: it died too. Whether an attempt was in an engine that died is
told with its failure, so that the leader can find the request that kills engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from workers_agent.engines.engine import Engine
from workers_agent.engines.engine_load import EngineLoad
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
        self._deaths = 0
        self._is_gone = False
        self._died_s = float("-inf")
        self._loads = 0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> None:
        """One look."""
        state = self._state
        deaths = self._deaths
        load = await self._ask_load()
        state.gpu = self._gpus.read()
        # A vLLM whose core has died serves its metrics for some seconds more: they prove no recovery.
        if (load is None or not state.engine_ok) and not await self._engine.is_alive():
            self._note_death()
        elif state.is_suspect and not await self._probe():
            await asyncio.sleep(PROBE_PAUSE_S)
        elif deaths == self._deaths:
            self._is_gone = False
            self._tell(True)

    async def check(self, since_s: float) -> bool:
        """Whether the engine died after `since_s` (monotonic), asking it now unless that is known.

        Called before a failure that may be its end is told.
        """
        if self._died_s < since_s and not self._is_gone:
            if not await self._engine.is_alive():
                self._note_death()
            else:
                await self._ask_load()
        return self._died_s >= since_s

    async def _ask_load(self) -> EngineLoad | None:
        """Take over what the engine says of its load; counters that fell are those of another life."""
        asked = self._loads
        load = await self._engine.load()
        if load is None or asked != self._loads:
            return load  # one that was asked for later came first
        self._loads += 1
        if load.is_known and load.progress < self._state.load.progress and not self._is_gone:
            self._died_s = self._state.clock.monotonic()
            self._state.log.warning("engine was restarted")
            self._died()
        self._state.load = load
        return load

    def _note_death(self) -> None:
        self._deaths += 1
        if not self._is_gone:
            self._is_gone = True
            self._died_s = self._state.clock.monotonic()
            self._died()
        self._tell(False)

    def _tell(self, works: bool) -> None:
        state = self._state
        state.metrics.engine_ok.set(works)
        if works != state.engine_ok:
            state.engine_ok = works
            state.log.warning("engine works again" if works else "engine does not work")
            state.changed.set()

    async def _probe(self) -> bool:
        """Whether one token comes through; nothing new goes there while it is found out."""
        state = self._state
        if state.engine_ok:
            state.log.warning("engine is suspect: a stream stalled; probing it")
            state.engine_ok = False
            state.metrics.engine_ok.set(False)
            state.changed.set()
        works = await self._engine.probe(state.identity.models[0] if state.identity.models else "")
        state.metrics.probes.labels("works" if works else "fails").inc()
        if works:
            state.is_suspect = False
        return works
