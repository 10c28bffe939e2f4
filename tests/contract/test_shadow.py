"""A shadow beside a live leader, on a real Kafka and a real Valkey: it tells what differs, and only reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from msgspec import Raw
from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import KafkaClients, connect_redis
from dispatcher.backends.node_store import Claimed, Ending
from dispatcher.backends.read_only import REDIS_READS
from dispatcher.backends.scripts import Redis
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import decode_job_data
from dispatcher.protocol.handoff import Handoff
from dispatcher.protocol.node import NodeReport, Role
from dispatcher.shadow import Shadow
from dispatcher.telemetry.logging import Log
from tests.contract.test_acl import PASSWORD, SHADOW, sample_for
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka

WHAT_CONNECTING_SENDS = {"client|setinfo", "client|setname", "select", "multi", "exec", "hello", "auth"}


class TellingNode(ScriptedNode):
    """A node that holds what it claimed and tells of it at once, as agents do."""

    holds = True
    to_compute_tokens = 0
    """What it has to compute, as it tells."""

    async def claim(self, limit: int) -> None:
        """Take what is queued, and report."""
        await super().claim(limit)
        await self.tell()

    async def _beat(self) -> None:
        while True:
            await self.tell()
            held = [job.job for job in self.claimed]
            await self.store.extend(self.incarnation, held, now_iso=Clock().now_iso())
            await asyncio.sleep(0.3)

    async def tell(self) -> None:
        """Report."""
        self._sequence += 1
        await self.store.report(
            NodeReport(
                node=self.name,
                incarnation=self.incarnation,
                sequence=self._sequence,
                running=len(self.claimed),
                queued_uncached_tokens=self.to_compute_tokens if self.claimed else 0,
                seen_seq=max((job.seq for job in self.claimed), default=0),
            )
        )


def shadow_of(one: Pool, redis: Callable[[], Redis] | None = None, **settings: Any) -> Shadow:
    """A shadow of a pool's leader, not yet running."""
    return Shadow(
        one.settings.model_copy(update=settings),
        redis=redis if redis is not None else lambda: connect_redis(one.redis_url),
        kafka=one.clients,
        clock=Clock(),
        rng=random.Random(1),
        registry=CollectorRegistry(),
        log=Log(),
        every=10,
    )


async def following(shadow: Shadow, nodes: int) -> None:
    """Wait until a shadow knows the fleet."""
    fleet = shadow.mirror.fleet
    await wait_until(
        lambda: shadow.ledger.is_primed and sum(node.admitted for node in fleet.nodes.values()) == nodes,
        "the shadow to follow",
    )


async def compared(shadow: Shadow, count: int) -> None:
    """Wait until a shadow has compared so many decisions."""
    await wait_until(lambda: shadow.summary().compared == count, f"{count} comparisons")


def handed_over(job: Claimed) -> Ending:
    """The end of a prefill stage."""
    work = decode_job_data(job.data)
    handoff = Handoff(
        node="p", kv_transfer_params=Raw(b"{}"), expires_ms=Clock().now_ms() + 60_000, prompt_tokens=60_000
    )
    return Ending(job=job.job, kind="handoff", ref=work.ref, id=work.id, payload=codec.encode(handoff))


@contextlib.asynccontextmanager
async def holding_pool(one: Pool, nodes: int = 3, **identity: Any) -> AsyncIterator[list[TellingNode]]:
    """A leader and nodes that hold what they claimed, so that every decision can be seen."""
    made = [TellingNode(one, f"n{number}", **identity) for number in range(nodes)]
    async with one.running(one.dispatcher()) as dispatcher, contextlib.AsyncExitStack() as stack:
        for node in made:
            await stack.enter_async_context(one.running(node))
        fleet = dispatcher.mirror.fleet.nodes
        await wait_until(lambda: sum(node.admitted for node in fleet.values()) == nodes, "the nodes")
        yield made


def prompt(number: int) -> dict[str, Any]:
    """A request with a prompt of its own, as long as a block and some more."""
    return request(f"r{number}", tokens={"count": 300, "block_hashes": [f"{number:016x}"]})


async def test_the_same_scheduler_as_its_shadow_decides_the_same(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, holding_pool(one) as nodes:
        shadow = shadow_of(one)
        async with one.running(shadow):
            await following(shadow, 3)
            for number in range(12):
                await one.append(prompt(number))
                await compared(shadow, number + 1)
            found = shadow.summary()
            assert found.agreement == 1.0, found
            assert set(found.verdicts) <= {"same", "near_tie"}
            assert (found.unseen, found.would_wait) == (0, 0)
            assert found.own_ttft.mean_ms == pytest.approx(found.leader_ttft.mean_ms, rel=0.05)
            # What ends is freed and learned from: an answer's time is held against what was predicted.
            for node in nodes:
                await node.finish()
            for number in range(12):
                await one.outcome(f"r{number}")
            await wait_until(lambda: not shadow.ledger.held, "the endings")


async def test_a_request_is_judged_on_a_node_that_does_not_have_it_yet(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    """The first that it may hear of it is that its node is busy with it, which the leader did not know."""
    async with Pool(kafka_clients, valkey.url, pool) as one, holding_pool(one) as nodes:
        for node in nodes:
            node.to_compute_tokens = 50_000
        shadow = shadow_of(one)
        async with one.running(shadow):
            await following(shadow, 3)
            for number in range(3):
                # The others are idle, so that no node is chosen twice.
                await one.append(prompt(number))
                await compared(shadow, number + 1)
            found = shadow.summary()
            assert set(found.verdicts) <= {"same", "near_tie"}, found
            assert found.leader_ttft.p99_ms < 100
            fleet = shadow.mirror.fleet.nodes.values()
            await wait_until(
                lambda: all(node.queued_tokens >= 50_000 for node in fleet), "the reports to count after all"
            )


async def test_looks_that_overlap_compare_nothing_twice(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, policy="round_robin") as one, holding_pool(one) as nodes:
        shadow = shadow_of(one)
        async with one.running(shadow):
            await following(shadow, 3)
            for number in range(24):
                await one.append(prompt(number))
                await asyncio.gather(*(shadow.ledger.look_around() for _ in range(8)))
            await wait_until(lambda: sum(len(node.claimed) for node in nodes) == 24, "all at their nodes")
            await compared(shadow, 24)
            shadow.ledger.forget_counter()
            await asyncio.gather(*(shadow.ledger.look_around() for _ in range(8)))
            assert shadow.summary().compared == 24
            assert sum(shadow.ledger.held.values()) == 24


async def test_another_policy_differs_and_tells_why(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, policy="round_robin") as one, holding_pool(one):
        ours, turns = shadow_of(one, policy="prefill_cost"), shadow_of(one, policy="round_robin")
        async with one.running(ours), one.running(turns):
            await following(ours, 3)
            await following(turns, 3)
            # The same prompt again and again: ours sends it where it is cached, in turn it goes everywhere.
            blocks = [f"{block:016x}" for block in range(40)]
            for number in range(12):
                await one.append(request(f"r{number}", tokens={"count": 10_300, "block_hashes": blocks}))
                for shadow in (ours, turns):
                    await compared(shadow, number + 1)
            found = ours.summary()
            assert found.policy == "prefill_cost"
            assert found.verdicts.get("cache", 0) + found.verdicts.get("queue", 0) >= 2, found
            assert sum(found.verdicts.values()) == 12
            assert found.own_ttft_apart.count == 12 - found.verdicts.get("same", 0)
            assert found.own_ttft_apart.mean_ms < found.leader_ttft_apart.mean_ms
            by_turn = turns.summary().verdicts
            assert set(by_turn) <= {"same", "rule"}


async def test_what_the_shadow_would_refuse_and_what_it_can_not_place_is_told(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, holding_pool(one, 1):
        strict = shadow_of(one, max_record_bytes=2048)
        async with one.running(strict):
            await following(strict, 1)
            await one.append(request("large", body={"prompt": "x" * 3000, "max_tokens": 1}))
            await compared(strict, 1)
            await one.append(request("small"))
            await compared(strict, 2)
            # A record may be read after its binding was seen: then it is compared as the leader took it.
            assert set(strict.summary().verdicts) <= {"refused", "same"}
            assert strict.ledger.refused == 1


async def test_both_stages_are_compared(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> None:
    one = Pool(kafka_clients, valkey.url, pool, policy="round_robin")
    async with one, one.running(one.dispatcher()):
        prefill = TellingNode(one, "p", role=Role.PREFILL)
        decode = TellingNode(one, "d", role=Role.DECODE, kv_total_tokens=100_000)
        async with one.running(prefill), one.running(decode):
            shadow = shadow_of(one)
            async with one.running(shadow):
                await following(shadow, 2)
                await one.append(
                    request("r", tokens={"count": 60_000}, body={"prompt": "x", "max_tokens": 9})
                )
                await compared(shadow, 1)
                assert shadow.summary().decode_verdicts == {}
                await wait_until(lambda: bool(prefill.claimed), "the prompt at the prefill node")
                await prefill.store.complete(prefill.incarnation, [handed_over(prefill.claimed.pop())])
                await compared(shadow, 2)
                assert shadow.summary().decode_verdicts == {"same": 1}
                assert list(shadow.ledger.held) == ["d"]


async def test_a_shadow_changes_nothing_in_a_pool_without_a_leader(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with holding_pool(one, 2) as nodes:
            await one.append(request("r"))
            await wait_until(lambda: any(node.claimed for node in nodes), "the claim")
        before = await everything_in(one)
        await one.redis.config_resetstat()
        shadow = shadow_of(one, policy="round_robin", election=False)
        async with one.running(shadow):
            await following(shadow, 2)
            await wait_until(lambda: bool(shadow.ledger.held), "the job that is there")
            await shadow.ledger.look_around()
        stats: dict[str, Any] = await one.redis.info("commandstats")
        called = {name.removeprefix("cmdstat_") for name in stats}
        assert called & REDIS_READS
        assert called - REDIS_READS - WHAT_CONNECTING_SENDS <= {"info", "config|resetstat"}
        assert await everything_in(one) == before


async def everything_in(one: Pool) -> dict[str, Any]:
    """Every lasting key of Redis, and how far Kafka's topics and groups are."""
    found: dict[str, Any] = {}
    async for key in one.redis.scan_iter(match=f"*{one.names.pool}*"):
        # What expires by itself is no change of the shadow's.
        if await one.redis.pttl(key) == -1:
            found[key.decode()] = await one.redis.dump(key)
    consumer = one.clients.consumer(group_id=None)
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, number) for topic in one.names.topics for number in (0, 1)]
        found["ends"] = await consumer.end_offsets(partitions)
    finally:
        await consumer.stop()
    admin = one.clients.admin()
    await admin.start()
    try:
        found["marks"] = {
            tp: stored.offset
            for tp, stored in (await admin.list_consumer_group_offsets(one.names.group)).items()
        }
    finally:
        await admin.close()
    return found


async def test_a_user_that_may_only_read_is_enough_for_a_shadow(
    kafka_clients: KafkaClients, tmp_path: Path, pool: str
) -> None:
    rules = tmp_path / "redis-acl.conf"
    rules.write_text(sample_for(pool))
    async with ValkeyServer(tmp_path / "valkey", options={"include": str(rules)}) as server:
        url = server.url.replace("redis://", f"redis://{SHADOW}:{PASSWORD}@")
        async with Pool(kafka_clients, server.url, pool) as one, holding_pool(one, 2):
            shadow = shadow_of(one, redis=lambda: connect_redis(url))
            async with one.running(shadow):
                await following(shadow, 2)
                for number in range(4):
                    await one.append(prompt(number))
                await compared(shadow, 4)
            log = await one.redis.execute_command("ACL", "LOG")
            assert log == [], "nothing was refused, so nothing was tried"


async def test_the_command_tells_what_it_found_and_leaves_the_leader_alone(
    kafka: KafkaAddress, kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, holding_pool(one, 2):
        leader = await one.redis.get(one.names.leader)
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dispatcher", "dispatcher", "--shadow", "--json", "--shadow-every", "2"),
            *("--pool", pool, "--redis", valkey.url, "--kafka", kafka.bootstrap, "--policy", "round_robin"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert command.stderr is not None
        lines: list[dict[str, Any]] = []

        async def read() -> None:
            assert command.stderr is not None
            async for line in command.stderr:
                lines.append(json.loads(line))

        reading = asyncio.create_task(read())
        try:
            await wait_until(lambda: any(one["event"] == "shadow follows" for one in lines), "it to follow")
            command.send_signal(signal.SIGHUP)
            await wait_until(lambda: any("keeps its settings" in one["event"] for one in lines), "its answer")
            for number in range(4):
                await one.append(prompt(number))
            await wait_until(lambda: sum(one["event"] == "shadow" for one in lines) == 2, "two lines")
        finally:
            command.send_signal(signal.SIGTERM)
            await reading
            out, _ = await command.communicate()
        assert command.returncode == 0, lines
        found = json.loads(out)
        assert (found["policy"], found["compared"]) == ("round_robin", 4)
        assert await one.redis.get(one.names.leader) == leader
