"""What a pool was sent and how it ended, read from Kafka for whoever wants to look at it again.

Reading only: no group, no commits, nothing produced, so that the pool doesn't know of it. What is appended
while it is read is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from aiokafka import TopicPartition

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.backends.request_log import LogRecord, record_of
from dispatcher.backends.topic_ranges import Ranges, ranges_of, read_ranges
from dispatcher.backends.topics import partition_counts
from dispatcher.errors import LogRefused
from dispatcher.protocol.names import Lane, Names

POLL_MS = 500
STALL_S = 30.0
"""Without a record for so long before the end the read is given up."""
FETCH_BYTES = 4 << 20

Told = Callable[[str, int, int], None]
"""Is told of which topic how many of how many offsets were read."""


class TrafficLog:
    """The requests of one pool's interactive lane and the outcomes of both.

    Args:
        told: is told how far a read is, after each answer of the brokers.
    """

    def __init__(self, kafka: KafkaClients, names: Names, told: Told = lambda topic, read, of: None) -> None:
        self._kafka = kafka
        self._names = names
        self._told = told

    async def requests(
        self, *, since_ms: int | None = None, last: int | None = None
    ) -> AsyncGenerator[LogRecord, None]:
        """Records appended from `since_ms` on, by partition; of each partition no more than its `last`.

        Raises:
            LogRefused: there are none.
            LogUnavailable: the broker did not answer, or the topic does not exist.
        """
        topic = self._names.requests(Lane.INTERACTIVE)
        async with self._reading(topic) as consumer:
            ranges = await ranges_of(consumer, since_ms=since_ms, last=last)
            if not any(first < end for first, end in ranges.values()):
                raise LogRefused(await self._nothing(consumer, topic, since_ms))
            async for record in self._read(consumer, topic, ranges):
                yield record_of(Lane.INTERACTIVE, record)

    async def outcomes(self, since_ms: int) -> AsyncGenerator[bytes, None]:
        """Values of the outcomes published from `since_ms` on.

        Raises:
            LogUnavailable: the broker did not answer, or the topic does not exist.
        """
        topic = self._names.outcomes
        async with self._reading(topic) as consumer:
            async for record in self._read(consumer, topic, await ranges_of(consumer, since_ms=since_ms)):
                yield record.value or b""

    @contextlib.asynccontextmanager
    async def _reading(self, topic: str) -> AsyncIterator[Any]:
        consumer = self._kafka.consumer(
            group_id=None,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            fetch_max_bytes=4 * FETCH_BYTES,
            max_partition_fetch_bytes=FETCH_BYTES,
        )
        try:
            count = (await partition_counts(self._kafka, [topic]))[topic]
            await consumer.start()
            consumer.assign([TopicPartition(topic, number) for number in range(count)])
            yield consumer
        except NO_ANSWER as error:
            raise self._kafka.unanswered(f"read {topic}", error) from error
        finally:
            await close_kafka_client(consumer)

    def _read(self, consumer: Any, topic: str, ranges: Ranges) -> AsyncIterator[Any]:
        return read_ranges(
            consumer,
            ranges,
            poll_ms=POLL_MS,
            stall_s=STALL_S,
            told=lambda read, of: self._told(topic, read, of),
        )

    async def _nothing(self, consumer: Any, topic: str, since_ms: int | None) -> str:
        partitions = sorted(consumer.assignment())
        starts, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        held = sum(ends[tp] - starts[tp] for tp in partitions)
        if not held or since_ms is None:
            return (
                f"topic {topic}: expected requests, seen none; check --pool, or whether retention took them"
            )
        since = datetime.fromtimestamp(since_ms / 1000, UTC).isoformat(timespec="seconds")
        return (
            f"topic {topic}: expected requests since {since}, seen only older ones ({held}); go further back"
        )
