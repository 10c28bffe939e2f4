"""The node with the least KV use, normalised by capacity: for originals without a choice of decode nodes.

    use = (blocks of prompts that were sent there and have not ended + this prompt's) / blocks of its cache

by the router's own account. Among equals any.
"""

from __future__ import annotations

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.picking import least


class LeastKV(Policy):
    """Without constants."""

    name = "least_kv"
    poll_s = 0.0
    wants_kv_events = False
    kv_event_delay_s = 0.0

    def start(self, world: World) -> None:
        """Begin with an idle fleet."""
        self._world = world
        self._blocks = [0] * world.nodes
        self._totals = [world.signal(node).total_blocks for node in range(world.nodes)]

    def choose(self, arrival: Arrival) -> int:
        """Return the node with the least use, this prompt included."""
        own = self._size(arrival)
        uses = [(blocks + own) / total for blocks, total in zip(self._blocks, self._totals, strict=True)]
        node = least(uses, self._world.rng)
        self._blocks[node] += own
        return node

    def finished(self, arrival: Arrival, node: int) -> None:
        """Count it no longer."""
        self._blocks[node] -= self._size(arrival)

    def _size(self, arrival: Arrival) -> int:
        return -(-arrival.prompt_tokens // self._world.block_tokens)

    def for_decode(self) -> Policy:
        """The same."""
        return LeastKV()
