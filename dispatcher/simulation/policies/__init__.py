"""The field's routing policies after their originals, to be simulated side by side with ours.

`BY_NAME` makes each from keyword arguments, its tunable constants; `TUNABLE` lists the values of each
constant worth trying, the original's default first, so that each can be shown at its best. What each is taken
from, what it sees and where it differs from its original: `dispatcher/docs/simulation.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dispatcher.simulation.policies.base import Arrival, Policy, Signal, World
from dispatcher.simulation.policies.blind import Random, RoundRobin
from dispatcher.simulation.policies.dynamo_kv import DynamoKV
from dispatcher.simulation.policies.llmd_sticky import LLMDSticky
from dispatcher.simulation.policies.llmd_weighted import LLMDWeighted
from dispatcher.simulation.policies.lmetric import LPWL, LMetric
from dispatcher.simulation.policies.mooncake import Mooncake
from dispatcher.simulation.policies.outstanding_tokens import LeastOutstandingTokens
from dispatcher.simulation.policies.rtp_llm_cost import RTPLLMCost
from dispatcher.simulation.policies.sglang_cache_aware import SGLangCacheAware
from dispatcher.simulation.policies.smg_expected_wait import SMGExpectedWait

BY_NAME: dict[str, Callable[..., Policy]] = {
    "random": Random,
    "round_robin": RoundRobin,
    "least_outstanding_tokens": LeastOutstandingTokens,
    "sglang_cache_aware": SGLangCacheAware,
    "smg_expected_wait": SMGExpectedWait,
    "dynamo_kv": DynamoKV,
    "llmd_weighted": LLMDWeighted,
    "llmd_sticky": LLMDSticky,
    "lmetric": LMetric,
    "lpwl": LPWL,
    "mooncake": Mooncake,
    "rtp_llm_cost": RTPLLMCost,
}

TUNABLE: dict[str, dict[str, tuple[Any, ...]]] = {
    "random": {},
    "round_robin": {},
    "least_outstanding_tokens": {"until": ("finished", "first_token")},
    "sglang_cache_aware": {
        "cache_threshold": (0.3, 0.1, 0.5),
        "balance_abs_threshold": (64, 4, 16, 32),
        "balance_rel_threshold": (1.5, 1.1),
        "tie": ("first", "random"),
    },
    "smg_expected_wait": {
        "cache_threshold": (0.3, 0.1, 0.5),
        "balance_rel_threshold": (1.5, 1.2),
        "throughput": (2000.0, 8000.0, 20_000.0),
        "poll_s": (10.0, 1.0),
    },
    "dynamo_kv": {
        "prefill_load_scale": (1.0, 2.0, 4.0),
        "overlap_score_credit": (1.0, 2.0),
        "overlap_score_credit_decay": (0.0, 1.0),
        "temperature": (0.0, 0.1),
    },
    "llmd_weighted": {
        "prefix_weight": (3.0, 1.0, 6.0),
        "no_hit_lru_weight": (2.0, 0.0),
        "kv_events": (False, True),
    },
    "llmd_sticky": {
        "affinity_threshold": (0.8, 0.5),
        "max_ttft_penalty_s": (18.0, 0.5, 2.0, 5.0),
        "peak_prefill_throughput": (15_928.0, 0.0),
        "kv_events": (False, True),
    },
    "lmetric": {"batch_exponent": (1.0, 0.5)},
    "lpwl": {},
    "mooncake": {},
    "rtp_llm_cost": {
        "tie_s": (0.02, 0.0),
        "tie_share": (0.1, 0.0),
        "hotspot_multiplier": (3.0, 1.5),
        "imbalance_multiplier": (3.0, 1.5),
    },
}

__all__ = ["BY_NAME", "TUNABLE", "Arrival", "Policy", "Signal", "World"]
