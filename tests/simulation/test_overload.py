"""Overload in virtual time: a pool is offered twice what it can serve, by itself and with whole processes."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter

import pytest

from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane
from dispatcher.protocol.outcome import OutcomeKind, Reason
from dispatcher.scheduling.overload import OverloadParameters
from tests.support.cluster import DISPATCHER, NODES, Cluster, Outcome
from tests.support.overload import EPOCH_MS, Bench, Request, capacity
from tests.support.sim.loop import run
from tests.support.workload import MODEL, Workload

TARGET_S = 5.0
INTERVAL_S = 2.0
PRIORITIES = {90: 0.1, 50: 0.7, 20: 0.2}
PARAMETERS = OverloadParameters(target_s=TARGET_S, interval_s=INTERVAL_S)
OFF = OverloadParameters(target_s=0)


@pytest.mark.parametrize("seed", [1, 2])
def test_twice_the_load_costs_no_goodput_no_swings_and_no_high_priority(seed: int) -> None:
    most = capacity(seed)
    bench = Bench(seed=seed, parameters=PARAMETERS)
    bench.offer(lambda now_s: 2 * most if now_s < 120 else most / 2, 180, PRIORITIES)
    bench.run(200)
    endless = Bench(seed=seed, parameters=OFF)
    endless.offer(lambda _: 2 * most, 120, PRIORITIES)
    endless.run(120)

    # Goodput: that of a pool which never turns anybody away, and so is never idle.
    assert bench.served(20, 120) >= 0.95 * endless.served(20, 120)
    assert bench.served(20, 120) >= 0.95 * most
    assert all(one.bound_s is None for one in bench.log if one.shed is not None), "work was wasted"
    assert all((one.ended_s is None) != (one.shed is None) for one in bench.log)
    # What is served waits for about the target at most; without shedding it waits for a minute.
    waits_s = [one.waited_s for one in bench.log if one.bound_s is not None and one.bound_s > 20]
    assert max(waits_s) <= 1.25 * TARGET_S
    assert max(one.waited_s for one in endless.log if one.bound_s is not None) > 5 * TARGET_S
    # The most important is neither refused nor delayed.
    high = list(bench.within(0, 200, priority=90))
    assert all(one.shed is None for one in high)
    assert max(one.waited_s for one in high) < 1.0
    # What enters does not swing.
    entered = [
        sum(one.shed_s != one.arrived_s for one in bench.within(first, first + 10))
        for first in range(30, 120, 10)
    ]
    assert statistics.pstdev(entered) / statistics.mean(entered) < 0.1
    # Overload begins once, ends once, and soon nobody is refused any more.
    assert [is_overloaded for _, is_overloaded in bench.overloaded] == [False, True, False]
    assert TARGET_S + INTERVAL_S <= bench.overloaded[1][0] < 3 * (TARGET_S + INTERVAL_S)
    assert 120 < bench.overloaded[2][0] < 120 + 2 * (TARGET_S + INTERVAL_S)
    assert max(one.shed_s or 0 for one in bench.log) < 120 + 1.2 * TARGET_S
    # Most is told at once, and all when to ask again.
    shed = bench.shed_of(Reason.OVERLOADED)
    assert len(shed) > 0.3 * len(list(bench.within(0, 120)))
    assert sum(one.shed_s == one.arrived_s for one in shed) > 0.9 * len(shed)
    assert all(one.shed is not None and 1000 <= one.shed.retry_after_ms <= 300_000 for one in shed)


def test_the_same_priority_is_shed_no_more_than_needed() -> None:
    most = capacity(3)
    bench = Bench(seed=3, parameters=PARAMETERS)
    bench.offer(lambda _: 1.5 * most, 90, {50: 1.0})
    bench.run(90)
    offered = len(list(bench.within(20, 90))) / 70
    refused = sum(one.shed_s is not None and 20 <= one.shed_s < 90 for one in bench.log) / 70
    assert refused == pytest.approx(offered - most, rel=0.2)


def test_a_burst_that_is_soon_worked_off_is_served_whole() -> None:
    """Three times the target of work at once: the last waits for longer, but the queue does not stand."""
    most = capacity(4)
    bench = Bench(seed=4, parameters=OverloadParameters(target_s=TARGET_S, interval_s=15.0))
    for _ in range(int(3 * TARGET_S * most)):
        bench.arrive()
    bench.run(60)
    assert max(one.waited_s for one in bench.log) > 2 * TARGET_S
    assert all(one.shed is None and one.ended_s is not None for one in bench.log)


def outage(bench: Bench, first_s: float, last_s: float, *, of_redis: bool) -> None:
    """Let nothing be bound for a while."""

    def begin() -> None:
        if of_redis:
            bench.healthy = False
        else:
            for node in bench.fleet.nodes.values():
                node.available = False

    def end() -> None:
        bench.healthy = True
        for node in bench.fleet.nodes.values():
            node.available = True

    bench.at(first_s, begin)
    bench.at(last_s, end)


@pytest.mark.parametrize("of_redis", [False, True], ids=["of all nodes", "of Redis"])
def test_an_outage_makes_nobody_late(of_redis: bool) -> None:
    """What came meanwhile waits as long as the outage takes, and is served after it."""
    most = capacity(5)
    bench = Bench(seed=5, parameters=PARAMETERS)
    bench.offer(lambda now_s: 0.9 * most if now_s < 20 else 0.1 * most, 80, PRIORITIES)
    outage(bench, 20, 65, of_redis=of_redis)
    bench.run(120)
    waits_s = [one.waited_s for one in bench.log if one.bound_s is not None]
    assert max(waits_s) > 40
    assert all(one.shed is None for one in bench.log)


def test_overload_after_an_outage_is_told_from_the_outage() -> None:
    most = capacity(6)
    bench = Bench(seed=6, parameters=PARAMETERS)
    bench.offer(lambda _: 1.2 * most, 90, PRIORITIES)
    outage(bench, 20, 45, of_redis=False)
    bench.run(120)
    assert not [one for one in bench.log if one.shed_s is not None and 20 <= one.shed_s < 45 + TARGET_S]
    assert [one for one in bench.log if one.shed_s is not None and one.shed_s >= 45 + TARGET_S]


def test_the_batch_lane_is_never_shed() -> None:
    most = capacity(7)
    bench = Bench(seed=7, parameters=PARAMETERS)
    batch = [bench.arrive(lane=Lane.BATCH) for _ in range(100)]
    bench.offer(lambda _: 2 * most, 60, PRIORITIES)
    bench.run(90)
    assert bench.shed_of(Reason.OVERLOADED)
    assert all(one.shed is None for one in batch)


def standing(seed: int, seconds: float, parameters: OverloadParameters) -> tuple[Bench, float]:
    """A pool that has been offered a little more than it can serve for this long, and its capacity."""
    most = capacity(seed)
    bench = Bench(seed=seed, parameters=parameters)
    bench.offer(lambda _: 1.5 * most, seconds, {60: 1.0})
    bench.run(seconds)
    return bench, most


def reason_of(request: Request) -> Reason | None:
    """Why a request was turned away; None when it was not."""
    return request.shed.reason if request.shed is not None else None


def test_a_deadline_that_is_surely_out_of_reach_is_refused_at_once() -> None:
    bench, most = standing(8, 30, OverloadParameters(target_s=3600))
    wait_s = len(bench.window) / most
    refused = bench.arrive(deadline_s=wait_s / 3)
    assert reason_of(refused) is Reason.DEADLINE_UNREACHABLE
    assert refused.shed is not None
    assert refused.shed.retry_after_ms / 1000 == pytest.approx(wait_s - wait_s / 3, rel=0.5)
    # What may come in time stays, and so does what goes first: by its priority, or by its deadline.
    assert bench.arrive(deadline_s=wait_s).shed is None
    assert bench.arrive(priority=61, deadline_s=wait_s / 3).shed is None
    assert bench.arrive(priority=60, deadline_s=wait_s / 3).shed is None


def test_no_deadline_is_called_out_of_reach_while_that_is_a_guess() -> None:
    """The fleet has just changed, a node has told nothing, or there was no time to measure."""
    bench, most = standing(9, 30, OverloadParameters(target_s=3600))
    soon_s = len(bench.window) / most / 3
    bench.fleet.nodes["n0"].available = False
    bench.run(31)
    assert bench.arrive(deadline_s=soon_s).shed is None
    bench.run(42)
    assert reason_of(bench.arrive(deadline_s=soon_s)) is Reason.DEADLINE_UNREACHABLE
    bench.silent = "n1"
    bench.run(46)
    assert bench.arrive(deadline_s=soon_s).shed is None
    early, most = standing(9, 4, OverloadParameters(target_s=3600))
    assert early.arrive(deadline_s=1.1).shed is None


def test_what_is_called_out_of_reach_would_indeed_have_come_too_late() -> None:
    """The same arrivals without shedding: who was refused for its deadline had no chance there."""
    most = capacity(10)
    benches = []
    for target_s in (3600.0, 0.0):
        bench = Bench(seed=10, parameters=OverloadParameters(target_s=target_s))
        bench.offer(
            lambda now_s: 1.6 * most if now_s < 60 else 0.3 * most, 90, {90: 0.1, 50: 0.9}, deadline_s=8.0
        )
        bench.run(200)
        benches.append(bench)
    refused = benches[0].shed_of(Reason.DEADLINE_UNREACHABLE)
    assert len(refused) > 20
    for one in refused:
        twin = benches[1].log[int(one.envelope.id[1:])]
        assert (twin.arrived_s, twin.envelope.priority) == (one.arrived_s, one.envelope.priority)
        assert twin.envelope.appended_ms == EPOCH_MS + round(1000 * twin.arrived_s)
        assert twin.waited_s > 8.0


# Whole processes

REQUESTS, RATE = 400, 36.0

SETTINGS = DISPATCHER.model_copy(update={"shed_target_s": 1.0, "shed_interval_s": 0.5})


class TooMany(Workload):
    """More than twice what two nodes serve; the highest of three priorities alone is less."""

    async def submit_all(self) -> None:
        """Append them."""
        for number in range(REQUESTS):
            await asyncio.sleep(self.rng.expovariate(RATE))
            request: dict[str, object] = {
                "id": f"r{number}",
                "model": MODEL,
                "endpoint": "/v1/completions",
                "priority": self.rng.choice([20, 20, 50, 50, 90]),
                "body": {"prompt": "x", "max_tokens": 3},
            }
            self.append(request)


class Overloaded(Cluster):
    """A cluster that is offered too much."""

    def __init__(self, seed: int, *, is_calm: bool) -> None:
        super().__init__(seed, nodes=NODES[:2])
        self.settings = SETTINGS
        self.workload = TooMany(self.names, self.kafka, self.expectations, self.rng, self.note)
        self._is_calm = is_calm

    async def break_things(self) -> None:
        """Whatever else happens."""
        if not self._is_calm:
            await super().break_things()


def overload(seed: int, *, is_calm: bool) -> tuple[Outcome, Counter[tuple[str, Reason]]]:
    """Run one seed; counts its endings by priority, and checks the hints."""
    endings: Counter[tuple[str, Reason]] = Counter()

    async def main() -> Outcome:
        cluster = Overloaded(seed, is_calm=is_calm)
        result = await cluster.run()
        for record in cluster.kafka.committed(cluster.names.outcomes):
            outcome = codec.outcomes.decode(record.value or b"")
            request = cluster.expectations.requests[outcome.ref]
            if "priority" not in request:
                continue  # of the clients that hold leases
            endings[str(request["priority"]), outcome.reason] += 1
            is_shed = outcome.reason is Reason.OVERLOADED
            if is_shed:
                assert outcome.kind is OutcomeKind.REJECTED
            assert (outcome.retry_after_ms > 0) == is_shed
        return result

    return run(main()), endings


def shed_share(endings: Counter[tuple[str, Reason]], priority: str) -> float:
    """How much of a priority was turned away."""
    return endings[priority, Reason.OVERLOADED] / sum(n for (one, _), n in endings.items() if one == priority)


def test_whole_processes_shed_what_matters_least() -> None:
    result, endings = overload(1, is_calm=True)
    assert not result.violations, result.violations
    assert endings["20", Reason.OVERLOADED] > 30
    assert shed_share(endings, "20") >= shed_share(endings, "50")
    assert not endings["90", Reason.OVERLOADED]
    assert {reason for _, reason in endings} == {Reason.OVERLOADED, Reason.FINISHED}


def test_what_is_shed_amid_faults_is_answered_once() -> None:
    shed = 0
    for seed in range(4):
        result, endings = overload(seed, is_calm=False)
        assert not result.violations, (seed, result.violations)
        assert sum(endings.values()) == REQUESTS
        shed += sum(count for (_, reason), count in endings.items() if reason is Reason.OVERLOADED)
    assert shed > 50
