"""llm-d's weighted stack (llm-d-router, guide "optimized-baseline" of 2026-07): weighted scores in [0, 1].

    3 * (matched blocks / prompt's blocks)               prefix-cache-scorer
    2 * (max waiting - waiting) / (max - min), or 1      queue-scorer; 1 when all are equal
    2 * (1 - KV cache use)                               kv-cache-utilization-scorer
    2 * (1 - rank / (nodes - 1)), or 0.5                 no-hit-lru-scorer; 0.5 when anybody has some of it

Rank is the order in which nodes last received such a cold prompt, those that never did first, in their own
order. The highest sum is picked, among equals any. Loads are scraped each 50 ms. Caches are known by own
routing, an LRU of each node's size (`approx-prefix-cache-producer`), or with `kv_events` from the engines
("precise").

Decode nodes are chosen by the same scorers, before the prefill node. `prefix-based-pd-decider` then has the
decode node compute the prompt too when that leaves it fewer than `non_cached_tokens` to compute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.picking import least
from dispatcher.simulation.policies.prefix_view import EventView, RoutedView

MAX_MATCHED_TOKENS = 131_072
NEVER_TOLD_BLOCKS = 31_250


def routed_view(world: World) -> RoutedView:
    """Return the approximate view: bounded by the engine's number of blocks, 31,250 while that is unknown."""
    blocks = max(world.signal(node).total_blocks for node in range(world.nodes))
    return RoutedView(world.nodes, blocks or NEVER_TOLD_BLOCKS)


def matchable(arrival: Arrival, block_tokens: int) -> tuple[int, ...]:
    """Return the blocks of the part of a prompt that llm-d looks at."""
    return arrival.blocks[: MAX_MATCHED_TOKENS // block_tokens]


class LLMDWeighted(Policy):
    """Weights, poll and LRU as the original's defaults."""

    name = "llmd_weighted"

    def __init__(
        self,
        *,
        prefix_weight: float = 3.0,
        queue_weight: float = 2.0,
        kv_weight: float = 2.0,
        no_hit_lru_weight: float = 2.0,
        kv_events: bool = False,
        kv_event_delay_s: float = 0.005,
        poll_s: float = 0.05,
        non_cached_tokens: int = 16,
    ) -> None:
        self._non_cached_tokens = non_cached_tokens
        self.poll_s = poll_s
        self.wants_kv_events = kv_events
        self.kv_event_delay_s = kv_event_delay_s
        self._prefix_weight = prefix_weight
        self._queue_weight = queue_weight
        self._kv_weight = kv_weight
        self._lru_weight = no_hit_lru_weight

    def start(self, world: World) -> None:
        """Begin with nothing routed."""
        self._world = world
        self._view = EventView(world.nodes) if self.wants_kv_events else routed_view(world)
        # Nodes by the time of their last cold prompt; those that never had one come first, in index order.
        self._cold: OrderedDict[int, None] = OrderedDict.fromkeys(range(world.nodes))

    def choose(self, arrival: Arrival) -> int:
        """Return the node with the highest weighted sum."""
        blocks = matchable(arrival, self._world.block_tokens)
        hits = self._view.runs(blocks)
        is_cold = not any(hits)
        node = least([-score for score in self._scores(hits, len(blocks), is_cold)], self._world.rng)
        if is_cold:
            self._cold.move_to_end(node)
        self._view.routed(node, blocks)
        self._uncached_tokens = arrival.prompt_tokens - hits[node] * self._world.block_tokens
        return node

    def wants_prefill(self, arrival: Arrival, node: int) -> bool:
        """As the decider has it: enough is left to compute."""
        return self._uncached_tokens >= self._non_cached_tokens

    def for_decode(self) -> Policy:
        """The same scorers, with nothing routed."""
        return LLMDWeighted(
            prefix_weight=self._prefix_weight,
            queue_weight=self._queue_weight,
            kv_weight=self._kv_weight,
            no_hit_lru_weight=self._lru_weight,
            kv_events=self.wants_kv_events,
            kv_event_delay_s=self.kv_event_delay_s,
            poll_s=self.poll_s,
            non_cached_tokens=self._non_cached_tokens,
        )

    def _scores(self, hits: Sequence[int], blocks: int, is_cold: bool) -> list[float]:
        world = self._world
        signals = [world.signal(node) for node in range(world.nodes)]
        waiting = [signal.waiting for signal in signals]
        high = max(waiting)
        spread = high - min(waiting)
        prefix = self._prefix_weight / blocks if blocks else 0.0
        queue = self._queue_weight / spread if spread else 0.0
        constant = 0.0 if spread else self._queue_weight
        if not is_cold:
            constant += 0.5 * self._lru_weight
        constant += self._kv_weight
        kv = self._kv_weight
        scores = [
            constant
            + prefix * hit
            + queue * (high - signal.waiting)
            - kv * signal.active_blocks / signal.total_blocks
            for hit, signal in zip(hits, signals, strict=True)
        ]
        if is_cold:
            last = max(1, world.nodes - 1)
            for rank, node in enumerate(self._cold):
                scores[node] += self._lru_weight * (1.0 - rank / last)
        return scores

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.stored(node, blocks)

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.removed(node, blocks)
