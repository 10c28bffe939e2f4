"""Entries of `closing` whose request is answered already: they are dropped, and nothing is decided again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.node_store import Claimed
from dispatcher.backends.outcome_log import OutcomeLog
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Lane
from dispatcher.protocol.outcome import FailureCause, OutcomeKind, Reason
from dispatcher.services import close, publish
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka


async def closing_refs(one: Pool) -> list[str]:
    """The refs that wait in `closing`."""
    return [fields[b"ref"].decode() for _, fields in await one.redis.xrange(one.names.closing)]


async def claimed_by(node: ScriptedNode, count: int) -> list[Claimed]:
    """Wait until a node that holds its work has claimed so much."""
    await wait_until(lambda: len(node.claimed) == count, f"{count} claimed")
    jobs, node.claimed = node.claimed, []
    return jobs


async def bring_back(one: Pool, entry: dict[str, Any], job: dict[bytes, bytes]) -> None:
    """Write an ending and its job as they were before the leader dropped them."""
    await one.redis.hset(one.names.job(entry["job"]), mapping=job)
    await one.redis.xadd(one.names.closing, entry)


async def test_a_failure_of_an_answered_request_is_not_decided_again(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(one.dispatcher()), one.running(ScriptedNode(one, "n1")) as node:
            node.holds = True
            await one.append(request("r1"))
            (job,) = await claimed_by(node, 1)
            stored = await one.redis.hgetall(one.names.job(job.job))
            (refused,) = [node.failed(job, FailureCause.REFUSED)]
            await node.store.complete(node.incarnation, [refused])
            assert (await one.outcome("r1")).reason is Reason.ENGINE_REFUSED
            again = node.failed(job, FailureCause.ENGINE_ERROR)
            entry = {
                "kind": again.kind,
                "ref": again.ref,
                "id": "r1",
                "job": job.job,
                "payload": again.payload,
            }
            await bring_back(one, entry, stored)

            async def is_dropped() -> bool:
                return not await closing_refs(one) and not await one.redis.exists(one.names.job(job.job))

            await wait_until(is_dropped, "the entry and its job to be dropped")
            assert not await one.redis.zcard(one.names.pending)
            await one.append(request("r2"))
            assert [work.id for work in node.works if work.id == "r1"] == ["r1"]


async def test_a_new_leader_drops_what_is_published_before_it_notes_newer_outcomes(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(ScriptedNode(one, "n1")) as node:
            node.holds = True
            async with one.running(one.dispatcher()):
                await one.append_many(
                    [
                        b'{"id":"r%d","model":"m","endpoint":"/v1/completions","body":'
                        b'{"prompt":"x"}}' % number
                        for number in range(3)
                    ]
                )
                first, second, third = await claimed_by(node, 3)
                stored = await one.redis.hgetall(one.names.job(second.job))
                settled = await one.redis.hgetall(one.names.settled)
                ending = node.failed(second, FailureCause.REFUSED)
                await node.store.complete(node.incarnation, [ending])
                assert (await one.outcome("r1")).kind is OutcomeKind.FAILED

                await wait_until(lambda: is_settled(one), "it to be settled")
            # As if the leader had died before it could drop the entry.
            entry = {
                "kind": "failed",
                "ref": ending.ref,
                "id": "r1",
                "job": second.job,
                "payload": ending.payload,
            }
            await one.redis.delete(one.names.settled)
            if settled:
                await one.redis.hset(one.names.settled, mapping=settled)
            unreadable = {
                "kind": "outcome",
                "ref": ending.ref.replace("_1", "_0"),
                "payload": b"none of ours",
            }
            await one.redis.xadd(one.names.closing, unreadable)
            await bring_back(one, entry, stored)
            monkeypatch.setattr(publish, "READ_COUNT", 1)
            monkeypatch.setattr(publish, "READ_BLOCK_MS", 3_600_000)
            one_leader = one.dispatcher()
            async with one.running(one_leader):
                await wait_until(
                    lambda: one_leader.state is not None and bool(one_leader.state.bound), "it to lead"
                )

                async def has_dropped() -> bool:
                    return await closing_refs(one) == [unreadable["ref"]]

                await wait_until(has_dropped, "the published entry to be dropped")
                assert one_leader.state is not None
                assert set(one_leader.state.bound) == {"i0_0", "i0_2"}
                assert not await one.redis.hgetall(one.names.settled)
            del first, third


UNREADABLE = pytest.mark.parametrize(
    "payload", [b"none of ours", b'{"v":99}'], ids=["garbage", "of a later release"]
)
KINDS = pytest.mark.parametrize("kind", ["outcome", "failed"])


async def is_settled(one: Pool) -> bool:
    """Whether nothing waits in `closing`."""
    return not await closing_refs(one)


async def finished_mark(one: Pool) -> int:
    """The *finished* mark that is committed for the interactive lane's first partition."""
    log = OutcomeLog(one.clients, one.names)
    try:
        return (await log.committed())["i0"].offset
    finally:
        await log.stop()


@KINDS
@UNREADABLE
async def test_a_new_leader_ends_at_its_deadline_what_nobody_can_read(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, payload: bytes, kind: str
) -> None:
    """An attempt's job is gone when its outcome waits in `closing`: only the log tells of the request."""
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        node.holds = True
        async with one.running(one.dispatcher()):
            await one.append_many([json.dumps(request("r1", tenant="acme", deadline_ms=4000)).encode()])
            (job,) = await claimed_by(node, 1)
        ending = replace(node.completed(job), payload=payload, kind=kind)
        assert await node.store.complete(node.incarnation, [ending]) == ["ok"]
        assert await one.redis.exists(one.names.job(job.job)) == (kind == "failed")
        async with one.running(one.dispatcher()) as second:
            assert (await one.outcome("r1", "acme")).reason is Reason.DEADLINE_EXCEEDED
            await wait_until(lambda: is_settled(one), "the entry to be dropped")
            assert not await one.redis.exists(one.names.job(job.job))
            assert len(one.of("r1", "acme")) == 1
            assert second.state is not None
            assert second.state.progress["i0"].finished == 1
            assert not second.state.held
        assert await finished_mark(one) == 1


async def test_a_cancel_ends_what_nobody_can_read(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        node.holds = True
        async with one.running(one.dispatcher()):
            await one.append(request("r1"))
            (job,) = await claimed_by(node, 1)
        await node.store.complete(node.incarnation, [replace(node.completed(job), payload=b"{}")])
        async with one.running(one.dispatcher()):
            await one.cancel("r1")
            assert (await one.outcome("r1")).kind is OutcomeKind.CANCELLED
            await wait_until(lambda: is_settled(one), "the entry to be dropped")


async def test_what_nobody_can_read_holds_up_nothing_when_its_record_is_gone(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        node.holds = True
        async with one.running(one.dispatcher()):
            await one.append_many([json.dumps(request("r1")).encode()])
            (job,) = await claimed_by(node, 1)
        await node.store.complete(node.incarnation, [replace(node.completed(job), payload=b"{}")])
        admin = kafka_clients.admin()
        await admin.start()
        await admin.delete_records(
            {TopicPartition(one.names.requests(Lane.INTERACTIVE), 0): RecordsToDelete(1)}
        )
        await admin.close()
        node.holds = False
        async with one.running(one.dispatcher()) as second:
            await wait_until(lambda: is_settled(one), "the entry to be dropped")
            await one.append_many([json.dumps(request("r2")).encode()])
            assert (await one.outcome("r2")).kind is OutcomeKind.COMPLETED
            assert second.state is not None
            assert second.state.progress["i0"].finished == 2


@KINDS
@UNREADABLE
async def test_a_request_whose_ending_nobody_can_read_ends_at_its_deadline(
    kafka_clients: KafkaClients,
    valkey: ValkeyServer,
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
    payload: bytes,
    kind: str,
) -> None:
    monkeypatch.setattr(close, "LOST_S", 1.0)
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(one.dispatcher()), one.running(ScriptedNode(one, "n1")) as node:
            node.holds = True
            await one.append(request("r1", deadline_ms=1500))
            (job,) = await claimed_by(node, 1)
            ending = replace(node.completed(job), payload=payload, kind=kind)
            assert await node.store.complete(node.incarnation, [ending]) == ["ok"]
            assert (await one.outcome("r1")).reason is Reason.DEADLINE_EXCEEDED
            await wait_until(lambda: is_settled(one), "the entry to be dropped")
            assert len(one.of("r1")) == 1
