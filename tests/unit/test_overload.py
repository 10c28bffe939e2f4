"""Overload control: its decisions one by one; tests/simulation/test_overload.py shows what they come to."""

from __future__ import annotations

import math

import pytest

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Lane, Ref
from dispatcher.protocol.outcome import Reason
from dispatcher.scheduling.choice import Capacity
from dispatcher.scheduling.overload import (
    FORGET_S,
    IDLE_HINT_S,
    LONGEST_STEP_S,
    MOST_HINT_S,
    SETTLE_S,
    Overload,
    OverloadParameters,
    Shed,
)
from dispatcher.scheduling.window import Waiting, Window

EPOCH_MS = 1_790_000_000_000
TICK_S = 0.1
SERVED = Capacity(nodes=1, busy=1.0)
IDLE = Capacity(nodes=0, busy=0.0)


class Pool:
    """Overload control, a window, and the time between ticks; nodes take `drain` tokens of a model."""

    def __init__(self, parameters: OverloadParameters) -> None:
        self.overload = Overload(parameters)
        self.window = Window()
        self.capacity: dict[str, Capacity | None] = {"m": SERVED}
        self.now_s = 0.0
        self.healthy_s = 0.0
        self.drain: dict[str, int] = {}
        self.shed: list[Shed] = []
        self._offset = 0

    def request(
        self, model: str = "m", priority: int = 50, tokens: int = 10, deadline_s: float = 600
    ) -> Envelope:
        """A request that comes now."""
        self._offset += 1
        now_ms = EPOCH_MS + round(1000 * self.now_s)
        return Envelope(
            ref=str(Ref(Lane.INTERACTIVE, 0, self._offset)),
            id=f"r{self._offset}",
            model=model,
            priority=priority,
            prompt_tokens=tokens,
            max_tokens=0,
            appended_ms=now_ms,
            deadline_at_ms=now_ms + round(1000 * deadline_s),
        )

    def enter(self, envelope: Envelope, *, from_pending: bool = False) -> Envelope:
        """Let a request wait, whatever overload control thinks of it."""
        self.window.push(Waiting(ref=Ref.parse(envelope.ref), envelope=envelope, from_pending=from_pending))
        return envelope

    def arrive(self, envelope: Envelope) -> Shed | None:
        """A request arrives; carries out what is decided."""
        backlog = self.window.backlogs.get(envelope.model)
        shed = self.overload.admit(
            envelope, backlog, now_ms=EPOCH_MS + round(1000 * self.now_s), now_s=self.now_s
        )
        if shed is not None and shed.envelope is not envelope:
            self.window.remove(shed.envelope.ref)
        if shed is None or shed.envelope is not envelope:
            self.enter(envelope)
        return shed

    def tick(self, step_s: float = TICK_S, *, is_healthy: bool = True) -> None:
        """Time passes, nodes take what they can, and the queues are looked at."""
        self.now_s += step_s
        if is_healthy:
            self.healthy_s += step_s
        for waiting in list(self.window):
            left = self.drain.get(waiting.envelope.model, 0)
            if left >= waiting.envelope.cost_tokens:
                self.drain[waiting.envelope.model] = left - waiting.envelope.cost_tokens
                self.window._take(waiting.envelope.ref, is_bound=True)
        for shed in self.overload.tick(
            self.window.backlogs,
            lambda model: self.capacity.get(model),
            now_ms=EPOCH_MS + round(1000 * self.now_s),
            now_s=self.now_s,
            healthy_s=self.healthy_s,
            any_served=any(one is not None and one.nodes for one in self.capacity.values()),
        ):
            self.shed.append(shed)
            self.window.remove(shed.envelope.ref)

    def empty(self) -> None:
        """Nothing waits any more."""
        for waiting in self.window:
            self.window.remove(waiting.envelope.ref)

    def pass_time(self, seconds: float, *, tokens_per_tick: int = 0, model: str = "m") -> None:
        """Let nodes drain a model for so long."""
        for _ in range(round(seconds / TICK_S)):
            self.drain[model] = self.drain.get(model, 0) + tokens_per_tick
            self.tick()


def overloaded(*, target_s: float = 4.0) -> Pool:
    """A pool whose model has become overloaded: twice what it drains, ten requests of ten tokens a second."""
    pool = Pool(OverloadParameters(target_s=target_s, interval_s=1.0))
    for _ in range(95):
        pool.enter(pool.request())
        pool.enter(pool.request())
        pool.pass_time(TICK_S, tokens_per_tick=10)
    return pool


def test_overload_is_a_queue_that_stands_for_an_interval_beyond_the_target() -> None:
    pool = Pool(OverloadParameters(target_s=4.0, interval_s=2.0))
    for _ in range(1000):
        pool.enter(pool.request())
    pool.pass_time(5.9, tokens_per_tick=10)
    assert not pool.overload.overloaded()
    pool.pass_time(0.5, tokens_per_tick=10)
    assert pool.overload.overloaded() == {"m"}


def test_it_is_over_once_nothing_has_waited_half_the_target_for_an_interval() -> None:
    pool = overloaded()
    assert pool.overload.overloaded() == {"m"}
    pool.empty()
    pool.pass_time(0.9)
    assert pool.overload.overloaded() == {"m"}
    pool.pass_time(0.3)
    assert not pool.overload.overloaded()
    assert pool.arrive(pool.request()) is None


def test_what_has_waited_between_half_the_target_and_the_target_neither_begins_nor_ends_it() -> None:
    for begun in (False, True):
        pool = overloaded() if begun else Pool(OverloadParameters(target_s=4.0, interval_s=1.0))
        pool.empty()
        for _ in range(50):
            old = pool.request()
            pool.enter(
                Envelope(
                    **{name: getattr(old, name) for name in old.__struct_fields__}
                    | {"appended_ms": old.appended_ms - 3000}
                )
            )
            pool.tick()
            pool.window.remove(old.ref)
        assert bool(pool.overload.overloaded()) == begun


def test_an_arrival_is_refused_by_the_work_ahead_of_it() -> None:
    """100 tokens a second, target 4 s: 400 tokens may be ahead."""
    pool = overloaded()
    pool.empty()
    for _ in range(39):
        pool.enter(pool.request())
    assert pool.arrive(pool.request()) is None
    assert pool.arrive(pool.request(tokens=300)) is None
    refused = pool.arrive(pool.request())
    assert refused is not None
    assert (refused.reason, refused.envelope.id) == (Reason.OVERLOADED, f"r{pool._offset}")
    assert refused.retry_after_ms == pytest.approx(3000, rel=0.1), "400 tokens too many at 100 a second"
    assert "predicted 7.0 s at priority 50" in refused.message
    assert pool.arrive(pool.request(priority=51)) is None


def test_what_higher_priorities_bring_in_is_not_there_for_lower_ones() -> None:
    """Priority 90 brings 60 of the 100 tokens a second: 200 tokens ahead are 5 s of what is left, not 2."""
    pool = overloaded()
    pool.empty()
    for _ in range(200):
        pool.enter(pool.request(tokens=6, priority=90))
        pool.pass_time(TICK_S, tokens_per_tick=10)
        pool.enter(pool.request(tokens=4))
        pool.overload._models["m"].is_overloaded = True
    pool.empty()
    pool.enter(pool.request(tokens=200, priority=90))
    refused = pool.arrive(pool.request(priority=20))
    assert pool.arrive(pool.request(priority=90)) is None
    assert refused is not None
    assert refused.retry_after_ms > 1000


def test_hints_are_bounded() -> None:
    pool = overloaded()
    pool.enter(pool.request(tokens=10_000_000, priority=90))
    refused = pool.arrive(pool.request())
    assert refused is not None
    assert refused.retry_after_ms == 1000 * MOST_HINT_S


def test_what_is_late_goes_by_its_priority_and_its_place_in_the_order() -> None:
    pool = Pool(OverloadParameters(target_s=4.0, interval_s=1.0))
    ordinary = [pool.enter(pool.request()) for _ in range(100)]
    low = [pool.enter(pool.request(priority=20)) for _ in range(5)]
    while not pool.shed:
        pool.pass_time(TICK_S, tokens_per_tick=10)
    shed = {one.envelope.ref for one in pool.shed}
    assert {one.ref for one in low} <= shed
    # What is about to be bound is kept: 0.4 s of work at 100 tokens a second.
    waiting = [one.ref for one in ordinary if one.ref in pool.window]
    assert 4 <= len(waiting) <= 5
    assert max(one.envelope.priority for one in pool.shed) == 50
    assert all(one.reason is Reason.OVERLOADED and "waited" in one.message for one in pool.shed)


def test_what_was_bound_before_is_never_given_up() -> None:
    pool = Pool(OverloadParameters(target_s=4.0, interval_s=1.0))
    for _ in range(200):
        pool.enter(pool.request())
    again = [pool.enter(pool.request(priority=1), from_pending=True) for _ in range(10)]
    pool.pass_time(SETTLE_S + 10, tokens_per_tick=10)
    assert len(pool.shed) > 50
    assert not {one.envelope.ref for one in pool.shed} & {one.ref for one in again}


@pytest.mark.parametrize(("target_s", "reason"), [(0, None), (3600, Reason.DEADLINE_UNREACHABLE)])
def test_a_target_of_zero_sheds_nothing(target_s: float, reason: Reason | None) -> None:
    pool = Pool(OverloadParameters(target_s=target_s, interval_s=1.0))
    for _ in range(250):
        pool.enter(pool.request())
        pool.enter(pool.request())
        pool.pass_time(TICK_S, tokens_per_tick=10)
    assert not pool.shed
    assert not pool.overload.overloaded()
    shed = pool.arrive(pool.request(priority=20, deadline_s=1))
    assert (shed.reason if shed is not None else None) == reason


def test_nothing_is_shed_while_the_rate_is_not_known() -> None:
    """Nodes take nothing at all: that tells nothing of how long anybody would wait."""
    pool = Pool(OverloadParameters(target_s=4.0, interval_s=1.0))
    for _ in range(100):
        pool.enter(pool.request())
    pool.pass_time(30)
    assert pool.overload.overloaded() == {"m"}
    assert not pool.shed
    assert pool.arrive(pool.request()) is None


def test_a_tick_that_comes_late_is_no_evidence() -> None:
    """The leader was not scheduled for a minute: what waited meanwhile is as good as new."""
    pool = Pool(OverloadParameters(target_s=4.0, interval_s=1.0))
    for _ in range(1000):
        pool.enter(pool.request())
    pool.pass_time(3, tokens_per_tick=10)
    pool.tick(60.0)
    pool.pass_time(3.5, tokens_per_tick=10)
    assert not pool.overload.overloaded()
    for _ in range(20):
        pool.tick(LONGEST_STEP_S / 2, is_healthy=False)
    pool.pass_time(3.5, tokens_per_tick=10)
    assert not pool.overload.overloaded()


def test_a_change_of_the_fleet_scales_the_rate() -> None:
    pool = overloaded()
    before = pool.overload.predicted_wait_s("m", pool.window.backlogs["m"])
    pool.capacity["m"] = Capacity(nodes=2, busy=1.0)
    tokens = pool.window.backlogs["m"].tokens
    pool.tick()
    after = pool.overload.predicted_wait_s("m", pool.window.backlogs["m"])
    assert before is not None
    assert after is not None
    assert after / pool.window.backlogs["m"].tokens == pytest.approx(before / tokens / 2, rel=0.01)


# A model without a node

LANE = 100


def idle_pool(*, waiting: int = LANE // 2, any_served: bool = True, lane_bytes: float = math.inf) -> Pool:
    """A pool where nobody has served `m` for a while, and that other models share."""
    pool = Pool(OverloadParameters(interval_s=10.0, lane_requests=LANE, lane_bytes=lane_bytes))
    pool.capacity = {"m": IDLE, "also idle": IDLE, "other": SERVED if any_served else None}
    for _ in range(waiting):
        pool.enter(pool.request(priority=30))
    pool.pass_time(10.5)
    return pool


def test_a_model_without_a_node_holds_half_of_the_lane_at_most() -> None:
    pool = idle_pool(waiting=LANE // 2 - 1)
    assert pool.arrive(pool.request(priority=30)) is None
    refused = pool.arrive(pool.request(priority=30))
    assert refused is not None
    assert (refused.reason, refused.retry_after_ms) == (Reason.NO_CAPACITY, 1000 * IDLE_HINT_S)
    assert "no node of m takes work" in refused.message
    # Models that are served are none the worse for it.
    for _ in range(LANE):
        assert pool.arrive(pool.request("other")) is None


def test_what_matters_more_takes_the_place_of_what_came_last_and_matters_least() -> None:
    pool = idle_pool()
    lowest = pool.enter(pool.request(priority=10))
    last = pool.enter(pool.request(priority=10))
    shed = pool.arrive(pool.request(priority=31))
    assert shed is not None
    assert (shed.envelope.ref, shed.reason) == (last.ref, Reason.NO_CAPACITY)
    shed = pool.arrive(pool.request(priority=31))
    assert shed is not None
    assert shed.envelope.ref == lowest.ref


def test_models_without_a_node_share_that_half() -> None:
    pool = idle_pool()
    pool.enter(pool.request("also idle"))
    pool.pass_time(10.5)
    assert pool.arrive(pool.request("also idle")) is not None


def test_bytes_count_as_requests_do() -> None:
    each = Waiting(ref=Ref(Lane.INTERACTIVE, 0, 0), envelope=Pool(OverloadParameters()).request()).bytes
    assert idle_pool(waiting=10, lane_bytes=22 * each).arrive(Pool(OverloadParameters()).request()) is None
    pool = idle_pool(waiting=10, lane_bytes=20 * each)
    refused = pool.arrive(pool.request(priority=1))
    assert refused is not None


def test_a_model_whose_nodes_are_away_for_a_moment_loses_nothing() -> None:
    pool = Pool(OverloadParameters(interval_s=10.0, lane_requests=LANE))
    pool.capacity = {"m": IDLE, "other": SERVED}
    for _ in range(LANE):
        pool.enter(pool.request())
    pool.pass_time(9.0)
    assert pool.arrive(pool.request()) is None
    pool.capacity["m"] = SERVED
    pool.pass_time(2.0)
    assert pool.arrive(pool.request()) is None


def test_where_nobody_is_served_there_is_nobody_to_make_room_for() -> None:
    pool = idle_pool(any_served=False, waiting=LANE)
    assert pool.arrive(pool.request()) is None


def test_models_are_forgotten() -> None:
    pool = Pool(OverloadParameters())
    one = pool.enter(pool.request())
    pool.enter(pool.request("nobody's"))
    pool.tick()
    assert pool.overload.known() == {"m"}
    pool.window.remove(one.ref)
    pool.tick()
    assert pool.overload.known() == {"m"}
    pool.tick(FORGET_S + 1)
    assert not pool.overload.known()
