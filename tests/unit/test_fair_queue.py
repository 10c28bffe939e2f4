"""The fair queue: turns by priority, service and deadline, against a plain list of what waits."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.scheduling.fair_queue import FEWEST_KEPT, FairQueue, Order


class Bench:
    """A queue and the refs that wait."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.waiting: set[str] = set()
        self.queue = FairQueue(self.waiting, lambda tenant: (weights or {}).get(tenant, 1.0))
        self.sequence = 0

    def push(self, tenant: str, *, priority: int = 50, due_ms: int = 0, urgent: bool = False) -> str:
        """Enter a request; returns its ref."""
        self.sequence += 1
        ref = f"{tenant}/{self.sequence}"
        self.waiting.add(ref)
        self.queue.push((0 if urgent else 1, -priority, due_ms, 0, self.sequence, ref), tenant)
        return ref

    def take(self) -> tuple[Order, str] | None:
        """Take out whose turn it is."""
        head = self.queue.head()
        if head is None:
            return None
        order, tenant = self.queue.pop()
        assert order == head
        return order, tenant

    def serve(self, tokens: float = 10.0) -> str | None:
        """Serve whose turn it is; returns its tenant."""
        taken = self.take()
        if taken is None:
            return None
        order, tenant = taken
        self.waiting.discard(order[5])
        self.queue.serve(order, tenant, tokens)
        return tenant


def test_one_tenants_requests_come_by_priority_and_deadline() -> None:
    bench = Bench()
    late, soon, first = (
        bench.push("a", due_ms=9),
        bench.push("a", due_ms=3),
        bench.push("a", priority=60, due_ms=100),
    )
    hurried = bench.push("a", priority=1, urgent=True)
    turns = []
    while (taken := bench.take()) is not None:
        bench.queue.part(*taken)
        turns.append(taken[0][5])
    assert turns == [hurried, first, soon, late]


def test_a_flood_waits_for_itself() -> None:
    bench = Bench()
    for _ in range(1_000):
        bench.push("flood")
    for _ in range(50):
        assert bench.serve() == "flood"
    for _ in range(3):
        bench.push("small", due_ms=1_000_000)
    assert Counter(bench.serve() for _ in range(6)) == {"small": 3, "flood": 3}
    assert bench.serve() == "flood"


def test_weights_are_proportions_and_tokens_are_what_counts() -> None:
    bench = Bench({"paid": 3.0})
    for _ in range(400):
        bench.push("paid")
        bench.push("free")
    served: Counter[str] = Counter()
    for _ in range(200):
        tenant = bench.serve(10.0)
        assert tenant is not None
        served[tenant] += 1
    assert served == {"paid": 150, "free": 50}


def test_idle_time_saves_nothing_up() -> None:
    bench = Bench()
    bench.push("late")
    assert bench.serve(1.0) == "late"
    for _ in range(100):
        bench.push("busy")
    for _ in range(50):
        assert bench.serve() == "busy"
    for _ in range(20):
        bench.push("late")
    assert Counter(bench.serve() for _ in range(10)) == {"late": 5, "busy": 5}


def test_service_counts_at_its_own_priority() -> None:
    bench = Bench()
    for _ in range(50):
        bench.push("a", priority=90)
        bench.serve(1_000.0)
    for _ in range(4):
        bench.push("a")
        bench.push("b")
    assert Counter(bench.serve() for _ in range(4)) == {"a": 2, "b": 2}


def test_looked_past_ones_let_other_tenants_have_a_turn_and_come_back_in_order() -> None:
    bench = Bench()
    mine = [bench.push("a", due_ms=n) for n in range(3)]
    other = bench.push("b", due_ms=99)
    taken = bench.take()
    assert taken is not None
    assert taken[0][5] == mine[0]
    bench.queue.look_past(*taken, 10.0)
    head = bench.queue.head()
    assert head is not None
    assert head[5] == other
    assert len(bench.queue) == 4
    bench.queue.end_round()
    head = bench.queue.head()
    assert head is not None
    assert head[5] == mine[0]


def test_all_looked_past_leaves_no_head_but_the_requests() -> None:
    bench = Bench()
    bench.push("a")
    taken = bench.take()
    assert taken is not None
    bench.queue.look_past(*taken, 10.0)
    assert bench.queue.head() is None
    assert len(bench.queue) == 1
    bench.queue.end_round()
    assert bench.serve() == "a"


def test_services_of_tenants_that_left_are_forgotten() -> None:
    bench = Bench()
    for number in range(20 * FEWEST_KEPT):
        if not any(ref.startswith("stays") for ref in bench.waiting):
            bench.push("stays", due_ms=number + 5)
        bench.push(f"t{number}", due_ms=number)
        assert bench.serve(1.0) is not None
    assert len(bench.queue._served) <= 3 * FEWEST_KEPT


def test_new_tenants_do_not_starve_those_who_were_here() -> None:
    bench = Bench()
    bench.push("stays", due_ms=1_000_000)
    for number in range(100):
        bench.push(f"t{number}", due_ms=number)
        if bench.serve(1.0) == "stays":
            break
    assert number <= 2


@given(dues=st.lists(st.integers(min_value=0, max_value=50), max_size=60), most=st.integers(1, 40))
def test_what_comes_next_is_told_in_order(dues: list[int], most: int) -> None:
    bench = Bench()
    for due_ms in dues:
        bench.push("a", due_ms=due_ms)
    upcoming = bench.queue.upcoming(most)
    turns: list[str] = []
    while len(turns) < most and (taken := bench.take()) is not None:
        bench.queue.part(*taken)
        turns.append(taken[0][5])
    assert upcoming == turns


def test_what_comes_next_is_some_of_every_tenant() -> None:
    bench = Bench()
    for n in range(90):
        bench.push("abc"[n % 3], due_ms=n)
    assert Counter(ref[0] for ref in bench.queue.upcoming(30)) == {"a": 10, "b": 10, "c": 10}


steps = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "serve", "pass", "leave", "end", "sweep"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(min_value=1, max_value=3),
        st.integers(min_value=0, max_value=20),
    ),
    max_size=80,
)


@given(steps=steps, seed=st.integers(min_value=0, max_value=1 << 30))
def test_nothing_is_lost_and_turns_are_those_of_a_plain_list(
    steps: list[tuple[str, str, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    bench = Bench({"b": 2.0})
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    present: dict[str, Order] = {}
    passed: dict[str, Order] = {}
    for kind, tenant, priority, number in steps:
        if kind == "push":
            ref = bench.push(tenant, priority=priority, due_ms=number)
            present[ref] = (1, -priority, number, 0, bench.sequence, ref)
        elif kind == "leave" and bench.waiting:
            ref = rng.choice(sorted(bench.waiting))
            bench.waiting.discard(ref)
            present.pop(ref, None)
            passed.pop(ref, None)
        elif kind == "end":
            bench.queue.end_round()
            present |= passed
            passed = {}
        elif kind == "sweep":
            bench.queue.sweep()
        elif kind in ("serve", "pass"):
            taken = bench.take()
            assert (taken is None) == (not present)
            if taken is None:
                continue
            order, whose = taken
            assert order[1] == min(one[1] for one in present.values())
            rivals = [one for one in present.values() if one[1] == order[1]]
            assert order == min(one for one in rivals if one[5].startswith(f"{whose}/"))
            service = {
                one: bench.queue._served[(order[1], one)] + bench.queue._passed.get((order[1], one), 0.0)
                for one in {rival[5].partition("/")[0] for rival in rivals}
            }
            assert service[whose] == min(service.values())
            del present[order[5]]
            if kind == "serve":
                bench.waiting.discard(order[5])
                before = service[whose]
                passing = bench.queue._passed.get((order[1], whose), 0.0)
                bench.queue.serve(order, whose, 10.0 * number)
                after = bench.queue._served[(order[1], whose)] + passing
                assert after == pytest.approx(before + 10.0 * number / weights[whose])
            else:
                bench.queue.look_past(order, whose, 10.0)
                passed[order[5]] = order
    bench.queue.end_round()
    present |= passed
    left = []
    while (taken := bench.take()) is not None:
        bench.queue.part(*taken)
        left.append(taken[0])
    assert sorted(left) == sorted(present.values())
