"""The doctor against a real Kafka and a real Valkey, well and badly set up."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from dispatcher.backends.connect import KafkaClients, connect_redis
from dispatcher.backends.leader_lock import LeaderLock, Lease
from dispatcher.backends.node_store import NodeStore
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.backends.topics import create_topics
from dispatcher.doctor.ask_kafka import ask_kafka
from dispatcher.doctor.ask_redis import COMMANDS, ask_redis
from dispatcher.doctor.command import examine, exit_code
from dispatcher.doctor.facts import Finding, Status
from dispatcher.local.processes import free_port
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.node import NodeIdentity
from dispatcher.settings import DispatcherSettings
from tests.support.pool import CLOCK
from tests.support.servers import KafkaAddress

OK, WARN, FAIL, UNKNOWN = Status.OK, Status.WARN, Status.FAIL, Status.UNKNOWN
ROOMY = {"maxmemory": str(64 << 20)}


def statuses(findings: list[Finding], check: str) -> set[Status]:
    """How one check ended."""
    found = {finding.status for finding in findings if finding.check == check}
    assert found, f"no finding of {check!r} among {sorted({finding.check for finding in findings})}"
    return found


def told(findings: list[Finding], check: str) -> str:
    """What one check found."""
    return "\n".join(finding.found for finding in findings if finding.check == check)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ValkeyServer]:
    """A Valkey that is set up as a pool wants it."""
    async with ValkeyServer(tmp_path / "store", options=ROOMY) as server:
        yield server


@pytest.fixture
async def admin(store: ValkeyServer) -> AsyncIterator[Redis]:
    client = connect_redis(store.url)
    yield client
    await client.aclose()


def settings(kafka: KafkaAddress, redis: str, pool: str) -> DispatcherSettings:
    return DispatcherSettings(kafka=kafka.bootstrap, redis=redis, pool=pool)


async def registered(client: Redis, names: Names, node: str, **identity: Any) -> None:
    """A node with an agent, admitted."""
    store = NodeStore(ScriptRunner(client), names, node, heartbeat_ttl_s=60, lease_s=10)
    told = NodeIdentity(node=node, incarnation=f"{node}-1", models=("m",), **identity)
    await store.register(told, {}, now_iso=CLOCK.now_iso())
    await client.sadd(names.nodes, node)


@pytest.mark.kafka
async def test_a_pool_made_by_init_has_no_failure(
    kafka: KafkaAddress, store: ValkeyServer, admin: Redis, pool: str
) -> None:
    names = Names(pool)
    await create_topics(kafka.clients, names, partitions=2, replication_factor=1)
    lock = LeaderLock(ScriptRunner(admin), names, ttl_s=60, clock=CLOCK.monotonic)
    assert isinstance(await lock.acquire("me"), Lease)
    await admin.hset(names.generation, "id", "g")
    await registered(admin, names, "n1", routing_block_size=256, engine_block_size=16)
    findings, is_reached = await examine(settings(kafka, store.url, pool))
    assert exit_code(findings, is_reached=is_reached) == 0, findings
    unwell = {finding.check for finding in findings if finding.status is not OK}
    assert unwell == {"kafka replication"}, findings  # one broker has one replica
    assert ":me leads" in told(findings, "leader")
    assert "1 of 1 report" in told(findings, "nodes")
    assert "Valkey" in told(findings, "redis version")


@pytest.mark.kafka
async def test_the_probe_is_seen_by_no_reader_of_what_is_committed(kafka: KafkaAddress, pool: str) -> None:
    names = Names(pool)
    await create_topics(kafka.clients, names, partitions=1, replication_factor=1)
    facts = await ask_kafka(kafka.clients, names, bootstrap=kafka.bootstrap, probe=True)
    assert facts.probe is not None
    assert facts.probe.error == ""
    assert facts.probe.clock is not None
    assert abs(facts.probe.clock.offset_s) <= facts.probe.clock.within_s + 0.05
    seen = {
        isolation: await count(kafka.clients, names.dead, isolation)
        for isolation in ("read_committed", "read_uncommitted")
    }
    assert seen == {"read_committed": 0, "read_uncommitted": 2}
    quiet = await ask_kafka(kafka.clients, names, bootstrap=kafka.bootstrap, probe=False)
    assert quiet.probe is None
    assert await count(kafka.clients, names.dead, "read_uncommitted") == 2


async def count(clients: KafkaClients, topic: str, isolation: str) -> int:
    """How many records a reader sees until the log's end."""
    consumer = clients.consumer(topic, group_id=None, auto_offset_reset="earliest", isolation_level=isolation)
    await consumer.start()
    try:
        (partition,) = consumer.assignment()
        ends = await consumer.end_offsets([partition])
        records = 0
        while await consumer.position(partition) < ends[partition]:
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                records += len(batch)
        return records
    finally:
        await consumer.stop()


@pytest.mark.kafka
async def test_topics_with_wrong_settings_are_found_one_by_one(
    kafka: KafkaAddress, store: ValkeyServer, pool: str
) -> None:
    names = Names(pool)
    interactive = names.requests(Lane.INTERACTIVE)
    wrong = {
        interactive: {"retention.ms": "3600000", "message.timestamp.type": "CreateTime"},
        names.bodies: {"max.message.bytes": "1048588"},
        names.outcomes: {"cleanup.policy": "compact", "min.insync.replicas": "2"},
        names.replies: {"retention.bytes": "1000000"},
    }
    client = kafka.clients.admin()
    await client.start()
    try:
        for topic, config in wrong.items():
            await client.create_topics(
                [NewTopic(name=topic, num_partitions=3, replication_factor=1, topic_configs=config)]
            )
        await create_topics(kafka.clients, names, partitions=1, replication_factor=1)
        await client.delete_topics([names.cancels])
    finally:
        await client.close()
    findings, is_reached = await examine(settings(kafka, store.url, pool))
    assert exit_code(findings, is_reached=is_reached) == 1
    assert {
        (finding.check, finding.status) for finding in findings if finding.found.startswith("flexlb.")
    } >= {
        ("kafka topics", FAIL),
        ("kafka retention", FAIL),
        ("kafka retention", WARN),
        ("kafka timestamps", FAIL),
        ("kafka record size", FAIL),
        ("kafka cleanup", FAIL),
        ("kafka replication", FAIL),
    }
    assert statuses(findings, "kafka lanes") == {WARN}
    assert f"{names.cancels}: missing" in told(findings, "kafka topics")
    assert f"{interactive}: timestamps are CreateTime" in told(findings, "kafka timestamps")


@pytest.mark.kafka
async def test_fix_of_a_topic_mends_it(kafka: KafkaAddress, pool: str, store: ValkeyServer) -> None:
    names = Names(pool)
    await create_topics(kafka.clients, names, partitions=1, replication_factor=1)
    client = kafka.clients.admin()
    await client.start()
    try:
        await client.alter_configs(
            [ConfigResource(ConfigResourceType.TOPIC, names.outcomes, {"retention.ms": "1000"})]
        )
        findings, _ = await examine(settings(kafka, store.url, pool), probe=False)
        (finding,) = [one for one in findings if one.check == "kafka retention"]
        key, _, value = finding.fix.rpartition(" ")[2].partition("=")
        assert (finding.status, key) == (FAIL, "retention.ms")
        await client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, names.outcomes, {key: value})])
        findings, _ = await examine(settings(kafka, store.url, pool), probe=False)
        assert statuses(findings, "kafka retention") == {OK}
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("key", "value", "check", "status"),
    [
        ("maxmemory-policy", "allkeys-lru", "redis eviction", FAIL),
        ("appendfsync", "no", "redis append-only file", WARN),
        ("appendonly", "no", "redis append-only file", WARN),
        ("maxmemory", "0", "redis memory", WARN),
        ("maxmemory", "1100000", "redis memory", FAIL),
    ],
)
async def test_store_with_wrong_settings_is_found(
    store: ValkeyServer, admin: Redis, key: str, value: str, check: str, status: Status
) -> None:
    absent = KafkaAddress(bootstrap=f"127.0.0.1:{free_port()}")
    await admin.config_set(key, value)
    findings, is_reached = await examine(settings(absent, store.url, "p"))
    assert statuses(findings, check) == {status}
    assert not is_reached
    assert statuses(findings, "kafka") == {FAIL}


async def test_user_without_rights_is_told_which_are_missing(store: ValkeyServer, admin: Redis) -> None:
    await admin.execute_command(
        *("ACL", "SETUSER", "poor", "on", ">hush", "~flexlb:*", "~rq:*", "+@all", "-@write", "-evalsha")
    )
    client = connect_redis(store.url.replace("redis://", "redis://poor:hush@"))
    try:
        facts = await ask_redis(client, Names("p"))
    finally:
        await client.aclose()
    assert facts.user == "poor"
    assert facts.denied is not None
    assert {"EVALSHA", "XADD", "SET", "RENAME"} <= facts.denied.keys()
    assert not {"GET", "XREAD", "PING", "HGETALL"} & facts.denied.keys()


async def test_keys_of_other_pools_may_be_closed_to_a_dispatcher(store: ValkeyServer, admin: Redis) -> None:
    words = [f"+{command.lower()}" for command, *_ in COMMANDS]
    await admin.execute_command(
        *("ACL", "SETUSER", "own", "on", ">x", "~flexlb:p:*", "~rq:*", "+acl", "+info", "+config|get", *words)
    )
    client = connect_redis(store.url.replace("redis://", "redis://own:x@"))
    try:
        assert (await ask_redis(client, Names("p"))).denied == {}
        other = await ask_redis(client, Names("q"))
    finally:
        await client.aclose()
    assert other.denied is not None
    assert "GET" in other.denied


async def test_user_that_may_ask_nothing_leaves_checks_unknown(store: ValkeyServer, admin: Redis) -> None:
    await admin.execute_command(
        *("ACL", "SETUSER", "mute", "on", ">x", "~*", "+@all", "-acl", "-info", "-config", "-time")
    )
    absent = KafkaAddress(bootstrap=f"127.0.0.1:{free_port()}")
    findings, _ = await examine(settings(absent, store.url.replace("redis://", "redis://mute:x@"), "p"))
    for check in ("redis info", "redis permissions", "clock of Redis", "pool"):
        assert statuses(findings, check) == {UNKNOWN}


async def test_nodes_with_other_blocks_and_silent_nodes_are_named(store: ValkeyServer, admin: Redis) -> None:
    names = Names("p")
    await registered(admin, names, "good", routing_block_size=256, engine_block_size=16)
    await registered(admin, names, "other", routing_block_size=512, engine_block_size=16)
    await registered(admin, names, "odd", routing_block_size=256, engine_block_size=48)
    await registered(admin, names, "gone")
    await admin.delete(names.load("gone"))
    await admin.hset(names.node("good"), "identity", b'{"node": 5}')
    absent = KafkaAddress(bootstrap=f"127.0.0.1:{free_port()}")
    findings, _ = await examine(settings(absent, store.url, "p"))
    assert "gone do not report (3 of 4 do)" in told(findings, "nodes")
    assert "other cut prompts in blocks of 512" in told(findings, "block size")
    assert "odd: the routing block is no multiple" in told(findings, "block size")
    assert "good can't be read" in told(findings, "node identity")
    assert statuses(findings, "leader") == {WARN}


async def test_lock_without_an_end_is_found(store: ValkeyServer, admin: Redis) -> None:
    names = Names("p")
    await admin.mset({names.leader: "5:a", names.epoch: "5:a"})
    absent = KafkaAddress(bootstrap=f"127.0.0.1:{free_port()}")
    findings, _ = await examine(settings(absent, store.url, "p"))
    assert statuses(findings, "leader") == {FAIL}
    assert "never expires" in told(findings, "leader")


async def test_command_prints_json_and_masks_the_password_of_an_absent_server() -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", "doctor", "--json", "--pool", "p"),
        *("--redis", f"redis://:hush@127.0.0.1:{port}/0", "--kafka", f"127.0.0.1:{port}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 2, err.decode()
    assert b"Traceback" not in err
    assert b"hush" not in out + err
    found = json.loads(out)
    assert found["exit_code"] == 2
    assert [(one["check"], one["status"]) for one in found["findings"]] == [
        ("kafka", "fail"),
        ("redis", "fail"),
    ]
    assert all(one["fix"] for one in found["findings"])
