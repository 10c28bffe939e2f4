"""Follow `outcomes` from now on, as any reader may: committed records, in no group."""

from __future__ import annotations

from aiokafka import TopicPartition

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.backends.topics import partition_counts
from dispatcher.errors import LogUnavailable
from dispatcher.protocol.names import Names


class OutcomeTail:
    """Reads what is published after its start."""

    def __init__(self, kafka: KafkaClients, names: Names) -> None:
        self._kafka = kafka
        self._topic = names.outcomes
        self._consumer = kafka.consumer(
            group_id=None, fetch_max_wait_ms=500, isolation_level="read_committed", auto_offset_reset="latest"
        )

    async def start(self) -> None:
        """Connect, and begin at the end.

        Raises:
            LogUnavailable: the broker did not answer, or the topic does not exist.
        """
        try:
            count = (await partition_counts(self._kafka, [self._topic]))[self._topic]
            partitions = [TopicPartition(self._topic, number) for number in range(count)]
            await self._consumer.start()
            self._consumer.assign(partitions)
            for tp, end in (await self._consumer.end_offsets(partitions)).items():
                self._consumer.seek(tp, end)
        except NO_ANSWER as error:
            raise LogUnavailable(f"outcomes: {error!r}") from error

    async def stop(self) -> None:
        """Close the connection."""
        await close_kafka_client(self._consumer)

    async def read(self, *, timeout_ms: int) -> list[bytes]:
        """The next records' values."""
        try:
            batches = await self._consumer.getmany(timeout_ms=timeout_ms, max_records=1000)
        except NO_ANSWER as error:
            raise LogUnavailable(f"outcomes: {error!r}") from error
        return [record.value or b"" for batch in batches.values() for record in batch]
