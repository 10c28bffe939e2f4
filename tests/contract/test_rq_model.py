"""RQ's own classes and commands read, and a stock RQ worker runs, what our scripts wrote."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import redis
from aiokafka import TopicPartition
from rq import Queue, Worker
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.leader_lock import LeaderLock, Lease
from dispatcher.backends.leader_store import AssignItem, LeaderStore, RetryItem
from dispatcher.backends.node_store import Ending, NodeStore
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.backends.store_view import StoreView
from dispatcher.backends.topics import create_topics
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import ENTRY_POINT, Envelope, Work, encode_job_data
from dispatcher.protocol.chunk import Chunk, ChunkKind
from dispatcher.protocol.names import Attempt, JobId, Lane, Names, Ref
from dispatcher.protocol.node import NodeIdentity
from dispatcher.protocol.outcome import OutcomeKind, Reason
from dispatcher.protocol.request import Endpoint
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until
from workers_agent.simulator.faults import Faults
from workers_agent.simulator.server import Simulator, SimulatorSettings

NODE = "gpu-17"
MODEL = "sim"
NOW_ISO = "2026-11-23T08:00:00.000000Z"
COMMAND_TIMEOUT_S = 60.0
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A leader and one registered node on a real Valkey."""

    client: Redis
    names: Names
    leader: LeaderStore
    node: NodeStore
    view: StoreView

    def job(self, offset: int, *, n: int = 1) -> JobId:
        """The job id of the request at an offset."""
        return JobId(
            self.names.pool, NODE, Ref(Lane.INTERACTIVE, 0, offset), Attempt(self.leader.lease.epoch, n)
        )

    async def assign(self, *offsets: int) -> list[JobId]:
        """Bind requests to the node."""
        items = []
        for offset in offsets:
            job = self.job(offset)
            body = {"model": MODEL, "prompt": f"Once upon {offset}", "max_tokens": 4}
            work = Work(
                ref=str(job.ref),
                id=f"r{offset}",
                model=MODEL,
                endpoint=Endpoint.COMPLETIONS,
                body=msgspec.Raw(json.dumps(body).encode()),
            )
            items.append(
                AssignItem(
                    job=job,
                    incarnation="agent",
                    cost_tokens=10,
                    from_pending=False,
                    identity=self.names.identity("", work.id),
                    fingerprint="aa",
                    data=encode_job_data(work),
                    envelope=codec.encode(Envelope(ref=str(job.ref), id=work.id, model=MODEL)),
                )
            )
        answers = await self.leader.assign(items, {}, now_iso=NOW_ISO)
        assert [answer for answer, _ in answers] == ["ok"] * len(offsets)
        return [item.job for item in items]

    async def claim(self, number: int, limit: int) -> list[str]:
        """Take jobs as the agent does."""
        answer = await self.node.claim("agent", number, limit, now_iso=NOW_ISO)
        return [job.job for job in answer.jobs]

    async def closing(self) -> list[dict[bytes, bytes]]:
        """What waits to be published."""
        return [fields for _, fields in await self.client.xrange(self.names.closing)]


@pytest.fixture
async def scene(redis_client: Redis, pool: str) -> Scene:
    """A leader, and a node whose agent fell silent a moment after it had registered."""
    names, runner = Names(pool), ScriptRunner(redis_client)
    lock = LeaderLock(runner, names, ttl_s=3600, clock=asyncio.get_running_loop().time)
    lease = await lock.acquire("leader")
    assert isinstance(lease, Lease)
    leader = LeaderStore(runner, names, lease)
    node = NodeStore(runner, names, NODE, heartbeat_ttl_s=0.001, lease_s=3600)
    identity = NodeIdentity(node=NODE, incarnation="agent", models=(MODEL,))
    assert isinstance(await node.register(identity, {}, now_iso=NOW_ISO), str)
    await leader.admit(NODE)
    return Scene(
        client=redis_client, names=names, leader=leader, node=node, view=StoreView(redis_client, names)
    )


@pytest.fixture
def rq_connection(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    """The client that RQ's classes use."""
    with redis.Redis.from_url(valkey.url) as connection:
        yield connection


@pytest.fixture
def queue(scene: Scene, rq_connection: redis.Redis) -> Queue:
    """The node's queue, as RQ sees it."""
    return Queue(scene.names.queue(NODE), connection=rq_connection, serializer=JSONSerializer)


async def rq_command(url: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run RQ's command line and return what it printed."""
    command, *rest = arguments
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "rq.cli",
        command,
        "--url",
        url,
        "--serializer",
        "rq.serializers.JSONSerializer",
        *rest,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(environment or {})},
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = output.decode()
    assert process.returncode == 0, text
    return text


# RQ reads what we write


def test_our_names_are_rqs_names(rq_connection: redis.Redis) -> None:
    names = Names("p")
    queue = Queue(names.queue(NODE), connection=rq_connection, serializer=JSONSerializer)
    assert queue.key == names.queue_key(NODE)
    assert queue.intermediate_queue_key == names.intermediate(NODE)
    assert StartedJobRegistry(queue=queue).key == names.wip(NODE)
    assert FailedJobRegistry(queue=queue).key == names.failed(NODE)
    assert Worker([queue], name=names.queue(NODE), connection=rq_connection).key == names.worker(NODE)
    assert Job.key_for("x") == names.job("x")


async def test_rq_reads_a_queued_job(scene: Scene, queue: Queue) -> None:
    first, second = await scene.assign(0, 1)
    assert queue.count == 2
    assert queue.job_ids == [str(first), str(second)]
    assert [found.name for found in Queue.all(connection=queue.connection)] == [queue.name]
    job = Job.fetch(str(second), connection=queue.connection, serializer=JSONSerializer)
    assert job.get_status() is JobStatus.QUEUED
    assert job.origin == queue.name
    assert job.description == "flexlb i0_1"
    assert job.func_name == ENTRY_POINT
    assert job.kwargs == {}
    assert job.args[0]["id"] == "r1"
    assert job.args[0]["body"] == {"model": MODEL, "prompt": "Once upon 1", "max_tokens": 4}
    assert job.enqueued_at is not None
    assert job.enqueued_at.year == 2026
    assert (job.timeout, job.result_ttl, job.failure_ttl) == (86_400, 0, 86_400)
    assert [found.id for found in queue.get_jobs()] == [str(first), str(second)]


async def test_rq_reads_what_the_agent_claimed_and_leaves_it_alone(scene: Scene, queue: Queue) -> None:
    first, second = await scene.assign(0, 1)
    assert await scene.claim(1, 1) == [str(first)]
    started = StartedJobRegistry(queue=queue)
    assert (queue.count, started.count) == (1, 1)
    assert started.get_job_ids() == [str(first)]
    started.cleanup()
    job = Job.fetch(str(first), connection=queue.connection, serializer=JSONSerializer)
    assert job.get_status() is JobStatus.STARTED
    assert job.worker_name == queue.name
    assert job.started_at is not None
    assert FailedJobRegistry(queue=queue).count == 0
    assert await scene.view.stored_job(str(first)) is not None
    assert queue.job_ids == [str(second)]


async def test_rq_reads_what_a_blocking_read_delivered(scene: Scene, queue: Queue) -> None:
    (job,) = await scene.assign(0)
    assert await scene.node.wait_for_work(1)
    delivering = IntermediateQueue(queue.key, connection=queue.connection)
    assert delivering.get_job_ids() == [str(job)]
    assert queue.count == 0


async def test_what_ended_is_gone_for_rq_too(scene: Scene, queue: Queue) -> None:
    done, failed = await scene.assign(0, 1)
    await scene.claim(1, 2)
    endings = [
        Ending(job=str(done), kind="outcome", ref="i0_0", id="r0", payload=b"{}"),
        Ending(job=str(failed), kind="failed", ref="i0_1", id="r1", payload=b"{}"),
    ]
    assert await scene.node.complete("agent", endings) == ["ok", "ok"]
    assert not Job.exists(str(done), connection=queue.connection)
    job = Job.fetch(str(failed), connection=queue.connection, serializer=JSONSerializer)
    assert job.get_status() is JobStatus.DEFERRED
    assert StartedJobRegistry(queue=queue).count == 0
    assert queue.count == 0


async def test_rq_lists_the_agent_as_a_worker(scene: Scene, queue: Queue) -> None:
    (worker,) = Worker.all(connection=queue.connection, serializer=JSONSerializer)
    assert worker.name == queue.name
    assert worker.queue_names() == [queue.name]
    assert worker.get_state() == "busy"
    assert worker.birth_date is not None
    assert worker.last_heartbeat is not None
    assert Worker.count(queue=queue) == 1
    await scene.leader.requeue(NODE, "fence", "agent", "draining")
    assert await scene.leader.forget(NODE)
    assert Worker.count(queue=queue) == 0
    assert Queue.all(connection=queue.connection) == []


async def test_rq_info_shows_queues_and_workers(scene: Scene, valkey: ValkeyServer) -> None:
    await scene.assign(0, 1, 2)
    await scene.claim(1, 1)
    name = scene.names.queue(NODE)
    text = await rq_command(valkey.url, "info")
    (line,) = [line for line in text.splitlines() if line.startswith(name) and "|" in line]
    assert "2, 1 executing, 0 finished, 0 failed" in line
    assert f"{name} (" in text
    assert "1 workers, 1 queues" in text
    raw = await rq_command(valkey.url, "info", "--raw", "--only-queues")
    assert raw.startswith(f"queue {name} 2, 1 executing")


# RQ's failed registry shows what failed, and its requeue runs nothing


async def fail_and_retry(scene: Scene, offset: int, number: int) -> JobId:
    """An attempt that failed and shall be bound again; returns its job, which is a record now."""
    (job,) = await scene.assign(offset)
    assert await scene.claim(number, 1) == [str(job)]
    failed = Ending(job=str(job), kind="failed", ref=str(job.ref), id=f"r{offset}", payload=b"{}")
    assert await scene.node.complete("agent", [failed]) == ["ok"]
    entry = (await scene.client.xrevrange(scene.names.closing, count=1))[0][0]
    retry = RetryItem(
        entry=entry,
        job=job,
        not_before_ms=0,
        failures=1,
        excluded=(NODE,),
        cause="connect",
        error=f"connect: nobody listens\nattempt {job.attempt} at {NODE}",
    )
    assert await scene.leader.retry([retry], now_iso=NOW_ISO) == ["ok"]
    return job


async def test_rq_shows_failed_attempts_with_their_cause(
    scene: Scene, queue: Queue, valkey: ValkeyServer
) -> None:
    jobs = [await fail_and_retry(scene, offset, offset + 1) for offset in range(2)]
    registry = FailedJobRegistry(queue=queue)
    assert sorted(registry.get_job_ids()) == sorted(map(str, jobs))
    job = Job.fetch(str(jobs[0]), connection=queue.connection, serializer=JSONSerializer)
    assert job.get_status() is JobStatus.FAILED
    assert job.origin == queue.name
    assert job.func_name == ENTRY_POINT
    assert job.args == [{"ref": "i0_0"}]
    assert job.description == f"flexlb i0_0 attempt {jobs[0].attempt} failed"
    assert job.ended_at is not None
    with pytest.deprecated_call():
        assert job.exc_info == f"connect: nobody listens\nattempt {jobs[0].attempt} at {NODE}"
    expires_s = registry.get_expiration_time(job).timestamp() - time.time()
    assert 86_000 < expires_s <= 86_400
    text = await rq_command(valkey.url, "info")
    (line,) = [line for line in text.splitlines() if line.startswith(queue.name) and "|" in line]
    assert "2 failed" in line


@pytest.mark.parametrize("by", ["class", "command", "command_for_all"])
async def test_requeueing_a_failed_attempt_runs_and_answers_nothing(
    scene: Scene, queue: Queue, valkey: ValkeyServer, by: str
) -> None:
    record = await fail_and_retry(scene, 0, 1)
    match by:
        case "class":
            FailedJobRegistry(queue=queue).requeue(str(record))
        case "command":
            await rq_command(valkey.url, "requeue", "--queue", queue.name, str(record))
        case _:
            await rq_command(valkey.url, "requeue", "--queue", queue.name, "--all")
    assert queue.job_ids == [str(record)]
    assert FailedJobRegistry(queue=queue).count == 0
    assert 0 < await scene.client.pttl(scene.names.job(record)) <= 86_400_000
    answer = await scene.node.claim("agent", 2, 10, now_iso=NOW_ISO)
    assert (answer.jobs, answer.foreign) == ((), (str(record),))
    assert queue.count == 0
    assert await scene.closing() == []
    assert await scene.node.complete(
        "agent", [Ending(job=str(record), kind="outcome", ref="i0_0", id="r0", payload=b"{}")]
    ) == ["lost"]
    again = AssignItem(job=scene.job(0, n=2), incarnation="agent", cost_tokens=10, from_pending=True)
    ((bound, _),) = await scene.leader.assign([again], {}, now_iso=NOW_ISO)
    assert bound == "ok"
    assert await scene.claim(3, 10) == [str(again.job)]


@pytest.mark.kafka
async def test_a_stock_worker_does_not_run_a_requeued_failed_attempt(
    scene: Scene, queue: Queue, valkey: ValkeyServer, kafka: KafkaAddress, kafka_clients: KafkaClients
) -> None:
    await create_topics(kafka_clients, scene.names, partitions=1, replication_factor=1)
    record = await fail_and_retry(scene, 0, 1)
    FailedJobRegistry(queue=queue).requeue(str(record))
    async with simulated_engine() as engine_url:
        log = await burst(scene, valkey, kafka, engine_url, "rq.SimpleWorker")
    job = Job.fetch(str(record), connection=queue.connection, serializer=JSONSerializer)
    assert "flexlb dead requeue" in str(job.return_value()), log
    assert await scene.closing() == []
    assert await chunks_of(kafka_clients, scene.names, "r0") == []
    assert [job.ref for job in (await scene.view.ledger()).jobs] == ["i0_0"]


# Nothing pickled is ever run


async def test_a_pickled_job_in_our_queue_is_named_and_never_run(
    scene: Scene, rq_connection: redis.Redis, tmp_path: Path
) -> None:
    proof = tmp_path / "ran"
    theirs = Queue(scene.names.queue(NODE), connection=rq_connection)
    foreign = theirs.enqueue("os.mkdir", str(proof), job_id="their-job")
    (ours,) = await scene.assign(0)
    answer = await scene.node.claim("agent", 1, 10, now_iso=NOW_ISO)
    assert [job.job for job in answer.jobs] == [str(ours)]
    assert answer.foreign == (foreign.id,)
    assert not proof.exists()
    assert await scene.closing() == []


# A stock worker runs our jobs


@asynccontextmanager
async def simulated_engine(**settings: object) -> AsyncIterator[str]:
    """An engine over HTTP; its address."""
    engine = Simulator(SimulatorSettings(**{"model": MODEL, "time_scale": 0.0, **settings}))  # type: ignore[arg-type]
    try:
        yield await engine.start()
    finally:
        await engine.close()


async def burst(
    scene: Scene, valkey: ValkeyServer, kafka: KafkaAddress, engine_url: str, worker_class: str
) -> str:
    """Let a stock RQ worker empty the node's queue."""

    async def is_silent() -> bool:
        return not await scene.client.exists(scene.names.load(NODE))

    await wait_until(is_silent, "the former agent's heartbeat to expire")
    environment = {
        "FLEXLB_REDIS": valkey.url,
        "FLEXLB_KAFKA": kafka.bootstrap,
        "FLEXLB_POOL": scene.names.pool,
        "FLEXLB_NODE": NODE,
        "FLEXLB_ENGINE_URL": engine_url,
        "FLEXLB_MODELS": MODEL,
    }
    return await rq_command(
        valkey.url,
        "worker",
        "--burst",
        "--worker-class",
        worker_class,
        scene.names.queue(NODE),
        environment=environment,
    )


async def chunks_of(clients: KafkaClients, names: Names, id: str) -> list[Chunk]:
    """The chunks of a request, which has ended."""
    consumer = clients.consumer(group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    try:
        tp = TopicPartition(names.replies, 0)
        consumer.assign([tp])
        end = (await consumer.end_offsets([tp]))[tp]
        chunks: list[Chunk] = []
        while await consumer.position(tp) < end:
            for records in (await consumer.getmany(timeout_ms=1000)).values():
                chunks += [codec.chunks.decode(record.value) for record in records]
        return [chunk for chunk in chunks if chunk.id == id]
    finally:
        await consumer.stop()


@pytest.mark.kafka
@pytest.mark.parametrize("worker_class", ["rq.SimpleWorker", "rq.Worker"])
async def test_a_stock_worker_runs_our_jobs_to_their_outcome(
    scene: Scene,
    queue: Queue,
    valkey: ValkeyServer,
    kafka: KafkaAddress,
    kafka_clients: KafkaClients,
    worker_class: str,
) -> None:
    await create_topics(kafka_clients, scene.names, partitions=1, replication_factor=1)
    jobs = await scene.assign(0, 1)
    async with simulated_engine() as engine_url:
        log = await burst(scene, valkey, kafka, engine_url, worker_class)
    entries = await scene.closing()
    assert [(entry[b"kind"], entry[b"job"].decode()) for entry in entries] == [
        (b"outcome", str(job)) for job in jobs
    ], log
    outcome = codec.outcomes.decode(entries[1][b"payload"])
    assert (outcome.kind, outcome.reason) == (OutcomeKind.COMPLETED, Reason.FINISHED)
    assert (outcome.id, outcome.ref, outcome.node, outcome.attempt) == (
        "r1",
        "i0_1",
        NODE,
        str(jobs[1].attempt),
    )
    assert outcome.usage.completion_tokens == 4
    chunks = await chunks_of(kafka_clients, scene.names, "r1")
    assert (chunks[0].kind, chunks[-1].kind) == (ChunkKind.BEGIN, ChunkKind.END)
    assert "".join(delta.text for chunk in chunks for delta in chunk.choices) == outcome.choices[0].text

    (stored,) = await scene.view.nodes([NODE])
    assert stored.incarnation.startswith("rq-")
    assert await scene.node.complete(
        stored.incarnation, [Ending(job=str(jobs[0]), kind="outcome", ref="i0_0", id="r0", payload=b"again")]
    ) == ["lost"]
    assert len(await scene.closing()) == 2
    assert (queue.count, StartedJobRegistry(queue=queue).count) == (0, 0)
    assert FailedJobRegistry(queue=queue).count == 0, log
    assert FinishedJobRegistry(queue=queue).get_job_ids() == [str(job) for job in jobs]
    assert await scene.client.zcard(scene.names.claimed(NODE)) == 0
    for key in await scene.client.keys("rq:*"):
        kept = await scene.client.pttl(key)
        assert kept > 0 or key.startswith((b"rq:queues", b"rq:workers", b"rq:finished:")), key


@pytest.mark.kafka
async def test_an_attempt_that_fails_under_a_stock_worker_is_bound_again(
    scene: Scene, queue: Queue, valkey: ValkeyServer, kafka: KafkaAddress, kafka_clients: KafkaClients
) -> None:
    await create_topics(kafka_clients, scene.names, partitions=1, replication_factor=1)
    (job,) = await scene.assign(0)
    async with simulated_engine(faults=Faults(fail_rate=1.0)) as engine_url:
        log = await burst(scene, valkey, kafka, engine_url, "rq.SimpleWorker")
    ((entry, fields),) = await scene.client.xrange(scene.names.closing)
    assert fields[b"kind"] == b"failed", log
    failed = codec.failed_attempts.decode(fields[b"payload"])
    assert (failed.node, failed.attempt) == (NODE, str(job.attempt))
    assert FailedJobRegistry(queue=queue).get_job_ids() == [str(job)]
    retry = RetryItem(
        entry=entry, job=job, not_before_ms=0, failures=1, excluded=(NODE,), cause=failed.cause.value
    )
    assert await scene.leader.retry([retry]) == ["ok"]
    (stored,) = (await scene.view.ledger()).jobs
    assert (stored.ref, stored.failures, stored.excluded) == ("i0_0", 1, (NODE,))
    assert codec.envelopes.decode(stored.envelope).id == "r0"


@pytest.mark.kafka
async def test_a_job_that_was_taken_away_is_not_run_by_a_stock_worker(
    scene: Scene, queue: Queue, valkey: ValkeyServer, kafka: KafkaAddress, kafka_clients: KafkaClients
) -> None:
    await create_topics(kafka_clients, scene.names, partitions=1, replication_factor=1)
    (job,) = await scene.assign(0)
    assert await scene.claim(1, 1) == [str(job)]
    queue.connection.rpush(queue.key, str(job))
    async with simulated_engine() as engine_url:
        await burst(scene, valkey, kafka, engine_url, "rq.SimpleWorker")
    assert await scene.closing() == []
    assert await chunks_of(kafka_clients, scene.names, "r0") == []
    assert await scene.client.zrange(scene.names.claimed(NODE), 0, -1) == [str(job).encode()]
