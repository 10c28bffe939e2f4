"""llm-d's "sticky until saturated" (llm-d-router 0.10): a filter by prefix, then the fewest tokens in flight.

`prefix-cache-affinity-filter` keeps the nodes that hold at least `affinity_threshold` of the prompt's
blocks, unless the best of them is behind the best of the others by more than `max_ttft_penalty_s`, or there
are none:

    ttft = uncached tokens in flight / peak_prefill_throughput

`token-load-scorer` and the max-score picker then take the least of (tokens in flight + this prompt's
uncached there), counted up to 4,194,304, among equals any. Tokens are the router's own account, released at
the first token; nothing is scraped. The original's throughput is of its reference fleet: its recipe wants
the measured one.

Decode nodes: the fewest active requests, its recipe where decoding is what binds, and its decider
(`least_requests`).
"""

from __future__ import annotations

from collections.abc import Sequence

from dispatcher.simulation.policies.accounting import InFlight
from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.least_requests import LeastRequests
from dispatcher.simulation.policies.llmd_weighted import matchable, routed_view
from dispatcher.simulation.policies.picking import least
from dispatcher.simulation.policies.prefix_view import EventView

QUEUE_THRESHOLD_TOKENS = 4_194_304


class LLMDSticky(Policy):
    """Defaults are the original's; throughput in tokens/s, 0 for the profile's (as its recipe does)."""

    name = "llmd_sticky"
    poll_s = 0.0

    def __init__(
        self,
        *,
        affinity_threshold: float = 0.8,
        max_ttft_penalty_s: float = 18.0,
        peak_prefill_throughput: float = 15_928.0,
        exploration: float = 0.0,
        kv_events: bool = False,
        kv_event_delay_s: float = 0.005,
        non_cached_tokens: int = 16,
    ) -> None:
        self._non_cached_tokens = non_cached_tokens
        self.wants_kv_events = kv_events
        self.kv_event_delay_s = kv_event_delay_s
        self._threshold = affinity_threshold
        self._max_penalty_s = max_ttft_penalty_s
        self._throughput = peak_prefill_throughput
        self._exploration = exploration

    def start(self, world: World) -> None:
        """Begin with an idle fleet; calibrate when asked to, on one prompt of 8,192 tokens."""
        self._world = world
        self._view = EventView(world.nodes) if self.wants_kv_events else routed_view(world)
        self._load = InFlight(world.nodes)
        if not self._throughput:
            self._throughput = 8192 / world.prefill_s(8192, 0)

    def choose(self, arrival: Arrival) -> int:
        """Return, of the sticky nodes or of all, the one with the fewest tokens."""
        world = self._world
        blocks = matchable(arrival, world.block_tokens)
        hits = self._view.runs(blocks)
        nodes = self.keep(hits, len(blocks))
        prefill = self._load.prefill
        size, prompt = world.block_tokens, arrival.prompt_tokens
        tokens = [min(QUEUE_THRESHOLD_TOKENS, prefill[node] + prompt - hits[node] * size) for node in nodes]
        node = nodes[least(tokens, world.rng)]
        self._load.begin(arrival.number, node, prompt - hits[node] * size)
        self._view.routed(node, blocks)
        return node

    def keep(self, hits: Sequence[int], blocks: int) -> Sequence[int]:
        """Return the nodes that pass the filter, given each node's held blocks of a prompt's."""
        everyone = range(self._world.nodes)
        if (
            not any(hits)
            or len(hits) < 2
            or (self._exploration and self._world.rng.random() < self._exploration)
        ):
            return everyone
        needed = self._threshold * blocks
        sticky = [node for node, hit in enumerate(hits) if hit >= needed]
        if not sticky or len(sticky) == len(hits) or not self._max_penalty_s:
            return sticky or everyone
        prefill = self._load.prefill
        best = min([prefill[node] for node in sticky])
        other = min([tokens for tokens, hit in zip(prefill, hits, strict=True) if hit < needed])
        return everyone if best - other > self._max_penalty_s * self._throughput else sticky

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Release the tokens."""
        self._load.prefilled(arrival.number, node)

    def finished(self, arrival: Arrival, node: int) -> None:
        """Release the request."""
        self._load.ended(arrival.number, node)

    def for_decode(self) -> Policy:
        """The fewest active requests."""
        return LeastRequests(non_cached_tokens=self._non_cached_tokens)

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.stored(node, blocks)

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.removed(node, blocks)
