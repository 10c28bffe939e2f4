"""The agent, put together: read top to bottom, this is the system diagram of one process.

Everything that touches the outside (Redis, Kafka, the engine, clocks) comes in as an argument, so that
a simulation runs exactly this code in virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry

from dispatcher.backends.body_log import BodyLog
from dispatcher.backends.clock import Clock, ServerClock
from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.node_store import NodeStore
from dispatcher.backends.reply_history import ReplyHistory
from dispatcher.backends.reply_log import ReplyLog
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.errors import Fenced, LogUnavailable
from dispatcher.protocol.names import JobId, Names
from dispatcher.protocol.node import NodeIdentity
from dispatcher.protocol.outcome import FailedAttempt, FailureCause
from dispatcher.tasks import end_tasks
from dispatcher.telemetry.logging import Log
from workers_agent.cache_view import CacheView
from workers_agent.engines.engine import Engine
from workers_agent.engines.gpu import GpuWatch
from workers_agent.engines.kv_events import KVEventSource
from workers_agent.metrics import AgentMetrics
from workers_agent.services.cache_events import CacheEvents
from workers_agent.services.control import Control
from workers_agent.services.engine_watch import EngineWatch
from workers_agent.services.execute import Executor, failed_ending
from workers_agent.services.finish import Finish
from workers_agent.services.heartbeat import Heartbeat
from workers_agent.services.pull import Pull
from workers_agent.services.registration import Registration
from workers_agent.services.reply_stream import Pacer
from workers_agent.settings import AgentSettings
from workers_agent.state import AgentState

CONNECT_PAUSE_S = 1.0
RELEASE_S = 5.0
EVENT_COUNTS = ("batches", "gaps", "replayed", "lost", "restarts", "unreadable")


class Agent:
    """The agent of one node: a sequence of incarnations, usually one.

    Args:
        redis: makes a client; two are used, so that no call waits behind a blocking read.
        scripts: Lua sources that replace the shipped ones, by name (for tests).
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        redis: Callable[[], Redis],
        kafka: KafkaClients,
        engine: Engine,
        clock: Clock,
        new_id: Callable[[], str],
        registry: CollectorRegistry,
        log: Log,
        scripts: dict[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._names = Names(settings.pool)
        self._kafka = kafka
        self._engine = engine
        self._clock = clock
        self._server_clock = ServerClock(clock)
        self._new_id = new_id
        self._log = log
        self.metrics = AgentMetrics(registry)
        self._clients = [redis(), redis()]
        commands, blocking = (ScriptRunner(client, scripts) for client in self._clients)
        self._store = self._node_store(commands)
        self._bell_store = self._node_store(blocking)
        self._replies = ReplyLog(kafka, self._names)
        self._bodies = BodyLog(kafka)
        self._history = ReplyHistory(kafka, self._names)
        self._gpus = GpuWatch(settings.gpus)
        self._view_moved = asyncio.Event()
        self._view: CacheView | None = None
        self._events: KVEventSource | None = None
        self.state: AgentState | None = None

    def _node_store(self, runner: ScriptRunner) -> NodeStore:
        settings = self._settings
        return NodeStore(
            runner,
            self._names,
            settings.node,
            heartbeat_ttl_s=settings.heartbeat_ttl_s,
            lease_s=settings.claim_lease_s,
            server_clock=self._server_clock,
        )

    def health(self) -> dict[str, object]:
        """What `/health` says."""
        state = self.state
        return {
            "ok": True,
            "node": self._settings.node,
            "registered": state is not None and bool(state.generation),
            "engine_ok": state.engine_ok if state is not None else False,
            "running": len(state.held) if state is not None else 0,
            "draining": state.draining if state is not None else False,
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain and return."""
        try:
            if not await self._connect(stop):
                return
            while not stop.is_set():
                try:
                    await self._live(stop)
                except* Fenced as fenced:
                    reason = str(fenced.exceptions[0])
                    self._log.warning("incarnation ended, beginning a new one", reason=reason)
        finally:
            self.state = None
            await self._replies.stop()
            await self._bodies.stop()
            await self._engine.close()
            for client in self._clients:
                await client.aclose()

    async def _connect(self, stop: asyncio.Event) -> bool:
        told = False
        while not stop.is_set():
            try:
                await self._replies.start()
                return True
            except LogUnavailable as error:
                if not told:
                    self._log.error("kafka does not answer, trying again", error=str(error))
                    told = True
                await self._replies.stop()
                self._replies = ReplyLog(self._kafka, self._names)
                try:
                    async with asyncio.timeout(CONNECT_PAUSE_S):
                        await stop.wait()
                except TimeoutError:
                    pass
        return False

    async def _live(self, stop: asyncio.Event) -> None:
        """One incarnation, from registration to drain; raises Fenced (in a group) when it is fenced."""
        settings = self._settings
        state = AgentState(
            identity=self._identity(),
            clock=self._clock,
            server_clock=self._server_clock,
            metrics=self.metrics,
            log=self._log,
        )
        self.state = state
        self.metrics.incarnations.inc()
        registration = Registration(state, self._store)
        async with asyncio.TaskGroup() as group:
            beginning = group.create_task(registration.begin())
            stopping = group.create_task(stop.wait())
            await asyncio.wait([beginning, stopping], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not beginning.done():
                beginning.cancel()
                return
            if beginning.exception() is not None:
                return
            self._log.info("agent ready", node=settings.node, incarnation=state.identity.incarnation)
            pacer = Pacer(settings.chunk_interval_s)
            heartbeat = Heartbeat(
                state,
                self._store,
                registration,
                interval_s=settings.report_interval_s,
                min_interval_s=settings.min_report_interval_s,
            )
            watch = EngineWatch(
                state,
                self._engine,
                self._gpus,
                interval_s=settings.engine_metrics_interval_s,
                died=self._engine_died,
            )
            executor = Executor(
                state,
                self._engine,
                self._replies,
                self._bodies,
                pacer,
                self._names,
                history=self._history,
                check_engine=watch.check,
            )
            running: list[Any] = [
                heartbeat,
                watch,
                Control(state, self._bell_store),
                Finish(state, self._store, registration),
                pacer,
            ]
            if settings.kv_events_endpoint:
                running += self._cache_services(state, registration)
            services = [group.create_task(service.run(), name=type(service).__name__) for service in running]
            pull = group.create_task(
                Pull(state, self._bell_store, registration, executor, group).run(), name="Pull"
            )
            await stop.wait()
            await end_tasks([pull])
            await self._drain(state, heartbeat)
            await end_tasks(services)

    def _cache_services(self, state: AgentState, registration: Registration) -> list[Any]:
        """Following the engine's cache, and publishing it. The view outlives incarnations."""
        settings = self._settings
        if self._view is None:
            model = state.identity.models[0] if state.identity.models else ""
            self._view = CacheView(model, settings.block_size, most_blocks=settings.max_view_blocks)
            self._events = KVEventSource(
                settings.kv_events_endpoint,
                replay=settings.kv_replay_endpoint,
                topic=settings.kv_events_topic,
                take=self._view.apply,
                forget=lambda missing, view=self._view: view.reset(partial=missing),  # type: ignore[misc]
                moved=self._view_moved.set,
            )
            for name in EVENT_COUNTS:
                self.metrics.kv_events.labels(name).set_function(
                    lambda name=name, counts=self._events.counts: getattr(counts, name)  # type: ignore[misc]
                )
        assert self._events is not None
        return [self._events, CacheEvents(state, self._store, registration, self._view, self._view_moved)]

    def _engine_died(self) -> None:
        if self._events is not None:
            self._events.restart()

    def _identity(self) -> NodeIdentity:
        settings = self._settings
        return NodeIdentity(
            node=settings.node,
            incarnation=self._new_id(),
            models=settings.model_names,
            loras=settings.lora_names,
            role=settings.role,
            max_running=settings.max_running,
            max_model_len=settings.max_model_len,
            kv_total_tokens=settings.kv_total_tokens,
            engine_url=settings.engine_url,
            engine_block_size=settings.engine_block_size,
            engine_version=settings.engine_version,
            routing_block_size=settings.block_size if settings.kv_events_endpoint else 0,
        )

    async def _drain(self, state: AgentState, heartbeat: Heartbeat) -> None:
        """Finish what runs, give back the rest, say goodbye."""
        settings = self._settings
        state.draining = True
        state.changed.set()
        self._log.info("draining", running=len(state.held), grace_s=settings.drain_grace_s)
        if not await _emptied(state, settings.drain_grace_s):
            for job, held in list(state.held.items()):
                if held.ending is None:
                    self._release(state, job)
            await _emptied(state, RELEASE_S)
        state.left = True
        try:
            async with asyncio.timeout(RELEASE_S):
                await heartbeat.beat()
        except TimeoutError:
            self._log.warning("left without a goodbye: redis does not answer")
        self._log.info("agent stopped")

    def _release(self, state: AgentState, job: str) -> None:
        held = state.held[job]
        checkpoint = held.checkpoint()
        if held.task is not None:
            held.task.cancel()
        failed = FailedAttempt(
            attempt=str(JobId.parse(job).attempt),
            node=state.identity.node,
            cause=FailureCause.DRAINING,
            message="the node is drained",
        )
        envelope = held.envelope
        state.end(
            job,
            failed_ending(job, envelope.ref, envelope.id, failed, kind="released", checkpoint=checkpoint),
        )


async def _emptied(state: AgentState, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            while state.held:
                state.emptied.clear()
                await state.emptied.wait()
    except TimeoutError:
        return False
    return True
