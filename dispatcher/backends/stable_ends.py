"""Where a topic ends for whoever reads committed records only, and where for the others.

An open transaction, whoever began it, holds the first back: what is committed after its first record waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiokafka import TopicPartition

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.backends.topics import partition_counts
from dispatcher.errors import LogUnavailable


@dataclass(frozen=True, kw_only=True)
class StableEnd:
    """Of one partition: `stable` is Kafka's last stable offset, `end` its high watermark."""

    stable: int
    end: int


async def stable_ends(kafka: KafkaClients, topic: str) -> dict[int, StableEnd]:
    """Both ends of each partition of a topic.

    Raises:
        LogUnavailable: the broker did not answer, or the topic does not exist.
    """
    found = []
    try:
        count = (await partition_counts(kafka, [topic]))[topic]
        partitions = [TopicPartition(topic, number) for number in range(count)]
        for isolation in ("read_committed", "read_uncommitted"):
            consumer = kafka.consumer(group_id=None, isolation_level=isolation)
            try:
                await consumer.start()
                found.append(await consumer.end_offsets(partitions))
            finally:
                await close_kafka_client(consumer)
    except NO_ANSWER as error:
        raise LogUnavailable(f"ends of {topic}: {error!r}") from error
    stable, ends = found
    return {tp.partition: StableEnd(stable=stable[tp], end=ends[tp]) for tp in partitions}
