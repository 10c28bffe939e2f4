"""What a policy is told and what it answers: parameters, what already waits, and the choice of a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dispatcher.protocol.explanation import Rule
from dispatcher.protocol.handoff import Stage
from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.scheduling.cost_based_prefill import CandidatePool, CostBased
from dispatcher.scheduling.fleet import NodeState

COST_BASED = CostBased()
TTFT_POOL = CandidatePool()
"""The original's defaults."""


MOST_HOLDERS = 16
"""Of a large fleet, this many holders of the prefix are looked at, besides the random others."""
STEP_TOKENS = 2_048
"""About what an engine computes in one step of chunked prefill (vLLM's default budget)."""


@dataclass(frozen=True, kw_only=True)
class SchedulingParameters:
    """How `prefill_cost` weighs: seconds that a request waits itself, and what it does to the others.

    `cost_based` are the constants of `cost_based_prefill`, `ttft_pool` those of `shortest_ttft`.

    Args:
        work_weight: what a request's own prefill counts besides its own wait: all who come after it there
            wait for it too, so that a cached prefix is worth more than the time it saves the one.
        stall_weight: what a whole answer's worth of stall costs. While a node computes a prompt, all that
            decode there stand still: for each of them, the prefill counts times its share of what an answer
            may take (its mean length x `tpot_slo_s`). It grows with the square of the prefill: short
            prompts go anywhere, long ones where few decode.
        burst_weight: what the prompts that a node had of late cost one who would decode there
            (`Burst.seconds`): it keeps short ones away from where the long ones go.
        tpot_slo_s: seconds per token after the first that users accept.
        pressure_s: seconds that a node's fullness k costs, times k/(1-k): of its KV cache, or of what it may
            hold.
        size_weight: a request's turn comes so many times its own prefill later, as if it had come later:
            short ones needn't wait behind long ones, which wait no longer than in proportion.
        near_tie: share of the best prediction within which nodes count as equal.
        sampled: random nodes looked at besides the holders of the prefix.
        lookahead_min_s, lookahead_max_s: bounds of the predicted work that a node may have queued.
        block_size: tokens of a routing block.
        batch_wait_s, batch_size: how long assignments to one node wait for each other, and how many at most
            are handed over together; with 0 or 1 none waits.
    """

    work_weight: float = 0.5
    stall_weight: float = 2.0
    burst_weight: float = 1.0
    tpot_slo_s: float = 0.05
    pressure_s: float = 0.15
    size_weight: float = 10.0
    near_tie: float = 0.05
    sampled: int = 16
    lookahead_min_s: float = 0.3
    lookahead_max_s: float = 2.0
    block_size: int = BLOCK_TOKENS
    batch_wait_s: float = 0.0
    batch_size: int = 8
    cost_based: CostBased = COST_BASED
    ttft_pool: CandidatePool = TTFT_POOL


class Priced(NamedTuple):
    """What a node would cost, seconds: `total_s` is the sum of the others.

    `wait_s` is the work it has before, `slot_s` included, `pressure_s` how full it is.
    """

    total_s: float
    hit_tokens: int
    wait_s: float
    prefill_s: float
    node: NodeState
    blocks: int
    slot_s: float
    planned_s: float
    work_s: float
    stall_s: float
    burst_s: float
    pressure_s: float
    transfer_s: float


Prices = Sequence[tuple[float, int, float, float, NodeState, int, *tuple[float, ...]]]
"""Fields of `Priced`, in plain tuples."""


class Choice(NamedTuple):
    """The best node for a request. `has_room` says whether it can be bound now; if not, it is worth waiting.

    `wait_s` is the work predicted before it, `prefill_s` its own; `is_stale` says that the node's load was
    taken from its peers, since its last report is old. `rule` says what decided, `candidates` between
    whom, where a policy has prices.
    """

    node: NodeState
    has_room: bool
    hit_tokens: int
    uncached_tokens: int
    wait_s: float
    prefill_s: float
    looked_at: int
    is_stale: bool = False
    stage: Stage = Stage.WHOLE
    rule: Rule = Rule.LEAST_COST
    candidates: Sequence[NodeState] = ()


class Capacity(NamedTuple):
    """Nodes of a model that take work, and the share of them that have all that they may hold."""

    nodes: int
    busy: float


Planned = dict[str, float]
"""Seconds of prefill, by node, of requests that already wait for it in this round."""
