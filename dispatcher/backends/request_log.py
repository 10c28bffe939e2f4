"""The leader's reading side of Kafka: request lanes by manual assignment, and cancels.

Positions are ours to choose (they come from Redis marks or from the *finished* commit), so no
consumer group moves partitions. A position below the log's start is reported, never reset silently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.backends.topics import partition_counts
from dispatcher.errors import LogUnavailable
from dispatcher.protocol.names import Lane, Names, Ref

Ends = Mapping[TopicPartition, int]
RECORD_S = 10.0
READ_ON_MS = 20
"""The client moves past control records only when it gives nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRecord:
    """One record of a request lane."""

    ref: Ref
    key: bytes | None
    value: bytes | None
    timestamp_ms: int
    traceparent: str


def source_of(lane: Lane, partition: int) -> str:
    """The name of a lane's partition in marks, e.g. `i3`."""
    return f"{lane.value}{partition}"


class RequestLog:
    """Reads both lanes of one pool from given positions."""

    def __init__(self, kafka: KafkaClients, names: Names, *, max_batch_bytes: int = 4 << 20) -> None:
        self._names = names
        self._kafka = kafka
        self._consumer = kafka.consumer(
            group_id=None,
            fetch_max_wait_ms=500,
            fetch_max_bytes=max_batch_bytes * 4,
            max_partition_fetch_bytes=max_batch_bytes,
            isolation_level="read_committed",
            auto_offset_reset="none",
        )
        self._lanes: dict[TopicPartition, Lane] = {}
        self.reply_partitions = 0
        self._counts: dict[str, int] = {}
        self.reads = 0
        """How often `read` was called: by each call, what the one before returned has been taken."""

    async def start(self) -> None:
        """Connect and assign every partition of both lanes.

        Raises:
            LogUnavailable: the broker did not answer or the topics do not exist.
        """
        try:
            lanes = {self._names.requests(lane): lane for lane in Lane}
            counts = self._counts = await self._partition_counts()
            self.reply_partitions = counts[self._names.replies]
            await self._consumer.start()
            for topic, lane in lanes.items():
                for partition in range(counts[topic]):
                    self._lanes[TopicPartition(topic, partition)] = lane
            self._consumer.assign(list(self._lanes))
        except NO_ANSWER as error:
            raise LogUnavailable(f"request log: {error!r}") from error

    async def _partition_counts(self) -> dict[str, int]:
        names = self._names
        topics = [*map(names.requests, Lane), names.replies, names.cancels]
        return await partition_counts(self._kafka, topics)

    async def has_grown(self) -> bool:
        """Whether a topic has other partitions than those found at the start.

        Raises:
            LogUnavailable: the broker did not answer.
        """
        return await self._partition_counts() != self._counts

    async def stop(self) -> None:
        """Close the connection."""
        await close_kafka_client(self._consumer)

    def sources(self) -> list[str]:
        """Every lane's partition, as named in marks."""
        return [source_of(lane, tp.partition) for tp, lane in self._lanes.items()]

    async def log_starts(self) -> dict[str, int]:
        """The first offset that each partition still has."""
        try:
            starts = await self._consumer.beginning_offsets(list(self._lanes))
        except NO_ANSWER as error:
            raise LogUnavailable(f"request log: {error!r}") from error
        return {source_of(self._lanes[tp], tp.partition): offset for tp, offset in starts.items()}

    async def ends(self) -> Ends:
        """Where each partition ends now.

        Raises:
            LogUnavailable: the broker did not answer.
        """
        return await _ends(self._consumer, list(self._lanes))

    async def log_ends(self) -> dict[str, int]:
        """The same by source, to be sought."""
        ends = await self.ends()
        return {source_of(self._lanes[tp], tp.partition): end for tp, end in ends.items()}

    async def has_read(self, ends: Ends) -> bool:
        """Whether `read` has returned everything below `ends`."""
        return await _has_read(self._consumer, ends)

    def seek(self, positions: Mapping[str, int]) -> None:
        """Read on from these offsets."""
        for tp, lane in self._lanes.items():
            self._consumer.seek(tp, positions[source_of(lane, tp.partition)])

    def pause(self, sources: set[str]) -> None:
        """Read only the partitions not in `sources`."""
        paused = self._consumer.paused()
        for tp, lane in self._lanes.items():
            if source_of(lane, tp.partition) in sources:
                if tp not in paused:
                    self._consumer.pause(tp)
            elif tp in paused:
                self._consumer.resume(tp)

    async def read(self, *, timeout_ms: int, limit: int) -> list[LogRecord]:
        """Up to `limit` next records; [] when none came within `timeout_ms`."""
        self.reads += 1
        try:
            batches = await self._consumer.getmany(timeout_ms=timeout_ms, max_records=limit)
        except NO_ANSWER as error:
            raise LogUnavailable(f"request log: {error!r}") from error
        records = []
        for tp, batch in batches.items():
            lane = self._lanes[tp]
            records += [record_of(lane, record) for record in batch]
        return records

    async def record_at(self, ref: Ref) -> LogRecord | None:
        """The record at one place, wherever `read` stands; None when it is gone.

        Raises:
            LogUnavailable: the broker did not answer.
        """
        tp = TopicPartition(self._names.requests(ref.lane), ref.partition)
        consumer = self._kafka.consumer(
            group_id=None,
            fetch_max_wait_ms=500,
            isolation_level="read_committed",
            auto_offset_reset="none",
        )
        try:
            async with asyncio.timeout(RECORD_S):
                await consumer.start()
                consumer.assign([tp])
                start = (await consumer.beginning_offsets([tp]))[tp]
                end = (await consumer.end_offsets([tp]))[tp]
                if not start <= ref.offset < end:
                    return None
                consumer.seek(tp, ref.offset)
                found: list[LogRecord] = []
                while not found and await consumer.position(tp) < end:
                    for batch in (await consumer.getmany(tp, timeout_ms=READ_ON_MS, max_records=1)).values():
                        found += [record_of(ref.lane, record) for record in batch]
        except OffsetOutOfRangeError:
            return None
        except NO_ANSWER as error:
            raise LogUnavailable(f"request {ref}: {error!r}") from error
        finally:
            await close_kafka_client(consumer)
        return found[0] if found and found[0].ref == ref else None


def record_of(lane: Lane, record: Any) -> LogRecord:
    """A record of a lane, as the client library gives it."""
    return LogRecord(
        ref=Ref(lane, record.partition, record.offset),
        key=record.key,
        value=record.value,
        timestamp_ms=record.timestamp,
        traceparent=_traceparent(record.headers),
    )


async def _ends(consumer: Any, partitions: list[TopicPartition]) -> Ends:
    try:
        found: Ends = await consumer.end_offsets(partitions)
    except NO_ANSWER as error:
        raise LogUnavailable(f"ends: {error!r}") from error
    return found


async def _has_read(consumer: Any, ends: Ends) -> bool:
    for tp, end in ends.items():
        if await consumer.position(tp) < end:
            return False
    return True


def _traceparent(headers: object) -> str:
    for name, value in headers or ():  # type: ignore[attr-defined]
        if name == "traceparent" and value is not None:
            return str(value.decode("ascii", "replace")[:64])
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelRecord:
    """One record of `requests.cancel`."""

    value: bytes
    appended_ms: int


class CancelLog:
    """Follows `requests.cancel` from a little before now."""

    def __init__(self, kafka: KafkaClients, names: Names) -> None:
        self._kafka = kafka
        self._topic = names.cancels
        self._partitions: list[TopicPartition] = []
        self._consumer = kafka.consumer(
            group_id=None, fetch_max_wait_ms=500, isolation_level="read_committed", auto_offset_reset="latest"
        )

    async def start(self, since_ms: int) -> None:
        """Connect and begin at the first record not older than `since_ms`."""
        try:
            count = (await partition_counts(self._kafka, [self._topic]))[self._topic]
            partitions = self._partitions = [TopicPartition(self._topic, number) for number in range(count)]
            await self._consumer.start()
            self._consumer.assign(partitions)
            # The ends first: a record appended between the two calls is then found by its time.
            ends = await self._consumer.end_offsets(partitions)
            found = await self._consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
            for tp in partitions:
                at = found.get(tp)
                self._consumer.seek(tp, at.offset if at is not None else ends[tp])
        except NO_ANSWER as error:
            raise LogUnavailable(f"cancel log: {error!r}") from error

    async def stop(self) -> None:
        """Close the connection."""
        await close_kafka_client(self._consumer)

    async def read(self, *, timeout_ms: int) -> list[CancelRecord]:
        """The next records."""
        try:
            batches = await self._consumer.getmany(timeout_ms=timeout_ms, max_records=1000)
        except NO_ANSWER as error:
            raise LogUnavailable(f"cancel log: {error!r}") from error
        return [
            CancelRecord(value=record.value or b"", appended_ms=record.timestamp)
            for batch in batches.values()
            for record in batch
        ]

    async def ends(self) -> Ends:
        """Where each partition ends now.

        Raises:
            LogUnavailable: the broker did not answer.
        """
        return await _ends(self._consumer, self._partitions)

    async def has_read(self, ends: Ends) -> bool:
        """Whether `read` has returned everything below `ends`."""
        return await _has_read(self._consumer, ends)
