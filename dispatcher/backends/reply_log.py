"""An agent's writing side of Kafka: reply chunks, idempotent and acknowledged by all replicas."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from aiokafka.errors import (
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol.names import Names
from dispatcher.protocol.request import ReplyTo

_REFUSALS = (
    AssertionError,
    ValueError,
    InvalidTopicError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)


def _translated(error: BaseException, doing: str) -> Exception:
    if isinstance(error, _REFUSALS):
        return LogRefused(f"{doing}: Kafka refused: {error!r}")
    return LogUnavailable(f"{doing}: {error!r}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a chunk lies in its topic."""

    partition: int
    offset: int


class ReplyLog:
    """Writes the chunks of one pool."""

    def __init__(self, kafka: KafkaClients, names: Names) -> None:
        self._topic = names.replies
        self._producer = kafka.producer(
            acks="all", enable_idempotence=True, linger_ms=0, max_request_size=16 << 20
        )

    async def start(self) -> None:
        """Connect.

        Raises:
            LogUnavailable: the broker did not answer.
        """
        try:
            await self._producer.start()
        except NO_ANSWER as error:
            raise LogUnavailable(f"reply log: {error!r}") from error

    async def stop(self) -> None:
        """Close the connection."""
        await close_kafka_client(self._producer)

    async def send(self, chunk: bytes, key: bytes, reply_to: ReplyTo | None) -> asyncio.Future[Any]:
        """Hand over one chunk; the future ends when it is acknowledged (see `acknowledged`).

        Raises:
            LogUnavailable: the broker did not take it for longer than the client's own timeout.
            LogRefused: the route can't be written.
        """
        topic = (reply_to and reply_to.topic) or self._topic
        try:
            future: asyncio.Future[Any] = await self._producer.send(
                topic, chunk, key=key, partition=reply_to.partition if reply_to else None
            )
        except (KafkaError, OSError, AssertionError, ValueError) as error:
            raise _translated(error, f"reply to {topic}") from error
        return future


async def acknowledged(future: asyncio.Future[Any]) -> Place:
    """Wait for one chunk's acknowledgement: where it lies. Raises as `send` does."""
    try:
        written = await asyncio.shield(future)
        return Place(partition=written.partition, offset=written.offset)
    except (KafkaError, OSError) as error:
        raise _translated(error, "reply") from error
