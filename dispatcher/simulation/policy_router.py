"""Routing policies of the field in a simulated fleet: bound at once, loads as old as their poll.

A router polls all nodes at multiples of `poll_s`. Here a node's load is taken down when it is about to change
for the first time since a poll, or when it is asked for: what a poll would have seen, for no work between.
Where reports are late, earlier ones are kept until the next has arrived.

Where prefill and decode are apart two policies choose, each among its own nodes: the one named, and what its
original chooses decode nodes by (`Policy.for_decode`).
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
    """What a policy may ask: polled loads, the profile's prefill time, chance.

    Args:
        first: the fleet's number of the policy's node 0.
    """

    def __init__(self, fleet: FleetSimulation, poll_s: float, first: int, nodes: int) -> None:
        self.nodes = nodes
        self._first = first
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
        return self._fleet.speeds[self._first + node]

    def prefill_s(self, uncached: int, cached: int) -> float:
        """Seconds that an idle engine of this profile takes, in one step; of a nominal node."""
        pairs = uncached * (uncached + 2 * cached)
        return self._fleet.profile.step_s(uncached, pairs, cached, 0, 0)

    def _load(self, node: int, at_s: float) -> Signal:
        engine = self._fleet.engines[self._first + node]
        return Signal(
            at_s=at_s,
            running=engine.running,
            waiting=engine.waiting,
            waiting_tokens=engine.waiting_tokens,
            active_blocks=engine.cache.used,
            total_blocks=engine.cache.blocks,
        )


class _Seat:
    """A policy at work on some of the fleet's nodes, which it numbers from 0."""

    def __init__(self, policy: Policy, fleet: FleetSimulation, nodes: range) -> None:
        self.policy = policy
        self.first = nodes.start
        self.world = FleetWorld(fleet, policy.poll_s, nodes.start, len(nodes))
        policy.start(self.world)

    def choose(self, arrival: Arrival) -> int:
        """Return the fleet's number of the node that the policy chooses.

        Raises:
            ValueError: it named a node that isn't there.
        """
        node = self.policy.choose(arrival)
        if not 0 <= node < self.world.nodes:
            raise ValueError(
                f"policy {self.policy.name}: expected a node from 0 to {self.world.nodes - 1}, seen {node}"
            )
        return self.first + node


class PolicyRouter:
    """A policy at work, and where prefill and decode are apart another for decode nodes."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._decode_policy = policy.for_decode()
        self.wants_blocks = policy.wants_kv_events

    def start(self, fleet: FleetSimulation) -> None:
        """Begin, before all else."""
        self._fleet = fleet
        nodes = fleet.decode_nodes
        self._seat = _Seat(self._policy, fleet, fleet.prefill_nodes or range(len(fleet.engines)))
        self._decode = _Seat(self._decode_policy, fleet, nodes) if nodes else None
        self._decode_from = nodes.start if nodes else len(fleet.engines)
        if nodes:
            self.wants_blocks |= self._decode_policy.wants_kv_events
        # The decode node of each request that was bound to one and whose prompt is being computed.
        self._bound: dict[int, int] = {}

    def arrive(self, arrival: Arrival) -> None:
        """Bind a request at once."""
        decode = self._decode
        if decode is not None and not decode.policy.binds_late:
            node = decode.choose(arrival)
            if not decode.policy.wants_prefill(arrival, node - decode.first):
                self._fleet.send(arrival, node)
                return
            self._bound[arrival.number] = node
        self._fleet.send(arrival, self._seat.choose(arrival))

    def prefilled(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        """Tell the policy that its part is done, and send the request on."""
        policy, decode = self._seat.policy, self._decode
        assert decode is not None, "a fleet without decode nodes has nothing to hand over"
        policy.first_token(arrival, node)
        policy.finished(arrival, node)
        bound = self._bound.pop(arrival.number, None)
        self._fleet.hand_over(arrival, decode.choose(arrival) if bound is None else bound)

    def first_token(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        """Tell the policy."""
        seat = self._seat_of(node)
        seat.policy.first_token(arrival, node - seat.first)

    def finished(self, arrival: Arrival, node: int) -> None:
        """Tell the policy."""
        seat = self._seat_of(node)
        seat.policy.finished(arrival, node - seat.first)

    def before_change(self, node: int) -> None:
        """Keep what the last poll saw."""
        seat = self._seat_of(node)
        seat.world.take_down(node - seat.first)

    def blocks_changed(self, node: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        """Tell the policy, as late as events travel."""
        seat = self._seat_of(node)
        policy = seat.policy
        if not policy.wants_kv_events:
            return
        at_s = self._fleet.now_s + policy.kv_event_delay_s
        if stored:
            self._fleet.call_at(at_s, policy.stored, node - seat.first, stored)
        if removed:
            self._fleet.call_at(at_s, policy.removed, node - seat.first, removed)

    def _seat_of(self, node: int) -> _Seat:
        if node < self._decode_from:
            return self._seat
        assert self._decode is not None
        return self._decode
