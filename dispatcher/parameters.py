"""What settings mean to the scheduling core: its parameters and limits."""

from __future__ import annotations

from dispatcher.protocol.names import Lane, Names
from dispatcher.scheduling.admission import AdmissionLimits
from dispatcher.scheduling.choice import SchedulingParameters
from dispatcher.scheduling.cost_based_prefill import CandidatePool, CostBased
from dispatcher.scheduling.overload import OverloadParameters
from dispatcher.scheduling.window import LANE_SHARE
from dispatcher.settings import DispatcherSettings


def admission_limits(settings: DispatcherSettings, names: Names, reply_partitions: int) -> AdmissionLimits:
    """What a record may be."""
    return AdmissionLimits(
        max_record_bytes=settings.max_record_bytes,
        default_deadline_ms=int(settings.default_deadline_s * 1000),
        max_deadline_ms=int(settings.max_deadline_s * 1000),
        request_topic=names.requests(Lane.INTERACTIVE),
        bodies_topic=names.bodies,
        reply_topics={names.replies: reply_partitions},
        isolate_tenants=settings.isolate_tenants,
    )


def scheduling_parameters(settings: DispatcherSettings) -> SchedulingParameters:
    """How a scheduler weighs."""
    return SchedulingParameters(
        work_weight=settings.work_weight,
        stall_weight=settings.stall_weight,
        burst_weight=settings.burst_weight,
        tpot_slo_s=settings.tpot_slo_ms / 1000,
        pressure_s=settings.pressure_s,
        size_weight=settings.size_weight,
        near_tie=settings.near_tie,
        sampled=settings.candidates,
        lookahead_min_s=settings.lookahead_min_s,
        lookahead_max_s=settings.lookahead_max_s,
        block_size=settings.block_size,
        batch_wait_s=settings.batch_wait_ms / 1000,
        batch_size=settings.batch_size,
        cost_based=CostBased(
            tie_share=settings.cost_tie_share,
            tie_s=settings.cost_tie_ms / 1000,
            hotspot_multiplier=settings.cost_hotspot,
            imbalance_multiplier=settings.cost_imbalance,
            queue_limit=settings.cost_queue_limit,
            hysteresis=settings.cost_hysteresis_percent / 100,
            slo_s=settings.cost_slo_ms / 1000 if settings.cost_slo_filter else 0.0,
            slo_margin_s=settings.cost_slo_margin_ms / 1000,
        ),
        ttft_pool=CandidatePool(
            mode=settings.ttft_pool,
            ratio=settings.ttft_pool_ratio,
            least=settings.ttft_pool_least,
            size=settings.ttft_pool_size,
        ),
    )


def overload_parameters(settings: DispatcherSettings) -> OverloadParameters:
    """When to turn away."""
    share = LANE_SHARE[Lane.INTERACTIVE]
    return OverloadParameters(
        target_s=settings.shed_target_s,
        interval_s=settings.shed_interval_s,
        lane_requests=share * settings.window_requests,
        lane_bytes=share * settings.window_bytes,
    )
