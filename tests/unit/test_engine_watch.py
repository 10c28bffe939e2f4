"""When an agent says that its engine does not work, and when it says so no longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock, ServerClock
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.node import NodeIdentity
from dispatcher.telemetry.logging import Log
from workers_agent.engines.engine import Piece, Prefilled
from workers_agent.engines.engine_load import EngineLoad
from workers_agent.engines.gpu import GpuWatch
from workers_agent.metrics import AgentMetrics
from workers_agent.services.engine_watch import EngineWatch
from workers_agent.state import AgentState


class ToldEngine:
    """An engine whose health, metrics and probes say what a test told them to."""

    def __init__(self) -> None:
        self.healthy = True
        self.serves_metrics = True
        self.generates = True
        self.progress = 0.0
        self.asked: list[str] = []
        self.load_waits_for: asyncio.Event | None = None

    async def stream(self, work: Work, body: bytes) -> AsyncGenerator[Piece, None]:
        """Nothing."""
        pieces: list[Piece] = []
        for piece in pieces:
            yield piece

    async def is_alive(self) -> bool:
        """What its health page says."""
        self.asked.append("health")
        return self.healthy

    async def prefill(self, work: Work, body: bytes) -> Prefilled | None:
        """It splits nothing."""
        return None

    async def prompt_ids(self, work: Work, body: bytes) -> tuple[int, ...] | None:
        """It tells no tokens."""
        return None

    async def text_of(self, work: Work, token_ids: Sequence[int]) -> str | None:
        """It tells no tokens."""
        return None

    async def load(self) -> EngineLoad | None:
        """Its metrics."""
        told = EngineLoad(is_known=True, progress=self.progress) if self.serves_metrics else None
        if self.load_waits_for is not None:
            await self.load_waits_for.wait()
        return told

    async def probe(self, model: str) -> bool:
        """Whether a token came."""
        self.asked.append("probe")
        return self.generates

    async def close(self) -> None:
        """Nothing."""


class Scene:
    """An engine and its watch."""

    def __init__(self) -> None:
        self.engine = ToldEngine()
        self.state = AgentState(
            identity=NodeIdentity(node="n", incarnation="x", models=("m",)),
            clock=Clock(),
            server_clock=ServerClock(Clock()),
            metrics=AgentMetrics(CollectorRegistry()),
            log=Log(),
        )
        self.deaths = 0
        self.since_s = self.state.clock.monotonic()
        self.watch = EngineWatch(
            self.state, self.engine, GpuWatch("none"), interval_s=1.0, died=self._note_death
        )

    async def check(self) -> bool:
        """Whether the engine died since the last check began or a moment before."""
        since_s, self.since_s = self.since_s, self.state.clock.monotonic()
        return await self.watch.check(since_s)

    def works(self) -> bool:
        """What the next report says."""
        return self.state.engine_ok

    def _note_death(self) -> None:
        self.deaths += 1


async def test_a_check_believes_a_health_page_that_says_no() -> None:
    scene = Scene()
    await scene.check()
    assert scene.works()
    scene.engine.healthy = False
    await scene.check()
    assert not scene.works()
    assert scene.state.changed.is_set(), "a report is due"
    assert scene.deaths == 1


async def test_what_is_known_to_be_dead_is_not_asked_again_by_each_failure() -> None:
    scene = Scene()
    scene.engine.healthy = False
    for _ in range(3):
        await scene.check()
    assert scene.engine.asked == ["health"]
    assert scene.deaths == 1


async def test_metrics_alone_do_not_bring_an_engine_back() -> None:
    scene = Scene()
    scene.engine.healthy = False
    await scene.check()
    await scene.watch.look()
    assert not scene.works()
    scene.engine.healthy = True
    await scene.watch.look()
    assert scene.works()
    assert scene.deaths == 1


async def test_a_look_that_began_before_a_death_proves_nothing() -> None:
    scene = Scene()
    scene.engine.load_waits_for = asyncio.Event()
    looking = asyncio.create_task(scene.watch.look())
    await asyncio.sleep(0)
    scene.engine.healthy = False
    await scene.check()
    scene.engine.healthy = True
    scene.engine.load_waits_for.set()
    await looking
    assert not scene.works()
    await scene.watch.look()
    assert scene.works()


async def test_an_engine_that_dies_while_it_is_suspect_loses_its_cache_too() -> None:
    scene = Scene()
    scene.state.is_suspect = True
    scene.engine.generates = False
    looking = asyncio.create_task(scene.watch.look())
    await asyncio.sleep(0)
    assert not scene.works()
    looking.cancel()
    await asyncio.wait([looking])
    assert scene.deaths == 0
    scene.engine.healthy = scene.engine.serves_metrics = False
    await scene.watch.look()
    assert scene.deaths == 1


async def test_an_engine_without_metrics_is_believed_by_its_health() -> None:
    scene = Scene()
    scene.engine.serves_metrics = False
    await scene.watch.look()
    assert scene.works()
    assert scene.deaths == 0


async def test_each_attempt_that_was_in_a_dying_engine_learns_of_its_death_and_no_later_one() -> None:
    scene = Scene()
    began_s = scene.since_s
    assert not await scene.watch.check(began_s)
    scene.engine.healthy = False
    assert await scene.watch.check(began_s)
    assert await scene.watch.check(began_s)
    later_s = scene.state.clock.monotonic()
    assert not await scene.watch.check(later_s), "it was dead already"
    scene.engine.healthy = True
    await scene.watch.look()
    assert not await scene.watch.check(later_s)
    assert await scene.watch.check(began_s)
    scene.engine.healthy = False
    assert await scene.watch.check(later_s), "it died again"
    assert scene.deaths == 2


async def test_an_engine_whose_counters_fell_was_restarted_unseen() -> None:
    scene = Scene()
    scene.engine.progress = 100.0
    await scene.watch.look()
    began_s = scene.state.clock.monotonic()
    assert not await scene.watch.check(began_s)
    scene.engine.progress = 3.0
    assert await scene.watch.check(began_s)
    assert await scene.watch.check(began_s), "the next to ask sees no fall any more"
    assert scene.works()
    assert scene.deaths == 1, "its cache is gone"
    assert not await scene.watch.check(scene.state.clock.monotonic())


async def test_metrics_asked_for_before_newer_ones_came_are_no_fall() -> None:
    scene = Scene()
    opened = scene.engine.load_waits_for = asyncio.Event()
    looking = asyncio.create_task(scene.watch.look())
    await asyncio.sleep(0)
    scene.engine.load_waits_for = None
    scene.engine.progress = 100.0
    assert not await scene.check()
    opened.set()
    await looking
    assert scene.deaths == 0
    assert scene.state.load.progress == 100.0
