"""An operator's side of the dead letters: read them, find the original record, send it again, delete.

The leader writes dead letters; whoever reads them here holds no lock and moves no mark. A letter's place
is its partition and offset in `requests.dead`, which is also what deletion goes by.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.errors import MessageSizeTooLargeError, OffsetOutOfRangeError

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.backends.topics import MAX_RECORD_BYTES, partition_counts
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Names, Ref
from dispatcher.protocol.outcome import DeadLetter

READ_ON_MS = 20
"""The client moves past control records only when it gives nothing."""
RECORD_S = 10.0


@dataclass(frozen=True, kw_only=True)
class PlacedLetter:
    """A dead letter and where it lies; `letter` is None when it can't be read."""

    partition: int
    offset: int
    letter: DeadLetter | None

    @property
    def place(self) -> str:
        """Partition and offset, as `purge` takes them."""
        return f"{self.partition}:{self.offset}"


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a partition of the dead letters holds: offsets from `start` to below `end`."""

    start: int
    end: int


class DeadLog:
    """The dead letters of one pool."""

    def __init__(self, kafka: KafkaClients, names: Names) -> None:
        self._kafka = kafka
        self._names = names

    async def read(
        self, *, limit: int | None = None, refs: frozenset[str] | None = None
    ) -> list[PlacedLetter]:
        """Committed letters, oldest first: the newest `limit`, those of `refs` only.

        Raises:
            LogUnavailable: the broker did not answer, or the topic does not exist.
        """
        consumer = self._consumer("read_committed")
        found: deque[tuple[int, PlacedLetter]] = deque()
        try:
            partitions = await self._partitions(self._names.dead)
            await consumer.start()
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            for tp, start in (await consumer.beginning_offsets(partitions)).items():
                consumer.seek(tp, start)
            while behind := [tp for tp in partitions if await consumer.position(tp) < ends[tp]]:
                batches = await consumer.getmany(*behind, timeout_ms=READ_ON_MS)
                for record in (record for batch in batches.values() for record in batch):
                    placed = _placed(record)
                    if refs is None or (placed.letter is not None and placed.letter.ref in refs):
                        found.append((record.timestamp, placed))
                if limit is not None and len(found) > 2 * limit:
                    found = _newest(found, limit)
        except NO_ANSWER as error:
            raise self._unanswered("read dead letters", error) from error
        finally:
            await close_kafka_client(consumer)
        return [placed for _, placed in _newest(found, limit)]

    async def original(self, ref: Ref) -> bytes:
        """The record that `ref` names, from its lane's log.

        Raises:
            LogRefused: it is not there (any more).
            LogUnavailable: the broker did not answer.
        """
        topic = self._names.requests(ref.lane)
        where = f"{topic}[{ref.partition}] {ref.offset}"
        tp = TopicPartition(topic, ref.partition)
        consumer = self._consumer("read_uncommitted")
        try:
            if tp not in await self._partitions(topic):
                raise LogRefused(f"record: expected it at {where}, seen no such partition")
            await consumer.start()
            consumer.assign([tp])
            start = (await consumer.beginning_offsets([tp]))[tp]
            end = (await consumer.end_offsets([tp]))[tp]
            if not start <= ref.offset < end:
                raise LogRefused(
                    f"record: expected it at {where}, seen a log from {start} to {end}; "
                    "retention has taken it, or its topic was made anew"
                )
            consumer.seek(tp, ref.offset)
            async with asyncio.timeout(RECORD_S):
                record = await consumer.getone(tp)
        except OffsetOutOfRangeError as error:
            raise LogRefused(f"record: expected it at {where}, seen it deleted meanwhile") from error
        except NO_ANSWER as error:
            raise self._unanswered("read the record", error) from error
        finally:
            await close_kafka_client(consumer)
        if record.offset != ref.offset:
            raise LogRefused(
                f"record: expected it at {where}, seen the next at {record.offset}; it is deleted"
            )
        return record.value or b""

    async def append(self, lane: Lane, id: str, record: bytes) -> Ref:
        """Append a request to a lane; returns where it lies.

        Raises:
            LogRefused: it is above what the topic takes.
            LogUnavailable: the broker did not answer: it may have been appended.
        """
        producer = self._kafka.producer(
            acks="all", enable_idempotence=True, max_request_size=2 * MAX_RECORD_BYTES
        )
        try:
            await producer.start()
            written = await producer.send_and_wait(self._names.requests(lane), record, key=id.encode())
        except MessageSizeTooLargeError as error:
            raise LogRefused(f"record: {len(record)} bytes are above what the topic takes") from error
        except NO_ANSWER as error:
            raise self._unanswered("append the record", error) from error
        finally:
            await close_kafka_client(producer)
        return Ref(lane, written.partition, written.offset)

    async def spans(self) -> dict[int, Span]:
        """What each partition of the dead letters holds.

        Raises:
            LogUnavailable: the broker did not answer, or the topic does not exist.
        """
        consumer = self._consumer("read_committed")
        try:
            partitions = await self._partitions(self._names.dead)
            await consumer.start()
            starts = await consumer.beginning_offsets(partitions)
            ends = await consumer.end_offsets(partitions)
        except NO_ANSWER as error:
            raise self._unanswered("read dead letters", error) from error
        finally:
            await close_kafka_client(consumer)
        return {tp.partition: Span(start=starts[tp], end=ends[tp]) for tp in partitions}

    async def delete_below(self, offsets: Mapping[int, int]) -> dict[int, int]:
        """Delete the letters below an offset of each partition, for good; returns where each log begins now.

        Raises:
            LogUnavailable: the broker did not answer, or refused.
        """
        admin = self._kafka.admin()
        try:
            await admin.start()
            answer = await admin.delete_records(
                {
                    TopicPartition(self._names.dead, partition): RecordsToDelete(before_offset=offset)
                    for partition, offset in offsets.items()
                }
            )
        except NO_ANSWER as error:
            raise self._unanswered("delete dead letters", error) from error
        finally:
            await admin.close()
        return {tp.partition: start for tp, start in answer.items()}

    def _consumer(self, isolation: str) -> Any:
        return self._kafka.consumer(
            group_id=None, isolation_level=isolation, auto_offset_reset="none", fetch_max_wait_ms=READ_ON_MS
        )

    async def _partitions(self, topic: str) -> list[TopicPartition]:
        count = (await partition_counts(self._kafka, [topic]))[topic]
        return [TopicPartition(topic, number) for number in range(count)]

    def _unanswered(self, doing: str, error: BaseException) -> LogUnavailable:
        return self._kafka.unanswered(doing, error)


def _placed(record: Any) -> PlacedLetter:
    letter = None
    try:
        letter = codec.dead_letters.decode(record.value or b"")
    except codec.MalformedRecord:
        pass
    return PlacedLetter(partition=record.partition, offset=record.offset, letter=letter)


def _newest(found: deque[tuple[int, PlacedLetter]], limit: int | None) -> deque[tuple[int, PlacedLetter]]:
    ordered = sorted(found, key=lambda one: (one[0], one[1].partition, one[1].offset))
    return deque(ordered, maxlen=limit)
