"""A shadow, put together: another scheduler beside a live leader, which changes nothing.

It takes no lock, joins no group, binds nothing and writes nothing: every client that it is given is made
read-only here, before anything else gets it (`backends.read_only`).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.outcome_tail import OutcomeTail
from dispatcher.backends.read_only import ReadOnlyRedis, read_only_kafka
from dispatcher.backends.request_log import RequestLog
from dispatcher.backends.scripts import Redis
from dispatcher.backends.store_view import StoreView
from dispatcher.parameters import admission_limits, scheduling_parameters
from dispatcher.protocol.names import Names
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.shadow import Summary, Tally
from dispatcher.services.registry import Registry
from dispatcher.services.shadow import ShadowLedger
from dispatcher.services.shadow_followers import OutcomeFollower, RecordFollower
from dispatcher.services.state import LeaderState
from dispatcher.services.watch import FleetMirror
from dispatcher.settings import DispatcherSettings
from dispatcher.tasks import run_together
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics, ShadowMetrics


class Shadow:
    """A shadow of one pool's leader.

    Args:
        settings: its own; policy, weights and limits are what it compares.
        every: a line in the log for so many comparisons.
    """

    def __init__(
        self,
        settings: DispatcherSettings,
        *,
        redis: Callable[[], Redis],
        kafka: KafkaClients,
        clock: Clock,
        rng: random.Random,
        registry: CollectorRegistry,
        log: Log,
        every: int,
    ) -> None:
        names, kafka = Names(settings.pool), read_only_kafka(kafka)
        self._clients = [ReadOnlyRedis(redis()) for _ in range(3)]
        streams, blocks, jobs = (StoreView(client, names) for client in self._clients)
        metrics = DispatcherMetrics(registry)
        self.mirror = FleetMirror(streams, clock, metrics)
        fleet, index = self.mirror.fleet, PrefixIndex()
        self._registry = Registry(
            blocks, fleet, index, block_size=settings.block_size, clock=clock, metrics=metrics, log=log
        )
        state = LeaderState(
            names=names,
            fleet=fleet,
            index=index,
            untold_linger_s=settings.own_assignment_ttl_s,
            clock=clock,
            rng=rng,
            metrics=metrics,
            log=log,
        )
        self._scheduler = Scheduler(
            fleet,
            index,
            policy=settings.policy,
            decode_policy=settings.decode_policy,
            parameters=scheduling_parameters(settings),
            rng=rng,
            healthy_s=lambda: self.mirror.healthy.now_s,
            now_s=clock.monotonic,
        )
        self._tally = Tally(settings.policy, settings.decode_policy)
        self.ledger = ShadowLedger(
            state,
            jobs,
            self.mirror,
            self._scheduler,
            self._tally,
            ShadowMetrics(registry),
            every=every,
        )
        self.mirror.before = self.ledger.before_reports
        self._records = RecordFollower(
            self.ledger,
            lambda: RequestLog(kafka, names),
            lambda log: admission_limits(settings, names, log.reply_partitions),
            metrics.log_errors.inc,
        )
        self._outcomes = OutcomeFollower(
            self.ledger, lambda: OutcomeTail(kafka, names), metrics.log_errors.inc
        )
        self._pool = settings.pool

    def summary(self) -> Summary:
        """What was found so far."""
        return self._tally.summary()

    def health(self) -> dict[str, object]:
        """What `/health` says."""
        return {
            "ok": True,
            "pool": self._pool,
            "shadow": True,
            "leading": False,
            "nodes": sum(node.available for node in self.mirror.fleet.nodes.values()),
            "compared": self._tally.compared,
        }

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            await run_together(
                mirror=self.mirror.run(),
                registry=self._registry.run(),
                ledger=self.ledger.run(),
                records=self._records.run(),
                outcomes=self._outcomes.run(),
            )
        finally:
            for client in self._clients:
                await client.aclose()
