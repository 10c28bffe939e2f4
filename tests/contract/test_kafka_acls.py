"""Kafka's own authorizer: the ACLs that `docs/security.md` names are enough for a pool, and allow no more."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.structs import TopicPartition
from prometheus_client import CollectorRegistry

from dispatcher.backends.access import KafkaAccess
from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import KafkaClients, connect_kafka, connect_redis
from dispatcher.client.client import Client
from dispatcher.client.reader import TextAdded
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.protocol.request import INLINE_BODY_BYTES, Endpoint
from dispatcher.shadow import Shadow
from dispatcher.telemetry.logging import Log
from tests.contract.test_agent import HeldEngine, running_agent
from tests.support.kafka_acls import allow, documented
from tests.support.pool import MODEL, Pool
from tests.support.servers import give_up, why_no_kafka
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka

ADMIN = "admin"
PRINCIPALS = ("dispatcher", "agent", "frontend", "shadow")
MODULE = "org.apache.kafka.common.security.plain.PlainLoginModule"


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[ApacheKafka]:
    """A broker that allows nobody but its administrator anything; controllers talk among themselves."""
    if (reason := why_no_kafka()) is not None:
        give_up(reason)
    users = " ".join(f'user_{name}="{name}"' for name in (ADMIN, *PRINCIPALS))
    options = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": f"User:{ADMIN};User:ANONYMOUS",
        "allow.everyone.if.no.acl.found": "false",
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
            f'{MODULE} required username="{ADMIN}" password="{ADMIN}" {users};'
        ),
    }
    async with ApacheKafka(tmp_path / "kafka", protocol="SASL_PLAINTEXT", options=options) as broker:
        yield broker


def login(broker: ApacheKafka, user: str) -> KafkaClients:
    """Clients of one user."""
    access = KafkaAccess(protocol="SASL_PLAINTEXT", mechanism="PLAIN", user=user, password=user)
    return connect_kafka(broker.bootstrap, access)


async def may_write(kafka: KafkaClients, topic: str) -> bool:
    """Whether a user may append to a topic."""
    producer = kafka.producer(acks="all", enable_idempotence=False)
    await producer.start()
    try:
        await producer.send_and_wait(topic, b"forged", partition=0)
    except TopicAuthorizationFailedError:
        return False
    finally:
        await producer.stop()
    return True


async def may_read(kafka: KafkaClients, topic: str) -> bool:
    """Whether a user gets what is on a topic, which has to hold something."""
    consumer = kafka.consumer(group_id=None, auto_offset_reset="none")
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, number) for number in (0, 1)]
        consumer.assign(partitions)
        for tp in partitions:
            consumer.seek(tp, 0)
        return bool(await consumer.getmany(timeout_ms=1500))
    except TopicAuthorizationFailedError:
        return False
    finally:
        await consumer.stop()


async def test_the_documented_acls_are_enough_for_a_pool_and_allow_an_agent_no_answer(
    guarded: ApacheKafka, valkey: ValkeyServer, pool: str
) -> None:
    names, admin = Names(pool), login(guarded, ADMIN)
    engine = HeldEngine()
    engine.go_on.set()
    async with Pool(admin, valkey.url, pool) as one:
        for principal in PRINCIPALS:
            assert not await may_write(login(guarded, principal), names.replies)
            await allow(admin, principal, documented(principal, names))
        async with (
            one.running(one.dispatcher(kafka=login(guarded, "dispatcher"))) as dispatcher,
            running_agent(one, engine, kafka=login(guarded, "agent")),
            Client(login(guarded, "frontend"), pool, lease_ttl_s=5.0) as client,
        ):
            # Each path: both lanes, bodies by reference, streams, endings, cancels, a poison record.
            for number, (prompt, lane) in enumerate(
                [("x", Lane.INTERACTIVE), ("x", Lane.BATCH), ("y" * 2 * INLINE_BODY_BYTES, Lane.INTERACTIVE)]
            ):
                body = {"prompt": prompt, "max_tokens": 4}
                id = await client.submit(MODEL, Endpoint.COMPLETIONS, body, id=f"r{number}", lane=lane)
                text = ""
                async for event in client.stream(id):
                    if isinstance(event, TextAdded):
                        text += "".join(delta.text for delta in event.choices)
                outcome = await client.outcome(id)
                assert (outcome.kind, text) == (OutcomeKind.COMPLETED, "t0 t1 t2 t3 ")
            engine.go_on.clear()
            id = await client.submit(MODEL, Endpoint.COMPLETIONS, {"prompt": "x"}, id="cancelled")
            await wait_until(lambda: engine.started[-1:] == ["cancelled"], "it to run")
            await client.cancel(id)
            assert (await client.outcome(id)).kind is OutcomeKind.CANCELLED
            await one.append(b"poison", key=b"poison")
            assert (await one.outcome("poison")).kind is OutcomeKind.REJECTED
            await wait_until(lambda: len(one.dead) == 1, "its dead letter")
            assert dispatcher.metrics.elections._value.get() == 1
            assert dispatcher.metrics.log_errors._value.get() == 0
        shadow = Shadow(
            one.settings,
            redis=lambda: connect_redis(valkey.url),
            kafka=login(guarded, "shadow"),
            clock=Clock(),
            rng=random.Random(1),
            registry=CollectorRegistry(),
            log=Log(),
            every=1,
        )
        held = HeldEngine()
        async with (
            one.running(one.dispatcher(kafka=login(guarded, "dispatcher"))),
            running_agent(one, held, kafka=login(guarded, "agent")),
            one.running(shadow),
            Client(login(guarded, "frontend"), pool) as client,
        ):
            await wait_until(lambda: shadow.ledger.is_primed, "the shadow to follow")
            id = await client.submit(MODEL, Endpoint.COMPLETIONS, {"prompt": "x", "max_tokens": 4}, id="seen")
            await wait_until(lambda: shadow.summary().compared == 1, "its comparison")
            held.go_on.set()
            assert (await client.outcome(id)).kind is OutcomeKind.COMPLETED
            await wait_until(lambda: shadow.summary().measured.count == 1, "the outcome in the shadow")
        # A second leader reads outcomes and the committed marks.
        async with one.running(one.dispatcher(kafka=login(guarded, "dispatcher"))) as second:
            await wait_until(lambda: second.state is not None and bool(second.state.progress), "it to lead")

        agent = login(guarded, "agent")
        assert [topic for topic in names.topics if await may_write(agent, topic)] == [names.replies]
        frontend = login(guarded, "frontend")
        assert [topic for topic in names.topics if await may_write(frontend, topic)] == [
            names.requests(Lane.INTERACTIVE),
            names.requests(Lane.BATCH),
            names.bodies,
            names.cancels,
        ]
        for topic in names.topics:
            assert not await may_write(login(guarded, "shadow"), topic), topic
        assert await may_read(admin, names.dead)
        assert await may_read(login(guarded, "dispatcher"), names.cancels)
        for user in (agent, frontend):
            for topic in (names.dead, names.cancels):
                assert not await may_read(user, topic), topic
            producer = user.producer(transactional_id=names.transactional_id)
            with pytest.raises(TransactionalIdAuthorizationFailed):
                await producer.start()
            await producer.stop()
            consumer = user.consumer(group_id=names.group)
            await consumer.start()
            try:
                consumer.assign([TopicPartition(names.replies, 0)])
                with pytest.raises(GroupAuthorizationFailedError):
                    await consumer.committed(TopicPartition(names.replies, 0))
            finally:
                await consumer.stop()
