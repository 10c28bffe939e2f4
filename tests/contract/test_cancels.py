"""Cancels, deadlines and leases on a real Kafka and a real Valkey: wherever a request is, it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from dispatcher.app import Dispatcher
from dispatcher.backends.connect import KafkaClients, connect_kafka
from dispatcher.client import Client
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.outcome import FailureCause, Outcome, OutcomeKind, Reason
from dispatcher.scheduling import retry
from dispatcher.services import cancels
from dispatcher.simulation.profiles import PROFILES
from tests.contract.test_agent import HeldEngine, running_agent
from tests.contract.test_openai_engine import engine_at, simulator
from tests.support.pool import MODEL, Pool, ScriptedNode, request
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka

CANCELLED = (OutcomeKind.CANCELLED, Reason.CLIENT_CANCELLED)
GONE = (OutcomeKind.CANCELLED, Reason.CLIENT_GONE)
ABORT_S = 0.2
SILENT_S = 5.0
"""How long a broker stands still: longer than a lease. The scenario itself, not a wait."""


class UnclaimingNode(ScriptedNode):
    """A node that reports and claims nothing."""

    async def _work(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture
async def one(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> AsyncIterator[Pool]:
    """A pool where nothing runs yet."""
    async with Pool(kafka_clients, valkey.url, pool) as it:
        yield it


def ended(outcome: Outcome) -> tuple[OutcomeKind, Reason]:
    """How a request ended."""
    return outcome.kind, outcome.reason


async def holds(node: ScriptedNode, *ids: str) -> None:
    """Wait until a node has claimed these."""
    await wait_until(
        lambda: {work.id for work in node.works} >= set(ids), f"the node to claim {', '.join(ids)}"
    )


@contextlib.asynccontextmanager
async def holding(one: Pool) -> AsyncIterator[ScriptedNode]:
    """A node that keeps what it claims."""
    node = ScriptedNode(one, "n1")
    node.holds = True
    async with one.running(node):
        yield node


# Where a request may be


async def test_in_a_nodes_queue(one: Pool) -> None:
    async with one.running(one.dispatcher()), one.running(UnclaimingNode(one, "n1")):
        await one.append(request("r1"))

        async def is_queued() -> bool:
            return bool(await one.redis.llen(one.names.queue_key("n1")))

        await wait_until(is_queued, "it to be queued")
        await one.cancel("r1", "somebody-else")
        await one.append(request("r2"))
        await one.cancel("r2")
        assert ended(await one.outcome("r2")) == CANCELLED
        assert not one.of("r1")
        assert not one.of("r1", "somebody-else")
        await one.cancel("r1")
        assert ended(await one.outcome("r1")) == CANCELLED
        assert not await is_queued()


async def test_claimed(one: Pool) -> None:
    async with one.running(one.dispatcher()), holding(one) as node:
        await one.append(request("r1"))
        await holds(node, "r1")
        await one.cancel("r1")
        assert ended(await one.outcome("r1")) == CANCELLED
        assert await node.finish() == ["lost"]


async def test_between_a_failed_attempt_and_its_retry(one: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE_DELAY_S", 3600.0)
    monkeypatch.setattr(retry, "MAX_DELAY_S", 3600.0)
    async with one.running(one.dispatcher()), holding(one) as node:
        await one.append(request("r1"))
        await holds(node, "r1")
        failed = [node.failed(job, FailureCause.ENGINE_ERROR) for job in node.claimed]
        node.claimed = []
        await node.store.complete(node.incarnation, failed)

        async def is_delayed() -> bool:
            return bool(await one.redis.zcard(one.names.pending))

        await wait_until(is_delayed, "it to wait for its retry")
        await one.cancel("r1")
        assert ended(await one.outcome("r1")) == CANCELLED
        assert not await is_delayed()


async def test_not_read_yet_because_intake_is_paused(one: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancels, "HOLD_S", 0.05)
    one.settings = one.settings.model_copy(update={"window_requests": 100})
    # The last record of a backlog that does not fit into the window.
    await one.append_many([json.dumps(request(f"w{number}")).encode() for number in range(2000)])
    dispatcher = one.dispatcher()
    async with one.running(dispatcher):
        await one.cancel("w1999")
        await wait_until(lambda: bool(early(dispatcher)), "the cancel to be read")
        state = dispatcher.state
        assert state is not None
        since_s = state.clock.monotonic()
        await wait_until(lambda: state.clock.monotonic() - since_s > 3.0, "it to be old")
        assert early(dispatcher), "it is kept as long as intake has not passed it"
        node = ScriptedNode(one, "n1", max_running=512)
        async with one.running(node):
            await wait_until(lambda: len(one.outcomes) == 2000, "all answers", timeout_s=60)
        assert ended(await one.outcome("w1999")) == CANCELLED
        assert "w1999" not in {work.id for work in node.works}


def early(dispatcher: Dispatcher) -> list[Any]:
    """The cancels that wait for their requests."""
    return list(dispatcher.state.early_cancels) if dispatcher.state is not None else []


async def test_a_cancel_for_nothing_is_dropped_once_intake_has_passed_it(
    one: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancels, "HOLD_S", 0.05)
    dispatcher = one.dispatcher()
    async with one.running(dispatcher):
        await one.cancel("nobody")
        await wait_until(lambda: bool(early(dispatcher)), "the cancel to be read")
        await wait_until(lambda: not early(dispatcher), "the cancel to be dropped")


async def test_a_cancel_does_not_mean_a_request_long_after_it(
    one: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancels, "HOLD_S", -60.0)  # whatever is appended now is long after it
    dispatcher = one.dispatcher()
    async with one.running(dispatcher), one.running(ScriptedNode(one, "n1")):
        await one.cancel("r1")
        await wait_until(lambda: bool(early(dispatcher)), "the cancel to be read")
        await one.append(request("r1"))
        assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED


async def test_while_nobody_leads(one: Pool) -> None:
    async with holding(one) as node:
        async with one.running(one.dispatcher()):
            await one.append(request("claimed"))
            await holds(node, "claimed")
        await one.append(request("unread"))
        for id in ("claimed", "unread"):
            await one.cancel(id)
        async with one.running(one.dispatcher()):
            assert ended(await one.outcome("claimed")) == CANCELLED
            assert ended(await one.outcome("unread")) == CANCELLED


async def test_while_redis_is_away(one: Pool, valkey: ValkeyServer) -> None:
    dispatcher = one.dispatcher()
    async with one.running(dispatcher), holding(one) as node:
        await one.append(request("r1"))
        await holds(node, "r1")
        valkey.freeze()
        await one.cancel("r1")
        await one.append(request("r2"))
        await one.cancel("r2")
        await wait_until(
            lambda: dispatcher.state is None or bool(dispatcher.state.doomed), "the cancel to be decided"
        )
        assert not one.outcomes
        valkey.thaw()
        assert ended(await one.outcome("r1")) == CANCELLED
        assert ended(await one.outcome("r2")) == CANCELLED


async def test_in_the_engine_whose_slot_and_cache_are_free_at_once(one: Pool) -> None:
    slow = replace(PROFILES["test"], decode_sequence_s=3_599.0)
    body = {"prompt": [*range(600)], "max_tokens": 100}
    async with (
        simulator(profile=slow, time_scale=1.0, model=MODEL) as (side, url),
        engine_at(url) as engine,
        one.running(one.dispatcher()),
        running_agent(one, engine) as (agent, _),
    ):
        await one.append(request("r1", body=body))
        await wait_until(lambda: side.engine.kv_used_blocks > 0, "the engine to compute it")
        assert agent.state is not None
        control = agent.state.drop
        learned: list[float] = []

        def drop(job: str) -> None:
            learned.append(time.monotonic())
            control(job)

        agent.state.drop = drop  # type: ignore[method-assign]
        await one.cancel("r1")
        await wait_until(lambda: side.engine.running == 0, "the slot to be free")
        took_s = time.monotonic() - learned[0]
        assert ended(await one.outcome("r1")) == CANCELLED
        assert side.engine.kv_used_blocks == 0
        assert took_s < ABORT_S


@pytest.mark.parametrize("ends_by", ["cancel", "deadline"])
async def test_claimed_while_its_body_is_being_fetched(
    one: Pool, ends_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = HeldEngine(), asyncio.Event()

    async def fetch(_: object, __: object) -> bytes:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("dispatcher.backends.body_log.BodyLog.fetch", fetch)
    body = {"prompt": "x" * 20_000, "max_tokens": 1}
    async with one.running(one.dispatcher()), running_agent(one, engine) as (agent, _):
        await one.append(request("r1", body=body, deadline_ms=2000 if ends_by == "deadline" else None))
        await wait_until(asked.is_set, "the agent to ask for the body")
        if ends_by == "cancel":
            await one.cancel("r1")
            assert ended(await one.outcome("r1")) == CANCELLED
        else:
            assert (await one.outcome("r1")).reason is Reason.DEADLINE_EXCEEDED
        assert agent.state is not None
        state = agent.state
        await wait_until(lambda: not state.held, "the agent to hold nothing")
        assert engine.started == []


# Deadlines


async def test_a_deadline_in_a_nodes_queue_and_between_attempts(
    one: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "BASE_DELAY_S", 3600.0)
    monkeypatch.setattr(retry, "MAX_DELAY_S", 3600.0)
    async with one.running(one.dispatcher()):
        async with one.running(UnclaimingNode(one, "n1")):
            await one.append(request("queued", deadline_ms=1000))
            assert (await one.outcome("queued")).reason is Reason.DEADLINE_EXCEEDED
            assert not await one.redis.llen(one.names.queue_key("n1"))
        node = ScriptedNode(one, "n2")
        node.holds = True
        async with one.running(node):
            await one.append(request("fails", deadline_ms=4000))
            await holds(node, "fails")
            failed = [node.failed(job, FailureCause.ENGINE_ERROR) for job in node.claimed]
            node.claimed = []
            await node.store.complete(node.incarnation, failed)
            assert (await one.outcome("fails")).reason is Reason.DEADLINE_EXCEEDED
            assert [work.id for work in node.works] == ["fails"]


async def test_an_agent_starts_nothing_whose_deadline_has_passed(one: Pool) -> None:
    engine = HeldEngine()
    engine.go_on.set()
    async with running_agent(one, engine) as (agent, _):
        await wait_until(lambda: agent.state is not None, "the agent to be there")
        assert agent.state is not None
        # Redis's clock, as it hears it, is ahead: the leader still takes the request for one in time.
        ahead: Any = _Ahead(agent.state.server_clock)
        agent.state.server_clock = agent._server_clock = ahead
        async with one.running(one.dispatcher()):
            await one.append(request("r1", deadline_ms=60_000))
            assert (await one.outcome("r1")).reason is Reason.DEADLINE_EXCEEDED
        assert engine.started == []


class _Ahead:
    def __init__(self, clock: Any) -> None:
        self._clock = clock

    def now_ms(self) -> int:
        return int(self._clock.now_ms()) + 3_600_000

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)


# Leases


async def test_requests_of_a_client_that_fell_silent_are_cancelled_and_nobody_elses(one: Pool) -> None:
    async with one.running(one.dispatcher()), holding(one) as node:
        living = Client(one.clients, one.names.pool, lease_ttl_s=3.0)
        async with living:
            kept = await living.submit(MODEL, "/v1/completions", {"prompt": "kept"})
            await one.live("silent", ttl_ms=3000)
            await one.append(request("waits", lease="silent"))
            await one.append(request("detached", lease="silent", detached=True))
            await one.append(request("plain"))
            await holds(node, kept, "waits", "detached", "plain")
            assert ended(await one.outcome("waits")) == GONE
            await one.append(request("late", lease="silent"))
            await one.live("silent", ttl_ms=0)
            assert ended(await one.outcome("late")) == GONE
            assert {outcome.id for outcome in one.outcomes} == {"waits", "late"}
        assert ended(await one.outcome(kept)) == GONE, "it said goodbye with its request unanswered"
        await node.finish()
        assert (await one.outcome("detached")).kind is OutcomeKind.COMPLETED
        assert (await one.outcome("plain")).kind is OutcomeKind.COMPLETED


async def test_a_new_leader_knows_the_leases_of_requests_that_it_finds(one: Pool) -> None:
    async with holding(one) as node:
        async with one.running(one.dispatcher()):
            await one.live("silent", ttl_ms=3000)
            await one.append(request("claimed", lease="silent"))
            await holds(node, "claimed")
        async with one.running(one.dispatcher()):
            assert ended(await one.outcome("claimed")) == GONE


async def test_a_repeat_by_another_client_keeps_a_request(one: Pool) -> None:
    dispatcher = one.dispatcher()
    async with one.running(dispatcher), holding(one) as node:
        for lease in ("first", "second"):
            await one.live(lease, ttl_ms=60_000)
            await one.append(request("r1", lease=lease))
        await holds(node, "r1")
        await one.append(request("mark"))
        await holds(node, "mark")  # by then the repeat is read too, or soon

        def holders() -> int:
            assert dispatcher.state is not None
            return max(map(len, dispatcher.state.leases._keys_of.values()), default=0)

        await wait_until(lambda: holders() == 2, "the repeat to be read")
        await one.live("first", ttl_ms=0)
        await one.append(request("other", lease="first"))
        assert ended(await one.outcome("other")) == GONE
        assert not one.of("r1")
        await one.live("second", ttl_ms=0)
        assert ended(await one.outcome("r1")) == GONE


async def test_a_broker_that_is_away_costs_no_living_client_anything(
    own_kafka: ApacheKafka, valkey: ValkeyServer, pool: str
) -> None:
    clients = connect_kafka(own_kafka.bootstrap)
    async with Pool(clients, valkey.url, pool) as one, one.running(one.dispatcher()), holding(one) as node:
        async with Client(clients, one.names.pool, lease_ttl_s=3.0) as living:
            kept = await living.submit(MODEL, "/v1/completions", {"prompt": "kept"})
            await holds(node, kept)
            own_kafka.freeze()
            await asyncio.sleep(SILENT_S)
            own_kafka.thaw()
            await one.live("silent", ttl_ms=3000)
            await one.append(request("waits", lease="silent"))
            assert ended(await one.outcome("waits")) == GONE, "leases run again"
            assert not one.of(kept)
            await node.finish()
            assert (await living.outcome(kept)).kind is OutcomeKind.COMPLETED
