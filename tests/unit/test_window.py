"""The window: whom it offers next, what it looks past, and what it costs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Lane, Ref
from dispatcher.protocol.node import NodeIdentity
from dispatcher.scheduling.choice import Choice
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import (
    BATCH_EVERY,
    ENVELOPE_OVERHEAD_BYTES,
    FEWEST_STALE,
    LOOK_PAST,
    MOST_PARKED,
    PARK_MS,
    Waiting,
    Window,
)

NOW_MS = 1_790_000_000_000


def waiting(
    offset: int,
    *,
    lane: Lane = Lane.INTERACTIVE,
    model: str = "m",
    priority: int = 50,
    deadline_ms: int = 60_000,
    age_ms: int = 0,
    prompt_tokens: int = 10,
    data: bytes = b"",
    excluded: tuple[str, ...] = (),
    lora: str = "",
    tenant: str = "",
) -> Waiting:
    """A request; its offset names it."""
    ref = Ref(lane, 0, offset)
    envelope = Envelope(
        ref=str(ref),
        id=f"r{offset}",
        model=model,
        priority=priority,
        prompt_tokens=prompt_tokens,
        tokens_exact=True,
        lora=lora,
        tenant=tenant,
        appended_ms=NOW_MS - age_ms,
        deadline_at_ms=NOW_MS + deadline_ms,
    )
    return Waiting(ref=ref, envelope=envelope, data=data, excluded=excluded)


def fleet_of(*nodes: NodeIdentity) -> Fleet:
    """A fleet whose nodes may be bound to."""
    fleet = Fleet()
    for identity in nodes:
        fleet.admit(identity, 0.0).admitted = True
    return fleet


def node(
    name: str = "n", *, models: tuple[str, ...] = ("m",), max_running: int = 1000, max_model_len: int = 1000
) -> NodeIdentity:
    """A node."""
    return NodeIdentity(
        node=name, incarnation="x", models=models, max_running=max_running, max_model_len=max_model_len
    )


class Bench:
    """A window, a fleet, and the binding that a leader does between choices."""

    def __init__(self, fleet: Fleet, items: Iterable[Waiting] = (), **settings: Any) -> None:
        self.window = Window(**settings)
        self.fleet = fleet
        self.rng = random.Random(1)
        self.now_ms = NOW_MS
        for item in items:
            self.window.push(item)

    def choose(self) -> tuple[Waiting, Choice] | None:
        """One choice in a round of its own."""
        scheduler = Scheduler(self.fleet, PrefixIndex(), policy="least_outstanding_tokens", rng=self.rng)
        round = self.window.begin_round()
        found = self.window.choose(scheduler, round, self.now_ms)
        self.window.end_round(round)
        return found

    def bind(self) -> Waiting | None:
        """Choose and reserve one request."""
        found = self.choose()
        if found is None:
            return None
        chosen, choice = found
        at = choice.node
        assert chosen.envelope.model in at.identity.models
        self.fleet.reserve(at.name, chosen.envelope.ref, chosen.envelope.cost_tokens)
        return chosen

    def bind_all(self) -> list[int]:
        """Offsets in the order in which they are bound, until nothing can be."""
        order = []
        while (chosen := self.bind()) is not None:
            order.append(chosen.ref.offset)
        return order


# Order


def test_priority_goes_before_deadline_before_age_before_arrival() -> None:
    items = [
        waiting(1, priority=50),
        waiting(2, priority=50),
        waiting(3, priority=50, age_ms=100),
        waiting(4, priority=50, deadline_ms=1_000),
        waiting(5, priority=90, deadline_ms=90_000),
        waiting(6, priority=1, deadline_ms=1),
    ]
    assert Bench(fleet_of(node()), items).bind_all() == [5, 4, 3, 1, 2, 6]


def flood(**settings: Any) -> Bench:
    """A tenant's backlog, and five requests of two others that came last and are due last."""
    items = [waiting(n, tenant="flood", age_ms=1_000) for n in range(100)]
    items += [waiting(100 + n, tenant="small", deadline_ms=90_000) for n in range(3)]
    items += [waiting(103 + n, tenant="paid", deadline_ms=90_000) for n in range(2)]
    return Bench(fleet_of(node()), items, **settings)


def test_a_tenants_backlog_is_its_own() -> None:
    order = flood().bind_all()
    assert sorted(order) == list(range(105))
    assert {100, 101, 103, 104} <= set(order[:8])
    assert [n for n in order if n < 100] == list(range(100))


def test_weights_say_who_goes_first() -> None:
    order = flood(weights={"paid": 10.0}).bind_all()
    assert {103, 104} <= set(order[:4])


def test_tenants_can_be_told_to_count_as_one() -> None:
    assert flood(is_fair=False).bind_all() == list(range(105))


def test_a_long_prompt_lets_shorter_ones_pass_for_a_while_but_not_forever() -> None:
    bench = Bench(fleet_of(node(max_model_len=2_000_000)), [])
    bench.window.longer_ms = lambda envelope: envelope.prompt_tokens
    for one in (
        waiting(1, prompt_tokens=10_000, age_ms=5_000, deadline_ms=55_000),
        waiting(2, prompt_tokens=100),
        waiting(3, prompt_tokens=10_000, deadline_ms=1_000),
        waiting(4, prompt_tokens=1_000_000, age_ms=30_000, deadline_ms=30_000),
    ):
        bench.window.push(one)
    # Due and put off: 55 + 10, 60 + 0.1, 1 + 0.25 (a quarter of what it has), 30 + 10 s (the most).
    assert bench.bind_all() == [3, 4, 2, 1]


def test_a_request_read_far_behind_is_bound_next_when_it_matters_more() -> None:
    bench = Bench(fleet_of(node()), [waiting(n) for n in range(2_000)])
    bench.window.push(waiting(9_999, priority=90))
    chosen = bench.bind()
    assert chosen is not None
    assert chosen.ref.offset == 9_999


def test_the_most_urgent_over_all_models_is_bound_first() -> None:
    items = [
        waiting(1, model="a", priority=10),
        waiting(2, model="b", priority=80),
        waiting(3, model="a", priority=90),
    ]
    assert Bench(fleet_of(node(models=("a", "b"))), items).bind_all() == [3, 2, 1]


@given(
    requests=st.lists(
        st.tuples(
            st.integers(min_value=1, max_value=5),
            st.integers(min_value=1, max_value=5),
            st.integers(min_value=0, max_value=5),
            st.sampled_from(["a", "b"]),
        ),
        max_size=20,
    ),
    removed=st.sets(st.integers(min_value=0, max_value=19)),
    hurried=st.sets(st.integers(min_value=0, max_value=19)),
)
def test_the_order_is_that_of_a_plain_sort(
    requests: list[tuple[int, int, int, str]], removed: set[int], hurried: set[int]
) -> None:
    items = [
        waiting(n, priority=priority, deadline_ms=deadline, age_ms=age, model=model)
        for n, (priority, deadline, age, model) in enumerate(requests)
    ]
    bench = Bench(fleet_of(node(models=("a", "b"))), items)
    for n in sorted(hurried):
        bench.window.hurry(f"i0_{n}")
    for n in removed:
        bench.window.remove(f"i0_{n}")

    def rank(n: int) -> tuple[bool, int, int, int, int]:
        priority, deadline, age, _ = requests[n]
        return n not in hurried, -priority, deadline, -age, n

    kept = [n for n in range(len(requests)) if n not in removed]
    assert bench.bind_all() == sorted(kept, key=rank)
    assert len(bench.window) == 0
    assert bench.window.bytes == 0


# Batch


def mixed(count: int) -> list[Waiting]:
    """As many batch requests as interactive ones."""
    batch = [waiting(n, lane=Lane.BATCH, priority=100) for n in range(count)]
    return batch + [waiting(n) for n in range(count)]


def test_batch_gets_one_bind_in_twenty_while_interactive_waits() -> None:
    bench = Bench(fleet_of(node()), mixed(400))
    lanes = [chosen.ref.lane for _ in range(400) if (chosen := bench.bind()) is not None]
    assert lanes.count(Lane.BATCH) == 400 // BATCH_EVERY
    assert lanes[BATCH_EVERY - 1] is Lane.BATCH


def test_batch_is_owed_its_bind_until_it_can_be_bound() -> None:
    """Two models whose binds alternate: each has a count of its own, and a missed turn comes again."""
    nodes = [node("a", models=("a",), max_running=1), node("b", models=("b",), max_running=1)]
    items = [waiting(n, model="ab"[n % 2]) for n in range(400)]
    items += [waiting(1000 + n, model="a", lane=Lane.BATCH) for n in range(20)]
    bench = Bench(fleet_of(*nodes), items)
    bound: list[Waiting] = []
    for _ in range(200):
        for name in ("a", "b"):
            chosen = bench.bind()
            while chosen is not None:
                bound.append(chosen)
                chosen = bench.bind()
            held = list(bench.fleet.nodes[name].held)
            if held:
                bench.fleet.release(name, held[0])
    of_a = [one for one in bound if one.envelope.model == "a"]
    assert sum(one.ref.lane is Lane.BATCH for one in of_a) >= len(of_a) // BATCH_EVERY


def test_batch_gets_all_of_spare_capacity() -> None:
    bench = Bench(fleet_of(node()), [waiting(n, lane=Lane.BATCH) for n in range(50)])
    assert len(bench.bind_all()) == 50


def test_interactive_gets_batchs_share_when_no_batch_waits() -> None:
    bench = Bench(fleet_of(node()), [waiting(n) for n in range(3 * BATCH_EVERY)])
    assert len(bench.bind_all()) == 3 * BATCH_EVERY


def test_an_overdue_batch_request_competes_as_interactive() -> None:
    items = [
        waiting(1, priority=50),
        waiting(2, lane=Lane.BATCH, priority=60, age_ms=10_001),
        waiting(3, priority=70),
    ]
    assert Bench(fleet_of(node()), items, max_batch_wait_ms=10_000).bind_all() == [3, 2, 1]
    items[1] = waiting(2, lane=Lane.BATCH, priority=60, age_ms=10_000)
    assert Bench(fleet_of(node()), items, max_batch_wait_ms=10_000).bind_all() == [3, 1, 2]


# Hurry


def test_a_hurried_request_is_the_first_of_its_model() -> None:
    bench = Bench(fleet_of(node()), [waiting(1, priority=90), waiting(2), waiting(3, priority=1)])
    bench.window.hurry("i0_3")
    bench.window.hurry("i0_3")
    assert bench.bind_all() == [3, 1, 2]


def test_hurrying_what_does_not_wait_does_nothing() -> None:
    bench = Bench(fleet_of(node()), [waiting(1)])
    bench.window.hurry("i0_7")
    assert bench.bind_all() == [1]


# Looking past


def test_a_model_without_capacity_holds_up_nobody_else() -> None:
    items = [waiting(n, model="absent", priority=100) for n in range(50)] + [waiting(99)]
    bench = Bench(fleet_of(node()), items)
    assert bench.bind_all() == [99]
    assert len(bench.window) == 50


def test_heads_that_fit_no_node_hold_up_nobody_and_keep_their_order() -> None:
    count = 3 * LOOK_PAST
    big = [waiting(n, priority=90, prompt_tokens=5_000) for n in range(count)]
    bench = Bench(fleet_of(node("small", max_model_len=1_000)), [*big, waiting(999)])
    assert bench.bind_all() == [999]
    assert len(bench.window) == count
    bench.fleet = fleet_of(node("large", max_model_len=10_000))
    assert bench.bind_all() == []
    bench.now_ms += PARK_MS
    assert bench.bind_all() == list(range(count))


def test_a_clock_set_back_does_not_keep_what_was_put_aside() -> None:
    bench = Bench(fleet_of(node("small", max_model_len=1_000)), [waiting(1, prompt_tokens=5_000)])
    assert bench.bind_all() == []
    bench.fleet = fleet_of(node("large", max_model_len=10_000))
    bench.now_ms -= 3_600_000
    assert bench.bind_all() == [1]


def test_more_heads_that_fit_no_node_are_put_aside_round_by_round() -> None:
    big = [waiting(n, priority=90, prompt_tokens=5_000) for n in range(3 * MOST_PARKED)]
    bench = Bench(fleet_of(node(max_model_len=1_000)), [*big, waiting(9_999)])
    assert [bench.bind() for _ in range(3)] == [None, None, None]
    assert bench.bind_all() == [9_999]


def test_a_request_put_aside_can_be_hurried_and_still_waits_for_its_model() -> None:
    bench = Bench(fleet_of(node(max_model_len=100)), [waiting(1, prompt_tokens=500)])
    assert bench.choose() is None
    assert bench.window.models() == {"m"}
    bench.window.hurry("i0_1")
    bench.fleet.admit(node("large"), 0.0).admitted = True
    chosen = bench.choose()
    assert chosen is not None
    assert (chosen[0].envelope.ref, chosen[1].node.name) == ("i0_1", "large")
    bench.now_ms += 2_000
    assert bench.choose() is None


def test_a_request_put_aside_can_be_taken_out() -> None:
    bench = Bench(fleet_of(node(max_model_len=1_000)), [waiting(1, prompt_tokens=5_000)])
    assert bench.bind() is None
    assert bench.window.remove("i0_1") is not None
    bench.now_ms += PARK_MS
    bench.fleet = fleet_of(node(max_model_len=10_000))
    assert bench.bind() is None


def test_only_so_many_heads_whose_node_is_busy_are_looked_past() -> None:
    busy, idle = node("busy", max_running=1), node("idle", max_running=1, max_model_len=100)
    for count, bound in ((LOOK_PAST - 1, [999]), (LOOK_PAST, [])):
        bench = Bench(
            fleet_of(busy, idle), [waiting(n, priority=90, prompt_tokens=500) for n in range(count)]
        )
        bench.window.push(waiting(999))
        for ref in ("x", "y"):
            bench.fleet.reserve("busy", ref, 1)
        chosen = bench.bind()
        assert ([chosen.ref.offset] if chosen is not None else []) == bound


def test_an_excluded_node_takes_a_request_only_when_no_other_is_eligible() -> None:
    both = Bench(fleet_of(node("a"), node("b")), [waiting(1, excluded=("a",))])
    found = both.choose()
    assert found is not None
    assert found[1].node.name == "b"
    alone = Bench(fleet_of(node("a")), [waiting(1, excluded=("a",))])
    assert alone.bind_all() == [1]


def test_nothing_is_chosen_beyond_the_fleets_room() -> None:
    bench = Bench(fleet_of(node(max_running=8)), [waiting(n) for n in range(20)])
    assert bench.bind_all() == list(range(9))
    bench.fleet.release("n", "i0_4")
    assert bench.bind_all() == [9]


# What waits


def test_a_request_waits_once_however_often_it_is_pushed() -> None:
    bench = Bench(fleet_of(node()), [waiting(1), waiting(1)])
    assert len(bench.window) == 1
    assert bench.bind_all() == [1]


def test_a_request_that_comes_back_is_offered_again_once() -> None:
    bench = Bench(fleet_of(node()), [waiting(1), waiting(2)])
    taken = bench.window.remove("i0_1")
    assert taken is not None
    assert bench.window.remove("i0_1") is None
    bench.window.push(taken)
    assert sorted(bench.bind_all()) == [1, 2]


def test_bytes_count_data_hashes_and_what_an_envelope_costs() -> None:
    window = Window()
    window.push(waiting(1, data=b"x" * 100))
    assert window.bytes == 100 + ENVELOPE_OVERHEAD_BYTES
    window.push(waiting(2))
    window.remove("i0_1")
    assert window.bytes == ENVELOPE_OVERHEAD_BYTES
    window.remove("i0_1")
    window.remove("i0_2")
    assert window.bytes == 0


def test_each_lane_fills_its_own_share_only() -> None:
    window = Window()
    for number in range(10):
        window.push(waiting(number, lane=Lane.BATCH, data=b"x" * 300))
    assert window.is_full(Lane.BATCH, requests=40, bytes=1 << 30)
    assert not window.is_full(Lane.BATCH, requests=41, bytes=1 << 30)
    assert window.is_full(Lane.BATCH, requests=1000, bytes=40_000)
    assert not window.is_full(Lane.INTERACTIVE, requests=1, bytes=1)
    assert (window.bytes_of(Lane.BATCH), window.bytes_of(Lane.INTERACTIVE)) == (10_000, 0)
    window.remove("b0_0")
    assert not window.is_full(Lane.BATCH, requests=40, bytes=1 << 30)


def test_what_is_gone_is_forgotten_behind_a_head_that_stays() -> None:
    window = Window()
    window.push(waiting(0, priority=99, model="busy"))
    for number in range(1, 20 * FEWEST_STALE):
        window.push(waiting(number, model="busy"))
        window.remove(f"i0_{number}")
    assert sum(map(len, window._queues.values())) <= FEWEST_STALE + 2
    assert len(window) == 1


def test_adapters_that_are_waited_for_can_be_asked_for() -> None:
    window = Window()
    window.push(waiting(1, lora="sql"))
    window.push(waiting(2, lora="sql"))
    window.remove("i0_1")
    assert window.loras() == {("m", "sql")}
    window.remove("i0_2")
    assert window.loras() == set()


def test_what_waits_can_be_asked_for() -> None:
    window = Window()
    window.push(waiting(1, model="a"))
    window.push(waiting(2, model="b"))
    assert "i0_1" in window
    assert "i0_9" not in window
    assert {item.ref.offset for item in window} == {1, 2}
    assert window.models() == {"a", "b"}
    found = window.get("i0_2")
    assert found is not None
    assert found.envelope.model == "b"
    assert window.get("i0_9") is None


@pytest.mark.parametrize("lane", list(Lane))
def test_nothing_is_chosen_of_an_empty_window(lane: Lane) -> None:
    bench = Bench(fleet_of(node()), [waiting(1, lane=lane)])
    assert bench.bind_all() == [1]
    assert bench.bind() is None
    assert bench.window.models() == set()


# Backlogs


def test_the_backlog_of_a_model_follows_the_interactive_lane() -> None:
    bench = Bench(fleet_of(node()), [waiting(n, prompt_tokens=84) for n in range(3)])
    bench.window.push(waiting(9, lane=Lane.BATCH))
    backlog = bench.window.backlogs["m"]
    assert (backlog.requests, backlog.tokens) == (3, 300)
    bench.window.remove("i0_1")
    bench.bind()
    assert (backlog.requests, backlog.tokens, backlog.bound_tokens) == (1, 100, 100)
    bench.bind_all()
    assert not bench.window.backlogs


def test_what_no_eligible_node_could_take_is_no_work_ahead_of_others() -> None:
    big = [waiting(n, prompt_tokens=5_000) for n in range(3)]
    fitting = [waiting(n, prompt_tokens=84) for n in range(10, 13)]
    bench = Bench(fleet_of(node(max_running=1)), [*big, *fitting])
    bench.bind_all()
    backlog = bench.window.backlogs["m"]
    assert (backlog.requests, backlog.tokens) == (4, 100)
    assert backlog.oldest_ms() == NOW_MS
    for one in (*big, *fitting):
        bench.window.remove(str(one.ref))
    assert not bench.window.backlogs
