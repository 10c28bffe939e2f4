"""Ask a Kafka cluster for the facts that findings need."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.protocol.admin import ApiVersionRequest

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.open_transactions import transactional_id_at
from dispatcher.backends.stable_ends import stable_ends
from dispatcher.doctor.facts import ClockReading, HeldUp, KafkaFacts, Probe, TopicFacts
from dispatcher.errors import LogUnavailable
from dispatcher.protocol.names import Names

TIMEOUT_S = 15.0
INTERNAL = ("__transaction_state", "__consumer_offsets")
BROKER_KEYS = ("auto.create.topics.enable", "offsets.retention.minutes")
STANDS_STILL_S = 3.0
"""A transaction that was open for so long is none of a leader's, unless Kafka is slow."""
PROBE = b'{"probe": "flexlb doctor; this transaction is aborted"}'


async def ask_kafka(kafka: KafkaClients, names: Names, *, bootstrap: str, probe: bool) -> KafkaFacts:
    """Gather facts of a cluster and a pool's topics.

    Args:
        probe: write one record to the dead letters in a transaction that is aborted.
    Raises:
        LogUnavailable: the cluster did not answer in time.
    """
    admin = kafka.admin(request_timeout_ms=int(TIMEOUT_S * 1000))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await admin.start()
            cluster = await admin.describe_cluster()
            described = await admin.describe_topics()
            found = {one["topic"]: one for one in described}
            configs = await _topic_configs(admin, [name for name in names.topics if name in found])
            brokers = [int(broker["node_id"]) for broker in cluster["brokers"]]
            broker_config = await _broker_config(admin, brokers)
            apis = await _apis(admin)
    except (KafkaError, OSError, TimeoutError) as error:
        raise LogUnavailable(f"{bootstrap}: Kafka did not answer: {_in_words(error)}") from error
    finally:
        await admin.close()
    topics = {
        name: _topic(found[name], configs.get(name)) if name in found else None for name in names.topics
    }
    return KafkaFacts(
        bootstrap=bootstrap,
        brokers=len(brokers),
        apis=apis,
        topics=topics,
        internal={name: _topic(found[name], None) for name in INTERNAL if name in found and len(brokers) > 1},
        broker_config=broker_config,
        probe=await _probe(kafka, names) if probe and topics[names.dead] is not None else None,
        held_up=await _held_up(kafka, names.outcomes) if topics[names.outcomes] is not None else (),
    )


async def _held_up(kafka: KafkaClients, topic: str) -> tuple[HeldUp, ...] | None:
    """Look at the ends of a topic, and once more if a transaction is open there."""
    try:
        before = await stable_ends(kafka, topic)
        if all(one.stable >= one.end for one in before.values()):
            return ()
        await asyncio.sleep(STANDS_STILL_S)
        after = await stable_ends(kafka, topic)
    except LogUnavailable:
        return None
    held = {
        partition: one
        for partition, one in sorted(after.items())
        if one.stable < one.end and partition in before and before[partition].stable == one.stable
    }
    whose = await _whose(kafka, topic, {partition: one.stable for partition, one in held.items()})
    return tuple(
        HeldUp(
            partition=partition,
            offset=one.stable,
            behind=one.end - one.stable,
            transactional_id=whose.get(partition),
        )
        for partition, one in held.items()
    )


async def _whose(kafka: KafkaClients, topic: str, offsets: Mapping[int, int]) -> dict[int, str | None]:
    """The transactional ids of what is open since these offsets, by partition; none where Kafka is silent."""
    if not offsets:
        return {}
    admin = kafka.admin(request_timeout_ms=int(TIMEOUT_S * 1000))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await admin.start()
            return {
                partition: await transactional_id_at(admin, topic, partition, offset)
                for partition, offset in offsets.items()
            }
    except (KafkaError, OSError, TimeoutError):
        return {}
    finally:
        await admin.close()


def _in_words(error: BaseException) -> str:
    # Its own text repeats the address in the library's terms.
    return "no connection" if isinstance(error, KafkaConnectionError) else str(error) or type(error).__name__


def _topic(described: Mapping[str, Any], config: Mapping[str, str] | None) -> TopicFacts:
    partitions = described["partitions"]
    return TopicFacts(
        partitions=len(partitions),
        replicas=min((len(one["replicas"]) for one in partitions), default=0),
        in_sync=min((len(one["isr"]) for one in partitions), default=0),
        leaderless=sum(one["leader"] < 0 for one in partitions),
        config=config,
    )


async def _topic_configs(admin: Any, topics: list[str]) -> dict[str, dict[str, str]]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics]
    return _configs(await admin.describe_configs(resources)) if resources else {}


async def _broker_config(admin: Any, brokers: Iterable[int]) -> dict[str, str] | None:
    """What all brokers agree on, the worse where they do not; None when none tells."""
    wanted = dict.fromkeys(BROKER_KEYS)
    resources = [ConfigResource(ConfigResourceType.BROKER, str(broker), wanted) for broker in brokers]
    told = list(_configs(await admin.describe_configs(resources)).values())
    if not told:
        return None
    worst: dict[str, str] = {}
    for config in told:
        for key, value in config.items():
            if key == "offsets.retention.minutes" and key in worst:
                value = min(value, worst[key], key=int)
            if worst.get(key) != "true":
                worst[key] = value
    return worst


def _configs(answers: Iterable[Any]) -> dict[str, dict[str, str]]:
    return {
        str(resource["resource_name"]): {
            entry["config_names"]: entry["config_value"]
            for entry in resource["config_entries"]
            if entry["config_value"] is not None
        }
        for answer in answers
        for resource in answer.to_object()["resources"]
        if not resource["error_code"]
    }


async def _apis(admin: Any) -> dict[int, int]:
    # The admin client has no public way to ask which APIs a broker has.
    answer = await admin._send_request(ApiVersionRequest())
    return {int(key): int(highest) for key, _, highest in answer.api_versions}


async def _probe(kafka: KafkaClients, names: Names) -> Probe:
    """Begin a transaction of our own, write one record and abort it: readers of outcomes never see it."""
    producer = kafka.producer(
        transactional_id=f"{names.transactional_id.rpartition('.')[0]}.doctor",
        enable_idempotence=True,
        acks="all",
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await producer.start()
            clock: ClockReading | None = None
            for _ in range(2):  # the first write also finds the partition's leader
                await producer.begin_transaction()
                sent_s = time.time()
                lies = await producer.send_and_wait(names.dead, PROBE, partition=0)
                answered_s = time.time()
                await producer.abort_transaction()
                if lies.timestamp_type == 1:
                    clock = reading(sent_s, lies.timestamp / 1000, answered_s)
            return Probe(clock=clock)
    except (KafkaError, OSError, TimeoutError) as error:
        return Probe(error=f"{type(error).__name__} {error}".strip())
    finally:
        await close_kafka_client(producer)


def reading(asked_s: float, theirs_s: float, answered_s: float) -> ClockReading:
    """Another clock's answer, read between two looks at ours."""
    return ClockReading(
        offset_s=theirs_s - (asked_s + answered_s) / 2, within_s=(answered_s - asked_s) / 2 + 0.001
    )
