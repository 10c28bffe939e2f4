"""The dispatcher, put together: read top to bottom, this is the system diagram of one process.

Everything that touches the outside (Redis, Kafka, clocks, chance) comes in as an argument, so that a
simulation runs exactly this code in virtual time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock, ServerClock
from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.leader_lock import LeaderLock, Lease
from dispatcher.backends.leader_store import LeaderStore
from dispatcher.backends.outcome_log import OutcomeLog
from dispatcher.backends.request_log import CancelLog, RequestLog
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.backends.store_view import StoreView
from dispatcher.parameters import admission_limits, overload_parameters, scheduling_parameters
from dispatcher.protocol.names import Names
from dispatcher.scheduling.batches import Batches
from dispatcher.scheduling.breaker import BreakerState
from dispatcher.scheduling.delayed import Delayed
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.retry_budget import RetryBudget
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import Window
from dispatcher.services.cancels import Cancels
from dispatcher.services.close import Endings
from dispatcher.services.dispatch import Chosen, Dispatch
from dispatcher.services.election import Election
from dispatcher.services.expire import Expire
from dispatcher.services.explain import Explain
from dispatcher.services.held_outcomes import HeldOutcomes
from dispatcher.services.intake import Intake
from dispatcher.services.mend import Mend
from dispatcher.services.partitions import Partitions
from dispatcher.services.publish import Publish
from dispatcher.services.recall import Recall
from dispatcher.services.recover import LastSeen, Recovery
from dispatcher.services.registry import Registry
from dispatcher.services.retention import Retention
from dispatcher.services.shed import Shedder
from dispatcher.services.state import LeaderState
from dispatcher.services.unreadable import Unreadable
from dispatcher.services.watch import FleetMirror, Guard
from dispatcher.settings import DispatcherSettings, tenant_weights
from dispatcher.tasks import run_together
from dispatcher.telemetry.clock_offset import ClockOffset
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

MOST_NAMED = 100
"""Nodes that `/health` names of a kind."""


class _SettingsRenewed(Exception):
    """Ends a session, so that the next one, under the same lease, has the new settings."""


class Dispatcher:
    """One dispatcher of one pool: a standby that may lead.

    Args:
        redis: makes a client; several are used, so that no call waits behind a blocking read.
        scripts: Lua sources that replace the shipped ones, by name (for tests).
    """

    def __init__(
        self,
        settings: DispatcherSettings,
        *,
        redis: Callable[[], Redis],
        kafka: KafkaClients,
        clock: Clock,
        new_id: Callable[[], str],
        rng: random.Random,
        registry: CollectorRegistry,
        log: Log,
        scripts: dict[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._kafka = kafka
        self._server_clock = ServerClock(clock)
        self._clock = self._server_clock.as_clock()
        self._new_id = new_id
        self._rng = rng
        self._log = log
        self._names = Names(settings.pool)
        self.metrics = DispatcherMetrics(registry)
        self._offset = ClockOffset(self.metrics.clock_ahead_s, log)
        self._clients = [redis(), redis(), redis(), redis()]
        commands, streams, lease, blocks = self._clients
        self._runner = ScriptRunner(commands, scripts)
        self._view = StoreView(streams, self._names)
        self.mirror = FleetMirror(self._view, clock, self.metrics)
        self.index = PrefixIndex()
        self.registry = Registry(
            StoreView(blocks, self._names),
            self.mirror.fleet,
            self.index,
            block_size=settings.block_size,
            clock=clock,
            metrics=self.metrics,
            log=log,
        )
        lock = LeaderLock(
            ScriptRunner(lease, scripts),
            self._names,
            ttl_s=settings.leader_ttl_s,
            clock=clock.monotonic,
            heard=self._heard,
        )
        self.election = Election(
            lock,
            self.mirror,
            self._lead,
            self._close,
            is_on=settings.election,
            ttl_s=settings.leader_ttl_s,
            new_id=new_id,
            clock=clock,
            rng=rng,
            metrics=self.metrics,
            log=log,
        )
        self._last_seen = LastSeen()
        self._renewed = asyncio.Event()
        self._open: list[RequestLog | OutcomeLog] = []
        self.state: LeaderState | None = None

    async def run(self) -> None:
        """Stand by and lead until cancelled.

        Raises:
            BaseExceptionGroup: of Superseded, when election is off and another dispatcher took over.
        """
        try:
            await run_together(election=self.election.run(), registry=self.registry.run())
        finally:
            for client in self._clients:
                await client.aclose()

    def _heard(self, server_ms: int, asked_s: float) -> None:
        """Follow Redis's clock, which deadlines go by."""
        self._server_clock.heard(server_ms, asked_s)
        self._offset.note(self._server_clock.own_ahead_s)

    @property
    def settings(self) -> DispatcherSettings:
        """Those that count now."""
        return self._settings

    def renew(self, settings: DispatcherSettings) -> None:
        """Go on with other settings; a leader begins a new session under its lease, as after a failover.

        Args:
            settings: equal to those so far in all that needs a restart.
        """
        self._settings = settings
        self._renewed.set()

    def health(self) -> dict[str, object]:
        """What `/health` says."""
        state = self.state
        return {
            "ok": True,
            "pool": self._names.pool,
            "leading": self.election.leading,
            "nodes": sum(node.available for node in self.mirror.fleet.nodes.values()),
            "on_probation": sorted(
                node.name
                for node in self.mirror.fleet.nodes.values()
                if node.breaker.state is not BreakerState.CLOSED
            )[:MOST_NAMED],
            "cordoned": {node: wish.value for node, wish in sorted(self.mirror.fleet.cordons.items())},
            "waiting": len(state.window) if state is not None else 0,
            "bound": len(state.bound) if state is not None else 0,
        }

    async def _lead(self, lease: Lease) -> None:
        """Lead under one lease, by a session and an epoch per renewal; ends by an exception only."""
        while True:
            self._renewed.clear()
            try:
                await run_together(session=self._session(lease), renewed=self._until_renewed())
            except* _SettingsRenewed:
                await self._close()
                await self.election.begin_epoch(lease)

    async def _until_renewed(self) -> None:
        await self._renewed.wait()
        raise _SettingsRenewed

    async def _session(self, lease: Lease) -> None:
        """One session of leadership; ends by an exception only."""
        settings, names = self._settings, self._names
        requests = RequestLog(self._kafka, names)
        outcomes = OutcomeLog(self._kafka, names)
        store = LeaderStore(self._runner, names, lease)
        state = LeaderState(
            names=names,
            fleet=self.mirror.fleet,
            index=self.index,
            window=Window(is_fair=settings.fair_tenants, weights=tenant_weights(settings.tenant_weights)),
            retries=Delayed(RetryBudget(share=settings.retry_share, floor_per_s=settings.retry_floor_rate)),
            untold_linger_s=settings.own_assignment_ttl_s,
            clock=self._clock,
            rng=self._rng,
            metrics=self.metrics,
            log=self._log,
        )
        self.state = state
        self._open = [requests, outcomes]
        try:
            await run_together(outcomes=outcomes.start(), requests=requests.start())
            recovery = Recovery(
                state,
                store,
                self._view,
                self.mirror,
                outcomes,
                requests,
                self._kafka,
                new_id=self._new_id,
                inventory_wait_s=settings.heartbeat_ttl_s,
                claim_lease_s=settings.claim_lease_s,
            )
            recovered = await recovery.recover(self._last_seen)
            endings = Endings(state, store)
            parameters = scheduling_parameters(settings)
            batches: Batches[Chosen] = Batches(wait_s=parameters.batch_wait_s, size=parameters.batch_size)
            scheduler = Scheduler(
                state.fleet,
                state.index,
                policy=settings.policy,
                decode_policy=settings.decode_policy,
                parameters=parameters,
                rng=self._rng,
                healthy_s=lambda: self.mirror.healthy.now_s,
                now_s=state.clock.monotonic,
                batches=batches,
            )
            state.window.longer_ms = scheduler.longer_ms
            # What waits by design must not pass for a sign of overload.
            state.window.most_put_off_ms = int(1000 * settings.shed_target_s / 3)
            shedder = Shedder(
                state,
                endings,
                scheduler,
                parameters=overload_parameters(settings),
                healthy_s=lambda: self.mirror.healthy.now_s,
            )
            limits = admission_limits(settings, names, requests.reply_partitions)
            intake = Intake(
                state,
                requests,
                endings,
                shedder,
                limits=limits,
                block_size=settings.block_size,
                window_requests=settings.window_requests,
                window_bytes=settings.window_bytes,
                carried_bytes=settings.carried_bytes,
                span_limit=settings.span_limit,
            )
            explain = Explain(
                state, store, scheduler, share=settings.explain_share, per_s=settings.explain_rate
            )
            dispatch = Dispatch(
                state,
                store,
                endings,
                explain,
                scheduler=scheduler,
                batches=batches,
                batch=settings.assign_batch,
            )
            recall = Recall(state, requests, limits)
            mend = Mend(state, store, self._view, recall, endings)
            guard = Guard(
                state,
                store,
                self._view,
                self.mirror,
                heartbeat_ttl_s=settings.heartbeat_ttl_s,
                claim_lease_s=settings.claim_lease_s,
            )
            publish = Publish(
                state,
                store,
                self._view,
                outcomes,
                Unreadable(state, recall),
                positions=recovered.positions,
                floor=recovered.floor,
                committed=recovered.committed,
            )
            expire = Expire(state, endings, shedder, unknown_model_grace_s=settings.unknown_model_grace_s)
            cancels = Cancels(state, CancelLog(self._kafka, names), requests, endings)
            partitions = Partitions(requests, self._log)
            retention = Retention(state, self._kafka, longest_deadline_ms=int(settings.max_deadline_s * 1000))
            services = (
                guard,
                endings,
                publish,
                mend,
                cancels,
                expire,
                dispatch,
                explain,
                intake,
                partitions,
                retention,
                HeldOutcomes(state, self._kafka),
            )
            await run_together(**{type(service).__name__: service.run() for service in services})
        finally:
            self._last_seen = LastSeen(generation=state.generation, counter=store.counter)
            self.state = None

    async def _close(self) -> None:
        """Close the Kafka clients of a session that ended."""
        logs, self._open = self._open, []
        for log in logs:
            await log.stop()
