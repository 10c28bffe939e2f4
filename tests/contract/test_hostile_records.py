"""Records that a client library can write and a careless reader breaks on, through the real broker.

Each must cost its own sender an answer at most: a reader that ends here ends again for every leader.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.backends.connect import KafkaClients, connect_kafka
from dispatcher.local import embedded_kafka
from dispatcher.local.embedded_kafka import EmbeddedKafka
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Lane
from dispatcher.protocol.outcome import OutcomeKind
from tests.support.header_names import Name, append_batch
from tests.support.pool import Pool, ScriptedNode, request

pytestmark = pytest.mark.kafka


@pytest.fixture
async def served(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> AsyncIterator[Pool]:
    """A pool with one dispatcher and one node that answers at once."""
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(one.dispatcher()), one.running(ScriptedNode(one, "n1")):
            yield one


async def append(pool: Pool, record: dict[str, Any], headers: Any, **options: Any) -> None:
    producer = pool.clients.producer(acks="all", **options)
    await producer.start()
    try:
        value = json.dumps(record).encode()
        await producer.send_and_wait(
            pool.names.requests(Lane.INTERACTIVE), value, headers=headers, partition=0
        )
    finally:
        await producer.stop()


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", None)],
        [("traceparent", b"\xff\x00")],
        [("traceparent", b"a"), ("traceparent", b"b")],
    ],
    ids=["no value", "no text", "twice"],
)
async def test_odd_headers_cost_nobody_anything(served: Pool, headers: Any) -> None:
    await append(served, request("odd"), headers)
    await append(served, request("good"), [])
    assert (await served.outcome("odd")).kind is OutcomeKind.COMPLETED
    assert (await served.outcome("good")).kind is OutcomeKind.COMPLETED


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_a_producer_may_compress_as_it_likes(served: Pool, codec: str) -> None:
    await append(served, request("packed"), [], compression_type=codec)
    assert (await served.outcome("packed")).kind is OutcomeKind.COMPLETED


async def append_badly_named(pool: Pool) -> None:
    """One batch in which the second record has a header name that is no text."""
    records = [
        (json.dumps(request("before")).encode(), [("a", b"b")]),
        (json.dumps(request("odd")).encode(), [(Name("x"), b"1")]),
        (json.dumps(request("after")).encode(), []),
    ]
    producer = pool.clients.producer(acks="all", enable_idempotence=False)
    await producer.start()
    try:
        await append_batch(producer, pool.names.requests(Lane.INTERACTIVE), records)  # type: ignore[arg-type]
    finally:
        await producer.stop()


async def all_complete(pool: Pool) -> None:
    for id in ("before", "odd", "after"):
        assert (await pool.outcome(id)).kind is OutcomeKind.COMPLETED


async def test_a_header_name_that_is_no_text_costs_nobody_anything(served: Pool) -> None:
    await append_badly_named(served)
    await all_complete(served)


@pytest.mark.skipif(embedded_kafka.why_unavailable() is not None, reason="no embedded broker here")
async def test_the_embedded_broker_too_keeps_such_names(
    tmp_path: Path, valkey: ValkeyServer, pool: str
) -> None:
    async with (
        EmbeddedKafka(tmp_path / "kafka") as broker,
        Pool(connect_kafka(broker.bootstrap), valkey.url, pool) as one,
        one.running(one.dispatcher()),
        one.running(ScriptedNode(one, "n1")),
    ):
        await append_badly_named(one)
        await all_complete(one)
