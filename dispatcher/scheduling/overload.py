"""Overload: who is turned away when more comes than can be served in time, and when that is over.

A model is overloaded once something of its interactive lane has waited longer than a target for a whole
interval without a break: a standing queue, told by age and not by length, as CoDel does (RFC 8289; "Fail at
Scale", ACM Queue 13(8)). Then an arrival that is predicted to wait longer than the target is refused at once,
and what has waited that long and is not about to be bound is given up, each by the work ahead of it, so that
lower priorities go first. It is over once nothing has waited half the target for an interval.

The batch lane is a durable backlog and is left alone, as are requests that were bound before. Time in which
nobody could have served them (no node, no Redis, no leader) makes nobody late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.outcome import Reason
from dispatcher.scheduling.backlog import Backlog
from dispatcher.scheduling.choice import Capacity
from dispatcher.scheduling.drain import Drain

SLACK = 0.1
"""What is late is kept when it is predicted to be bound within this share of the target."""
STEADY_S = 10.0
"""A deadline is called out of reach only when nodes neither came nor went for this long,"""
BUSY = 0.9
"""only while this share of them had no room of late and something waited,"""
CERTAINTY = 1.5
"""and only when the predicted wait is this many times what is left of it."""
FLEET_CHANGE = 0.1
"""Nodes that come or go count as a change from this share of the model's nodes on."""
SETTLE_S = 2.0
"""After a change nodes fill up or empty: what they take meanwhile is not their rate."""
LONGEST_STEP_S = 1.0
"""A tick that comes this late, or Redis silent for so long: that time is no evidence."""
RECENT_S = 4.0
"""Time constant of averages that must follow the load: of what enters by priority, and of busy nodes."""
LEAST_SHARE = 0.05
"""Of the rate, what is left to a priority at least, however much comes above it."""
IDLE_SHARE = 0.5
"""Of the lane, what models without a node may hold together while others are served."""
FORGET_S = 600.0
"""A model of which nothing waited for so long is forgotten."""
LEAST_HINT_S = 1.0
MOST_HINT_S = 300.0
IDLE_HINT_S = 30.0
"""Retry hints: bounds, and the hint of a model without a node."""


@dataclass(frozen=True, kw_only=True)
class OverloadParameters:
    """When to turn away.

    Args:
        target_s: waiting time beyond which a standing queue is overload, seconds; 0 turns that off.
        interval_s: how long it must stand, seconds.
        lane_requests, lane_bytes: what the window's interactive lane holds at most.
    """

    target_s: float = 30.0
    interval_s: float = 10.0
    lane_requests: float = math.inf
    lane_bytes: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Shed:
    """A request to turn away, waiting or just arriving."""

    envelope: Envelope
    reason: Reason
    message: str
    retry_after_ms: int


@dataclass(kw_only=True)
class _Model:
    """What is known of one model. `floor_ms`: waiting counts from there at the earliest."""

    floor_ms: int
    drain: Drain = field(default_factory=Drain)
    is_overloaded: bool = False
    late_since_s: float | None = None
    early_since_s: float | None = None
    nodes: int = 0
    usual_nodes: int = 0
    changed_s: float = -math.inf
    seen_s: float = 0.0
    idle_since_s: float | None = None
    busy: float = 0.0
    entering: dict[int, float] = field(default_factory=dict)

    def left_tokens_per_s(self, priority: int) -> float:
        """The rate that is left to a priority by what comes above it."""
        rate = self.drain.tokens_per_s
        above = sum(one for level, one in self.entering.items() if level > priority)
        return max(rate - above, LEAST_SHARE * rate)

    def wait_s(self, tokens: float, priority: int) -> float:
        """Predicted seconds until a request with this much work ahead is bound."""
        left = self.left_tokens_per_s(priority)
        return tokens / left if left > 0 else math.inf


class Overload:
    """Overload control of one pool's interactive lane."""

    def __init__(self, parameters: OverloadParameters) -> None:
        self._parameters = parameters
        self._models: dict[str, _Model] = {}
        self._last_s: float | None = None
        self._healthy_s = -math.inf
        self._heard_s = 0.0
        self._idle_requests = 0
        self._idle_bytes = 0
        self._any_served = False

    def overloaded(self) -> set[str]:
        """Models that are overloaded."""
        return {name for name, model in self._models.items() if model.is_overloaded}

    def known(self) -> set[str]:
        """Models of which something waits, or waited lately."""
        return set(self._models)

    def predicted_wait_s(self, name: str, backlog: Backlog) -> float | None:
        """Predicted wait of the last in a model's queue, seconds; None without a trusted rate."""
        model = self._models.get(name)
        if model is None or not model.drain.is_trusted or not model.drain.tokens_per_s:
            return None
        return backlog.tokens / model.drain.tokens_per_s

    # Time passes

    def tick(
        self,
        backlogs: Mapping[str, Backlog],
        capacity_of: Callable[[str], Capacity | None],
        *,
        now_ms: int,
        now_s: float,
        healthy_s: float,
        any_served: bool,
    ) -> list[Shed]:
        """Look at the queues; returns the waiting requests to turn away. Called every tenth of a second.

        Args:
            capacity_of: a model's capacity; None for a model that no node serves, which is refused elsewhere.
            now_s: a monotonic clock, seconds.
            healthy_s: counts time during which Redis answered, seconds.
            any_served: whether any node of the pool takes work.
        """
        step_s = now_s - self._last_s if self._last_s is not None else 0.0
        self._last_s = now_s
        if healthy_s > self._healthy_s:
            self._healthy_s, self._heard_s = healthy_s, now_s
        is_blind = step_s > LONGEST_STEP_S or now_s - self._heard_s > LONGEST_STEP_S
        self._any_served = any_served
        self._idle_requests = self._idle_bytes = 0
        shed: list[Shed] = []
        for name in [name for name in self._models if name not in backlogs]:
            self._rest(name, now_ms, now_s)
        for name, backlog in backlogs.items():
            capacity = capacity_of(name)
            if capacity is None:
                if name in self._models:
                    self._rest(name, now_ms, now_s)
                continue
            model = self._models.get(name)
            if model is None:
                model = self._models[name] = _Model(floor_ms=now_ms)
            model.seen_s = now_s
            self._note_capacity(model, capacity, now_s)
            if not capacity.nodes:
                self._idle_requests += backlog.requests
                self._idle_bytes += backlog.bytes
            if is_blind or not capacity.nodes:
                model.floor_ms = now_ms
                model.is_overloaded = False
                model.late_since_s = model.early_since_s = None
                model.busy = 0.0
                backlog.restart()
                continue
            self._measure(model, capacity, backlog, step_s, now_s)
            self._note_age(model, backlog.oldest_ms(), now_ms, now_s)
            if model.is_overloaded and model.drain.is_trusted:
                shed += self._late(model, backlog, now_ms)
        return shed

    def _rest(self, name: str, now_ms: int, now_s: float) -> None:
        """Nothing of a model waits."""
        model = self._models[name]
        model.busy = 0.0
        self._note_age(model, None, now_ms, now_s)
        if not model.is_overloaded and now_s - model.seen_s > FORGET_S:
            del self._models[name]

    def _note_capacity(self, model: _Model, capacity: Capacity, now_s: float) -> None:
        nodes, usual = capacity.nodes, model.usual_nodes
        if nodes and nodes != usual and abs(nodes - usual) >= FLEET_CHANGE * usual:
            if usual:
                model.drain.scale(nodes / usual)
            model.usual_nodes = nodes
            model.changed_s = now_s
        elif bool(nodes) != bool(model.nodes):
            model.changed_s = now_s
        model.nodes = nodes
        if nodes:
            model.idle_since_s = None
        elif model.idle_since_s is None:
            model.idle_since_s = now_s

    def _measure(
        self, model: _Model, capacity: Capacity, backlog: Backlog, step_s: float, now_s: float
    ) -> None:
        if step_s > 0 and now_s - model.changed_s >= SETTLE_S and not backlog.was_empty:
            model.drain.observe(backlog.bound_tokens, backlog.bound_requests, step_s)
        if step_s > 0:
            gain = 1 - math.exp(-step_s / RECENT_S)
            seen_busy = 0.0 if backlog.was_empty else capacity.busy
            model.busy += gain * (seen_busy - model.busy)
            for priority in model.entering.keys() | backlog.entered_tokens.keys():
                rate = model.entering.get(priority, 0.0)
                seen = backlog.entered_tokens.get(priority, 0) / step_s
                model.entering[priority] = rate + gain * (seen - rate)
        backlog.restart()

    def _note_age(self, model: _Model, oldest_ms: int | None, now_ms: int, now_s: float) -> None:
        """Enter or leave overload by how long the oldest has waited."""
        target_s, interval_s = self._parameters.target_s, self._parameters.interval_s
        age_s = (now_ms - max(oldest_ms, model.floor_ms)) / 1000 if oldest_ms is not None else 0.0
        if not target_s or age_s <= target_s:
            model.late_since_s = None
        elif model.late_since_s is None:
            model.late_since_s = now_s
        if target_s and age_s > target_s / 2:
            model.early_since_s = None
        elif model.early_since_s is None:
            model.early_since_s = now_s
        if model.late_since_s is not None and now_s - model.late_since_s >= interval_s:
            model.is_overloaded = True
        if model.early_since_s is not None and now_s - model.early_since_s >= interval_s:
            model.is_overloaded = False

    def _late(self, model: _Model, backlog: Backlog, now_ms: int) -> list[Shed]:
        target_s = self._parameters.target_s
        then_ms = now_ms - round(1000 * target_s)
        if model.floor_ms >= then_ms:
            return []
        shed = []
        for priority, late in backlog.appended_before(then_ms):
            ahead = backlog.higher_tokens(priority)
            for envelope in late:
                wait_s = model.wait_s(ahead, priority)
                if wait_s <= SLACK * target_s:
                    ahead += envelope.cost_tokens
                    continue
                waited_s = (now_ms - max(envelope.appended_ms, model.floor_ms)) / 1000
                shed.append(
                    _shed(
                        envelope,
                        Reason.OVERLOADED,
                        f"{envelope.model} is overloaded: waited {waited_s:.1f} s (expected at most "
                        f"{target_s:g} s) with {ahead} tokens ahead of it",
                        wait_s,
                    )
                )
        return shed

    # A request arrives

    def admit(self, envelope: Envelope, backlog: Backlog | None, *, now_ms: int, now_s: float) -> Shed | None:
        """Whom to turn away as `envelope` arrives: itself, one that waits and matters less, or nobody."""
        model = self._models.get(envelope.model)
        if model is None or backlog is None:
            return None
        if not model.nodes:
            return self._admit_idle(model, envelope, backlog, now_s)
        target_s = self._parameters.target_s
        if not target_s or not model.drain.is_trusted:
            return None
        if model.is_overloaded:
            wait_s = model.wait_s(backlog.ahead_tokens(envelope), envelope.priority)
            if wait_s > target_s:
                message = (
                    f"{envelope.model} is overloaded: expected to wait at most {target_s:g} s, predicted "
                    f"{min(wait_s, 1e6):.1f} s at priority {envelope.priority}"
                )
                return _shed(envelope, Reason.OVERLOADED, message, wait_s - target_s)
        return self._check_deadline(model, envelope, backlog, now_ms, now_s)

    def _check_deadline(
        self, model: _Model, envelope: Envelope, backlog: Backlog, now_ms: int, now_s: float
    ) -> Shed | None:
        rate = model.drain.tokens_per_s
        left_s = (envelope.deadline_at_ms - now_ms) / 1000
        if rate <= 0 or backlog.tokens <= CERTAINTY * left_s * rate:
            return None
        if model.busy < BUSY or now_s - model.changed_s < STEADY_S:
            return None
        wait_s = backlog.ahead_tokens(envelope) / rate
        if wait_s <= CERTAINTY * left_s:
            return None
        message = (
            f"deadline: expected more than the predicted wait of {wait_s:.1f} s for {envelope.model}, "
            f"seen {left_s:.1f} s left"
        )
        return _shed(envelope, Reason.DEADLINE_UNREACHABLE, message, wait_s - left_s)

    def _admit_idle(self, model: _Model, envelope: Envelope, backlog: Backlog, now_s: float) -> Shed | None:
        parameters = self._parameters
        is_for_long = model.idle_since_s is not None and now_s - model.idle_since_s >= parameters.interval_s
        self._idle_requests += 1
        if not self._any_served or not is_for_long:
            return None
        if (
            self._idle_requests <= IDLE_SHARE * parameters.lane_requests
            and self._idle_bytes < IDLE_SHARE * parameters.lane_bytes
        ):
            return None
        self._idle_requests -= 1
        lowest = backlog.newest_of_lowest()
        victim = envelope
        if lowest is not None and lowest.priority < envelope.priority:
            victim = lowest
        message = (
            f"model: no node of {envelope.model} takes work, and its waiting requests may hold "
            f"{IDLE_SHARE:.0%} of the window; ask again when its nodes are back"
        )
        return _shed(victim, Reason.NO_CAPACITY, message, IDLE_HINT_S)


def _shed(envelope: Envelope, reason: Reason, message: str, hint_s: float) -> Shed:
    hint_ms = round(1000 * min(max(hint_s, LEAST_HINT_S), MOST_HINT_S))
    return Shed(envelope=envelope, reason=reason, message=message, retry_after_ms=hint_ms)
