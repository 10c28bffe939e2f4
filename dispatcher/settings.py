"""Settings of a dispatcher, each with unit and bounds; `backends.environment` says where they come from.

A wrong value stops the process at start with the setting's name, what was expected and what was seen.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import SettingsConfigDict

from dispatcher.backends.access import AccessSettings
from dispatcher.backends.addresses import Form, KafkaServers, RedisUrl
from dispatcher.backends.legacy_environment import our_policy
from dispatcher.protocol.names import POOL_PATTERN

NEEDS_RESTART = frozenset(
    {
        "redis",
        "kafka",
        "pool",
        "block_size",
        "fair_tenants",
        "tenant_weights",
        "metrics_port",
        "metrics_host",
        "election",
        "leader_ttl_s",
        "topic_partitions",
        "topic_replication",
        "seed",
    }
)
"""Settings that a running dispatcher keeps: servers, addresses, and what other processes count on."""


def lower_case(value: object) -> object:
    """A value in lower case, where it is text."""
    return value.lower() if isinstance(value, str) else value


def tenant_weights(text: str) -> dict[str, float]:
    """The weights in `NAME=WEIGHT,...`.

    Raises:
        ValueError: it is written otherwise, a weight is not above 0, or a name stands twice.
    """
    weights = {}
    for one in text.split(",") if text.strip() else ():
        name, _, weight = one.strip().rpartition("=")
        if not name or name in weights or not 0 < float(weight) < math.inf:
            raise ValueError(one)
        weights[name] = float(weight)
    return weights


def _are_weights(text: str) -> bool:
    try:
        tenant_weights(text)
    except ValueError:
        return False
    return True


TenantWeights = Annotated[str, Form("NAME=WEIGHT,... with each name once and weights above 0", _are_weights)]


class DispatcherSettings(AccessSettings):
    """Everything a dispatcher can be told."""

    model_config = SettingsConfigDict(env_prefix="FLEXLB_", extra="ignore", frozen=True)

    redis: RedisUrl = Field(default="redis://127.0.0.1:6379/0", description="Redis or Valkey URL")
    kafka: KafkaServers = Field(default="127.0.0.1:9092", description="Kafka bootstrap servers")
    pool: str = Field(
        default="default", pattern=rf"^{POOL_PATTERN}$", max_length=64, description="pool served"
    )
    policy: Annotated[
        Literal[
            "prefill_cost",
            "least_outstanding_tokens",
            "random",
            "round_robin",
            "round_robin_lowest_concurrency",
            "shortest_ttft",
            "cost_based_prefill",
        ],
        BeforeValidator(our_policy),
    ] = Field(
        default="prefill_cost",
        description="how a node is chosen; the original's spellings (COST_BASED_PREFILL) are understood too",
    )
    decode_policy: Literal[
        "least_kv", "cost_based_decode", "COST_BASED_DECODE", "weighted_cache", "WEIGHTED_CACHE"
    ] = Field(default="least_kv", description="how a decode node is chosen once its prompt is computed")
    block_size: int = Field(
        default=256, ge=16, le=4096, description="routing block, tokens; the same for the whole pool"
    )
    isolate_tenants: bool = Field(
        default=False, description="keep each tenant's cached prompts from the others, by a salt"
    )
    fair_tenants: bool = Field(
        default=True, description="whether tenants of equal priority share capacity by their weights"
    )
    tenant_weights: TenantWeights = Field(
        default="",
        description="NAME=WEIGHT,...: a tenant's share of capacity beside the others'; 1 if not named",
    )
    work_weight: float = Field(
        default=0.5, ge=0, le=100, description="seconds that a second of own prefill counts besides its own"
    )
    stall_weight: float = Field(
        default=2.0, ge=0, le=1000, description="weight of the stall that a prompt is to answers under way"
    )
    burst_weight: float = Field(
        default=1.0, ge=0, le=1000, description="weight of the long prompts that a node had of late"
    )
    tpot_slo_ms: float = Field(
        default=50.0, ge=1, le=60_000, description="time per token after the first that users accept, ms"
    )
    pressure_s: float = Field(
        default=0.15, ge=0, le=10, description="weight of a node's fullness k/(1-k), seconds"
    )
    size_weight: float = Field(
        default=10.0, ge=0, le=1000, description="a turn comes so many times its own prefill later"
    )
    near_tie: float = Field(
        default=0.05, ge=0, le=1, description="share within which predictions count as equal"
    )
    candidates: int = Field(
        default=16, ge=1, le=1000, description="random nodes looked at besides holders of the prefix"
    )
    cost_tie_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="cost_based_prefill: share of the least score within which nodes are equal",
    )
    cost_tie_ms: float = Field(
        default=20, ge=0, le=60_000, description="cost_based_prefill: nodes this near are equal too, ms"
    )
    cost_hotspot: float = Field(
        default=3.0,
        ge=1,
        le=1_000_000,
        description="cost_based_prefill: nodes with so many times the mean of requests are left out",
    )
    cost_imbalance: float = Field(
        default=3.0,
        ge=1,
        le=1_000_000,
        description="cost_based_prefill: nodes with so many times the mean wait are left out",
    )
    cost_queue_limit: int = Field(
        default=64,
        ge=1,
        le=1_000_000,
        description="cost_based_prefill: a node with so many requests takes no more",
    )
    cost_hysteresis_percent: float = Field(
        default=15,
        ge=0,
        le=100,
        description="cost_based_prefill: so much of that limit must be free before it does again, percent",
    )
    cost_slo_filter: bool = Field(
        default=False, description="cost_based_prefill: whether nodes that would be too late are left out"
    )
    cost_slo_ms: float = Field(
        default=500, ge=1, le=600_000, description="cost_based_prefill: what is too late, ms"
    )
    cost_slo_margin_ms: float = Field(
        default=100,
        ge=0,
        le=600_000,
        description="cost_based_prefill: so much earlier is too late as well, ms",
    )
    ttft_pool: Annotated[Literal["ratio", "fixed"], BeforeValidator(lower_case)] = Field(
        default="ratio", description="shortest_ttft: whether a share or a number of nodes are the best"
    )
    ttft_pool_ratio: float = Field(
        default=0.3, ge=0, le=1, description="shortest_ttft: the share of nodes that are the best"
    )
    ttft_pool_least: int = Field(
        default=1, ge=1, le=10_000, description="shortest_ttft: the fewest nodes that are a share"
    )
    ttft_pool_size: int = Field(
        default=1, ge=1, le=10_000, description="shortest_ttft: the number of nodes that are the best"
    )
    # Below the time after which the guard takes what is bound and in Redis as waiting for lost.
    batch_wait_ms: float = Field(
        default=0,
        ge=0,
        le=1000,
        description="how long assignments to one node wait to be handed over together, ms; 0 for not at all",
    )
    batch_size: int = Field(
        default=8, ge=1, le=1024, description="so many assignments to one node wait for no more"
    )
    lookahead_min_s: float = Field(
        default=0.3, ge=0.001, le=10, description="least predicted work queued at a node, seconds"
    )
    lookahead_max_s: float = Field(
        default=2.0, ge=0.001, le=60, description="most predicted work queued at a node, seconds"
    )
    own_assignment_ttl_s: float = Field(
        default=300, ge=0, le=86_400, description="how long our own assignments count as cached, seconds"
    )
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port of /metrics and /health, 0 for any"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of /metrics and /health")
    election: bool = Field(
        default=True,
        description="whether a leader is elected; without, run one dispatcher: it leads at once, and ends "
        "when another takes over",
    )
    leader_ttl_s: float = Field(default=3.0, ge=0.2, le=60, description="leader lock TTL, seconds")
    heartbeat_ttl_s: float = Field(
        default=2.0, ge=0.2, le=60, description="silence that fences a node, seconds"
    )
    claim_lease_s: float = Field(default=10.0, ge=1, le=600, description="lease of a claimed job, seconds")
    window_requests: int = Field(default=200_000, ge=1, le=10_000_000, description="envelopes kept in memory")
    window_bytes: int = Field(default=256 << 20, ge=1 << 16, description="bytes of envelopes kept in memory")
    carried_bytes: int = Field(
        default=64 << 20, ge=0, description="bytes of small bodies kept in memory; beyond, by reference"
    )
    span_limit: int = Field(default=1_000_000, ge=100, description="offsets read ahead of the assigned mark")
    assign_batch: int = Field(default=128, ge=1, le=1024, description="requests bound by one script call")
    max_record_bytes: int = Field(default=1 << 20, ge=1024, description="largest request record, bytes")
    default_deadline_s: float = Field(
        default=600, ge=1, le=86_400, description="deadline of requests without one, seconds"
    )
    max_deadline_s: float = Field(
        default=86_400, ge=1, le=604_800, description="longest deadline accepted, seconds"
    )
    unknown_model_grace_s: float = Field(
        default=5.0, ge=0, le=3600, description="wait before a model that no node serves is refused, seconds"
    )
    retry_share: float = Field(
        default=0.2, ge=0, le=10, description="retries allowed per request bound for the first time"
    )
    retry_floor_rate: float = Field(
        default=10, ge=0.1, le=100_000, description="retries allowed whatever is bound, per second"
    )
    shed_target_s: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        description="wait beyond which a standing interactive queue is overload, seconds; 0 for never",
    )
    shed_interval_s: float = Field(
        default=10.0, ge=0.1, le=3600, description="how long a queue must stand to be overload, seconds"
    )
    explain_share: float = Field(
        default=1.0, ge=0, le=1, description="share of decisions that flexlb explain can tell of"
    )
    explain_rate: float = Field(
        default=50.0, ge=0, le=1000, description="most decisions explained, per second; 0 for none"
    )
    topic_partitions: int = Field(
        default=4, ge=1, le=1000, description="partitions of topics that `init` creates"
    )
    topic_replication: int = Field(
        default=1, ge=1, le=10, description="replicas of topics that `init` creates"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least level logged"
    )
    seed: int = Field(default=0, ge=0, description="seed of random choices, 0 for a fresh one")

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        """Refuse pairs of values that contradict each other."""
        for low, high in (
            ("lookahead_min_s", "lookahead_max_s"),
            ("default_deadline_s", "max_deadline_s"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}: expected at most {high} ({getattr(self, high):g}), seen {getattr(self, low):g}"
                )
        return self
