"""What is right and wrong with a Kafka cluster, from facts alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping

from dispatcher.doctor.clock_findings import clock_finding
from dispatcher.doctor.facts import Finding, HeldUp, KafkaFacts, Needs, Status, TopicFacts

FETCH, INIT_PRODUCER_ID, TXN_OFFSET_COMMIT = 1, 22, 28
VERSIONS = ((18, "4.1"), (17, "3.9"), (16, "3.7"), (15, "3.5"), (13, "3.1"), (12, "2.7"), (11, "2.3"))
"""The first Kafka whose Fetch API goes up to a number."""
OLDEST_FETCH = 12
SAFE_REPLICAS = 3

Fault = tuple[Status, str, str]
"""Status, what was found, the fix."""


def kafka_findings(facts: KafkaFacts, needs: Needs) -> list[Finding]:
    """Judge a cluster that answered."""
    existing = {name: topic for name, topic in facts.topics.items() if topic is not None}
    return [
        _version(facts),
        *_topics(facts, needs),
        *_per_topic("kafka partitions", existing, _led, "every partition has a leader in sync"),
        *_lanes(existing, needs),
        *_per_topic(
            "kafka retention",
            existing,
            lambda name, topic: _retention(facts, needs, name, topic),
            f"records outlive twice the longest deadline ({_days(2 * needs.longest_deadline_s * 1000)})",
        ),
        *_per_topic(
            "kafka record size",
            existing,
            lambda name, topic: _record_size(facts, needs, name, topic),
            "every topic takes the largest record that is sent to it",
        ),
        *_per_topic(
            "kafka timestamps",
            existing,
            lambda name, topic: _timestamps(facts, needs, name, topic),
            "records carry the broker's append time",
        ),
        *_per_topic(
            "kafka cleanup",
            existing,
            lambda name, topic: _cleanup(facts, name, topic),
            "cleanup.policy is delete",
        ),
        *_per_topic(
            "kafka replication",
            {**existing, **facts.internal},
            lambda name, topic: _replication(facts, name, topic),
            f"{SAFE_REPLICAS} or more replicas, one of which may be lost",
        ),
        _auto_create(facts),
        _offsets_retention(facts, needs),
        _transactions(facts, needs),
        *_held_up(facts, needs),
        clock_finding("clock of Kafka", facts.probe.clock if facts.probe else None),
    ]


def version_of(apis: Mapping[int, int]) -> str:
    """The Kafka version that a broker's APIs show, e.g. '3.7 or newer'."""
    highest = apis.get(FETCH, 0)
    return next((f"{version} or newer" for api, version in VERSIONS if highest >= api), "older than 2.3")


def _version(facts: KafkaFacts) -> Finding:
    brokers = "1 broker" if facts.brokers == 1 else f"{facts.brokers} brokers"
    found = f"{brokers} at {facts.bootstrap}, Kafka {version_of(facts.apis)} by its APIs"
    if not facts.apis:
        return Finding(check="kafka version", status=Status.UNKNOWN, found=f"{brokers}; no APIs were told")
    if not {INIT_PRODUCER_ID, TXN_OFFSET_COMMIT} <= facts.apis.keys():
        fix = "use Apache Kafka 2.7 or newer, or a broker that has transactions"
        return Finding(check="kafka version", status=Status.FAIL, found=f"{found}: no transactions", fix=fix)
    if facts.apis.get(FETCH, 0) < OLDEST_FETCH:
        return Finding(
            check="kafka version", status=Status.WARN, found=found, fix="use Apache Kafka 2.7 or newer"
        )
    return Finding(check="kafka version", status=Status.OK, found=found)


def _topics(facts: KafkaFacts, needs: Needs) -> list[Finding]:
    missing = [name for name, topic in facts.topics.items() if topic is None]
    if not missing:
        return [
            Finding(check="kafka topics", status=Status.OK, found=f"all {len(facts.topics)} topics exist")
        ]
    fix = (
        f"flexlb init --kafka {facts.bootstrap} --pool {needs.pool} --topic-partitions {needs.partitions} "
        f"--topic-replication {min(max(needs.replication, 1), facts.brokers)}"
    )
    return [
        Finding(check="kafka topics", status=Status.FAIL, found=f"{name}: missing", fix=fix)
        for name in missing
    ]


def _per_topic(
    check: str,
    topics: Mapping[str, TopicFacts],
    judge: Callable[[str, TopicFacts], Fault | None],
    well: str,
) -> list[Finding]:
    """One finding for each topic at fault, or a single one that all is well."""
    if not topics:
        return []
    faults = [fault for name, topic in topics.items() if (fault := judge(name, topic)) is not None]
    if not faults:
        return [Finding(check=check, status=Status.OK, found=well)]
    return [Finding(check=check, status=status, found=found, fix=fix) for status, found, fix in faults]


def _untold(name: str) -> Fault:
    return (
        Status.UNKNOWN,
        f"{name}: the broker does not tell its configuration",
        f"allow DescribeConfigs on topic {name} to this user",
    )


def _alter(facts: KafkaFacts, name: str, setting: str) -> str:
    return (
        f"kafka-configs.sh --bootstrap-server {facts.bootstrap} --alter --entity-type topics "
        f"--entity-name {name} --add-config {setting}"
    )


def _led(name: str, topic: TopicFacts) -> Fault | None:
    if topic.leaderless or topic.in_sync < 1:
        found = f"{name}: {topic.leaderless or 'some'} of {topic.partitions} partitions have no leader"
        return Status.FAIL, found, "bring the brokers back that hold its replicas"
    if topic.in_sync < topic.replicas:
        found = f"{name}: only {topic.in_sync} of {topic.replicas} replicas are in sync"
        return Status.WARN, found, "bring the lagging brokers back"
    return None


def _lanes(topics: Mapping[str, TopicFacts], needs: Needs) -> list[Finding]:
    counts = {name: topics[name].partitions for name in needs.lanes if name in topics}
    if len(counts) < len(needs.lanes):
        return []
    told = ", ".join(f"{name} has {count}" for name, count in counts.items())
    if len(set(counts.values())) == 1:
        return [Finding(check="kafka lanes", status=Status.OK, found=f"partitions: {told}")]
    low = min(counts, key=lambda name: counts[name])
    fix = f"kafka-topics.sh --alter --topic {low} --partitions {max(counts.values())}"
    return [Finding(check="kafka lanes", status=Status.WARN, found=f"partitions differ: {told}", fix=fix)]


def _retention(facts: KafkaFacts, needs: Needs, name: str, topic: TopicFacts) -> Fault | None:
    if name not in needs.keeps:
        return None
    if topic.config is None:
        return _untold(name)
    need_ms = int(2 * needs.longest_deadline_s * 1000)
    kept_ms = _number(topic.config, "retention.ms")
    if kept_ms is not None and 0 <= kept_ms < need_ms:
        found = f"{name}: records live {_days(kept_ms)}, a request up to {_days(need_ms / 2)}"
        return Status.FAIL, found, _alter(facts, name, f"retention.ms={need_ms}")
    kept_bytes = _number(topic.config, "retention.bytes")
    if kept_bytes is not None and kept_bytes >= 0:
        found = f"{name}: records are dropped beyond {kept_bytes} bytes a partition, however young"
        return Status.WARN, found, _alter(facts, name, "retention.bytes=-1")
    return None


def _record_size(facts: KafkaFacts, needs: Needs, name: str, topic: TopicFacts) -> Fault | None:
    need = needs.sizes.get(name, 0)
    if topic.config is None:
        return _untold(name) if need else None
    limit = _number(topic.config, "max.message.bytes")
    if limit is None or limit >= need:
        return None
    found = f"{name}: takes records up to {limit} bytes, and up to {need} are sent"
    return Status.FAIL, found, _alter(facts, name, f"max.message.bytes={need}")


def _timestamps(facts: KafkaFacts, needs: Needs, name: str, topic: TopicFacts) -> Fault | None:
    if topic.config is None:
        return _untold(name)
    kind = topic.config.get("message.timestamp.type", "LogAppendTime")
    if kind == "LogAppendTime":
        return None
    is_lane = name in needs.lanes
    meaning = "deadlines would count from producers' clocks" if is_lane else "times would be producers' own"
    fix = _alter(facts, name, "message.timestamp.type=LogAppendTime")
    return (Status.FAIL if is_lane else Status.WARN), f"{name}: timestamps are {kind}: {meaning}", fix


def _cleanup(facts: KafkaFacts, name: str, topic: TopicFacts) -> Fault | None:
    if topic.config is None:
        return _untold(name)
    policy = topic.config.get("cleanup.policy", "delete")
    if policy == "delete":
        return None
    found = f"{name}: cleanup.policy is {policy}: compaction removes records that are still needed"
    return Status.FAIL, found, _alter(facts, name, "cleanup.policy=delete")


def _replication(facts: KafkaFacts, name: str, topic: TopicFacts) -> Fault | None:
    least = _number(topic.config or {}, "min.insync.replicas") or 1
    if least > topic.replicas:
        found = f"{name}: min.insync.replicas {least} with {topic.replicas} replicas: no write is accepted"
        return Status.FAIL, found, _alter(facts, name, f"min.insync.replicas={max(topic.replicas - 1, 1)}")
    if topic.replicas == 1:
        found = f"{name}: one replica: the loss of one disk loses requests"
        fix = f"on {SAFE_REPLICAS} or more brokers: kafka-reassign-partitions.sh, or set topic_replication"
        return Status.WARN, found, f"{fix} = {SAFE_REPLICAS} and create the pool anew"
    if least == topic.replicas:
        found = f"{name}: min.insync.replicas {least} of {topic.replicas}: one broker down stops writes"
        return Status.WARN, found, _alter(facts, name, f"min.insync.replicas={topic.replicas - 1}")
    if topic.config is not None and topic.replicas >= SAFE_REPLICAS and least == 1:
        found = (
            f"{name}: min.insync.replicas 1 of {topic.replicas}: an accepted record may be on one disk only"
        )
        return Status.WARN, found, _alter(facts, name, "min.insync.replicas=2")
    return None


def _auto_create(facts: KafkaFacts) -> Finding:
    check, key = "kafka auto-creation", "auto.create.topics.enable"
    if facts.broker_config is None or key not in facts.broker_config:
        return Finding(check=check, status=Status.UNKNOWN, found=f"{key} is not told to this user")
    if facts.broker_config[key] == "true":
        return Finding(
            check=check,
            status=Status.WARN,
            found="brokers create topics on first use, with one partition and their own defaults",
            fix=f"{key}=false in server.properties of each broker, and restart it",
        )
    return Finding(check=check, status=Status.OK, found="brokers create no topics by themselves")


def _offsets_retention(facts: KafkaFacts, needs: Needs) -> Finding:
    check, key = "kafka offsets", "offsets.retention.minutes"
    minutes = _number(facts.broker_config or {}, key)
    if minutes is None:
        return Finding(check=check, status=Status.UNKNOWN, found=f"{key} is not told to this user")
    need = int(2 * needs.longest_deadline_s / 60)
    told = f"committed marks of a pool without a dispatcher live {_days(minutes * 60_000)}"
    if minutes >= need:
        return Finding(check=check, status=Status.OK, found=told)
    fix = f"{key}={need} in server.properties of each broker, and restart it"
    return Finding(check=check, status=Status.WARN, found=told, fix=fix)


def _transactions(facts: KafkaFacts, needs: Needs) -> Finding:
    check = "kafka transactions"
    if facts.probe is None:
        return Finding(
            check=check,
            status=Status.UNKNOWN,
            found="not tried",
            fix="create the topics; leave out --no-probe",
        )
    if facts.probe.error:
        return Finding(
            check=check,
            status=Status.FAIL,
            found=f"a transaction failed: {facts.probe.error}",
            fix="check __transaction_state (transaction.state.log.replication.factor up to the number of "
            f"brokers) and ACLs: Write and Describe on transactional id flexlb.{needs.pool}.*",
        )
    return Finding(check=check, status=Status.OK, found="a transaction was begun, written to and aborted")


def _held_up(facts: KafkaFacts, needs: Needs) -> list[Finding]:
    check, topic = "kafka open transactions", f"flexlb.{needs.pool}.outcomes"
    if facts.held_up is None:
        return [Finding(check=check, status=Status.UNKNOWN, found=f"the ends of {topic} are not told")]
    if not facts.held_up:
        return [Finding(check=check, status=Status.OK, found="no transaction holds up readers of outcomes")]
    return [
        Finding(
            check=check,
            status=Status.FAIL,
            found=f"{topic}[{one.partition}]: a transaction {_of_whom(one)}, open since offset {one.offset}, "
            f"holds up {one.behind} records: nobody who reads committed records gets those",
            fix=_end_it(facts, topic, one),
        )
        for one in facts.held_up
    ]


def _of_whom(held: HeldUp) -> str:
    if held.transactional_id:
        return f"of transactional id {held.transactional_id!r}"
    return "of nobody that Kafka names" if held.transactional_id == "" else "of somebody"


def _end_it(facts: KafkaFacts, topic: str, held: HeldUp) -> str:
    """The command that ends a transaction; by its id its producer is fenced too."""
    tool = f"kafka-transactions.sh --bootstrap-server {facts.bootstrap}"
    place = f"--topic {topic} --partition {held.partition}"
    abort = f"{tool} abort {place} --start-offset {held.offset}"
    if held.transactional_id:
        by_id = f"--transactionalId {shlex.quote(held.transactional_id)}"
        return (
            f"{tool} forceTerminateTransaction {by_id}, which fences its producer too (Kafka 4.1); with "
            f"older tools: {abort}, after which a producer that lives may go on"
        )
    if held.transactional_id == "":
        return abort
    return f"see whose it is: {tool} describe-producers {place}; then: {abort}"


def _number(config: Mapping[str, str], key: str) -> int | None:
    try:
        return int(config[key])
    except (KeyError, ValueError):
        return None


def _days(ms: float) -> str:
    hours = ms / 3_600_000
    if hours >= 48:
        return f"{hours / 24:.4g} days"
    return f"{hours:.4g} h" if hours >= 1 else f"{ms / 1000:.4g} s"
