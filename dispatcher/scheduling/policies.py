"""Policies: which of the candidate nodes gets a request.

Each is a function of (envelope, candidates, rng); candidates are never empty. Near-equal choices are
broken at random, never by index, so that nodes with equal load share what comes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from dispatcher.protocol.assignment import Envelope
from dispatcher.scheduling.fleet import NodeState

Policy = Callable[[Envelope, Sequence[NodeState], random.Random], NodeState]


def choose_random(envelope: Envelope, nodes: Sequence[NodeState], rng: random.Random) -> NodeState:
    """Any candidate, uniformly."""
    return nodes[rng.randrange(len(nodes))]


def choose_least_outstanding_tokens(
    envelope: Envelope, nodes: Sequence[NodeState], rng: random.Random
) -> NodeState:
    """The node with the fewest tokens bound per running slot: its queue is the shortest in work."""
    loads = [node.held_tokens / node.identity.max_running for node in nodes]
    least = min(loads)
    tied = [node for node, load in zip(nodes, loads, strict=True) if load <= least]
    return tied[0] if len(tied) == 1 else tied[rng.randrange(len(tied))]


POLICIES: Mapping[str, Policy] = {
    "random": choose_random,
    "least_outstanding_tokens": choose_least_outstanding_tokens,
}
