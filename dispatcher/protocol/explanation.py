"""Explanations: why a request went where it went, as the leader that decided it knew things then.

The leader writes a bounded, sampled number of them into Redis; `flexlb explain` reads them. They hold no
prompt. Durations are milliseconds, and those of a candidate add up to its `cost_ms`.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from dispatcher.protocol.handoff import Stage
from dispatcher.protocol.request import FIRST_VERSION


class Rule(StrEnum):
    """What made the node chosen the one."""

    LEAST_COST = "least_cost"
    MOST_CACHED = "most_cached"
    CHANCE = "chance"
    TURN = "turn"
    FEWEST_TOKENS = "fewest_tokens"
    FEWEST_REQUESTS = "fewest_requests"
    LONGEST_UNCHOSEN = "longest_unchosen"
    NEARLY_LEAST_WAIT = "nearly_least_wait"
    DECODE_POLICY = "decode_policy"
    LEAST_FULL = "least_full"


class Bar(StrEnum):
    """Why a node that serves the model could not be chosen."""

    CORDONED = "cordoned"
    GONE = "gone"
    NOT_ADMITTED = "not_admitted"
    ON_PROBATION = "on_probation"
    ENGINE_DOWN = "engine_down"
    DRAINING = "draining"
    ROLE = "role"
    LORA = "lora"
    TOO_LONG = "too_long"
    SUSPECT = "suspect"
    EXCLUDED = "excluded"


class Doubt(StrEnum):
    """What the decision did not know, and by which stated rule it went on."""

    STALE_LOAD = "stale_load"
    EMPTY_REGISTRY = "empty_registry"
    OTHER_BLOCKS = "other_blocks"
    TEXT_ONLY = "text_only"
    NO_BLOCKS = "no_blocks"
    ESTIMATED_LENGTH = "estimated_length"


class Candidate(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node that was priced.

    Args:
        matched_blocks, cached_tokens: what its cache is believed to hold of the prompt, and what that saves.
        compute_tokens: the rest.
        queue_ms: the prompts that it has to compute before.
        slot_ms: until it has a slot and KV cache for one more.
        planned_ms: requests of this round that wait for it.
        prefill_ms: this one's own prefill.
        work_ms: what that is to those who come after it there.
        stall_ms: what it is to the answers under way there.
        burst_ms: the long prompts that came there of late.
        pressure_ms: how full it is.
        transfer_ms: to hand the prompt over to another node.
        queued_tokens: prompt tokens that it has to compute, reported or bound there since.
        held: requests there; `most` it may hold.
        kv_use: share of its KV cache in use; of a decode stage with this request in it.
        is_tied: so near the best that other rules decided.
        has_room: it could begin this one now.
        is_stale: its last report is old, so that its load is taken from its peers too.
    """

    node: str
    cost_ms: float = 0.0
    matched_blocks: int = 0
    cached_tokens: int = 0
    compute_tokens: int = 0
    queue_ms: float = 0.0
    slot_ms: float = 0.0
    planned_ms: float = 0.0
    prefill_ms: float = 0.0
    work_ms: float = 0.0
    stall_ms: float = 0.0
    burst_ms: float = 0.0
    pressure_ms: float = 0.0
    transfer_ms: float = 0.0
    queued_tokens: int = 0
    held: int = 0
    most: int = 0
    kv_use: float = 0.0
    is_tied: bool = False
    has_room: bool = False
    is_stale: bool = False


class BarredNode(Struct, frozen=True, kw_only=True):
    """A node that could not be chosen."""

    node: str
    why: Bar


class Explanation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One decision.

    Args:
        epoch, n: of the attempt.
        is_priced: the policy chose by these costs; another's candidates are priced for comparison.
        waited_ms: since its append; `read_ms` of it until this leader had it in its window, as far as known.
        put_off_ms: by so much its turn came later for the prefill that it takes.
        busy_rounds: how often it was passed over because its best node had no room, last `busy_node`.
        unplaced_rounds: how often no eligible node could take it.
        failures: engine failures before this attempt; `excluded` are the nodes of its earlier attempts.
        serving: nodes that serve the model; `eligible` may take the request, `looked_at` were priced.
        candidates: the best few of those, the chosen one among them.
        barred: how many nodes could not be chosen, by why; `barred_nodes` names a few; of `asked` nodes.
    """

    ref: str
    id: str
    model: str
    node: str
    epoch: int
    n: int
    at_ms: int
    policy: str
    rule: Rule
    tenant: str = ""
    stage: Stage = Stage.WHOLE
    is_priced: bool = False
    near_tie: float = 0.0
    prompt_tokens: int = 0
    max_tokens: int = 0
    blocks: int = 0
    block_size: int = 0
    priority: int = 0
    waited_ms: int = 0
    read_ms: int = 0
    put_off_ms: int = 0
    busy_rounds: int = 0
    busy_node: str = ""
    unplaced_rounds: int = 0
    failures: int = 0
    excluded: tuple[str, ...] = ()
    serving: int = 0
    looked_at: int = 0
    candidates: tuple[Candidate, ...] = ()
    asked: int = 0
    barred: dict[str, int] = {}
    barred_nodes: tuple[BarredNode, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    v: int = FIRST_VERSION
