"""Clients that can only read: for a process that must not change anything, whatever its code comes to.

What is allowed is listed; everything else raises before a byte is sent. A user with read rights alone
(`flexlb-shadow` in `deploy/redis-acl.conf`, the row in `docs/security.md`) is the second lock.
"""

from __future__ import annotations

from typing import Any

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.scripts import Redis

REDIS_READS = frozenset(
    {
        "get",
        "hget",
        "hgetall",
        "hmget",
        "lrange",
        "ping",
        "smembers",
        "time",
        "xrange",
        "xread",
        "xrevrange",
        "zrange",
    }
)
CONSUMER_READS = frozenset(
    {
        "assign",
        "beginning_offsets",
        "end_offsets",
        "getmany",
        "offsets_for_times",
        "pause",
        "paused",
        "position",
        "resume",
        "seek",
        "start",
        "stop",
    }
)
ADMIN_READS = frozenset({"close", "describe_topics", "start"})


class WriteRefused(Exception):
    """A bug: something that only reads was about to do something else."""


class _Only:
    """Passes on what is allowed of another object."""

    def __init__(self, inner: Any, allowed: frozenset[str], what: str) -> None:
        self._inner = inner
        self._allowed = allowed
        self._what = what

    def __getattr__(self, name: str) -> Any:
        if name not in self._allowed:
            raise WriteRefused(
                f"{self._what}: expected one of {', '.join(sorted(self._allowed))}, seen {name}"
            )
        return getattr(self._inner, name)


class ReadOnlyRedis(_Only):
    """A Redis client without the commands that write, and without scripts."""

    def __init__(self, client: Redis) -> None:
        super().__init__(client, REDIS_READS | {"aclose"}, "Redis")

    def execute_command(self, command: str, *arguments: Any) -> Any:
        """A plain command, if it reads."""
        if command.lower() not in REDIS_READS:
            raise WriteRefused(
                f"Redis: expected one of {', '.join(sorted(REDIS_READS))}, seen the command {command}"
            )
        return self._inner.execute_command(command, *arguments)

    def pipeline(self, *, transaction: bool) -> Any:
        """Several reads in one round trip."""
        return _Only(
            self._inner.pipeline(transaction=transaction), REDIS_READS | {"execute"}, "Redis pipeline"
        )


def read_only_kafka(kafka: KafkaClients) -> KafkaClients:
    """The same brokers, for consumers outside any group, which commit nothing; no producer."""

    def consumer(*topics: str, **options: Any) -> Any:
        if options.get("group_id") is not None:
            raise WriteRefused(f"Kafka: expected no consumer group, seen {options['group_id']!r}")
        return _Only(kafka.consumer(*topics, **options), CONSUMER_READS, "Kafka consumer")

    def producer(**_: Any) -> Any:
        raise WriteRefused("Kafka: expected no producer, seen one asked for")

    def admin(**options: Any) -> Any:
        return _Only(kafka.admin(**options), ADMIN_READS, "Kafka admin")

    return KafkaClients(
        consumer=consumer,
        producer=producer,
        admin=admin,
        bootstrap=kafka.bootstrap,
        protocol=kafka.protocol,
    )
