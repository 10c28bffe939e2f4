"""One pool on real servers, driven from a test: topics, a dispatcher in this process, a scripted node.

The node speaks the production scripts and answers at once, or holds what it claimed until told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry

from dispatcher.app import Dispatcher
from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import KafkaClients, connect_redis
from dispatcher.backends.node_store import Claimed, Ending, NodeStore
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.backends.topics import create_topics
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work, decode_job_data
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.node import NodeIdentity, NodeReport
from dispatcher.protocol.outcome import (
    Choice,
    DeadLetter,
    FailedAttempt,
    FailureCause,
    Outcome,
    OutcomeKind,
    Reason,
)
from dispatcher.settings import DispatcherSettings
from dispatcher.telemetry.logging import Log
from tests.support.wait import wait_until

MODEL = "m"
CLOCK = Clock()


def request(id: str, **fields: Any) -> dict[str, Any]:
    """A small valid request, with `fields` over it."""
    return {
        "id": id,
        "model": MODEL,
        "endpoint": "/v1/completions",
        "body": {"prompt": "x", "max_tokens": 1},
        **fields,
    }


class ScriptedNode:
    """A node whose agent is this test."""

    holds = False

    def __init__(self, pool: Pool, name: str, **identity: Any) -> None:
        self.name = name
        self.incarnation = uuid.uuid4().hex
        self.identity = NodeIdentity(
            node=name, incarnation=self.incarnation, **{"models": (MODEL,), "max_running": 8, **identity}
        )
        self.claimed: list[Claimed] = []
        self.works: list[Work] = []
        self.hears = asyncio.Event()
        self.hears.set()
        self.answer = ""
        self.store = NodeStore(ScriptRunner(pool.redis), pool.names, name, heartbeat_ttl_s=2.0, lease_s=10.0)
        self._claims = 0
        self._sequence = 0

    async def run(self) -> None:
        """Register, report, claim and answer until cancelled."""
        answer = await self.store.register(self.identity, {}, now_iso=CLOCK.now_iso())
        assert isinstance(answer, str)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            group.create_task(self._work())

    async def _beat(self) -> None:
        while True:
            self._sequence += 1
            report = NodeReport(node=self.name, incarnation=self.incarnation, sequence=self._sequence)
            await self.store.report(report)
            held = [job.job for job in self.claimed]
            await self.store.extend(self.incarnation, held, now_iso=CLOCK.now_iso())
            await asyncio.sleep(0.3)

    async def _work(self) -> None:
        while True:
            await self.hears.wait()
            if await self.store.wait_for_work(0.5) and self.hears.is_set():
                await self.claim(64)
                if not self.holds:
                    await self.finish()

    async def claim(self, limit: int) -> None:
        """Take what is queued."""
        self._claims += 1
        claim = await self.store.claim(self.incarnation, self._claims, limit, now_iso=CLOCK.now_iso())
        self.claimed += claim.jobs
        self.works += [decode_job_data(job.data) for job in claim.jobs]

    async def finish(self) -> list[str]:
        """Answer everything claimed."""
        endings = [self.completed(job) for job in self.claimed]
        self.claimed = []
        return await self.store.complete(self.incarnation, endings) if endings else []

    def completed(self, job: Claimed) -> Ending:
        """A finished ending of a job."""
        work = decode_job_data(job.data)
        outcome = Outcome(
            id=work.id,
            ref=work.ref,
            tenant=work.tenant,
            kind=OutcomeKind.COMPLETED,
            reason=Reason.FINISHED,
            fingerprint=work.fingerprint,
            node=self.name,
            choices=(Choice(text=self.answer),) if self.answer else (),
        )
        return Ending(job=job.job, kind="outcome", ref=work.ref, id=work.id, payload=codec.encode(outcome))

    def failed(
        self, job: Claimed, cause: FailureCause, message: str = "no", *, crash: bool = False
    ) -> Ending:
        """A failed ending of a job."""
        work = decode_job_data(job.data)
        failed = FailedAttempt(
            attempt=job.job.rpartition("--")[2], node=self.name, cause=cause, message=message, crash=crash
        )
        return Ending(job=job.job, kind="failed", ref=work.ref, id=work.id, payload=codec.encode(failed))


class Pool:
    """A pool on the test's servers."""

    def __init__(self, clients: KafkaClients, redis_url: str, pool: str, **settings: Any) -> None:
        self.names = Names(pool)
        self.clients = clients
        self.redis_url = redis_url
        self.redis = connect_redis(redis_url)
        self.settings = DispatcherSettings(
            pool=pool, **{"leader_ttl_s": 1.0, "unknown_model_grace_s": 0.5, **settings}
        )
        self.outcomes: list[Outcome] = []
        self.dead: list[DeadLetter] = []
        self.unreadable = 0
        self._stack = contextlib.AsyncExitStack()
        self._producer: Any = None

    def dispatcher(self, clock: Clock = CLOCK, *, kafka: KafkaClients | None = None) -> Dispatcher:
        """A dispatcher of this pool, not yet running."""
        return Dispatcher(
            self.settings,
            redis=lambda: connect_redis(self.redis_url),
            kafka=kafka or self.clients,
            clock=clock,
            new_id=lambda: uuid.uuid4().hex,
            rng=random.Random(1),
            registry=CollectorRegistry(),
            log=Log(),
        )

    @contextlib.asynccontextmanager
    async def running(self, service: Any) -> AsyncIterator[Any]:
        """Run a dispatcher or a node in the background."""
        task = asyncio.create_task(service.run())
        try:
            yield service
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def __aenter__(self) -> Pool:
        self._stack.push_async_callback(self.redis.aclose)
        await create_topics(self.clients, self.names, partitions=2, replication_factor=1)
        self._producer = self.clients.producer(
            acks="all", enable_idempotence=True, max_request_size=20 << 20, linger_ms=5
        )
        await self._producer.start()
        self._stack.push_async_callback(self._producer.stop)
        reader = asyncio.create_task(self._follow())
        self._stack.push_async_callback(_ended, reader)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _follow(self) -> None:
        consumer = self.clients.consumer(
            group_id=None, isolation_level="read_committed", auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            topics = (self.names.outcomes, self.names.dead)
            consumer.assign([TopicPartition(topic, number) for topic in topics for number in (0, 1)])
            while True:
                for tp, batch in (await consumer.getmany(timeout_ms=500)).items():
                    for record in batch:
                        try:
                            self._take(tp.topic, record.value or b"")
                        except codec.MalformedRecord:
                            self.unreadable += 1
        finally:
            await consumer.stop()

    def _take(self, topic: str, value: bytes) -> None:
        if topic == self.names.outcomes:
            self.outcomes.append(codec.outcomes.decode(value))
        else:
            self.dead.append(codec.dead_letters.decode(value))

    async def append(
        self, record: dict[str, Any] | bytes, *, lane: Lane = Lane.INTERACTIVE, key: bytes | None = None
    ) -> None:
        """Append one record and wait until Kafka has it."""
        value = record if isinstance(record, bytes) else json.dumps(record).encode()
        await self._producer.send_and_wait(self.names.requests(lane), value, key=key)

    async def append_many(self, records: list[bytes], *, lane: Lane = Lane.INTERACTIVE) -> None:
        """Append records to one partition, in order."""
        for value in records:
            last = await self._producer.send(self.names.requests(lane), value, partition=0)
        await last

    async def cancel(self, id: str, tenant: str = "") -> None:
        """Append a cancel."""
        value = json.dumps({"id": id, "tenant": tenant}).encode()
        await self._producer.send_and_wait(self.names.cancels, value, key=id.encode())

    async def live(self, lease: str, *, ttl_ms: int, tenant: str = "") -> None:
        """Append a sign of life of a lease, or its end."""
        value = json.dumps({"lease": lease, "ttl_ms": ttl_ms, "tenant": tenant}).encode()
        await self._producer.send_and_wait(self.names.cancels, value, partition=0)

    def of(self, id: str, tenant: str = "") -> list[Outcome]:
        """The outcomes of an id so far."""
        return [outcome for outcome in self.outcomes if (outcome.tenant, outcome.id) == (tenant, id)]

    async def outcome(self, id: str, tenant: str = "") -> Outcome:
        """The first outcome of an id."""
        await wait_until(lambda: bool(self.of(id, tenant)), f"an outcome of {id}")
        return self.of(id, tenant)[0]


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
