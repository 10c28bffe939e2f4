"""The benches' lean client and light nodes on a real Valkey: they do what the agents' own transport does."""

from __future__ import annotations

import asyncio
import time

import pytest
from redis.exceptions import ResponseError

from dispatcher.backends.leader_lock import LeaderLock, Lease
from dispatcher.backends.leader_store import AssignItem, LeaderStore
from dispatcher.backends.node_store import NodeStore
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Attempt, JobId, Lane, Names, Ref
from tests.bench import prompts
from tests.bench.lean_redis import LeanConnection, LeanRedis
from tests.bench.light_nodes import LightNode, Stats
from tests.bench.open_loop import percentile_of
from tests.support.wait import wait_until

NOW_ISO = "2026-01-01T00:00:00.000000Z"


async def test_answers_of_commands_in_flight_come_to_their_own_callers(valkey: ValkeyServer) -> None:
    connection = await LeanConnection.connect(valkey.url)
    pushed = [connection.command("RPUSH", "list", value) for value in range(100)]
    wrong = connection.command("INCR", "list")
    asked = connection.command("LRANGE", "list", 0, -1)
    assert await asyncio.gather(*pushed) == list(range(1, 101))
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await wrong
    assert await asked == [str(value).encode() for value in range(100)]
    connection.close()


async def test_a_light_node_registers_tells_its_view_and_answers_what_is_assigned(
    valkey: ValkeyServer, redis_client: Redis
) -> None:
    names = Names()
    runner = ScriptRunner(redis_client)
    lease = await LeaderLock(runner, names, ttl_s=60, clock=time.monotonic).acquire("test")
    assert isinstance(lease, Lease)
    leader = LeaderStore(runner, names, lease)
    await leader.begin_generation("g", {"i0": 0}, {})
    shared = await LeanConnection.connect(valkey.url)
    own = await LeanConnection.connect(valkey.url)
    stats = Stats()
    store = NodeStore(
        ScriptRunner(LeanRedis(shared, own)), names, prompts.node_name(3), heartbeat_ttl_s=30, lease_s=60
    )
    node = LightNode(3, store, stats, max_running=8, report_s=30, is_told=True)
    await node.register()
    await node.publish_view(5)
    view = await redis_client.scard(names.cached_blocks(store.node, "GPU"))
    assert view == len({block for blocks in prompts.view(3, 5) for block in blocks})
    await leader.admit(store.node)
    tasks = [asyncio.create_task(node.drain()), asyncio.create_task(node.report())]
    now_ms = int(time.time() * 1000)
    answers = await leader.assign(
        [item(offset, now_ms, names, lease.epoch) for offset in range(40)], {"i0": 40}, now_iso=NOW_ISO
    )
    assert {answer for answer, _ in answers} == {"ok"}
    await wait_until(lambda: stats.completed == 40, "every assignment is answered")
    assert (stats.claimed, stats.lost) == (40, 0)
    assert 0 <= percentile_of(stats.latency_ms.items(), 1.0) < 60_000
    closing = await redis_client.xrange(names.closing)
    assert {fields[b"ref"] for _, fields in closing} == {f"i0_{offset}".encode() for offset in range(40)}
    await wait_until(lambda: stats.reports > 0, "it reports")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    shared.close()
    own.close()


def item(offset: int, now_ms: int, names: Names, epoch: int) -> AssignItem:
    ref = Ref(Lane.INTERACTIVE, 0, offset)
    envelope = Envelope(ref=str(ref), id=f"r{offset}", model=prompts.MODEL, appended_ms=now_ms)
    return AssignItem(
        job=JobId(names.pool, prompts.node_name(3), ref, Attempt(epoch, 1)),
        incarnation="light3",
        cost_tokens=10,
        from_pending=False,
        identity=names.identity("", envelope.id),
        fingerprint="0123456789abcdef",
        data=b"{}",
        envelope=codec.encode(envelope),
    )
