"""Entries of `closing` whose request is answered already: they are dropped, and nothing is decided again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.node_store import Claimed
from dispatcher.local.valkey import ValkeyServer
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

                async def is_settled() -> bool:
                    return not await closing_refs(one)

                await wait_until(is_settled, "it to be settled")
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


@pytest.mark.parametrize("payload", [b"none of ours", b'{"v":99}'], ids=["garbage", "of a later release"])
async def test_a_request_whose_ending_nobody_can_read_ends_at_its_deadline(
    kafka_clients: KafkaClients,
    valkey: ValkeyServer,
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
    payload: bytes,
) -> None:
    monkeypatch.setattr(close, "LOST_S", 1.0)
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(one.dispatcher()), one.running(ScriptedNode(one, "n1")) as node:
            node.holds = True
            await one.append(request("r1", deadline_ms=1500))
            (job,) = await claimed_by(node, 1)
            ending = replace(node.completed(job), payload=payload)
            assert await node.store.complete(node.incarnation, [ending]) == ["ok"]
            assert (await one.outcome("r1")).reason is Reason.DEADLINE_EXCEEDED

            async def is_settled() -> bool:
                return not await closing_refs(one)

            await wait_until(is_settled, "the entry to be dropped")
            assert len(one.of("r1")) == 1
