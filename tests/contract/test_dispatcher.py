"""A dispatcher on a real Kafka and a real Valkey: what comes in, what comes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka.admin import NewPartitions
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.request_log import RequestLog
from dispatcher.backends.topics import create_topics
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Attempt, Lane, Names
from dispatcher.protocol.outcome import FailureCause, OutcomeKind, Reason
from dispatcher.scheduling.breaker import FAILURES
from dispatcher.services import close, watch
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka


class UnclaimingNode(ScriptedNode):
    """A node that reports and claims nothing."""

    async def _work(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture
async def served(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> AsyncIterator[Pool]:
    """A pool with one dispatcher and one node that answers at once."""
    async with Pool(kafka_clients, valkey.url, pool) as one:
        node = ScriptedNode(one, "n1", max_model_len=1000)
        async with one.running(one.dispatcher()), one.running(node):
            yield one


async def test_request_becomes_one_outcome(served: Pool) -> None:
    await served.append(request("r1"))
    outcome = await served.outcome("r1")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.COMPLETED, Reason.FINISHED)
    await served.append(request("r2"), lane=Lane.BATCH)
    assert (await served.outcome("r2")).kind is OutcomeKind.COMPLETED
    assert len(served.outcomes) == 2


BAD_INPUT: list[tuple[str, Any, Reason, str]] = [
    ("wrong type", {"priority": "high"}, Reason.MALFORMED, "$.priority"),
    ("priority out of range", {"priority": 101}, Reason.MALFORMED, "<= 100"),
    ("missing body", {"body": None}, Reason.MALFORMED, "body"),
    ("body is a list", {"body": [1]}, Reason.MALFORMED, "$.body"),
    ("unknown endpoint", {"endpoint": "/admin"}, Reason.MALFORMED, "$.endpoint"),
    ("unknown model", {"model": "gpt-9"}, Reason.UNKNOWN_MODEL, "expected one of m"),
    ("unknown adapter", {"lora": "sql"}, Reason.UNKNOWN_MODEL, "an adapter of m (none), seen 'sql'"),
    ("prompt too long", {"tokens": {"count": 1001}}, Reason.PROMPT_TOO_LONG, "at most 1000 tokens"),
    ("negative deadline", {"deadline_ms": -1}, Reason.INVALID_DEADLINE, "seen -1"),
    ("deadline too long", {"deadline_ms": 10**9}, Reason.INVALID_DEADLINE, "seen 1000000000"),
    ("unknown reply topic", {"reply_to": {"topic": "nowhere"}}, Reason.REPLY_ROUTE_UNKNOWN, "nowhere"),
    ("unknown reply partition", {"reply_to": {"partition": 7}}, Reason.REPLY_ROUTE_UNKNOWN, "0 to 1"),
    ("later version", {"v": 99}, Reason.UNSUPPORTED_VERSION, "newer than 1"),
    (
        "foreign body topic",
        {
            "body": None,
            "body_ref": {"topic": "x", "partition": 0, "offset": 0, "bytes": 1, "sha256": "0" * 64},
        },
        Reason.BODY_UNREADABLE,
        "body_ref.topic",
    ),
]


@pytest.mark.parametrize(
    ("fields", "reason", "words"), [case[1:] for case in BAD_INPUT], ids=[c[0] for c in BAD_INPUT]
)
async def test_bad_input_is_rejected_in_words(served: Pool, fields: Any, reason: Reason, words: str) -> None:
    record = {name: value for name, value in request("bad", **fields).items() if value is not None}
    await served.append(record)
    await served.append(request("good"))
    outcome = await served.outcome("bad")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.REJECTED, reason)
    assert words in outcome.message
    assert (await served.outcome("good")).kind is OutcomeKind.COMPLETED


async def test_poison_is_dead_lettered_and_costs_nobody(served: Pool) -> None:
    deep = (
        b'{"id":"deep","model":"m","endpoint":"/v1/completions","body":'
        + b'{"a":' * 5000
        + b"1"
        + b"}" * 5000
        + b"}"
    )
    poison = [b"{", b"\xff\xfe", b"[]", b"null", b'{"id": 5}', b'{"no": "id"}', deep]
    for value in poison:
        await served.append(value)
    await served.append(b"{broken", key=b"named-by-key")
    await served.append(request("good"))
    assert (await served.outcome("good")).kind is OutcomeKind.COMPLETED
    assert (await served.outcome("named-by-key")).reason is Reason.MALFORMED
    await wait_until(lambda: len(served.dead) >= 7, "the poison in the dead letters")
    assert all(letter.message for letter in served.dead)
    assert {letter.record_base64 for letter in served.dead} >= {"ew==", "//4=", "W10="}


async def test_ten_megabyte_record_is_refused_by_size(served: Pool) -> None:
    await served.append(request("huge", body={"prompt": "x" * (10 << 20)}))
    outcome = await served.outcome("huge")
    assert outcome.reason is Reason.TOO_LARGE
    assert "expected at most 1048576 bytes" in outcome.message


async def test_repeated_record_is_coalesced(served: Pool) -> None:
    for _ in range(3):
        await served.append(request("twice"))
    await served.outcome("twice")
    await served.append(request("twice"))
    await served.append(request("after"))
    await served.outcome("after")
    assert len(served.of("twice")) == 1


async def test_repeats_of_finished_requests_leave_nothing_in_the_leaders_memory(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()) as dispatcher:
        async with one.running(ScriptedNode(one, "n1")):
            await one.append(request("ran"))
            await one.append(request("refused", model="nobody"))
            await one.outcome("ran")
            await one.outcome("refused")
            for id, fields in (("ran", {}), ("refused", {"model": "nobody"})):
                await one.append(request(id, **fields))
                await one.append(request(id, **fields, body={"prompt": "other", "max_tokens": 1}))
            await one.append(request("last"))
            await one.outcome("last")
            await wait_until(lambda: len(one.outcomes) == 5, "the answers to the reuses")
            state = dispatcher.state
            assert state is not None
            await wait_until(
                lambda: not state.identities and not state.doomed and not state.attempts, "an empty memory"
            )
            assert not any(state.is_unfinished(ref) for _, ref in state.deadlines)
            assert [len(one.of("ran")), len(one.of("refused"))] == [2, 2]


async def test_reused_id_is_rejected_and_tenants_are_apart(served: Pool) -> None:
    await served.append(request("same"))
    await served.outcome("same")
    await served.append(request("same", body={"prompt": "other", "max_tokens": 1}))
    await served.append(request("same", tenant="b"))
    assert (await served.outcome("same", "b")).kind is OutcomeKind.COMPLETED
    await wait_until(lambda: len(served.of("same")) == 2, "the answer to the reuse")
    assert served.of("same")[1].reason is Reason.ID_IN_USE


async def test_hostile_ids_reach_no_name(served: Pool) -> None:
    ids = ["../../etc", "a:b:c", "x\ny", "'; FLUSHALL; --", "{}*?[]", "é" * 100, " ", "--", "🦊"]
    for id in ids:
        await served.append(request(id))
    for id in ids:
        assert (await served.outcome(id)).kind is OutcomeKind.COMPLETED
    keys = {key.decode() for key in await served.redis.keys("*")}
    assert all(key.isascii() and "etc" not in key and "FLUSHALL" not in key for key in keys)


async def test_request_hashed_in_other_blocks_is_served_and_counted(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        dispatcher = one.dispatcher()
        counted = dispatcher.metrics.block_size_mismatches._value
        async with one.running(dispatcher), one.running(ScriptedNode(one, "n1")):
            for size in (256, 512):
                tokens = {"count": 600, "block_size": size, "block_hashes": ["724a45aab967ce62"]}
                await one.append(request(f"r{size}", tokens=tokens))
                assert (await one.outcome(f"r{size}")).kind is OutcomeKind.COMPLETED
            await one.append(request("text", body={"prompt": "x" * 9000, "max_tokens": 1}))
            assert (await one.outcome("text")).kind is OutcomeKind.COMPLETED
            assert counted.get() == 1


async def test_large_body_travels_by_reference(served: Pool) -> None:
    prompt = "y" * 200_000
    await served.append(request("large", body={"prompt": prompt, "max_tokens": 1}, tokens={"count": 900}))
    assert (await served.outcome("large")).kind is OutcomeKind.COMPLETED


async def test_a_prompt_that_is_long_by_estimate_only_is_left_to_the_engine(served: Pool) -> None:
    await served.append(request("long", body={"prompt": "y" * 200_000, "max_tokens": 1}))
    assert (await served.outcome("long")).kind is OutcomeKind.COMPLETED


async def test_waiting_request_is_cancelled_by_its_tenant_only(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()):
        await one.cancel("early", "t")
        await one.append(request("early", tenant="t"))
        await one.append(request("kept", tenant="t"))
        await one.append(request("dropped", tenant="t"))
        await one.cancel("kept", "somebody-else")
        await one.cancel("dropped", "t")
        assert (await one.outcome("early", "t")).kind is OutcomeKind.CANCELLED
        assert (await one.outcome("dropped", "t")).kind is OutcomeKind.CANCELLED
        async with one.running(ScriptedNode(one, "n1")):
            assert (await one.outcome("kept", "t")).kind is OutcomeKind.COMPLETED


async def test_deadline_ends_a_waiting_and_a_running_request(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()):
        await one.append(request("late", deadline_ms=1))
        assert (await one.outcome("late")).reason in {Reason.DEADLINE_PASSED, Reason.DEADLINE_EXCEEDED}
        await one.append(request("waits", deadline_ms=1000))
        assert (await one.outcome("waits")).reason is Reason.DEADLINE_EXCEEDED
        node = ScriptedNode(one, "n1")
        node.holds = True
        async with one.running(node):
            await one.append(request("runs", deadline_ms=1500))
            assert (await one.outcome("runs")).reason is Reason.DEADLINE_EXCEEDED
            assert await node.finish() == ["lost"]


async def test_a_request_whose_job_was_deleted_by_hand_is_ended_at_its_deadline(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(close, "LOST_S", 1.0)
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()):
        async with one.running(UnclaimingNode(one, "n1")):
            await one.append(request("deleted", deadline_ms=1000))
            queue = one.names.queue_key("n1")

            async def is_queued() -> bool:
                return bool(await one.redis.llen(queue))

            await wait_until(is_queued, "it to be queued")
            # What rq-dashboard's "Empty" and `rq empty` do.
            for job in await one.redis.lrange(queue, 0, -1):
                await one.redis.delete(one.names.job(job.decode()))
            await one.redis.delete(queue)
            assert (await one.outcome("deleted")).reason is Reason.DEADLINE_EXCEEDED

            async def is_settled() -> bool:
                return not await one.redis.xlen(one.names.closing)

            await wait_until(is_settled, "the ending to be settled")
            assert len(one.of("deleted")) == 1


async def test_urgent_request_behind_100_000_is_bound_next(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        ordinary = [json.dumps(request(f"o{number}", priority=50)).encode() for number in range(100_000)]
        await one.append_many([*ordinary, json.dumps(request("urgent", priority=90)).encode()])
        dispatcher = one.dispatcher()
        async with one.running(dispatcher):

            def has_read_all() -> bool:
                return dispatcher.state is not None and len(dispatcher.state.window) == 100_001

            await wait_until(has_read_all, "the window to hold everything", timeout_s=150)
            node = ScriptedNode(one, "n1", max_running=1)
            node.holds = True
            async with one.running(node):
                await wait_until(lambda: bool(node.works), "the first claim")
                assert node.works[0].id == "urgent"


async def test_window_is_bounded_and_reads_on(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, window_requests=1000) as one:
        await one.append_many([json.dumps(request(f"w{number}")).encode() for number in range(5000)])
        dispatcher = one.dispatcher()
        async with one.running(dispatcher):
            await wait_until(
                lambda: dispatcher.state is not None and len(dispatcher.state.window) >= 1000, "a full window"
            )
            assert dispatcher.state is not None
            assert len(dispatcher.state.window) <= 2000
            async with one.running(ScriptedNode(one, "n1", max_running=512)):
                await wait_until(lambda: len(one.outcomes) == 5000, "all answers", timeout_s=150)


@pytest.mark.parametrize(
    ("backlog", "late"), [(Lane.BATCH, Lane.INTERACTIVE), (Lane.INTERACTIVE, Lane.BATCH)]
)
async def test_a_backlog_of_one_lane_keeps_nobody_from_the_other(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, backlog: Lane, late: Lane
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, window_requests=1000) as one:
        records = [json.dumps(request(f"w{number}")).encode() for number in range(4000)]
        await one.append_many(records, lane=backlog)
        async with one.running(one.dispatcher()) as dispatcher:
            await wait_until(
                lambda: (
                    dispatcher.state is not None
                    and dispatcher.state.window.is_full(backlog, requests=1000, bytes=1 << 30)
                ),
                "a full window",
            )
            await one.append(request("late"), lane=late)
            await wait_until(
                lambda: dispatcher.state is not None and ("", "late") in dispatcher.state.identities,
                "the late request to be read",
            )


async def test_a_node_whose_engine_keeps_failing_is_on_probation_until_it_answers(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()) as dispatcher:
        node = ScriptedNode(one, "n1")
        node.holds = True
        async with one.running(node):
            await wait_until(lambda: "n1" in dispatcher.mirror.fleet.nodes, "the node")
            await one.append(request("r"))
            for _ in range(FAILURES):
                await wait_until(lambda: bool(node.claimed), "an attempt")
                ending = node.failed(node.claimed.pop(), FailureCause.ENGINE_ERROR)
                assert await node.store.complete(node.incarnation, [ending]) == ["ok"]
            await wait_until(lambda: dispatcher.health()["on_probation"] == ["n1"], "the probation")
            for n in range(3):
                await one.append(request(f"w{n}"))
            # One at a time is tried; its answer brings the others.
            await wait_until(lambda: bool(node.claimed), "the try")
            assert len(node.claimed) == 1
            assert await node.finish() == ["ok"]
            await wait_until(lambda: len(node.claimed) == 3, "the others")
            assert dispatcher.health()["on_probation"] == []
            await node.finish()
            for id in ("r", "w0", "w1", "w2"):
                assert (await one.outcome(id)).kind is OutcomeKind.COMPLETED


async def test_failing_attempts_go_elsewhere_then_to_the_dead_letters(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()) as dispatcher:
        nodes = [ScriptedNode(one, "n1"), ScriptedNode(one, "n2")]
        for node in nodes:
            node.holds = True
        async with one.running(nodes[0]), one.running(nodes[1]):
            fleet = dispatcher.mirror.fleet
            await wait_until(
                lambda: sum(node.is_eligible for node in fleet.nodes.values()) == 2,
                "both nodes to be admitted",
            )
            await one.append(request("fails"))
            used = []
            for _ in range(4):
                await wait_until(lambda: any(node.claimed for node in nodes), "an attempt")
                node = next(node for node in nodes if node.claimed)
                used.append(node.name)
                job = node.claimed.pop()
                ending = node.failed(job, FailureCause.ENGINE_ERROR)
                assert await node.store.complete(node.incarnation, [ending]) == ["ok"]
            outcome = await one.outcome("fails")
            assert outcome.reason is Reason.ATTEMPTS_EXHAUSTED
            assert used[0] != used[1]
            await wait_until(lambda: bool(one.dead), "a dead letter")
            (letter,) = one.dead
            assert letter.id == "fails"
            told = [(attempt.node, attempt.cause, attempt.message) for attempt in letter.attempts]
            assert told == [(name, FailureCause.ENGINE_ERROR, "no") for name in used]
            assert [Attempt.parse(attempt.attempt).n for attempt in letter.attempts] == [1, 2, 3, 4]


async def test_a_dead_letter_tells_also_of_a_node_that_was_lost(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with (
        Pool(kafka_clients, valkey.url, pool, heartbeat_ttl_s=1.0) as one,
        one.running(one.dispatcher()),
    ):
        lost = ScriptedNode(one, "n1")
        lost.holds = True
        async with one.running(lost):
            await one.append(request("refused"))
            await wait_until(lambda: bool(lost.claimed), "the claim")
        other = ScriptedNode(one, "n2")
        other.holds = True
        async with one.running(other):
            await wait_until(lambda: bool(other.claimed), "the second attempt")
            ending = other.failed(other.claimed.pop(), FailureCause.REFUSED, message="y" * 3000)
            assert await other.store.complete(other.incarnation, [ending]) == ["ok"]
            await wait_until(lambda: bool(one.dead), "a dead letter")
        told = [(attempt.node, attempt.cause, len(attempt.message)) for attempt in one.dead[0].attempts]
        assert told == [("n1", FailureCause.NODE_LOST, 0), ("n2", FailureCause.REFUSED, 500)]


async def test_silent_node_is_fenced_and_its_work_moves(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with (
        Pool(kafka_clients, valkey.url, pool, heartbeat_ttl_s=1.0) as one,
        one.running(one.dispatcher()),
    ):
        silent = ScriptedNode(one, "n1")
        silent.holds = True
        async with one.running(silent):
            await one.append(request("moves"))
            await wait_until(lambda: bool(silent.claimed), "the claim")
        async with one.running(ScriptedNode(one, "n2")):
            outcome = await one.outcome("moves")
            assert outcome.node == "n2"
            assert len(one.of("moves")) == 1


async def test_a_node_that_is_gone_for_good_is_forgotten(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "FORGET_S", 0.2)
    async with (
        Pool(kafka_clients, valkey.url, pool, heartbeat_ttl_s=1.0) as one,
        one.running(one.dispatcher()) as dispatcher,
        one.running(ScriptedNode(one, "stays")),
    ):
        fleet = dispatcher.mirror.fleet
        async with one.running(ScriptedNode(one, "goes")):
            await wait_until(lambda: set(fleet.nodes) == {"stays", "goes"}, "both nodes")
        await wait_until(lambda: not fleet.nodes["goes"].available, "it to be fenced")
        assert set(await one.redis.smembers(one.names.nodes)) == {b"stays", b"goes"}
        await one.redis.delete(one.names.node("goes"))  # as it expires after an hour
        await wait_until(lambda: set(fleet.nodes) == {"stays"}, "it to be forgotten")
        assert await one.redis.smembers(one.names.nodes) == {b"stays"}
        assert not await one.redis.exists(f"rq:workers:{one.names.queue('goes')}")
        await one.append(request("r1"))
        assert (await one.outcome("r1")).node == "stays"


async def test_all_redis_data_lost_runs_only_the_rest_again(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()):
        async with one.running(ScriptedNode(one, "n1")):
            for number in range(20):
                await one.append(request(f"before{number}"))
            for number in range(20):
                await one.outcome(f"before{number}")
        for number in range(5):
            await one.append(request(f"during{number}"))
        await one.redis.flushall()
        async with one.running(ScriptedNode(one, "n2")):
            for number in range(5):
                await one.outcome(f"during{number}")
            await one.append(request("before3"))
            await one.append(request("last"))
            await one.outcome("last")
        assert all(len(one.of(f"before{number}")) == 1 for number in range(20))


async def configure(pool: Pool, topic: str, config: dict[str, str]) -> None:
    """Change a topic's configuration, as an operator may have made it."""
    admin = pool.clients.admin()
    await admin.start()
    try:
        everything = {"message.timestamp.type": "LogAppendTime", "min.insync.replicas": "1", **config}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, everything)])
    finally:
        await admin.close()


async def test_an_answer_too_large_for_the_topic_loses_its_text_only(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        await configure(one, one.names.outcomes, {"max.message.bytes": "1048588"})
        node = ScriptedNode(one, "n1")
        node.answer = "x" * (2 << 20)
        async with one.running(one.dispatcher()), one.running(node):
            await one.append(request("large"))
            outcome = await one.outcome("large")
            assert outcome.kind is OutcomeKind.COMPLETED
            assert not outcome.choices
            assert "on the reply topic only" in outcome.message
            node.answer = "small"
            await one.append(request("small"))
            assert (await one.outcome("small")).choices[0].text == "small"


async def test_short_retention_is_told_and_hurries_batch(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        batch = one.names.requests(Lane.BATCH)
        await configure(one, batch, {"retention.ms": "60000"})
        async with one.running(one.dispatcher()) as dispatcher, one.running(ScriptedNode(one, "n1")):
            await one.append(request("r1"))
            await one.outcome("r1")
            told = dispatcher.metrics.retention_short
            await wait_until(lambda: told.labels(batch)._value.get() == 1, "the alarm")
            assert told.labels(one.names.requests(Lane.INTERACTIVE))._value.get() == 0
            assert dispatcher.state is not None
            assert dispatcher.state.window._max_batch_wait_ms == 30_000


async def test_new_partitions_are_noticed(kafka_clients: KafkaClients, pool: str) -> None:
    names = Names(pool)
    await create_topics(kafka_clients, names, partitions=1, replication_factor=1)
    log = RequestLog(kafka_clients, names)
    await log.start()
    try:
        assert not await log.has_grown()
        admin = kafka_clients.admin()
        await admin.start()
        await admin.create_partitions({names.requests(Lane.BATCH): NewPartitions(2)})
        await admin.close()
        await wait_until(log.has_grown, "the new partition to be noticed")
    finally:
        await log.stop()


async def test_requests_for_a_node_wait_for_each_other_and_come_together(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, batch_wait_ms=1000, batch_size=3) as one:
        node = ScriptedNode(one, "n1")
        async with one.running(one.dispatcher()) as dispatcher, one.running(node):
            batches = dispatcher.metrics.node_batch

            def handed_over() -> tuple[float, float]:
                return batches._sum.get(), sum(bucket.get() for bucket in batches._buckets)

            for number in range(3):
                await one.append(request(f"full{number}"))
            for number in range(3):
                assert (await one.outcome(f"full{number}")).kind is OutcomeKind.COMPLETED
            assert handed_over() == (3, 1), "three at once"
            for number in range(2):
                await one.append(request(f"late{number}"))
            for number in range(2):
                assert (await one.outcome(f"late{number}")).kind is OutcomeKind.COMPLETED
            assert handed_over() == (5, 2), "two when the first had waited"


async def test_what_waits_for_its_batch_outlives_its_leader_and_so_does_its_cancel(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, batch_size=100) as one:
        node = ScriptedNode(one, "n1")
        told = one.settings
        async with one.running(node):
            one.settings = told.model_copy(update={"batch_wait_ms": 600_000})
            async with one.running(one.dispatcher()) as first:
                for name in ("kept", "dropped"):
                    await one.append(request(name))
                await wait_until(
                    lambda: first.state is not None and len(first.state.bound) == 2, "both to be bound"
                )
                await one.cancel("dropped")
                await wait_until(
                    lambda: first.state is not None and bool(first.state.doomed), "the cancel to be read"
                )
                assert not node.works, "neither is handed over"
                assert not one.outcomes
            one.settings = told
            # Whether the cancel or the node comes first is chance: nothing is answered before the cancel.
            node.holds = True
            async with one.running(one.dispatcher()):
                assert (await one.outcome("dropped")).kind is OutcomeKind.CANCELLED
                await wait_until(
                    lambda: any(work.id == "kept" for work in node.works), "the other to be claimed"
                )
                await node.finish()
                assert (await one.outcome("kept")).kind is OutcomeKind.COMPLETED
        assert len(one.outcomes) == 2


async def test_a_batch_whose_node_went_away_goes_to_another(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, batch_wait_ms=1000, batch_size=2) as one:
        async with one.running(one.dispatcher()) as dispatcher:
            async with one.running(ScriptedNode(one, "n1")):
                await one.append(request("first"))
                await wait_until(
                    lambda: dispatcher.state is not None and bool(dispatcher.state.bound), "it to be bound"
                )
            # Its silence fences it while the request waits, or is queued there.
            async with one.running(ScriptedNode(one, "n2")):
                await one.append(request("second"))
                for name in ("first", "second"):
                    assert (await one.outcome(name)).kind is OutcomeKind.COMPLETED
        assert len(one.outcomes) == 2
