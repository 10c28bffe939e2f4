"""Policies that look at nothing: a node by chance, or the next in turn. Every router's baselines.

Decode nodes are chosen in the same way.
"""

from __future__ import annotations

from dispatcher.simulation.policies.base import Arrival, Policy, World


class Random(Policy):
    """Uniformly at random."""

    name = "random"
    poll_s = 0.0
    wants_kv_events = False
    kv_event_delay_s = 0.0

    def start(self, world: World) -> None:
        """Take the fleet's size and source of chance."""
        self._nodes = world.nodes
        self._rng = world.rng

    def choose(self, arrival: Arrival) -> int:
        """Return any node."""
        return int(self._rng.random() * self._nodes)

    def for_decode(self) -> Policy:
        """Any decode node."""
        return Random()


class RoundRobin(Policy):
    """Each node in turn."""

    name = "round_robin"
    poll_s = 0.0
    wants_kv_events = False
    kv_event_delay_s = 0.0

    def start(self, world: World) -> None:
        """Begin with node 0."""
        self._nodes = world.nodes
        self._next = 0

    def choose(self, arrival: Arrival) -> int:
        """Return the node after the last one."""
        node = self._next
        self._next = (node + 1) % self._nodes
        return node

    def for_decode(self) -> Policy:
        """Each decode node in turn."""
        return RoundRobin()
