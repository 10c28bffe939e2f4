"""An agent's reading side of the reply topic: what earlier attempts have published of one request.

Read once by an attempt that goes on where another ended, from the place that its checkpoint names up to
its own first chunk. A connection per call: this is rare.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError, UnknownTopicOrPartitionError

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol.names import Names

TIMEOUT_S = 5.0
"""For the whole reading: a client waits meanwhile, and generating anew may be quicker than reading on."""
POLL_MS = 200


@dataclass(frozen=True, kw_only=True)
class Published:
    """One record of a request; `at_ms` is when it was written."""

    value: bytes
    at_ms: int


class ReplyHistory:
    """Reads back reply chunks."""

    def __init__(self, kafka: KafkaClients, names: Names) -> None:
        self._kafka = kafka
        self.topic = names.replies

    async def read(self, topic: str, partition: int, first: int, end: int, key: bytes) -> list[Published]:
        """The records under `key` from offset `first` to before `end`, in order.

        Raises:
            LogUnavailable: the broker did not answer in time.
            LogRefused: the records are not there any more.
        """
        where = f"replies: {topic}[{partition}] {first} to {end}"
        consumer = self._kafka.consumer(group_id=None, auto_offset_reset="none", fetch_max_wait_ms=100)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await consumer.start()
                tp = TopicPartition(topic, partition)
                consumer.assign([tp])
                consumer.seek(tp, first)
                found: list[Published] = []
                while await consumer.position(tp) < end:
                    for record in (await consumer.getmany(tp, timeout_ms=POLL_MS)).get(tp, ()):
                        if record.key == key and record.offset < end:
                            found.append(Published(value=record.value or b"", at_ms=record.timestamp))
                return found
        except (OffsetOutOfRangeError, UnknownTopicOrPartitionError) as error:
            raise LogRefused(f"{where}: expected these records, seen {error!r}") from error
        except (KafkaError, OSError, TimeoutError) as error:
            raise LogUnavailable(f"{where}: {error!r}") from error
        finally:
            await close_kafka_client(consumer)
