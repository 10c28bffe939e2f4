"""Mooncake's Algorithm 1 (FAST'25, "Mooncake: Trading More Storage for Less Computation").

    TTFT = queue + prefill(prompt, prefix),  argmin

The queue is the sum of the predicted prefills that were sent there and gave no first token yet; the
prediction is the profile's, where the paper fits a polynomial offline. The conductor knows caches from the
nodes' own announcements.

Here nothing moves KV between nodes, so the branch of the algorithm that would (a prefix elsewhere longer by
`kvcache_balancing_threshold` times is fetched) is left out, and with it the copies of hot prefixes: what
remains is the paper's "cache-aware" scheduling. Nor does it turn requests away whose TTFT would be above
their SLO. For the decode node it says no more than "by load": the least KV use (`least_kv`).
"""

from __future__ import annotations

from collections.abc import Sequence

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.least_kv import LeastKV
from dispatcher.simulation.policies.picking import least
from dispatcher.simulation.policies.prefix_view import EventView


class Mooncake(Policy):
    """Without constants: the one that the algorithm has belongs to the transfers."""

    name = "mooncake"
    poll_s = 0.0
    wants_kv_events = True

    def __init__(self, *, kv_event_delay_s: float = 0.005) -> None:
        self.kv_event_delay_s = kv_event_delay_s

    def start(self, world: World) -> None:
        """Begin with an idle fleet and empty caches."""
        self._world = world
        self._view = EventView(world.nodes)
        self._queue_s = [0.0] * world.nodes
        self._predicted_s: dict[int, float] = {}

    def choose(self, arrival: Arrival) -> int:
        """Return the node with the least predicted time to first token."""
        world = self._world
        size, prompt = world.block_tokens, arrival.prompt_tokens
        hits = self._view.runs(arrival.blocks[: (prompt - 1) // size])
        prefill_s = {hit: world.prefill_s(prompt - hit * size, hit * size) for hit in set(hits)}
        ttft_s = [queue_s + prefill_s[hit] for queue_s, hit in zip(self._queue_s, hits, strict=True)]
        node = least(ttft_s, world.rng)
        self._predicted_s[arrival.number] = prefill_s[hits[node]]
        self._queue_s[node] += prefill_s[hits[node]]
        return node

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Take its prefill out of the queue."""
        left_s = self._queue_s[node] - self._predicted_s.pop(arrival.number, 0.0)
        # What rounding leaves of an empty queue would break ties.
        self._queue_s[node] = left_s if left_s > 1e-9 else 0.0

    def finished(self, arrival: Arrival, node: int) -> None:
        """Take it out of the queue if it never gave a first token."""
        self.first_token(arrival, node)

    def for_decode(self) -> Policy:
        """The least KV use."""
        return LeastKV()

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.stored(node, blocks)

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.removed(node, blocks)
