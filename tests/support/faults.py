"""What breaks in one simulated cluster: kinds, victims and durations are the seed's.

Servers restart, freeze, refuse and lose data; processes are killed, stopped, frozen and cut off from one
server alone; wall clocks jump; engines crash; operators cordon and drain. Now and then two at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from dispatcher.backends.operator_store import OperatorStore
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.errors import StoreRefused, StoreUnavailable
from dispatcher.protocol.node import Wish
from tests.support.sim.loop import current

if TYPE_CHECKING:
    from tests.support.cluster import Cluster

FAULT_WINDOW_S = 5.0
FEWEST_FAULTS, MOST_FAULTS = 2, 6
TWO_AT_ONCE = 0.25
JUMPS_S = (-3600.0, -20.0, -0.5, 0.5, 20.0, 3600.0)


class Faults:
    """Breaks one cluster.

    Args:
        kinds: only these, by name; all of them when empty.
    """

    def __init__(self, cluster: Cluster, rng: random.Random, *, kinds: tuple[str, ...] = ()) -> None:
        self._cluster = cluster
        self._rng = rng
        self._operators = 0
        faults = (
            self._kill_dispatcher,
            self._stop_dispatcher,
            self._freeze_dispatcher,
            self._kill_agent,
            self._strike_between_effects,
            self._strike_between_effects,
            self._stop_agent,
            self._freeze_agent,
            self._crash_engine,
            self._cordon,
            self._restart_redis,
            self._refuse_redis,
            self._freeze_redis,
            self._lose_redis,
            self._rewind_redis,
            self._break_kafka,
            self._freeze_kafka,
            self._cut,
            self._cut,
            self._slow_network,
            self._jump_clock,
            self._renew_settings,
        )
        by_name = (self._damage_jobs, self._spoil_jobs)  # beside those of every seed
        self._faults = (
            tuple(fault for fault in (*faults, *by_name) if fault.__name__.lstrip("_") in kinds) or faults
        )

    async def run(self) -> None:
        """The seed's faults over the fault window."""
        rng = self._rng
        for _ in range(rng.randrange(FEWEST_FAULTS, MOST_FAULTS + 1)):
            await asyncio.sleep(rng.uniform(0.1, FAULT_WINDOW_S / 4))
            rng.choice(self._faults)()
            if rng.random() < TWO_AT_ONCE:
                rng.choice(self._faults)()
            self._cluster.invariants.check_places("after a fault")

    def _dispatcher(self) -> str:
        return self._rng.choice(self._cluster.dispatchers)

    def _node(self) -> str:
        return self._rng.choice(self._cluster.nodes)

    def _anyone(self) -> str:
        return self._rng.choice([*self._cluster.dispatchers, *self._cluster.nodes])

    # Processes

    def _kill_dispatcher(self) -> None:
        self._kill(self._dispatcher(), self._cluster.start_dispatcher)

    def _kill_agent(self) -> None:
        self._kill(self._node(), self._cluster.start_agent)

    def _strike_between_effects(self) -> None:
        """Kill or freeze a process right after one of its next effects at a server, not heard of yet."""
        rng = self._rng
        name, start = rng.choice(
            [
                (self._dispatcher(), self._cluster.start_dispatcher),
                (self._node(), self._cluster.start_agent),
            ]
        )
        process, server = self._cluster.processes[name], rng.choice(["kafka", "kafka", "redis"])
        effects, freezes = rng.choice([1, 2, 3, 5, 8, 13, 21, 34, 55]), rng.random() < 0.5

        def spring() -> None:
            if self._cluster.processes[name] is not process or not process.is_alive:
                return
            if freezes:
                self._freeze(name)
            else:
                self._kill(name, start)

        self._cluster.note(f"strike {name} after {effects} effects at {server}")
        self._cluster.network.trap(process.name, server, effects, spring)

    def _kill(self, name: str, start: Callable[[str], None]) -> None:
        self._cluster.note(f"kill {name}")
        self._cluster.processes[name].kill()
        # At once, too: the successor meets what its predecessor still holds.
        current().call_later(self._rng.choice([0.0, 0.1, 1.0, 5.0]), self._start, name, start)

    def _start(self, name: str, start: Callable[[str], None]) -> None:
        if not self._cluster.processes[name].is_alive:
            start(name)

    def _stop_dispatcher(self) -> None:
        """SIGTERM: it gives the lease back; another starts in its place."""
        name = self._dispatcher()
        self._cluster.note(f"stop {name}")
        self._cluster.stop_dispatcher(name)
        self._replace(name, self._cluster.start_dispatcher)

    def _stop_agent(self) -> None:
        """SIGTERM: it drains for up to 3 s; another starts in its place, perhaps while it still drains."""
        name = self._node()
        self._cluster.note(f"stop {name}")
        self._cluster.stop_agent(name)
        self._replace(name, self._cluster.start_agent)

    def _replace(self, name: str, start: Callable[[str], None]) -> None:
        stopping = self._cluster.processes[name]

        def replace() -> None:
            if self._cluster.processes[name] is stopping:
                if stopping.is_alive:
                    stopping.kill()
                start(name)

        current().call_later(self._rng.choice([0.2, 2.0, 5.0]), replace)

    def _freeze_dispatcher(self) -> None:
        self._freeze(self._dispatcher())

    def _freeze_agent(self) -> None:
        self._freeze(self._node())

    def _freeze(self, name: str) -> None:
        seconds = self._rng.choice([0.3, 1.5, 3.0, 5.0])
        process = self._cluster.processes[name]
        if process.is_alive and not process.is_frozen:
            self._cluster.note(f"freeze {name} for {seconds}")
            process.freeze(seconds)

    def _jump_clock(self) -> None:
        """NTP steps the wall clock of one process, for good."""
        name, seconds = self._anyone(), self._rng.choice(JUMPS_S)
        self._cluster.note(f"the clock of {name} jumps by {seconds}")
        self._cluster.processes[name].clock_skew_s += seconds

    def _crash_engine(self) -> None:
        node, seconds = self._node(), self._rng.choice([0.05, 1.0, 3.0])
        self._cluster.note(f"crash the engine of {node} for {seconds}")
        self._cluster.engines[node].crash(seconds)

    # Operators

    def _cordon(self) -> None:
        """An operator cordons or drains a node and takes it back some seconds later."""
        node, wish = self._node(), self._rng.choice(list(Wish))
        self._operators += 1
        operator = self._cluster.network.process(f"operator-{self._operators}")
        store = OperatorStore(ScriptRunner(self._cluster.redis.client(operator)), self._cluster.names)
        seconds = self._rng.uniform(0.5, 5.0)

        async def wish_for_a_while() -> None:
            for wanted, then_s in ((wish, seconds), (None, 0.0)):
                while True:
                    try:
                        await store.wish(node, wanted)
                    except (StoreUnavailable, StoreRefused):
                        await asyncio.sleep(0.2)
                    else:
                        break
                await asyncio.sleep(then_s)

        self._cluster.note(f"{wish.value} {node} for {seconds:.1f}")
        self._cluster.processes[operator.name] = operator
        operator.spawn(wish_for_a_while(), name="wish")

    def _renew_settings(self) -> None:
        name = self._rng.choice(self._cluster.dispatchers)
        process = self._cluster.processes[name]
        if process.is_alive and not process.is_frozen:
            self._cluster.note(f"renew settings of {name}")
            dispatcher = self._cluster.running[name]
            dispatcher.renew(
                dispatcher.settings.model_copy(update={"assign_batch": self._rng.choice([1, 128])})
            )

    # Servers

    def _restart_redis(self) -> None:
        self._cluster.note("restart redis")
        self._cluster.redis.restart(down_s=self._rng.choice([0.1, 1.0, 3.0]))

    def _refuse_redis(self) -> None:
        self._cluster.note("redis refuses")
        self._cluster.redis.down(self._rng.choice([2.0, 5.0]))

    def _freeze_redis(self) -> None:
        self._cluster.note("freeze redis")
        self._cluster.redis.freeze(self._rng.choice([0.5, 3.0]))

    def _lose_redis(self) -> None:
        self._cluster.note("lose redis")
        self._cluster.redis.restart(keep_data=False, down_s=self._rng.choice([0.1, 1.0]))

    def _rewind_redis(self) -> None:
        """A restart without the last writes, or a failover to a replica that missed them."""
        self._cluster.note("rewind redis")
        self._cluster.redis.restart(
            lose_last_s=self._rng.choice([0.02, 0.2, 1.0, 3.0]), down_s=self._rng.choice([0.02, 0.2, 1.0])
        )

    def _damage_jobs(self) -> None:
        """Some jobs become what no release can read, and a dispatcher dies: the next leader meets them."""
        rng, redis, names = self._rng, self._cluster.redis, self._cluster.names
        found = [*redis.call("KEYS", names.pending_job("*")), *redis.call("KEYS", names.job("*"))]
        jobs = [key for key in sorted(found) if redis.call("HGET", key, "envelope") is not None]
        damaged = rng.sample(jobs, rng.randint(0, len(jobs)))
        for key in damaged:
            field = rng.choice(["envelope", "envelope", "failures"])
            redis.call(
                "HSET",
                key,
                field,
                rng.choice(["none of ours", '{"v":99}', "\udcff"]).encode(errors="surrogateescape"),
            )
        self._cluster.note(f"damage {len(damaged)} of {len(jobs)} jobs")
        self._kill_dispatcher()

    def _spoil_jobs(self) -> None:
        """Some jobs are deleted, or have rubbish in a field or none of it; their leader goes on."""
        rng, redis, names = self._rng, self._cluster.redis, self._cluster.names
        found = [*redis.call("KEYS", names.pending_job("*")), *redis.call("KEYS", names.job("*"))]
        jobs = [key for key in sorted(found) if redis.call("TYPE", key) == b"hash"]
        spoilt = rng.sample(jobs, rng.randint(0, len(jobs)))
        for key in spoilt:
            match rng.choice(["gone", "gone", "rubbish", "field gone", "strange"]):
                case "gone":
                    redis.call("DEL", key)
                case "rubbish":
                    field = rng.choice(["envelope", "data", "failures", "hit", "seq", "ref"])
                    redis.call("HSET", key, field, rng.choice([b"none of ours", b'{"v":99}', b"\xff"]))
                case "field gone":
                    redis.call("HDEL", key, rng.choice(["envelope", "data"]))
                case _:
                    redis.call("DEL", key)
                    redis.call("SET", key, "none of ours", "PX", 600_000)
        self._cluster.note(f"spoil {len(spoilt)} of {len(jobs)} jobs")

    def _break_kafka(self) -> None:
        self._cluster.note("kafka down")
        self._cluster.kafka.down(self._rng.choice([0.2, 2.0]))

    def _freeze_kafka(self) -> None:
        self._cluster.note("freeze kafka")
        self._cluster.kafka.freeze(self._rng.choice([0.5, 3.0]))

    # The network

    def _cut(self) -> None:
        """One process and one server can't reach each other; all others can."""
        name, server = self._anyone(), self._rng.choice(["redis", "redis", "kafka"])
        seconds, refuses = self._rng.choice([0.5, 2.5, 5.0]), self._rng.random() < 0.3
        self._cluster.note(f"cut {name} from {server} for {seconds}{', refusing' if refuses else ''}")
        self._cluster.network.cut(self._cluster.processes[name].name, server, seconds, refuses=refuses)

    def _slow_network(self) -> None:
        lag_s = self._rng.choice([0.05, 0.2, 0.5])
        self._cluster.note(f"messages take up to {lag_s} longer")
        self._cluster.network.lag(lag_s, self._rng.choice([1.0, 4.0]))
