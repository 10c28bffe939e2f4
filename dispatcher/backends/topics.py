"""Create a pool's topics, and check those that exist."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiokafka.admin import NewTopic
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)

from dispatcher.backends.connect import KafkaClients
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol.names import Names

MAX_RECORD_BYTES = 16 << 20
WEEK_MS = 7 * 24 * 3_600_000
BODIES_MS = 2 * 24 * 3_600_000
LOOKS = 10
LOOK_S = 0.1


async def create_topics(
    kafka: KafkaClients, names: Names, *, partitions: int, replication_factor: int
) -> list[str]:
    """Create the pool's topics that do not exist yet.

    Returns:
        The topics created; existing ones are left as they are.
    Raises:
        LogUnavailable: the broker did not answer.
        LogRefused: it refused, e.g. a replication factor above the number of brokers.
    """
    admin = kafka.admin()
    created = []
    try:
        await admin.start()
        for topic in names.topics:
            new = NewTopic(
                name=topic,
                num_partitions=partitions,
                replication_factor=replication_factor,
                topic_configs={
                    "max.message.bytes": str(MAX_RECORD_BYTES),
                    "retention.ms": str(BODIES_MS if topic in {names.replies, names.cancels} else WEEK_MS),
                    "retention.bytes": "-1",
                    "message.timestamp.type": "LogAppendTime",
                    "cleanup.policy": "delete",
                    "min.insync.replicas": "2" if replication_factor > 2 else "1",
                },
            )
            response = await _create(admin, new)
            for name, code, *rest in response.topic_errors:
                if code == 0:
                    created.append(name)
                elif for_code(code) is not TopicAlreadyExistsError:
                    reason = rest[0] if rest and rest[0] else for_code(code).__name__
                    raise LogRefused(f"topic {name}: Kafka refused to create it: {reason}")
    except (KafkaError, OSError) as error:
        raise kafka.unanswered("create topics", error) from error
    finally:
        await admin.close()
    return created


async def _create(admin: Any, new: NewTopic) -> Any:
    """Ask the controller, which a broker that has just started may not know yet."""
    for _ in range(LOOKS):
        try:
            return await admin.create_topics([new])
        except AttributeError:  # the client looks up the address of a controller that it was not told
            await asyncio.sleep(LOOK_S)
    raise KafkaConnectionError("the brokers know no controller")


def _check_allowed(described: Iterable[Mapping[str, Any]]) -> None:
    """Raise LogUnavailable for a topic that is kept from this user."""
    for one in described:
        if one["error_code"] == TopicAuthorizationFailedError.errno:
            raise LogUnavailable(
                f"topic {one['topic']}: expected to be allowed to see it, seen Kafka refuse this user; "
                "give it the rights in docs/security.md (Kafka's ACLs)"
            )


async def partition_counts(kafka: KafkaClients, topics: Sequence[str]) -> dict[str, int]:
    """How many partitions each topic has.

    A topic that was just created is known to each broker a little later, so one that is missing is
    asked for again before it counts as missing.

    Raises:
        LogUnavailable: the broker did not answer, a topic does not exist (yet), or is kept from this user.
    """
    admin = kafka.admin()
    try:
        await admin.start()
        for _ in range(LOOKS):
            described = await admin.describe_topics(list(topics))
            counts = {one["topic"]: len(one["partitions"]) for one in described if not one["error_code"]}
            _check_allowed(described)
            missing = [topic for topic in topics if not counts.get(topic)]
            if not missing:
                return counts
            await asyncio.sleep(LOOK_S)
    except (KafkaError, OSError) as error:
        raise kafka.unanswered("topics", error) from error
    finally:
        await admin.close()
    raise LogUnavailable(
        f"topic {missing[0]}: expected it to exist, seen nothing; create it with 'flexlb init'"
    )
