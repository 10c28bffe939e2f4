"""Foreign bytes wherever a process reads, each stream and each topic: they run no code and stop nobody."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import msgspec
import pytest

from dispatcher.audit import audit
from dispatcher.backends.connect import KafkaClients
from dispatcher.client.client import Client
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.assignment import Work, encode_job_data
from dispatcher.protocol.names import Attempt, JobId, Lane, Ref
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.protocol.request import BodyRef, Endpoint, ReplyTo
from tests.contract.test_agent import HeldEngine, running_agent
from tests.contract.test_hostile_queue import Bomb
from tests.support.pool import MODEL, Pool, ScriptedNode, request
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka


def nasty(proof: Path) -> list[bytes]:
    """Values that a careless reader runs, or breaks on."""
    bomb = pickle.dumps(Bomb(proof))
    return [
        bomb,
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"v":99}',
        b'{"id":null,"ref":7,"kind":[]}',
        b'{"id":"' + b"x" * 5000 + b'"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1e999",
        b'{"id":"\\ud800"}',
        random.Random(1).randbytes(3000),
        b"!!python/object/apply:os.system ['touch x']",
    ]


async def test_foreign_entries_in_every_stream_stop_nobody(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    engine = HeldEngine()
    engine.go_on.set()
    async with (
        Pool(kafka_clients, valkey.url, pool, leader_ttl_s=10) as one,
        one.running(one.dispatcher()) as dispatcher,
        running_agent(one, engine) as (agent, _),
    ):
        names, redis = one.names, one.redis
        await one.append(request("before"))
        await one.outcome("before")
        foreign = JobId(pool, "n1", Ref(Lane.BATCH, 7, 7), Attempt(1, 1))
        for value in nasty(proof):
            fields = (
                {"body": value},
                {"kind": value, "ref": value, "id": value, "job": value, "payload": value},
                {
                    "kind": "outcome",
                    "ref": "i0_999999",
                    "id": "nobody",
                    "job": str(foreign),
                    "payload": value,
                },
                {
                    "kind": "failed",
                    "ref": str(foreign.ref),
                    "id": "nobody",
                    "job": str(foreign),
                    "payload": value,
                },
                {"kind": "outcome", "ref": str(foreign.ref), "id": "nobody", "job": "", "payload": value},
                {"node": value, "report": value, "incarnation": value, "sequence": value},
                {value: value},
            )
            for stream in (names.closing, names.reports, names.blocks, names.control("n1")):
                for entry in fields:
                    await redis.xadd(stream, entry)
        for number in range(20):
            await one.append(request(f"after-{number}"))
        for number in range(20):
            assert (await one.outcome(f"after-{number}")).kind is OutcomeKind.COMPLETED
        assert dispatcher.metrics.foreign._value.get() > 0
        assert agent.health()["ok"]
        assert dispatcher.metrics.elections._value.get() == 1, "the leader went on"
        assert [outcome.id for outcome in one.outcomes if outcome.id == "nobody"] == []
    assert not proof.exists()


async def test_foreign_bytes_in_every_topic_stop_nobody(
    kafka: KafkaAddress, kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    engine = HeldEngine()
    engine.go_on.set()
    async with (
        Pool(kafka_clients, valkey.url, pool, leader_ttl_s=10) as one,
        one.running(one.dispatcher()) as dispatcher,
        running_agent(one, engine) as (agent, _),
        Client(kafka.bootstrap, pool) as client,
    ):
        names = one.names
        own = {names.outcomes, names.dead}  # what only the leader writes is the pool's own reader's here
        for topic in names.topics:
            if topic in own:
                continue
            for value in nasty(proof):
                for key in (None, b"", value[:200], b"before"):
                    await one._producer.send(topic, value, key=key, headers=[("traceparent", value[:300])])
        await one._producer.flush()
        id = await client.submit(MODEL, Endpoint.COMPLETIONS, {"prompt": "x", "max_tokens": 1}, id="after")
        assert (await client.outcome(id)).kind is OutcomeKind.COMPLETED
        assert dispatcher.metrics.elections._value.get() == 1, "the leader went on"
        assert agent.health()["ok"]
        await wait_until(lambda: len(one.dead) >= len(nasty(proof)), "dead letters of what had no id")
    found = await audit(kafka.bootstrap, pool, settle_s=20)
    assert found.lost == []
    assert found.duplicated == []
    assert not proof.exists()


@pytest.mark.parametrize(
    "stray",
    [
        {"reply_to": ReplyTo(topic="elsewhere")},
        {"reply_to": ReplyTo(topic="outcomes")},
        {"body_ref": BodyRef(topic="secrets", partition=0, offset=0, bytes=1, sha256="0" * 64)},
    ],
    ids=["reply topic", "pool's own other topic", "body topic"],
)
async def test_a_planted_job_makes_no_agent_write_or_read_elsewhere(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, stray: dict[str, object]
) -> None:
    engine = HeldEngine()
    engine.go_on.set()
    async with (
        Pool(kafka_clients, valkey.url, pool, leader_ttl_s=10) as one,
        one.running(one.dispatcher()),
        running_agent(one, engine) as (agent, _),
    ):
        names = one.names
        job = JobId(pool, "n1", Ref(Lane.BATCH, 0, 0), Attempt(1, 1))
        plain = Work(ref=str(job.ref), id="planted", model=MODEL, endpoint=Endpoint.COMPLETIONS)
        work = msgspec.structs.replace(plain, **{"body": msgspec.Raw(b'{"prompt":"x"}'), **stray})
        await one.redis.hset(
            names.job(str(job)),
            mapping={
                "data": encode_job_data(work),
                "envelope": b'{"ref":"b0_0","id":"planted","model":"m"}',
                "seq": "1",
                "failures": "0",
                "status": "queued",
            },
        )
        await one.redis.rpush(names.queue_key("n1"), str(job))
        await wait_until(lambda: agent.metrics.claimed._value.get() == 1, "the planted job being claimed")
        await one.append(request("served"))
        assert (await one.outcome("served")).kind is OutcomeKind.COMPLETED
        assert engine.started == ["served"]
        assert not await topics_of(one) & {"elsewhere", "outcomes", "secrets"}


async def topics_of(pool: Pool) -> set[str]:
    admin = pool.clients.admin()
    await admin.start()
    try:
        return set(await admin.list_topics())
    finally:
        await admin.close()


def test_an_endpoint_is_one_of_a_list_and_never_an_address() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(
            b'{"ref":"i0_0","id":"x","model":"m","endpoint":"http://169.254.169.254/latest"}', type=Work
        )
    assert all(path.startswith("/v1/") and os.path.normpath(path) == path for path in Endpoint)


async def test_a_new_leader_reads_on_past_what_a_hostile_agent_left(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, tmp_path: Path
) -> None:
    """Its own queue, its own jobs and the shared streams are what an agent's user may write."""
    proof = tmp_path / "proof"
    async with Pool(kafka_clients, valkey.url, pool, leader_ttl_s=10) as one:
        names, redis = one.names, one.redis
        async with one.running(one.dispatcher()), one.running(ScriptedNode(one, "n1")):
            await one.append(request("before"))
            await one.outcome("before")
        for number, value in enumerate(nasty(proof)):
            own = str(JobId(pool, "n1", Ref(Lane.INTERACTIVE, 0, 1000 + number), Attempt(1, 1)))
            far = str(JobId(pool, "n1", Ref(Lane.INTERACTIVE, 77, number), Attempt(1, 1)))
            strange = f"{names.queue('n1')}--{number}"
            for job in (own, far, strange):
                fields = {"ref": value, "envelope": value, "data": value, "failures": value, "seq": value}
                await redis.hset(names.job(job), mapping=fields)
                await redis.rpush(names.queue_key("n1"), job)
            await redis.zadd(names.claimed("n1"), {own: 1, value: 1})
            await redis.rpush(names.intermediate("n1"), value)
            for stream in (names.closing, names.reports, names.blocks):
                await redis.xadd(
                    stream, {"kind": value, "ref": value, "job": value, "payload": value, "body": value}
                )
                await redis.xadd(stream, {value: value})
        async with one.running(one.dispatcher()) as dispatcher, one.running(ScriptedNode(one, "n2")):
            for number in range(5):
                await one.append(request(f"after-{number}"))
            for number in range(5):
                assert (await one.outcome(f"after-{number}")).kind is OutcomeKind.COMPLETED
            await wait_until(
                lambda: dispatcher.metrics.fenced._value.get() == 1, "the silent node being fenced"
            )
            await one.append(request("last"))
            assert (await one.outcome("last")).kind is OutcomeKind.COMPLETED
            assert dispatcher.metrics.elections._value.get() == 1, "the leader went on"
    assert not proof.exists()
