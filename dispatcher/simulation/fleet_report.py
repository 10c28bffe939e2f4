"""What a simulated run is told as: percentiles, SLO attainment, the knee; as a table, or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from dispatcher.simulation.fleet import FleetResult

ATTAINED = 0.9
"""Share of requests within the SLO up to which a rate counts as carried."""


class Times(Struct, frozen=True, kw_only=True):
    """Milliseconds over all requests."""

    mean: float
    p50: float
    p90: float
    p99: float


class Run(Struct, frozen=True, kw_only=True):
    """One policy at one rate. `goodput_per_s`: requests within the SLO; `busy`: the engines' share."""

    policy: str
    trace: str
    profile: str
    rate: float
    per_s: float
    nodes: int
    seed: int
    requests: int
    ttft_ms: Times
    tpot_ms: Times
    slo_attainment: float
    goodput_per_s: float
    hit_ratio: float
    load_max_over_mean: float
    busy: float
    preemptions: int
    wall_s: float


class Report(Struct, frozen=True, kw_only=True):
    """All runs; `knee`, empty without a sweep: the highest rate up to which each policy carries all."""

    runs: list[Run]
    knee: dict[str, float]


def times_ms(seconds: Iterable[float]) -> Times:
    """Mean and percentiles (nearest rank)."""
    ordered = sorted(seconds)
    if not ordered:
        return Times(mean=0.0, p50=0.0, p90=0.0, p99=0.0)

    def percentile(share: float) -> float:
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return Times(
        mean=round(1000 * sum(ordered) / len(ordered), 3),
        p50=percentile(0.5),
        p90=percentile(0.9),
        p99=percentile(0.99),
    )


def run_of(
    result: FleetResult,
    *,
    policy: str,
    trace: str,
    profile: str,
    rate: float,
    per_s: float,
    nodes: int,
    seed: int,
    slo_s: float,
) -> Run:
    """Sum up one run; `per_s` is the offered load, in requests a second."""
    within = sum(1 for one in result.ttft_s if one <= slo_s)
    mean_busy_s = sum(result.busy_s) / len(result.busy_s)
    return Run(
        policy=policy,
        trace=trace,
        profile=profile,
        rate=round(rate, 4),
        per_s=round(per_s, 3),
        nodes=nodes,
        seed=seed,
        requests=len(result.ttft_s),
        ttft_ms=times_ms(result.ttft_s),
        tpot_ms=times_ms(one for one in result.tpot_s if one),
        slo_attainment=round(within / len(result.ttft_s), 4),
        goodput_per_s=round(within / result.span_s, 3) if result.span_s else 0.0,
        hit_ratio=round(result.cached_tokens / result.prompt_tokens, 4),
        load_max_over_mean=round(max(result.busy_s) / mean_busy_s, 3) if mean_busy_s else 1.0,
        busy=round(mean_busy_s / result.span_s, 4) if result.span_s else 0.0,
        preemptions=result.preemptions,
        wall_s=round(result.wall_s, 2),
    )


def knees(runs: Sequence[Run]) -> dict[str, float]:
    """The highest rate of each policy up to which no rate fell short of `ATTAINED`; 0 when the lowest did."""
    found: dict[str, float] = {}
    for policy in dict.fromkeys(run.policy for run in runs):
        found[policy] = 0.0
        for run in sorted((run for run in runs if run.policy == policy), key=lambda run: run.rate):
            if run.slo_attainment < ATTAINED:
                break
            found[policy] = run.rate
    return found


COLUMNS: Mapping[str, str] = {
    "policy": "<28",
    "rate": ">7",
    "req/s": ">8",
    "TTFT mean": ">10",
    "p50": ">9",
    "p90": ">9",
    "p99": ">9",
    "TPOT p50": ">9",
    "SLO": ">7",
    "hit": ">7",
    "max/mean": ">9",
    "busy": ">6",
    "wall s": ">7",
}


def table(report: Report, slo_ms: float) -> str:
    """The report for a terminal. Times are milliseconds."""
    lines = ["".join(format(name, width) for name, width in COLUMNS.items())]
    for run in report.runs:
        cells = (
            run.policy,
            f"{run.rate:g}",
            f"{run.per_s:.2f}",
            f"{run.ttft_ms.mean:.0f}",
            f"{run.ttft_ms.p50:.0f}",
            f"{run.ttft_ms.p90:.0f}",
            f"{run.ttft_ms.p99:.0f}",
            f"{run.tpot_ms.p50:.1f}",
            f"{run.slo_attainment:.1%}",
            f"{run.hit_ratio:.1%}",
            f"{run.load_max_over_mean:.2f}",
            f"{run.busy:.0%}",
            f"{run.wall_s:.1f}",
        )
        lines.append(
            "".join(format(cell, width) for cell, width in zip(cells, COLUMNS.values(), strict=True))
        )
    if report.knee:
        lines += ["", f"highest rate with {ATTAINED:.0%} of first tokens within {slo_ms:g} ms:"]
        lines += [f"  {policy:<26} {rate:g}" for policy, rate in report.knee.items()]
    return "\n".join(lines)
