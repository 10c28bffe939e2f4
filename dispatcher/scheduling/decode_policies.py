"""Decode nodes by their KV use, as the original FlexLB chooses them: pure functions over nodes.

Each takes eligible nodes, the KV tokens that a request is expected to need there (prompt and answer), and
chance; it returns a node, or None when none can take the request. `BY_NAME` knows them by the original's
names and by ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from dispatcher.scheduling.fleet import NodeState

DECAY_PER_TOKEN = 0.001
"""How fast a node's weight falls with each KV token that it uses beyond the least used (the original's)."""
HOTSPOT_TIMES = 3.0
"""Nodes with more than so many times the mean of requests are left out (the original's)."""
IMBALANCE_TIMES = 3.0
"""Nodes with more than so many times the mean KV use are left out (the original's)."""

DecodePolicy = Callable[[Sequence[NodeState], int, random.Random], NodeState | None]


def kv_total(node: NodeState) -> int:
    """KV tokens that a node has room for, 0 when it does not tell."""
    reported = node.report.kv_total_tokens if node.report is not None else 0
    return reported or node.identity.kv_total_tokens


def kv_used(node: NodeState) -> int:
    """KV tokens in use there: the larger of what it reports and what we bound (the original: both added).

    Our own ledger has every request until it ends, also those that a report counts already.
    """
    reported = node.report.kv_used_tokens if node.report is not None else 0
    return max(node.held_tokens, reported + node.unseen_tokens)


def cost_based_decode(nodes: Sequence[NodeState], tokens: int, rng: random.Random) -> NodeState | None:
    """By weight, among those with room that are neither hot spots nor out of balance."""
    if not nodes:
        return None
    most_held = HOTSPOT_TIMES * sum(len(node.held) for node in nodes) / len(nodes)
    most_used = IMBALANCE_TIMES * sum(map(kv_used, nodes)) / len(nodes)
    return _weighted(
        [
            node
            for node in nodes
            if _has_room(node, tokens) and len(node.held) <= most_held and kv_used(node) <= most_used
        ],
        rng,
    )


def weighted_cache(nodes: Sequence[NodeState], tokens: int, rng: random.Random) -> NodeState | None:
    """By weight, among those with room.

    The original names it but has no code of it any more: the weight is `COST_BASED_DECODE`'s, whose decay
    still bears its name (`weightedCacheDecayFactor`).
    """
    return _weighted([node for node in nodes if _has_room(node, tokens)], rng)


def _has_room(node: NodeState, tokens: int) -> bool:
    total = kv_total(node)
    return not total or kv_used(node) + tokens <= total


def _weighted(nodes: Sequence[NodeState], rng: random.Random) -> NodeState | None:
    """Any of these, each with a weight that falls exponentially with its KV use in absolute tokens."""
    if not nodes:
        return None
    used = [kv_used(node) for node in nodes]
    least = min(used)
    weights = [math.exp(-DECAY_PER_TOKEN * (one - least)) for one in used]
    return rng.choices(nodes, weights)[0]


BY_NAME: Mapping[str, DecodePolicy] = {
    "cost_based_decode": cost_based_decode,
    "COST_BASED_DECODE": cost_based_decode,
    "weighted_cache": weighted_cache,
    "WEIGHTED_CACHE": weighted_cache,
}
