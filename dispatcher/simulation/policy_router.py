"""Routing policies of the field in a simulated fleet: bound at once, loads as old as their poll.

A router polls all nodes at multiples of `poll_s`. Here a node's load is taken down when it is about to change
for the first time since a poll, or when it is asked for: what a poll would have seen, for no work between.
Where reports are late, earlier ones are kept until the next has arrived.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from dispatcher.simulation.fleet import FleetSimulation
from dispatcher.simulation.policies.base import Arrival, Policy, Signal


class FleetWorld:
    """What a policy may ask: polled loads, the profile's prefill time, chance."""

    def __init__(self, fleet: FleetSimulation, poll_s: float) -> None:
        self.nodes = len(fleet.engines)
        self.block_tokens = fleet.block_tokens
        self.rng: Random = fleet.rng
        self._fleet = fleet
        self._poll_s = poll_s
        self._delay_s = fleet.conditions.report_delay_s
        # Per node, the load seen by each poll after the entry before up to this one.
        self._polled = [deque([(-1, self._load(node, 0.0))]) for node in range(self.nodes)]

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return self._fleet.now_s

    @now_s.setter
    def now_s(self, value: float) -> None:
        raise AttributeError("now_s: expected the simulator alone to move time")

    def signal(self, node: int) -> Signal:
        """The node's load as of the last poll that arrived, or now for a policy that never polls."""
        if self._poll_s <= 0:
            return self._load(node, self.now_s)
        self.take_down(node)
        polled = self._polled[node]
        arrived = math.floor((self.now_s - self._delay_s) / self._poll_s)
        while polled[0][0] < arrived:
            polled.popleft()
        return polled[0][1] if polled[0][0] <= arrived else self._seen(polled[0][1], arrived)

    def take_down(self, node: int) -> None:
        """Keep the load that the last poll saw, unless it is kept already."""
        if self._poll_s <= 0:
            return
        poll = int(self.now_s / self._poll_s)
        polled = self._polled[node]
        if polled[-1][0] != poll:
            polled.append((poll, self._load(node, poll * self._poll_s)))
            if not self._delay_s:
                polled.popleft()

    def _seen(self, signal: Signal, poll: int) -> Signal:
        """A load that did not change, as an earlier poll saw it."""
        return replace(signal, at_s=max(0.0, poll * self._poll_s))

    def speed(self, node: int) -> float:
        """How fast the node is: 1 is the profile's speed."""
        return self._fleet.speeds[node]

    def prefill_s(self, uncached: int, cached: int) -> float:
        """Seconds that an idle engine of this profile takes, in one step; of a nominal node."""
        pairs = uncached * (uncached + 2 * cached)
        return self._fleet.profile.step_s(uncached, pairs, cached, 0, 0)

    def _load(self, node: int, at_s: float) -> Signal:
        engine = self._fleet.engines[node]
        return Signal(
            at_s=at_s,
            running=engine.running,
            waiting=engine.waiting,
            waiting_tokens=engine.waiting_tokens,
            active_blocks=engine.cache.used,
            total_blocks=engine.cache.blocks,
        )


class PolicyRouter:
    """A policy at work."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.wants_blocks = policy.wants_kv_events

    def start(self, fleet: FleetSimulation) -> None:
        """Begin, before all else."""
        self._fleet = fleet
        self._world = FleetWorld(fleet, self._policy.poll_s)
        self._policy.start(self._world)

    def arrive(self, arrival: Arrival) -> None:
        """Bind a request at once.

        Raises:
            ValueError: the policy named a node that isn't there.
        """
        node = self._policy.choose(arrival)
        if not 0 <= node < self._world.nodes:
            raise ValueError(
                f"policy {self._policy.name}: expected a node from 0 to {self._world.nodes - 1}, seen {node}"
            )
        self._fleet.send(arrival, node)

    def first_token(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        """Tell the policy."""
        self._policy.first_token(arrival, node)

    def finished(self, arrival: Arrival, node: int) -> None:
        """Tell the policy."""
        self._policy.finished(arrival, node)

    def before_change(self, node: int) -> None:
        """Keep what the last poll saw."""
        self._world.take_down(node)

    def blocks_changed(self, node: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        """Tell the policy, as late as events travel."""
        at_s = self._fleet.now_s + self._policy.kv_event_delay_s
        if stored:
            self._fleet.call_at(at_s, self._policy.stored, node, stored)
        if removed:
            self._fleet.call_at(at_s, self._policy.removed, node, removed)
