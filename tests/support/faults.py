"""What breaks in one simulated cluster: kinds, victims and durations are the seed's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tests.support.sim.loop import current

if TYPE_CHECKING:
    from tests.support.cluster import Cluster

FAULT_WINDOW_S = 10.0


class Faults:
    """Breaks one cluster."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng

    async def run(self) -> None:
        """The seed's faults, one after the other over the fault window."""
        rng = self._rng
        faults: Sequence[Callable[[], None]] = (
            self._kill_dispatcher,
            self._freeze_dispatcher,
            self._kill_agent,
            self._freeze_agent,
            self._restart_redis,
            self._freeze_redis,
            self._lose_redis,
            self._rewind_redis,
            self._break_kafka,
        )
        for _ in range(rng.randrange(1, 6)):
            await asyncio.sleep(rng.uniform(0.1, FAULT_WINDOW_S / 4))
            rng.choice(faults)()
            self._cluster.invariants.check_places("after a fault")

    def _kill_dispatcher(self) -> None:
        self._kill(self._rng.choice(self._cluster.dispatchers), self._cluster.start_dispatcher)

    def _kill_agent(self) -> None:
        self._kill(self._rng.choice(self._cluster.nodes), self._cluster.start_agent)

    def _kill(self, name: str, start: Callable[[str], None]) -> None:
        self._cluster.note(f"kill {name}")
        self._cluster.processes[name].kill()
        current().call_later(self._rng.choice([0.1, 1.0, 5.0]), start, name)

    def _freeze_dispatcher(self) -> None:
        self._freeze(self._rng.choice(self._cluster.dispatchers))

    def _freeze_agent(self) -> None:
        self._freeze(self._rng.choice(self._cluster.nodes))

    def _freeze(self, name: str) -> None:
        seconds = self._rng.choice([0.3, 1.5, 3.0, 6.0])
        process = self._cluster.processes[name]
        if process.is_alive and not process.is_frozen:
            self._cluster.note(f"freeze {name} for {seconds}")
            process.freeze(seconds)

    def _restart_redis(self) -> None:
        self._cluster.note("restart redis")
        self._cluster.redis.restart(down_s=self._rng.choice([0.1, 1.0, 3.0]))

    def _freeze_redis(self) -> None:
        self._cluster.note("freeze redis")
        self._cluster.redis.freeze(self._rng.choice([0.5, 3.0]))

    def _lose_redis(self) -> None:
        self._cluster.note("lose redis")
        self._cluster.redis.restart(keep_data=False, down_s=self._rng.choice([0.1, 1.0]))

    def _rewind_redis(self) -> None:
        self._cluster.note("rewind redis")
        self._cluster.redis.restart(lose_last_s=self._rng.choice([0.2, 1.0]), down_s=0.2)

    def _break_kafka(self) -> None:
        self._cluster.note("kafka down")
        self._cluster.kafka.down(self._rng.choice([0.2, 2.0]))
