"""The function that a stock RQ worker calls for a job of ours: the same claim and completion as the agent.

RQ has taken the job from the node's queue already; the claim proves it by RQ's execution id, and from
there on the attempt is leased, run and completed like any other. One job at a time, on a connection of
its own: this is for operators with RQ's tools at hand, the agent is what keeps an engine busy.

An attempt that failed raises, so that RQ keeps the job's hash, from which the leader binds it again; of
one that ended RQ keeps a record of its own for a while, in place of the hash that the completion deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from rq import get_current_job
from rq.job import Job
from rq.utils import as_text

from dispatcher.backends.body_log import BodyLog
from dispatcher.backends.clock import Clock, ServerClock
from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.environment import read_settings
from dispatcher.backends.node_store import Claimed, NodeStore
from dispatcher.backends.reply_history import ReplyHistory
from dispatcher.backends.reply_log import ReplyLog
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.errors import Fenced, FlexLBError, SettingsError
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import decode_job_data
from dispatcher.protocol.names import JobId, Names
from dispatcher.protocol.node import NodeIdentity
from dispatcher.telemetry.logging import Log
from workers_agent.engines.openai_http import OpenAIEngine
from workers_agent.metrics import AgentMetrics
from workers_agent.services.execute import Executor
from workers_agent.services.heartbeat import Heartbeat
from workers_agent.services.registration import Registration
from workers_agent.services.reply_stream import Pacer
from workers_agent.settings import AgentSettings
from workers_agent.state import AgentState

REGISTER_TIMEOUT_S = 10.0
"""How long another incarnation of the node may live on: a dead one's heartbeat is gone long before."""
RECORD_S = 60
"""How long RQ keeps its record of a job that ended."""
FOREIGN_RECORD_S = 86_400
"""As above for a job that is in other hands: its hash is theirs, and RQ is about to let it expire."""
NOT_RUN = (
    "not run: the job is not this worker's any more; for a request that ended use 'flexlb dead requeue REF'"
)


class AttemptFailed(FlexLBError):
    """The attempt ended without an outcome, as the leader knows by now; RQ keeps the job as failed."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """RQ's run of a job: what proves that this process may claim it."""

    job: str
    id: str
    incarnation: str


def execute(work: Mapping[str, object]) -> str:
    """Run the current RQ job; settings come from FLEXLB_REDIS, _KAFKA, _POOL, _NODE, _ENGINE_URL, _MODELS.

    Args:
        work: the request as RQ decoded it. What runs are the bytes that the claim gives.
    Returns:
        How it ended, in a few words.
    Raises:
        AttemptFailed: without an outcome; the leader decides what becomes of the request.
        SettingsError: the environment lacks something, or names another node than the job's.
    """
    job = get_current_job()
    if job is None:
        raise SettingsError("expected to be called by an RQ worker, seen no current job; start `rq worker`")
    settings = read_settings(AgentSettings, {})
    _check(settings, JobId.parse(job.id))
    job.result_ttl = FOREIGN_RECORD_S
    text = asyncio.run(_Run(settings, _current_execution(job)).run())
    if text != NOT_RUN:
        job.result_ttl = RECORD_S
    return text


def _current_execution(job: Job) -> Execution:
    """What RQ knows of this run: the newest execution of the job, and the worker that does it."""
    executions = sorted(job.get_executions(), key=lambda found: found.created_at)
    if not executions:
        raise AttemptFailed(f"job {job.id}: expected an execution of RQ 3, seen none; upgrade rq")
    worker = job.worker_name or "worker"
    pid = job.connection.hget(f"rq:worker:{worker}", "pid")
    incarnation = f"rq-{worker}-{as_text(pid) if pid else 0}"
    return Execution(job=job.id, id=executions[-1].id, incarnation=incarnation)


def _check(settings: AgentSettings, job: JobId) -> None:
    if (settings.pool, settings.node) != (job.pool, job.node):
        raise SettingsError(
            f"FLEXLB_POOL and FLEXLB_NODE: expected {job.pool} and {job.node} as in the job's id, "
            f"seen {settings.pool} and {settings.node}"
        )
    if not settings.models:
        raise SettingsError("FLEXLB_MODELS: expected the models served, comma separated, seen nothing")


class _Run:
    """One job's run."""

    def __init__(self, settings: AgentSettings, execution: Execution) -> None:
        self._settings = settings
        self._execution = execution
        self._clock = Clock()
        self._server_clock = ServerClock(self._clock)
        self._names = Names(settings.pool)
        self._log = Log(process="rq", pool=settings.pool, node=settings.node)

    async def run(self) -> str:
        """Claim, run, complete."""
        settings = self._settings
        client = connect_redis(settings.redis, access=settings.redis_access)
        store = NodeStore(
            ScriptRunner(client),
            self._names,
            settings.node,
            heartbeat_ttl_s=settings.heartbeat_ttl_s,
            lease_s=settings.claim_lease_s,
            server_clock=self._server_clock,
        )
        kafka = connect_kafka(settings.kafka, settings.kafka_access)
        replies, bodies = ReplyLog(kafka, self._names), BodyLog(kafka)
        engine = OpenAIEngine(
            settings.engine_url,
            first_token_timeout_s=settings.first_token_timeout_s,
            inter_token_timeout_s=settings.inter_token_timeout_s,
        )
        try:
            await replies.start()
            state, registration = await self._register(store)
            claimed = await self._claim(state, store, registration)
            if claimed is None:
                return NOT_RUN
            pacer = Pacer(settings.chunk_interval_s)
            history = ReplyHistory(kafka, self._names)
            executor = Executor(state, engine, replies, bodies, pacer, self._names, history=history)
            return await self._execute(state, store, registration, executor, pacer, claimed)
        finally:
            await replies.stop()
            await bodies.stop()
            await engine.close()
            await client.aclose()

    async def _register(self, store: NodeStore) -> tuple[AgentState, Registration]:
        """Register the worker's incarnation; one that was fenced between jobs is replaced by a new one."""
        incarnation = self._execution.incarnation
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT_S):
                while True:
                    state = self._state(incarnation)
                    registration = Registration(state, store)
                    try:
                        await registration.begin()
                        return state, registration
                    except Fenced:
                        incarnation = f"{self._execution.incarnation}-{self._execution.id}"
        except TimeoutError:
            raise AttemptFailed(
                f"node {self._settings.node}: expected no other agent, seen one for {REGISTER_TIMEOUT_S} s; "
                "stop it before running an RQ worker on its queue"
            ) from None

    def _state(self, incarnation: str) -> AgentState:
        settings = self._settings
        identity = NodeIdentity(
            node=settings.node,
            incarnation=incarnation,
            models=settings.model_names,
            loras=settings.lora_names,
            role=settings.role,
            max_running=1,
            max_model_len=settings.max_model_len,
            kv_total_tokens=settings.kv_total_tokens,
            engine_url=settings.engine_url,
        )
        return AgentState(
            identity=identity,
            clock=self._clock,
            server_clock=self._server_clock,
            metrics=AgentMetrics(CollectorRegistry()),
            log=self._log,
        )

    async def _claim(self, state: AgentState, store: NodeStore, registration: Registration) -> Claimed | None:
        number = self._clock.now_ms()  # rises from job to job of a worker, whichever process runs it
        execution = self._execution
        claim = await registration.say(
            lambda: store.claim(
                state.identity.incarnation,
                number,
                1,
                now_iso=self._clock.now_iso(),
                execution=execution.id,
                job=execution.job,
            )
        )
        return claim.jobs[0] if claim.jobs else None

    async def _execute(
        self,
        state: AgentState,
        store: NodeStore,
        registration: Registration,
        executor: Executor,
        pacer: Pacer,
        claimed: Claimed,
    ) -> str:
        """Run the attempt, its lease prolonged beside it, and complete it."""
        settings = self._settings
        held = state.take(claimed, codec.envelopes.decode(claimed.envelope))
        work = decode_job_data(claimed.data)
        heartbeat = Heartbeat(
            state,
            store,
            registration,
            interval_s=settings.report_interval_s,
            min_interval_s=settings.min_report_interval_s,
        )
        answers: list[str] = []
        try:
            async with asyncio.TaskGroup() as group:
                beside = [group.create_task(heartbeat.run()), group.create_task(pacer.run())]
                attempt = JobId.parse(claimed.job).attempt
                held.task = group.create_task(executor.run(claimed.job, attempt, work))
                await asyncio.wait([held.task])
                if (ending := held.ending) is not None:
                    answers = await registration.say(
                        lambda: store.complete(state.identity.incarnation, [ending])
                    )
                for task in beside:
                    task.cancel()
        except* Fenced:
            answers = ["lost"]
        if held.ending is None or answers != ["ok"]:
            return "lost: the attempt was superseded"
        if held.ending.kind != "outcome":
            failed = codec.failed_attempts.decode(held.ending.payload)
            raise AttemptFailed(f"{failed.cause.value}: {failed.message}")
        return codec.outcome_heads.decode(held.ending.payload).kind
