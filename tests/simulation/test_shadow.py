"""A shadow beside a simulated cluster: it lives through every fault, and forgets what is over."""

from __future__ import annotations

import asyncio
import random

import pytest
from prometheus_client import CollectorRegistry

from dispatcher.shadow import Shadow
from tests.support.cluster import Cluster
from tests.support.sim.loop import run

SHADOW = "shadow"
SEEDS = 20
WATCHED_S = 30.0
"""Beyond the longest pause of a follower after a fault."""


class ShadowedCluster(Cluster):
    """A cluster with a shadow, which no fault strikes itself: all servers and processes around it fail."""

    shadow: Shadow

    async def break_things(self) -> None:
        """Start the shadow, then the seed's faults; at the end give it time to see that all is over."""
        process = self.network.process(SHADOW)
        self.shadow = Shadow(
            self.settings,
            redis=lambda: self.redis.client(process),
            kafka=self.kafka.clients(process),
            clock=process.clock,
            rng=random.Random(7),
            registry=CollectorRegistry(),
            log=self._log(SHADOW),
            every=10,
        )
        self.processes[SHADOW] = process
        process.spawn(self.shadow.run(), name=SHADOW)
        await super().break_things()
        async with asyncio.timeout(WATCHED_S * 10):
            while self.invariants.unanswered():  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(0.25)
        await asyncio.sleep(WATCHED_S)


def shadowed(seed: int, *, is_split: bool) -> tuple[ShadowedCluster, list[str]]:
    """Run one seed; the cluster afterwards, and what was violated."""

    async def main() -> tuple[ShadowedCluster, list[str]]:
        cluster = ShadowedCluster(seed, is_split=is_split)
        return cluster, (await cluster.run()).violations

    return run(main())


@pytest.mark.parametrize("first", range(0, SEEDS, 5))
def test_a_shadow_survives_every_fault_and_breaks_nothing(first: int) -> None:
    compared = 0
    for seed in range(first, first + 5):
        cluster, violations = shadowed(seed, is_split=seed % 3 == 2)
        assert not violations, f"seed {seed}: {violations[:3]}"
        found = cluster.shadow.summary()
        compared += found.compared
        assert not cluster.shadow.ledger.held, f"seed {seed}: what is over is held"
        assert found.compared == sum(found.verdicts.values())
    assert compared, "nothing was compared"
