"""A run of a simulated fleet as it is told, for tests of what is made of runs."""

from __future__ import annotations

from dispatcher.simulation.conditions import Conditions
from dispatcher.simulation.fleet_report import Run, Times


def told_run(
    policy: str, *, rate: float = 1.0, seed: int = 1, good: float = 1.0, mean: float = 1.0, hits: float = 0.0
) -> Run:
    """One run, of which only what is given matters."""
    times = Times(mean=mean, p50=1.0, p90=1.0, p99=1.0)
    return Run(
        policy=policy,
        trace="t",
        profile="p",
        rate=rate,
        per_s=rate,
        nodes=1,
        seed=seed,
        conditions=Conditions(),
        requests=1,
        completion=1.0,
        ttft_ms=times,
        tpot_ms=times,
        slo_attainment=good,
        goodput_per_s=1.0,
        hit_ratio=hits,
        load_max_over_mean=1.0,
        busy=0.5,
        preemptions=0,
        wall_s=0.0,
    )
