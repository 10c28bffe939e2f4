"""SGLang's classic cache_aware policy (sglang-router 0.3.2, `src/policies/cache_aware.rs`).

    imbalanced = max(L) - min(L) > balance_abs_threshold  and  max(L) > balance_rel_threshold * min(L)
    imbalanced:                     argmin L
    matched / prompt > threshold:   the first tenant of the deepest matching place in the radix tree
    else:                           argmin L

L counts the requests that this router has in flight on each node. Argmin is the first of equals: so the
original sends all of an idle fleet's first requests to node 0. `tie="random"` is what a user would wish it
did. Decode nodes are chosen by the same policy, with counts and a tree of their own (no `--decode-policy`).
"""

from __future__ import annotations

from typing import Literal

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.picking import least
from dispatcher.simulation.policies.radix_tenants import RadixTenants

CHARS_PER_TOKEN = 4


class SGLangCacheAware(Policy):
    """Thresholds, interval and size are the original's command-line defaults; the size is in characters."""

    name = "sglang_cache_aware"
    poll_s = 0.0
    wants_kv_events = False
    kv_event_delay_s = 0.0

    def __init__(
        self,
        *,
        cache_threshold: float = 0.3,
        balance_abs_threshold: int = 64,
        balance_rel_threshold: float = 1.5,
        eviction_interval_s: float = 60.0,
        max_tree_chars: int = 67_108_864,
        tie: Literal["first", "random"] = "first",
    ) -> None:
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs_threshold
        self._balance_rel = balance_rel_threshold
        self._eviction_interval_s = eviction_interval_s
        self._max_tree_chars = max_tree_chars
        self._tie = tie

    def start(self, world: World) -> None:
        """Begin with an idle fleet and an empty tree."""
        self._world = world
        self._load = [0] * world.nodes
        self._tree = RadixTenants(
            world.nodes,
            limit=self._max_tree_chars // (CHARS_PER_TOKEN * world.block_tokens),
            shared_limit=False,
            interval_s=self._eviction_interval_s,
        )

    def choose(self, arrival: Arrival) -> int:
        """Return the node by the three rules above."""
        now_s = self._world.now_s
        load = self._load
        low, high = min(load), max(load)
        if high - low > self._balance_abs and high > self._balance_rel * low:
            node = self._least_loaded()
        else:
            length, tenants = self._tree.match(arrival.blocks, now_s)
            matched_tokens = length * self._world.block_tokens
            if tenants and matched_tokens > self._cache_threshold * arrival.prompt_tokens:
                node = tenants[0]
            else:
                node = self._least_loaded()
        self._tree.insert(arrival.blocks, node, now_s)
        load[node] += 1
        return node

    def _least_loaded(self) -> int:
        if self._tie == "random":
            return least(self._load, self._world.rng)
        return self._load.index(min(self._load))

    def finished(self, arrival: Arrival, node: int) -> None:
        """Count it no longer."""
        self._load[node] -= 1

    def for_decode(self) -> Policy:
        """The same, with nothing in it."""
        return SGLangCacheAware(
            cache_threshold=self._cache_threshold,
            balance_abs_threshold=self._balance_abs,
            balance_rel_threshold=self._balance_rel,
            eviction_interval_s=self._eviction_interval_s,
            max_tree_chars=self._max_tree_chars,
            tie=self._tie,
        )
