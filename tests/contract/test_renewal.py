"""A leader's settings change while it serves: nothing is lost, and it goes on under the same lease."""

from __future__ import annotations

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import JobId
from dispatcher.protocol.outcome import FailureCause, OutcomeKind
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka


async def test_new_settings_count_at_once_and_cost_no_request(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(one.dispatcher()) as dispatcher, one.running(ScriptedNode(one, "n1")) as node:
            await one.append(request("before"))
            await one.outcome("before")
            node.holds = True
            for number in range(20):
                await one.append(request(f"r{number}"))
            await wait_until(lambda: bool(node.claimed), "work at the node")
            before = dispatcher.state
            dispatcher.renew(one.settings.model_copy(update={"max_record_bytes": 2048}))
            await wait_until(
                lambda: dispatcher.state is not None and dispatcher.state is not before, "another session"
            )
            node.holds = False
            await node.finish()
            for number in range(20):
                assert (await one.outcome(f"r{number}")).kind is OutcomeKind.COMPLETED
            await one.append(request("large", body={"prompt": "x" * 4096, "max_tokens": 1}))
            assert (await one.outcome("large")).reason == "too_large"
            assert dispatcher.metrics.elections._value.get() == 1


async def test_attempts_go_on_rising_over_a_renewal(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(one.dispatcher()) as dispatcher, one.running(ScriptedNode(one, "n1")) as node:
            node.holds = True
            await one.append(request("r1"))
            await wait_until(lambda: bool(node.claimed), "the first attempt")
            (first,) = node.claimed
            before = dispatcher.state
            dispatcher.renew(one.settings.model_copy(update={"max_record_bytes": 2048}))
            await wait_until(
                lambda: dispatcher.state is not None and dispatcher.state is not before, "another session"
            )
            node.claimed = []
            await node.store.complete(node.incarnation, [node.failed(first, FailureCause.ENGINE_ERROR)])
            await wait_until(lambda: bool(node.claimed), "the next attempt")
            assert JobId.parse(node.claimed[0].job).attempt > JobId.parse(first.job).attempt
            await node.finish()
            assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED
