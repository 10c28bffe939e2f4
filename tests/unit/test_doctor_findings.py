"""Findings of the doctor, each from facts alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from dispatcher.doctor.ask_kafka import reading
from dispatcher.doctor.ask_redis import COMMANDS
from dispatcher.doctor.clock_findings import clock_finding
from dispatcher.doctor.command import as_text, exit_code, needs_of
from dispatcher.doctor.facts import (
    ClockReading,
    Finding,
    HeldUp,
    KafkaFacts,
    NodeFacts,
    PoolFacts,
    Probe,
    RedisFacts,
    Status,
    TopicFacts,
)
from dispatcher.doctor.kafka_findings import kafka_findings, version_of
from dispatcher.doctor.pool_findings import pool_findings
from dispatcher.doctor.redis_findings import redis_findings
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.node import NodeIdentity
from dispatcher.settings import DispatcherSettings

OK, WARN, FAIL, UNKNOWN = Status.OK, Status.WARN, Status.FAIL, Status.UNKNOWN
NAMES = Names("p")
NEEDS = needs_of(DispatcherSettings(pool="p"))
INTERACTIVE, BATCH = NAMES.requests(Lane.INTERACTIVE), NAMES.requests(Lane.BATCH)
IN_STEP = ClockReading(offset_s=0.001, within_s=0.002)
CONFIG = {
    "retention.ms": "604800000",
    "retention.bytes": "-1",
    "max.message.bytes": str(16 << 20),
    "message.timestamp.type": "LogAppendTime",
    "cleanup.policy": "delete",
    "min.insync.replicas": "2",
}
TOPIC = TopicFacts(partitions=4, replicas=3, in_sync=3, config=CONFIG)
KAFKA = KafkaFacts(
    bootstrap="k:9092",
    brokers=3,
    apis={1: 17, 22: 5, 28: 4},
    topics=dict.fromkeys(NAMES.topics, TOPIC),
    internal={"__transaction_state": replace(TOPIC, config=None)},
    broker_config={"auto.create.topics.enable": "false", "offsets.retention.minutes": "10080"},
    probe=Probe(clock=IN_STEP),
)
INFO: dict[str, object] = {
    "redis_version": "7.2.4",
    "valkey_version": "9.1.2",
    "role": "master",
    "cluster_enabled": 0,
    "loading": 0,
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "aof_last_bgrewrite_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "maxmemory": 1 << 30,
    "used_memory": 1 << 20,
    "total_system_memory": 8 << 30,
}
REDIS = RedisFacts(info=INFO, appendfsync="everysec", user="default", denied={}, clock=IN_STEP)
NOW_MS = 1_800_000_000_000


def node(name: str = "n1", **identity: Any) -> NodeFacts:
    """A node in good health."""
    told = {"routing_block_size": 256, "engine_block_size": 16, **identity}
    return NodeFacts(
        node=name,
        alive=True,
        identity=NodeIdentity(node=name, incarnation="x", models=("m",), **told),
    )


POOL = PoolFacts(
    prefix="flexlb:p:",
    leader=f"{NOW_MS}:a",
    leader_ttl_ms=2900,
    epoch=f"{NOW_MS}:a",
    generation="g",
    redis_ms=NOW_MS,
    nodes=(node(),),
)


def of(check: str, findings: Iterable[Finding]) -> list[Finding]:
    """The findings of one check."""
    return [finding for finding in findings if finding.check == check]


def the(check: str, findings: Iterable[Finding]) -> Finding:
    """The one finding of a check."""
    (finding,) = of(check, findings)
    return finding


def altered(**config: str) -> KafkaFacts:
    """A cluster whose topics have other settings."""
    named = {key.replace("_", "."): value for key, value in config.items()}
    return replace(KAFKA, topics=dict.fromkeys(NAMES.topics, replace(TOPIC, config={**CONFIG, **named})))


def test_a_cluster_as_it_should_be_is_all_ok() -> None:
    findings = [*kafka_findings(KAFKA, NEEDS), *redis_findings(REDIS), *pool_findings(POOL, NEEDS)]
    assert {finding.status for finding in findings} == {OK}
    assert not any(finding.fix for finding in findings)


@pytest.mark.parametrize(
    ("findings", "check", "status", "words"),
    [
        (kafka_findings(replace(KAFKA, apis={}), NEEDS), "kafka version", UNKNOWN, "no APIs"),
        (kafka_findings(replace(KAFKA, apis={1: 17}), NEEDS), "kafka version", FAIL, "no transactions"),
        (
            kafka_findings(replace(KAFKA, apis={1: 11, 22: 0, 28: 0}), NEEDS),
            "kafka version",
            WARN,
            "Kafka 2.3 or newer",
        ),
        (
            kafka_findings(replace(KAFKA, topics={**KAFKA.topics, BATCH: None}), NEEDS),
            "kafka topics",
            FAIL,
            f"{BATCH}: missing",
        ),
        (
            kafka_findings(
                replace(KAFKA, topics={INTERACTIVE: replace(TOPIC, in_sync=0, leaderless=2)}), NEEDS
            ),
            "kafka partitions",
            FAIL,
            "2 of 4 partitions have no leader",
        ),
        (
            kafka_findings(replace(KAFKA, topics={INTERACTIVE: replace(TOPIC, in_sync=2)}), NEEDS),
            "kafka partitions",
            WARN,
            "only 2 of 3 replicas are in sync",
        ),
        (
            kafka_findings(
                replace(KAFKA, topics={**KAFKA.topics, BATCH: replace(TOPIC, partitions=2)}), NEEDS
            ),
            "kafka lanes",
            WARN,
            f"{BATCH} has 2",
        ),
        (
            kafka_findings(replace(KAFKA, broker_config=None), NEEDS),
            "kafka auto-creation",
            UNKNOWN,
            "not told",
        ),
        (kafka_findings(replace(KAFKA, broker_config=None), NEEDS), "kafka offsets", UNKNOWN, "not told"),
        (
            kafka_findings(
                replace(
                    KAFKA,
                    broker_config={"auto.create.topics.enable": "true", "offsets.retention.minutes": "60"},
                ),
                NEEDS,
            ),
            "kafka auto-creation",
            WARN,
            "create topics on first use",
        ),
        (
            kafka_findings(
                replace(KAFKA, broker_config={"offsets.retention.minutes": "60"}),
                NEEDS,
            ),
            "kafka offsets",
            WARN,
            "live 1 h",
        ),
        (kafka_findings(replace(KAFKA, probe=None), NEEDS), "kafka transactions", UNKNOWN, "not tried"),
        (kafka_findings(replace(KAFKA, probe=None), NEEDS), "clock of Kafka", UNKNOWN, "could not be read"),
        (
            kafka_findings(replace(KAFKA, probe=Probe(error="NotCoordinator")), NEEDS),
            "kafka transactions",
            FAIL,
            "NotCoordinator",
        ),
    ],
)
def test_a_cluster_s_faults_are_found(
    findings: list[Finding], check: str, status: Status, words: str
) -> None:
    finding = the(check, findings)
    assert finding.status is status
    assert words in finding.found
    assert finding.fix or status is UNKNOWN


@pytest.mark.parametrize(
    ("check", "config", "topics", "status", "fix"),
    [
        ("kafka retention", {"retention_ms": "1"}, set(NAMES.topics) - {NAMES.dead}, FAIL, "=172800000"),
        ("kafka retention", {"retention_bytes": "9"}, set(NAMES.topics) - {NAMES.dead}, WARN, "bytes=-1"),
        ("kafka record size", {"max_message_bytes": "5"}, set(NAMES.topics), FAIL, "max.message.bytes="),
        (
            "kafka record size",
            {"max_message_bytes": "1048588"},
            {NAMES.bodies, NAMES.replies, NAMES.outcomes, NAMES.dead},
            FAIL,
            f"max.message.bytes={16 << 20}",
        ),
        ("kafka cleanup", {"cleanup_policy": "compact"}, set(NAMES.topics), FAIL, "cleanup.policy=delete"),
        ("kafka replication", {"min_insync_replicas": "4"}, set(NAMES.topics), FAIL, "min.insync.replicas=2"),
        ("kafka replication", {"min_insync_replicas": "3"}, set(NAMES.topics), WARN, "min.insync.replicas=2"),
        ("kafka replication", {"min_insync_replicas": "1"}, set(NAMES.topics), WARN, "min.insync.replicas=2"),
    ],
)
def test_a_topic_s_settings_are_judged_one_by_one(
    check: str, config: dict[str, str], topics: set[str], status: Status, fix: str
) -> None:
    findings = of(check, kafka_findings(altered(**config), NEEDS))
    assert {finding.found.partition(":")[0] for finding in findings} == topics
    assert {finding.status for finding in findings} == {status}
    assert all(fix in finding.fix for finding in findings)


def test_producers_timestamps_fail_lanes_and_warn_of_the_rest() -> None:
    findings = of("kafka timestamps", kafka_findings(altered(message_timestamp_type="CreateTime"), NEEDS))
    failed = {finding.found.partition(":")[0] for finding in findings if finding.status is FAIL}
    assert failed == {INTERACTIVE, BATCH}
    assert {finding.status for finding in findings} == {FAIL, WARN}
    assert len(findings) == len(NAMES.topics)


def test_retention_of_exactly_twice_the_longest_deadline_is_enough() -> None:
    twice_ms = int(2 * NEEDS.longest_deadline_s * 1000)
    assert the("kafka retention", kafka_findings(altered(retention_ms=str(twice_ms)), NEEDS)).status is OK
    assert the("kafka retention", kafka_findings(altered(retention_ms="-1"), NEEDS)).status is OK
    less = of("kafka retention", kafka_findings(altered(retention_ms=str(twice_ms - 1)), NEEDS))
    assert {finding.status for finding in less} == {FAIL}


def test_topics_that_are_not_described_are_unknown_not_well() -> None:
    facts = replace(KAFKA, topics=dict.fromkeys(NAMES.topics, replace(TOPIC, config=None)))
    findings = kafka_findings(facts, NEEDS)
    for check in ("kafka retention", "kafka record size", "kafka timestamps", "kafka cleanup"):
        assert {finding.status for finding in of(check, findings)} == {UNKNOWN}


def test_one_replica_is_warned_of_also_for_transactions() -> None:
    lone = TopicFacts(partitions=50, replicas=1, in_sync=1, config=None)
    findings = kafka_findings(replace(KAFKA, internal={"__transaction_state": lone}), NEEDS)
    finding = the("kafka replication", findings)
    assert (finding.status, finding.found.partition(":")[0]) == (WARN, "__transaction_state")


@pytest.mark.parametrize(
    ("fetch", "version"),
    [(18, "4.1 or newer"), (14, "3.1 or newer"), (12, "2.7 or newer"), (4, "older than 2.3")],
)
def test_version_is_read_from_the_fetch_api(fetch: int, version: str) -> None:
    assert version_of({1: fetch}) == version


def info(**changed: object) -> list[Finding]:
    """Findings about a server that says something else."""
    return redis_findings(replace(REDIS, info={**INFO, **changed}))


@pytest.mark.parametrize(
    ("findings", "check", "status", "words"),
    [
        (redis_findings(replace(REDIS, info=None)), "redis info", UNKNOWN, "may not run INFO"),
        (info(role="slave"), "redis mode", FAIL, "replica"),
        (info(cluster_enabled=1), "redis mode", FAIL, "cluster mode is on"),
        (info(loading=1), "redis mode", WARN, "loading"),
        (info(maxmemory_policy="allkeys-lru"), "redis eviction", FAIL, "allkeys-lru"),
        (info(aof_enabled=0), "redis append-only file", WARN, "off"),
        (
            redis_findings(replace(REDIS, appendfsync="always")),
            "redis append-only file",
            WARN,
            "waits for the disk",
        ),
        (redis_findings(replace(REDIS, appendfsync="no")), "redis append-only file", WARN, "kernel decides"),
        (redis_findings(replace(REDIS, appendfsync=None)), "redis append-only file", UNKNOWN, "not told"),
        (info(aof_last_write_status="err"), "redis persistence", FAIL, "aof_last_write_status is err"),
        (info(rdb_last_bgsave_status="err"), "redis persistence", FAIL, "rdb_last_bgsave_status is err"),
        (info(aof_last_bgrewrite_status="err"), "redis persistence", FAIL, "bgrewrite_status is err"),
        (info(maxmemory=0), "redis memory", WARN, "no maxmemory"),
        (info(used_memory=int(0.8 * (1 << 30)) + 1), "redis memory", WARN, "819 MiB of 1,024 MiB"),
        (info(used_memory=1 << 30), "redis memory", FAIL, "new work is refused"),
        (redis_findings(replace(REDIS, denied=None)), "redis permissions", UNKNOWN, "may not ask"),
        (
            redis_findings(replace(REDIS, user="u", denied={"XADD": "no", "EVALSHA": "no"})),
            "redis permissions",
            FAIL,
            "user u is refused EVALSHA, XADD",
        ),
        (redis_findings(replace(REDIS, clock=None)), "clock of Redis", UNKNOWN, "could not be read"),
    ],
)
def test_a_store_s_faults_are_found(findings: list[Finding], check: str, status: Status, words: str) -> None:
    finding = the(check, findings)
    assert finding.status is status
    assert words in finding.found
    assert finding.fix or check == "clock of Redis"


@pytest.mark.parametrize(("version", "status"), [("7.0.0", OK), ("8.2.1", OK), ("6.2.14", FAIL)])
def test_redis_is_new_enough_from_seven(version: str, status: Status) -> None:
    old = {key: value for key, value in INFO.items() if key != "valkey_version"} | {"redis_version": version}
    assert the("redis version", redis_findings(replace(REDIS, info=old))).status is status


def test_fix_of_permissions_names_what_is_missing() -> None:
    facts = replace(REDIS, user="u", denied={"XADD": "no", "EVALSHA": "no"})
    fix = the("redis permissions", redis_findings(facts)).fix
    assert fix.startswith("ACL SETUSER u ~flexlb:* ~rq:* +evalsha +xadd; ACL SAVE; ")
    assert "dispatcher/deploy/redis-acl.conf" in fix
    assert (files("dispatcher") / "deploy" / "redis-acl.conf").is_file()


def test_permissions_cover_every_command_of_the_leader_s_scripts() -> None:
    of_agents = {"blocks", "claim", "complete", "extend", "register", "report"}
    called = {"SADD", "SREM"}  # chosen at run time in admit.lua
    folder = files("dispatcher.backends") / "lua"
    for script in folder.iterdir():
        if script.name.endswith(".lua") and script.name.removesuffix(".lua") not in of_agents:
            called |= set(re.findall(r"redis\.p?call\(\s*'([A-Z]+)'", script.read_text()))
    assert len(called) > 20
    assert called <= {command for command, *_ in COMMANDS}


@pytest.mark.parametrize(
    ("offset_s", "within_s", "status"),
    [(0.4, 0, OK), (-0.6, 0, WARN), (0.6, 0.2, OK), (6, 0.1, FAIL), (-6, 2, WARN)],
)
def test_only_what_is_certain_of_a_clock_counts(offset_s: float, within_s: float, status: Status) -> None:
    finding = clock_finding("clock", ClockReading(offset_s=offset_s, within_s=within_s))
    assert finding.status is status
    assert ("behind" if offset_s < 0 else "ahead of") in finding.found


def test_reading_lies_within_the_time_of_asking() -> None:
    one = reading(10.0, 12.0, 11.0)
    assert one.offset_s == 1.5
    assert one.within_s == pytest.approx(0.501)


@pytest.mark.parametrize(
    ("changed", "check", "status", "words"),
    [
        ({"leader": ""}, "leader", WARN, "no dispatcher leads"),
        ({"leader_ttl_ms": -1}, "leader", FAIL, "never expires"),
        ({"epoch": f"{NOW_MS + 1}:b"}, "leader", FAIL, "the owner is refused"),
        ({"epoch": ""}, "leader", FAIL, "the epoch absent"),
        ({"generation": ""}, "leader", WARN, "has not begun a generation"),
        ({"redis_ms": NOW_MS - 90_000}, "epoch", WARN, "90 s ahead of Redis's clock"),
        ({"epoch": "what", "leader": "what"}, "epoch", FAIL, "seen 'what'"),
        ({"nodes": ()}, "nodes", WARN, "no node has registered"),
        ({"nodes": (replace(node(), alive=False),)}, "nodes", FAIL, "no node reports"),
        (
            {"nodes": (node(), replace(node("n2"), alive=False))},
            "nodes",
            WARN,
            "n2 do not report (1 of 2 do)",
        ),
        ({"nodes": (replace(node(), identity=None),)}, "node identity", FAIL, "n1 can't be read"),
        ({"nodes": (node(routing_block_size=512),)}, "block size", FAIL, "n1 cut prompts in blocks of 512"),
        ({"nodes": (node(engine_block_size=48),)}, "block size", FAIL, "no multiple"),
        ({"nodes": (node(), node("n2", v=2))}, "node versions", WARN, "1 x 1, 1 x 2"),
    ],
)
def test_a_pool_s_faults_are_found(changed: dict[str, Any], check: str, status: Status, words: str) -> None:
    finding = the(check, pool_findings(replace(POOL, **changed), NEEDS))
    assert finding.status is status
    assert words in finding.found
    assert finding.fix


def test_nodes_that_tell_no_cache_need_no_block_size() -> None:
    silent = node("n2", routing_block_size=0, engine_block_size=48)
    finding = the("block size", pool_findings(replace(POOL, nodes=(node(), silent)), NEEDS))
    assert (finding.status, finding.found[:16]) == (OK, "1 of 2 nodes tel")


def test_fenced_node_that_reports_is_told_beside_the_others() -> None:
    fenced = replace(node("n2"), is_fenced=True)
    findings = of("nodes", pool_findings(replace(POOL, nodes=(node(), fenced)), NEEDS))
    assert [finding.status for finding in findings] == [OK, WARN]
    assert "n2 report although" in findings[1].found


def test_forgotten_nodes_are_named_without_alarm() -> None:
    findings = of("nodes", pool_findings(replace(POOL, forgotten=("old",)), NEEDS))
    assert [finding.status for finding in findings] == [OK, OK]
    assert "old" in findings[1].found


def test_many_nodes_are_not_all_named() -> None:
    lost = tuple(replace(node(f"n{number}"), alive=False) for number in range(9))
    finding = the("nodes", pool_findings(replace(POOL, nodes=(node("up"), *lost)), NEEDS))
    assert "n4 and 4 more" in finding.found
    assert "n5" not in finding.found


def some(*statuses: Status) -> list[Finding]:
    """A finding for each status."""
    return [Finding(check=f"c{at}", status=status, found="f", fix="x") for at, status in enumerate(statuses)]


@pytest.mark.parametrize(
    ("statuses", "is_reached", "code"),
    [
        ((OK, WARN, UNKNOWN), True, 0),
        ((OK, FAIL), True, 1),
        ((FAIL,), False, 2),
        ((), True, 0),
    ],
)
def test_exit_code_tells_failures_from_absent_servers(
    statuses: tuple[Status, ...], is_reached: bool, code: int
) -> None:
    assert exit_code(some(*statuses), is_reached=is_reached) == code


def test_text_is_coloured_only_when_asked() -> None:
    findings = some(OK, FAIL)
    plain, coloured = as_text(findings, colour=False), as_text(findings, colour=True)
    assert "\033" not in plain
    assert coloured.count("\033[") == 4
    assert re.sub(r"\033\[[\d;]+m", "", coloured) == plain
    assert plain.splitlines()[-1] == "1 ok, 1 fail"
    assert json.dumps(plain).count("fix: x") == 2


def test_text_gathers_topics_with_the_same_fault_and_the_same_fix() -> None:
    alike = [Finding(check="c", status=WARN, found=f"{topic}: lone", fix="x") for topic in "ab"]
    other = Finding(check="c", status=WARN, found="d: dull", fix="y")
    lines = as_text([*alike, other], colour=False).splitlines()
    assert [line.partition("  c  ")[2] for line in lines if "  c  " in line] == ["a, b: lone", "d: dull"]
    assert lines[-1] == "3 warn"
    unlike = [alike[0], replace(alike[1], found="b: lost")]
    assert "a: lone" in as_text(unlike, colour=False)
    assert "b: lost" in as_text(unlike, colour=False)


@pytest.mark.parametrize(
    ("transactional_id", "found", "fix"),
    [
        ("it's theirs", 'of transactional id "it\'s theirs"', "--transactionalId 'it'\"'\"'s theirs', which"),
        ("", "of nobody that Kafka names", "kafka-transactions.sh --bootstrap-server k:9092 abort"),
        (None, "of somebody", "describe-producers --topic flexlb.p.outcomes --partition 2; then"),
    ],
)
def test_an_open_transaction_is_told_with_whose_it_is_as_far_as_known(
    transactional_id: str | None, found: str, fix: str
) -> None:
    held = HeldUp(partition=2, offset=7, behind=3, transactional_id=transactional_id)
    (finding,) = [
        one
        for one in kafka_findings(replace(KAFKA, held_up=(held,)), NEEDS)
        if one.check == "kafka open transactions"
    ]
    assert finding.status is Status.FAIL
    assert f"flexlb.p.outcomes[2]: a transaction {found}, open since offset 7, holds up 3" in finding.found
    assert fix in finding.fix
    assert "abort --topic flexlb.p.outcomes --partition 2 --start-offset 7" in finding.fix
