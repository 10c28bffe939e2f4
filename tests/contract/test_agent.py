"""The agent between real servers and an engine of any manners: claims, streams, answers, aborts, drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import KafkaClients, connect_redis
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta, Chunk, ChunkKind
from dispatcher.protocol.outcome import OutcomeKind, Reason, Usage
from dispatcher.telemetry.logging import Log
from tests.support.bad_engines import Behaviour, bad_engine
from tests.support.pool import CLOCK, MODEL, Pool, request
from tests.support.wait import wait_until
from workers_agent.app import Agent
from workers_agent.engines.engine import Engine, Piece, Prefilled
from workers_agent.engines.engine_load import EngineLoad
from workers_agent.engines.openai_http import OpenAIEngine
from workers_agent.settings import AgentSettings

pytestmark = pytest.mark.kafka


class HeldEngine:
    """Gives `given` tokens of each request, then waits to be let go on."""

    def __init__(self, *, given: int = 2, total: int = 4) -> None:
        self.go_on = asyncio.Event()
        self.started: list[str] = []
        self.aborted: list[str] = []
        self._given = given
        self._total = total

    async def stream(self, work: Work, body: bytes) -> AsyncGenerator[Piece, None]:
        """Run one request."""
        self.started.append(work.id)
        finished = False
        try:
            for number in range(self._total):
                if number == self._given:
                    await self.go_on.wait()
                yield Piece(choices=(ChoiceDelta(text=f"t{number} "),), tokens=1)
            finished = True
            yield Piece(finish_reasons=((0, "stop"),), usage=Usage(completion_tokens=self._total))
        finally:
            if not finished:
                self.aborted.append(work.id)

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
        """It tells nothing of itself."""
        return EngineLoad()

    async def probe(self, model: str) -> bool:
        """A token always comes through."""
        return True

    async def is_alive(self) -> bool:
        """Whether it answers."""
        return True

    async def close(self) -> None:
        """Nothing to close."""


@contextlib.asynccontextmanager
async def running_agent(
    pool: Pool,
    engine: Engine,
    *,
    node: str = "n1",
    clock: Clock = CLOCK,
    kafka: KafkaClients | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[Agent, asyncio.Event]]:
    """Run an agent in this process; stops it at the end as SIGTERM would."""
    agent = Agent(
        AgentSettings(
            pool=pool.names.pool,
            node=node,
            **{"models": MODEL, "max_running": 4, "drain_grace_s": 0.2, "report_interval_s": 0.3, **settings},
        ),
        redis=lambda: connect_redis(pool.redis_url),
        kafka=kafka or pool.clients,
        engine=engine,
        clock=clock,
        new_id=lambda: uuid.uuid4().hex,
        registry=CollectorRegistry(),
        log=Log(node=node),
    )
    stop = asyncio.Event()
    task = asyncio.create_task(agent.run(stop))
    try:
        yield agent, stop
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await task


@pytest.fixture
async def led(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> AsyncIterator[Pool]:
    """A pool with a dispatcher and no node."""
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()):
        yield one


async def chunks_of(pool: Pool, id: str) -> list[Chunk]:
    """What is on the reply topic for a request now."""
    consumer = pool.clients.consumer(group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partitions = [TopicPartition(pool.names.replies, number) for number in (0, 1)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        found: list[Chunk] = []
        while any([await consumer.position(tp) < ends[tp] for tp in partitions]):
            for batch in (await consumer.getmany(timeout_ms=100)).values():
                found += [codec.chunks.decode(record.value) for record in batch]
        return [chunk for chunk in found if chunk.id == id]
    finally:
        await consumer.stop()


async def test_request_is_streamed_and_answered_whole(led: Pool) -> None:
    engine = HeldEngine(total=5)
    engine.go_on.set()
    async with running_agent(led, engine):
        await led.append(request("r1"))
        outcome = await led.outcome("r1")
    assert outcome.choices[0].text == "t0 t1 t2 t3 t4 "
    assert (outcome.choices[0].finish_reason, outcome.node) == ("stop", "n1")
    assert outcome.timing.appended <= outcome.timing.claimed <= outcome.timing.first_token
    chunks = await chunks_of(led, "r1")
    assert [chunks[0].kind, chunks[-1].kind] == [ChunkKind.BEGIN, ChunkKind.END]
    text = "".join(delta.text for chunk in chunks for delta in chunk.choices)
    assert text == outcome.choices[0].text
    counted = 0
    for chunk in chunks[1:-1]:
        assert chunk.first_token == counted
        counted += chunk.tokens
    assert {chunk.attempt for chunk in chunks} == {outcome.attempt}


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0], ids=["ahead", "behind"])
async def test_deadlines_go_by_the_clock_of_redis(
    led: Pool, caplog: pytest.LogCaptureFixture, ahead_s: float
) -> None:
    """A node that gave up all that it gets, at once, would get ever more."""
    caplog.set_level(logging.INFO, "flexlb")
    engine = HeldEngine()
    engine.go_on.set()
    skews = [0.0]
    clock = Clock(epoch_s=lambda: time.time() + skews[-1])
    async with running_agent(led, engine, clock=clock) as (agent, _):
        for number in range(3):
            await led.append(request(f"r{number}", deadline_ms=20_000))
            outcome = await led.outcome(f"r{number}")
            assert outcome.kind is OutcomeKind.COMPLETED
            timing = outcome.timing
            assert 0 <= timing.ended - timing.appended < 20_000, "its times are of one clock"
            skews.append(ahead_s)

        async def is_shown() -> bool:
            return bool(abs(agent.metrics.clock_ahead_s._value.get() - ahead_s) < 1)

        await wait_until(is_shown, "the difference in a metric")
        engine.go_on.clear()
        await led.append(request("late", deadline_ms=1500))
        assert (await led.outcome("late")).reason is Reason.DEADLINE_EXCEEDED
        assert engine.aborted == ["late"]
    told = [line for line in caplog.records if "clock differs" in line.getMessage()]
    assert len(told) == 1


async def test_a_request_for_an_adapter_goes_to_the_node_that_has_it(led: Pool) -> None:
    engine = HeldEngine(total=2)
    engine.go_on.set()
    async with (
        running_agent(led, engine, node="plain"),
        running_agent(led, engine, node="tuned", loras=" sql, chat "),
    ):
        await led.append(request("r1", lora="sql"))
        assert (await led.outcome("r1")).node == "tuned"


BAD: list[tuple[Behaviour, OutcomeKind, Reason]] = [
    (Behaviour.ANSWERS_400, OutcomeKind.FAILED, Reason.ENGINE_REFUSED),
    (Behaviour.ANSWERS_429, OutcomeKind.EVICTED, Reason.DEADLINE_EXCEEDED),
    (Behaviour.ANSWERS_500, OutcomeKind.FAILED, Reason.ATTEMPTS_EXHAUSTED),
    (Behaviour.GARBAGE, OutcomeKind.FAILED, Reason.ATTEMPTS_EXHAUSTED),
    (Behaviour.SILENT, OutcomeKind.FAILED, Reason.ATTEMPTS_EXHAUSTED),
    (Behaviour.STALLS, OutcomeKind.FAILED, Reason.ATTEMPTS_EXHAUSTED),
    (Behaviour.DIES, OutcomeKind.FAILED, Reason.ATTEMPTS_EXHAUSTED),
    (Behaviour.DONE_EARLY, OutcomeKind.FAILED, Reason.ATTEMPTS_EXHAUSTED),
]


STALLING = {Behaviour.SILENT, Behaviour.STALLS}


@pytest.mark.parametrize(("behaviour", "kind", "reason"), BAD, ids=[case[0].name for case in BAD])
async def test_bad_engine_comes_to_a_typed_outcome(
    led: Pool, behaviour: Behaviour, kind: OutcomeKind, reason: Reason
) -> None:
    async with bad_engine(behaviour) as bad:
        engine = OpenAIEngine(bad.url, first_token_timeout_s=0.2, inter_token_timeout_s=0.2)
        async with running_agent(led, engine):
            await led.append(request("r1", deadline_ms=6000))
            outcome = await led.outcome("r1")
            ended = (outcome.kind, outcome.reason)
            # A stalled engine gets nothing more until a probe has come through, here never: whether the last
            # attempt comes before the first probe is a matter of milliseconds.
            in_time = behaviour in STALLING and ended == (OutcomeKind.EVICTED, Reason.DEADLINE_EXCEEDED)
            assert in_time or ended == (kind, reason)
            assert outcome.message
            assert len(led.of("r1")) == 1


async def test_cancelled_request_is_aborted_in_the_engine(led: Pool) -> None:
    engine = HeldEngine()
    async with running_agent(led, engine) as (agent, _):
        await led.append(request("r1"))
        await wait_until(lambda: engine.started == ["r1"], "the engine to have it")
        await led.cancel("r1")
        assert (await led.outcome("r1")).kind is OutcomeKind.CANCELLED
        await wait_until(lambda: engine.aborted == ["r1"], "the engine to be aborted")
        assert agent.state is not None
        assert not agent.state.held


async def test_deadline_in_the_engine_keeps_what_was_generated(led: Pool) -> None:
    engine = HeldEngine()
    async with running_agent(led, engine):
        await led.append(request("r1", deadline_ms=1500))
        outcome = await led.outcome("r1")
        assert outcome.reason is Reason.DEADLINE_EXCEEDED
        assert outcome.choices[0].text == "t0 t1 "
        assert engine.aborted == ["r1"]


async def test_drain_gives_back_what_does_not_finish(led: Pool) -> None:
    held, free = HeldEngine(), HeldEngine()
    free.go_on.set()
    async with running_agent(led, held) as (_, stop):
        await led.append(request("r1"))
        await wait_until(lambda: held.started == ["r1"], "the first engine to have it")
        stop.set()
        async with running_agent(led, free, node="n2"):
            outcome = await led.outcome("r1")
    assert outcome.node == "n2"
    assert held.aborted == ["r1"]
    begins = [chunk for chunk in await chunks_of(led, "r1") if chunk.kind is ChunkKind.BEGIN]
    assert [chunk.node for chunk in begins] == ["n1", "n2"]


async def test_running_request_survives_the_loss_of_all_redis_data(led: Pool) -> None:
    engine = HeldEngine()
    async with running_agent(led, engine):
        await led.append(request("r1"))
        await wait_until(lambda: engine.started == ["r1"], "the engine to have it")
        await led.redis.flushall()

        async def is_claimed_again() -> bool:
            return bool(await led.redis.zcard(led.names.claimed("n1")))

        await wait_until(is_claimed_again, "the running attempt to be adopted")
        engine.go_on.set()
        outcome = await led.outcome("r1")
    assert outcome.kind is OutcomeKind.COMPLETED
    assert engine.started == ["r1"], "it must not run twice"


async def test_outcome_is_kept_while_redis_is_away(led: Pool, valkey: ValkeyServer) -> None:
    engine = HeldEngine()
    async with running_agent(led, engine) as (agent, _):
        await led.append(request("r1"))
        await wait_until(lambda: engine.started == ["r1"], "the engine to have it")
        valkey.freeze()
        engine.go_on.set()

        def has_ended() -> bool:
            state = agent.state
            return state is not None and any(held.ending is not None for held in state.held.values())

        await wait_until(has_ended, "the attempt to end")
        valkey.thaw()
        assert (await led.outcome("r1")).kind is OutcomeKind.COMPLETED
    assert engine.started == ["r1"]


async def test_second_agent_of_a_node_waits_for_the_first(led: Pool) -> None:
    first, second = HeldEngine(), HeldEngine()
    first.go_on.set()
    second.go_on.set()
    async with running_agent(led, second, node="same") as (waiting, _):
        await wait_until(
            lambda: waiting.state is not None and bool(waiting.state.generation), "its registration"
        )
        async with running_agent(led, first, node="same") as (other, _):
            await led.append(request("r1"))
            await led.outcome("r1")
            assert other.state is not None
            assert not other.state.generation
    assert (first.started, second.started) == ([], ["r1"])


@pytest.mark.parametrize(
    ("partition", "offset"),
    [(0, 99), (0, 0), (77, 0)],
    ids=["beyond the end", "at the end", "no such partition"],
)
async def test_body_that_is_not_there_is_refused(led: Pool, partition: int, offset: int) -> None:
    reference = {
        "topic": led.names.bodies,
        "partition": partition,
        "offset": offset,
        "bytes": 10,
        "sha256": "0" * 64,
    }
    engine = HeldEngine()
    async with running_agent(led, engine):
        record = request("r1", body_ref=reference)
        del record["body"]
        await led.append(record)
        outcome = await led.outcome("r1")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.FAILED, Reason.BODY_UNREADABLE)
    assert engine.started == []


async def test_a_job_id_that_is_none_of_ours_ends_no_agent(led: Pool) -> None:
    engine = HeldEngine()
    engine.go_on.set()
    async with running_agent(led, engine) as (agent, _):
        queue = led.names.queue_key("n1")
        junk = f"{led.names.queue('n1')}--junk"
        await led.redis.hset(led.names.job(junk), "data", b"junk")
        await led.redis.rpush(queue, junk)
        await wait_until(lambda: agent.metrics.foreign._value.get() == 1, "it to be told")
        await led.append(request("r1"))
        assert (await led.outcome("r1")).kind is OutcomeKind.COMPLETED
