"""Clients that can only read refuse everything else before a byte is sent."""

from __future__ import annotations

from typing import Any

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.read_only import (
    CONSUMER_READS,
    REDIS_READS,
    ReadOnlyRedis,
    WriteRefused,
    read_only_kafka,
)


class Recorder:
    """A client that does anything, and remembers what."""

    def __init__(self, calls: list[str], **_: Any) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":
            return lambda **_: Recorder(self._calls)
        return lambda *_, **__: self._calls.append(name)


WRITES = (
    *("set", "delete", "hset", "hdel", "zadd", "zrem", "sadd", "srem", "xadd", "xdel", "rpush", "lpop"),
    *(
        "eval",
        "evalsha",
        "script_load",
        "expire",
        "pexpire",
        "rename",
        "flushall",
        "xtrim",
    ),
    *("blmove", "publish", "config_set", "getdel", "getex", "incr", "from_url", "connection_pool"),
)


@pytest.mark.parametrize("name", WRITES)
def test_a_write_to_redis_is_refused_alone_and_in_a_pipeline(name: str) -> None:
    calls: list[str] = []
    client = ReadOnlyRedis(Recorder(calls))
    with pytest.raises(WriteRefused, match=f"seen {name}"):
        getattr(client, name)("key")
    with pytest.raises(WriteRefused, match=f"seen {name}"):
        getattr(client.pipeline(transaction=True), name)("key")
    assert calls == []


def test_reads_of_redis_go_through() -> None:
    calls: list[str] = []
    client = ReadOnlyRedis(Recorder(calls))
    pipe = client.pipeline(transaction=False)
    for name in sorted(REDIS_READS):
        getattr(client, name)("key")
        getattr(pipe, name)("key")
    pipe.execute()
    assert calls == [name for name in sorted(REDIS_READS) for _ in range(2)] + ["execute"]


def test_kafka_can_only_be_read_and_outside_any_group() -> None:
    calls: list[str] = []

    def make(*_: Any, **__: Any) -> Recorder:
        return Recorder(calls)

    kafka = read_only_kafka(KafkaClients(consumer=make, producer=make, admin=make, bootstrap="k:1"))
    assert kafka.bootstrap == "k:1"
    with pytest.raises(WriteRefused, match="no producer"):
        kafka.producer(acks="all")
    with pytest.raises(WriteRefused, match="no consumer group, seen 'g'"):
        kafka.consumer("topic", group_id="g")
    consumer = kafka.consumer("topic", group_id=None)
    for name in sorted(CONSUMER_READS):
        getattr(consumer, name)()
    assert calls == sorted(CONSUMER_READS)
    for name in ("commit", "subscribe", "committed"):
        with pytest.raises(WriteRefused):
            getattr(consumer, name)()
    admin = kafka.admin()
    admin.describe_topics([])
    for name in ("create_topics", "delete_records", "alter_configs", "create_partitions", "delete_topics"):
        with pytest.raises(WriteRefused):
            getattr(admin, name)()


def test_a_plain_command_is_let_through_only_if_it_reads() -> None:
    calls: list[str] = []
    client = ReadOnlyRedis(Recorder(calls))
    client.execute_command("XREAD", b"COUNT", 1, b"STREAMS", "s", b"0")
    assert calls == ["execute_command"]
    with pytest.raises(WriteRefused, match="seen execute_command"):
        client.pipeline(transaction=True).execute_command("XREAD", "s")
    for command in ("XADD", "EVALSHA", "del", "FLUSHALL"):
        with pytest.raises(WriteRefused, match=f"seen the command {command}"):
            client.execute_command(command, "s")
    assert calls == ["execute_command"]
