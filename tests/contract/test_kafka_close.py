"""Closing Kafka clients: one that can't say goodbye leaves no connection open."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from dispatcher.backends import connect
from dispatcher.backends.connect import close_kafka_client
from dispatcher.backends.topics import create_topics
from dispatcher.protocol.names import Lane, Names
from tests.support.servers import KafkaAddress

pytestmark = pytest.mark.kafka


async def never(*_: Any, **__: Any) -> None:
    """A step of a goodbye to a broker that does not answer."""
    await asyncio.Event().wait()


def connections(inner: Any) -> list[Any]:
    """What a client has open."""
    return [one for one in inner._conns.values() if one.connected()]


@pytest.fixture
async def names(kafka: KafkaAddress, pool: str) -> Names:
    names = Names(pool)
    await create_topics(kafka.clients, names, partitions=1, replication_factor=1)
    return names


async def test_a_consumer_that_cannot_leave_its_group(
    kafka: KafkaAddress, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer: AIOKafkaConsumer = kafka.clients.consumer(
        names.requests(Lane.INTERACTIVE), group_id=f"{names.pool}-closing"
    )
    await consumer.start()
    await consumer.getmany(timeout_ms=100)
    opened = connections(consumer._client)
    assert len(opened) >= 2
    monkeypatch.setattr(connect, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(consumer._coordinator, "_maybe_leave_group", never)
    before = asyncio.all_tasks()
    await close_kafka_client(consumer)
    assert not any(one.connected() for one in opened)
    assert consumer._fetcher._fetch_task.done()
    assert asyncio.all_tasks() < before


async def test_a_producer_whose_last_records_stay(
    kafka: KafkaAddress, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer: AIOKafkaProducer = kafka.clients.producer(acks="all")
    await producer.start()
    await producer.send_and_wait(names.requests(Lane.INTERACTIVE), b"x")
    opened = connections(producer.client)
    assert opened
    monkeypatch.setattr(connect, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(producer._message_accumulator, "close", never)
    await close_kafka_client(producer)
    assert not any(one.connected() for one in opened)
    assert producer._sender._sender_task.done()


async def test_one_that_never_started_is_closed_without_a_word(kafka: KafkaAddress) -> None:
    for client in (kafka.clients.consumer(group_id=None), kafka.clients.producer()):
        await close_kafka_client(client)
