"""Outages and poison in virtual time: all engines of a pool fail for a minute; a request kills engines."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest

from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.outcome import FailureCause, Outcome, OutcomeKind, Reason
from dispatcher.scheduling.retry_budget import KEPT_S
from tests.support.cluster import PARTITIONS, Cluster
from tests.support.scripted_engine import MOST_TOKENS, ScriptedEngine
from tests.support.sim.loop import current, run
from workers_agent.engines.engine import EngineFailure, Piece

SHARE = 0.1
SCARCE, AMPLE = 0.5, 50.0
"""Retries per second."""
OUTAGE_S = 60.0
RESTART_S = 5.0
POISON = "poison"


class BreakableEngine(ScriptedEngine):
    """Answers, until it is broken: it then refuses (crashed), or answers 500 and looks well (ill)."""

    def __init__(self, rng: random.Random, scene: Scene) -> None:
        super().__init__(rng, failure_share=0.0)
        self._scene = scene

    async def stream(self, work: Work, body: bytes) -> AsyncGenerator[Piece, None]:
        """Run one request."""
        if await self.is_alive():
            self._scene.started.append((current().time(), work.id))
        if self._scene.is_ill:
            await asyncio.sleep(0.05)
            raise EngineFailure(FailureCause.ENGINE_ERROR, "internal server error", http_status=500)
        async for piece in super().stream(work, body):
            yield piece
            if work.id == POISON:
                self.crash(RESTART_S)


class Scene(Cluster):
    """A cluster with engines to break."""

    def __init__(self, seed: int, nodes: int, *, floor: float = AMPLE) -> None:
        super().__init__(seed, nodes=tuple(f"n{number}" for number in range(nodes)))
        self.settings = self.settings.model_copy(update={"retry_share": SHARE, "retry_floor_rate": floor})
        self.is_ill = False
        self.started: list[tuple[float, str]] = []

    def engine_of(self, node: str) -> BreakableEngine:
        """The engine beside an agent."""
        return BreakableEngine(random.Random(self.rng.random()), self)

    def start(self) -> None:
        """Start all processes."""
        for topic in self.names.topics:
            self.kafka.create_topic(topic, PARTITIONS)
        for name in self.dispatchers:
            self.start_dispatcher(name)
        for node in self.nodes:
            self.start_agent(node)

    def append(self, id: str) -> None:
        """Append a request that takes a while."""
        self.workload.append(
            {
                "id": id,
                "model": "m",
                "endpoint": "/v1/completions",
                "body": {"prompt": "x", "max_tokens": MOST_TOKENS},
            }
        )

    def elections(self) -> int:
        """How many leaders there have been: a rough network may change them unasked."""
        return sum(int(one.metrics.elections._value.get()) for one in self.running.values())

    def kill_leader(self) -> None:
        """Kill whoever leads; the other dispatcher takes over."""
        for name in self.dispatchers:
            if self.running[name].election.leading:
                self.processes[name].kill()

    async def until(self, is_so: Callable[[], bool], what: str, within_s: float) -> None:
        """Wait in virtual time."""
        until_s = current().time() + within_s
        while not is_so():
            assert current().time() < until_s, f"{what}: not within {within_s} s"
            await asyncio.sleep(0.1)

    def outcomes(self) -> dict[str, Outcome]:
        """The committed outcomes by id."""
        records = self.kafka.committed(self.names.outcomes)
        decoded = (codec.outcomes.decode(one.value or b"") for one in records)
        return {outcome.id: outcome for outcome in decoded}

    async def answered(self, within_s: float) -> dict[str, Outcome]:
        """Wait until every request is answered; the outcomes by id."""
        await self.until(lambda: not self.invariants.unanswered(), "all are answered", within_s)
        self.invariants.check_end()
        assert not self.result.violations, self.result.violations
        # Decided is not yet readable: the last transaction's markers may be still to be written.
        await self.until(lambda: len(self.outcomes()) == len(self.expectations.groups), "all are read", 5)
        found = self.outcomes()
        for process in self.processes.values():
            if process.is_alive:
                assert not process.failures
                process.kill()
        return found


def in_virtual_time(test: Coroutine[Any, Any, None]) -> None:
    """Run a test."""
    run(test)


def retries_beyond_budget(
    started: list[tuple[float, str]], answered_at_s: float, *, floor: float, leaders: int
) -> list[str]:
    """Moments at which more attempts had been repeated than the budget had given, before `answered_at_s`.

    Each leader begins with the floor of some seconds.
    """
    seen: set[str] = set()
    repeated, began_s, wrong = 0, started[0][0], []
    for at_s, id in started:
        if at_s > answered_at_s:
            break
        if id not in seen:
            seen.add(id)
            continue
        repeated += 1
        given = floor * (KEPT_S * leaders + at_s - began_s) + SHARE * len(seen) + 1
        if repeated > given:
            wrong.append(f"{at_s - began_s:.1f} s: {repeated} repeated, {given:.1f} given")
    return wrong


@pytest.mark.parametrize(
    ("is_dead", "kills_leader", "floor", "seed"),
    [
        (True, False, SCARCE, 7),
        (False, False, SCARCE, 7),
        (False, True, SCARCE, 7),
        *((False, False, AMPLE, seed) for seed in (5, 7, 9, 12)),
    ],
)
def test_an_outage_of_all_engines_is_no_storm_and_ends_no_request(
    is_dead: bool, kills_leader: bool, floor: float, seed: int
) -> None:
    async def main() -> None:
        scene = Scene(seed=seed, nodes=10, floor=floor)
        scene.start()
        for number in range(80):
            scene.append(f"r{number}")
        await scene.until(lambda: len(scene.started) > 20, "engines are at work", 30)
        began_s = current().time()
        if is_dead:
            for engine in scene.engines.values():
                engine.crash(OUTAGE_S)
        else:
            scene.is_ill = True
        await asyncio.sleep(OUTAGE_S / 2)
        if kills_leader:
            scene.kill_leader()
        await asyncio.sleep(OUTAGE_S / 2)
        scene.is_ill = False
        ended_s = current().time()
        tried = [id for at_s, id in scene.started if began_s <= at_s < ended_s]
        leaders = scene.elections()
        assert leaders > kills_leader
        outcomes = await scene.answered(within_s=240)
        assert len(outcomes) == 80
        assert {outcome.reason for outcome in outcomes.values()} == {Reason.FINISHED}
        beyond = retries_beyond_budget(scene.started, ended_s, floor=floor, leaders=leaders)
        assert not beyond, beyond
        if not is_dead:
            assert len(tried) > len(set(tried)), "some were tried again during the outage"

    in_virtual_time(main())


@pytest.mark.parametrize("kills_leader", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_of_many_requests_the_one_that_kills_engines_is_found_and_two_engines_die(
    seed: int, kills_leader: bool
) -> None:
    async def main() -> None:
        scene = Scene(seed, nodes=6)
        scene.start()
        for number in range(40):
            scene.append(POISON if number == 10 else f"r{number}")
        await scene.until(
            lambda: any(engine.crashes for engine in scene.engines.values()), "the first engine dies", 60
        )
        if kills_leader:
            await asyncio.sleep(scene.rng.uniform(0.0, 1.0))
            scene.kill_leader()
        outcomes = await scene.answered(within_s=240)
        ended = {id: (outcome.kind, outcome.reason) for id, outcome in outcomes.items()}
        assert ended.pop(POISON) == (OutcomeKind.FAILED, Reason.POISON)
        assert set(ended.values()) == {(OutcomeKind.COMPLETED, Reason.FINISHED)}
        assert len(ended) == 39
        deaths = {node: engine.crashes for node, engine in scene.engines.items() if engine.crashes}
        assert list(deaths.values()) == [1, 1], deaths
        (letter,) = [
            codec.dead_letters.decode(one.value or b"") for one in scene.kafka.committed(scene.names.dead)
        ]
        assert letter.reason is Reason.POISON
        assert {attempt.node for attempt in letter.attempts if attempt.crash} == set(deaths)

    in_virtual_time(main())
