"""Ours against the best of the field, in simulated runs of equal arrivals: ratios, intervals over seeds.

Whoever is compared with is chosen after the fact, for each measure the best of all: the hardest judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean

from msgspec import Struct

from dispatcher.simulation.fleet_report import Run, estimate


class Measure(Struct, frozen=True, kw_only=True):
    """A figure of a run, and which way is better."""

    is_more_better: bool
    value: Callable[[Run], float]


# Of the load offered: where sessions are a closed loop, the longest alone decides how long all arrive.
MEASURES: Mapping[str, Measure] = {
    "goodput": Measure(is_more_better=True, value=lambda run: run.slo_attainment * run.per_s),
    "TTFT mean": Measure(is_more_better=False, value=lambda run: run.ttft_ms.mean),
    "TTFT p99": Measure(is_more_better=False, value=lambda run: run.ttft_ms.p99),
    "TPOT mean": Measure(is_more_better=False, value=lambda run: run.tpot_ms.mean),
    "hits": Measure(is_more_better=True, value=lambda run: run.hit_ratio),
    "max/mean busy": Measure(is_more_better=False, value=lambda run: run.load_max_over_mean),
}


class Ratio(Struct, frozen=True, kw_only=True):
    """Ours divided by another policy's, seed by seed: mean and half of the 95 % interval."""

    ours: float
    other: float
    policy: str
    ratio: float
    half: float

    def __str__(self) -> str:
        interval = f" ±{self.half:.2f}" if self.half else ""
        return f"{self.ratio:.2f}{interval}"


def ratios(runs: Iterable[Run], ours: str, others: Iterable[str]) -> dict[str, Ratio]:
    """Compare at one rate, in each measure with whichever of `others` has the best mean.

    Returns:
        By measure; without those in which the best has nothing (hits of a trace without prefixes).
    """
    by_policy: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_policy.setdefault(run.policy, {})[run.seed] = run
    others = list(others)
    found = {}
    for name, measure in MEASURES.items():
        means = {
            policy: fmean(measure.value(run) for run in by_policy[policy].values())
            for policy in (ours, *others)
        }
        best = (max if measure.is_more_better else min)(others, key=means.__getitem__)
        if not all(measure.value(run) for run in by_policy[best].values()):
            continue
        of_seeds = estimate(
            [
                measure.value(run) / measure.value(by_policy[best][seed])
                for seed, run in by_policy[ours].items()
            ]
        )
        found[name] = Ratio(
            ours=round(means[ours], 4),
            other=round(means[best], 4),
            policy=best,
            ratio=round(of_seeds.mean, 4),
            half=round(of_seeds.half, 4),
        )
    return found
