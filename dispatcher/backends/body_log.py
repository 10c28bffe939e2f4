"""An agent's reading side of Kafka: one body by its place in the log."""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.topics import partition_counts
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol.request import BodyRef

FETCH_BYTES = 64 << 10
"""Read-ahead per fetch; a larger record still comes whole."""
TIMEOUT_S = 10.0
DOUBT_S = 1.0
"""A body that has not come by then may not be there at all: a broker waits for one at the log's end."""


class BodyLog:
    """Fetches bodies, one at a time per consumer, with a few consumers side by side."""

    def __init__(self, kafka: KafkaClients, *, consumers: int = 4) -> None:
        self._kafka = kafka
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        for _ in range(consumers):
            self._idle.put_nowait(None)

    async def fetch(self, ref: BodyRef) -> bytes:
        """The value of the record that `ref` names.

        Raises:
            LogUnavailable: the broker did not answer: try again.
            LogRefused: the record is not there (any more).
        """
        consumer = await self._idle.get()
        try:
            if consumer is None:
                consumer = await self._connect()
            async with asyncio.timeout(TIMEOUT_S):
                return await self._read(consumer, ref)
        except LogRefused:
            # It would go on asking for a partition that may not exist.
            await close_kafka_client(consumer)
            consumer = None
            raise
        except (KafkaError, OSError, TimeoutError) as error:
            if consumer is not None and not isinstance(error, OffsetOutOfRangeError):
                await close_kafka_client(consumer)
                consumer = None
            if isinstance(error, OffsetOutOfRangeError):
                raise LogRefused(
                    f"body: expected a record at {ref.topic}[{ref.partition}] {ref.offset}, seen none; "
                    "retention may have taken it"
                ) from error
            raise LogUnavailable(f"body: {error!r}") from error
        finally:
            self._idle.put_nowait(consumer)

    async def stop(self) -> None:
        """Close the connections that are idle."""
        while not self._idle.empty():
            consumer = self._idle.get_nowait()
            if consumer is not None:
                await close_kafka_client(consumer)

    async def _connect(self) -> Any:
        consumer = self._kafka.consumer(
            group_id=None,
            auto_offset_reset="none",
            max_partition_fetch_bytes=FETCH_BYTES,
            fetch_max_wait_ms=100,
        )
        try:
            await consumer.start()
        except BaseException:
            await close_kafka_client(consumer)
            raise
        return consumer

    async def _read(self, consumer: Any, ref: BodyRef) -> bytes:
        tp = TopicPartition(ref.topic, ref.partition)
        consumer.assign([tp])
        consumer.seek(tp, ref.offset)
        try:
            async with asyncio.timeout(DOUBT_S):
                record = await consumer.getone(tp)
        except TimeoutError:
            await self._expect_record(consumer, tp, ref)
            record = await consumer.getone(tp)
        consumer.pause(tp)
        if record.offset != ref.offset:
            raise LogRefused(
                f"body: expected a record at {ref.topic}[{ref.partition}] {ref.offset}, seen the next at "
                f"{record.offset}; it was deleted or never committed"
            )
        value: bytes = record.value or b""
        return value

    async def _expect_record(self, consumer: Any, tp: TopicPartition, ref: BodyRef) -> None:
        """Refuse a place that the log does not have: a body is written before the request that names it."""
        count = (await partition_counts(self._kafka, [ref.topic]))[ref.topic]
        if ref.partition >= count:
            raise LogRefused(
                f"body: expected a partition of {ref.topic} from 0 to {count - 1}, seen {ref.partition}"
            )
        end = (await consumer.end_offsets([tp]))[tp]
        if ref.offset >= end:
            raise LogRefused(
                f"body: expected a record at {ref.topic}[{ref.partition}] {ref.offset}, seen the end "
                f"of the log at {end}; write the body before the request"
            )
