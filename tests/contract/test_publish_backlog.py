"""Intake waits for Publish: what is decided and not yet published is bounded, whatever floods a topic."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.local.valkey import ValkeyServer
from dispatcher.services import close, intake
from tests.support.pool import Pool
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka

RECORDS = 20_000


async def test_poison_waits_in_kafka_and_not_in_redis(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MOST_UNPUBLISHED", 1000)
    async with Pool(kafka_clients, valkey.url, pool) as one:
        await one.append_many([b'{"id":"p%d"}' % number for number in range(RECORDS)])
        longest = 0

        async def watch() -> None:
            nonlocal longest
            while True:
                longest = max(longest, await one.redis.xlen(one.names.closing))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        async with one.running(one.dispatcher()) as dispatcher:
            await wait_until(lambda: len(one.outcomes) >= RECORDS, "all to be answered", timeout_s=120)
            assert dispatcher.state is not None
            await wait_until(lambda: not dispatcher.state.closed, "all to be forgotten")
        watching.cancel()
        await asyncio.wait([watching])
        assert longest <= intake.MOST_UNPUBLISHED + intake.READ_LIMIT + close.BACKLOG + close.BATCH
