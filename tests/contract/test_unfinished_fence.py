"""A leader's session ends while it fences a silent node: the next one fences it after all."""

from __future__ import annotations

import asyncio
import random
import uuid

import pytest
from prometheus_client import CollectorRegistry

from dispatcher.app import Dispatcher
from dispatcher.backends.connect import KafkaClients, connect_redis
from dispatcher.backends.scripts import Script
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.telemetry.logging import Log
from tests.contract.test_cancels import UnclaimingNode
from tests.support.pool import CLOCK, Pool, ScriptedNode, request
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka

BLOCKED = "blocked"


def blockable(name: str) -> str:
    """A script that Redis is too busy to run while a key exists."""
    flags, _, body = Script(name).source.partition("\n")
    check = f"if redis.call('EXISTS', '{BLOCKED}') == 1 then return redis.error_reply('BUSY wait') end"
    return f"{flags}\n{check}\n{body}"


async def test_work_queued_at_a_node_whose_fence_was_interrupted_runs_elsewhere(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        dispatcher = Dispatcher(
            one.settings,
            redis=lambda: connect_redis(one.redis_url),
            kafka=one.clients,
            clock=CLOCK,
            new_id=lambda: uuid.uuid4().hex,
            rng=random.Random(1),
            registry=CollectorRegistry(),
            log=Log(),
            scripts={"requeue": blockable("requeue")},
        )
        async with one.running(dispatcher):
            node = asyncio.create_task(UnclaimingNode(one, "n1").run())
            await one.append(request("r1"))

            async def is_queued() -> bool:
                return bool(await one.redis.llen(one.names.queue_key("n1")))

            await wait_until(is_queued, "it to be queued")
            await one.redis.set(BLOCKED, "1")
            node.cancel()
            await asyncio.wait([node])
            fleet = dispatcher.mirror.fleet
            await wait_until(lambda: not fleet.nodes["n1"].available, "the node to be given up")
            before = dispatcher.state
            dispatcher.renew(one.settings.model_copy(update={"max_record_bytes": 2048}))
            await wait_until(
                lambda: dispatcher.state is not None and dispatcher.state is not before, "another session"
            )
            await one.redis.delete(BLOCKED)
            async with one.running(ScriptedNode(one, "n2")):
                outcome = await one.outcome("r1")
                assert (outcome.kind, outcome.node) == (OutcomeKind.COMPLETED, "n2")
