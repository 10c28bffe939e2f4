"""What simulated runs are told as: percentiles, good requests, intervals over seeds; as a table, or JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import fsum, inf, isfinite, sqrt

from msgspec import Struct

from dispatcher.simulation.conditions import Conditions
from dispatcher.simulation.fleet import FleetResult
from dispatcher.simulation.goodput import Objectives
from dispatcher.simulation.knee import ATTAINED, RESOLUTION, knee, told
from dispatcher.simulation.profile import Profile

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Half of a 95 % interval in standard errors, by seeds less two."""


class Times(Struct, frozen=True, kw_only=True):
    """Milliseconds over all requests; infinite, in JSON null, where unanswered ones reach."""

    mean: float
    p50: float
    p90: float
    p99: float


class RoleLoad(Struct, frozen=True, kw_only=True):
    """How the load lay on the nodes of one role."""

    load_max_over_mean: float
    busy: float


class Run(Struct, frozen=True, kw_only=True):
    """One policy at one rate and seed.

    `slo_attainment` is the share of all requests that were good (`goodput.Objectives`), `goodput_per_s` how
    many a second while requests arrive: how long the last answers are says nothing of the fleet. `completion`
    is the share that was answered; `busy` the engines' share of the time. Of `nodes` `prefill` and `decode`
    are apart, none where all do both; `by_role` is theirs alone, and `load_max_over_mean` then the larger.
    """

    policy: str
    trace: str
    profile: str
    rate: float
    per_s: float
    nodes: int
    prefill: int = 0
    decode: int = 0
    seed: int
    conditions: Conditions
    requests: int
    completion: float
    ttft_ms: Times
    tpot_ms: Times
    slo_attainment: float
    goodput_per_s: float
    hit_ratio: float
    load_max_over_mean: float
    busy: float
    by_role: dict[str, RoleLoad] = {}
    preemptions: int
    wall_s: float


class Report(Struct, frozen=True, kw_only=True):
    """All runs; `knee`, empty without a sweep: the highest rate that each policy carries."""

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


def told_nodes(nodes: int, decode: int) -> str:
    """How many nodes, by their roles."""
    return f"{nodes - decode} prefill + {decode} decode" if decode else str(nodes)


def load_of(busy_s: Sequence[float], span_s: float) -> RoleLoad:
    """How the load lay on some engines."""
    mean_s = sum(busy_s) / len(busy_s)
    return RoleLoad(
        load_max_over_mean=round(max(busy_s) / mean_s, 3) if mean_s else 1.0,
        busy=round(mean_s / span_s, 4) if span_s else 0.0,
    )


def run_of(
    result: FleetResult,
    *,
    policy: str,
    trace: str,
    profile: Profile,
    rate: float,
    per_s: float,
    nodes: int,
    decode: int = 0,
    seed: int,
    objectives: Objectives,
    conditions: Conditions,
) -> Run:
    """Sum up one run.

    Args:
        profile: of a nominal node, which the objectives go by.
        per_s: the offered load, in requests a second.
        decode: so many of the nodes, the last ones, are decode nodes and the others prefill nodes.
    """
    requests = len(result.ttft_s)
    good = sum(map(objectives.judge(profile), result.ttft_s, result.tpot_s, result.prompt_tokens))
    answered = sum(1 for one in result.ttft_s if one < inf)
    prompts = sum(result.prompt_tokens)
    load = load_of(result.busy_s, result.span_s)
    by_role: dict[str, RoleLoad] = {}
    if decode:
        by_role["prefill"] = load_of(result.busy_s[: nodes - decode], result.span_s)
        by_role["decode"] = load_of(result.busy_s[nodes - decode :], result.span_s)
    return Run(
        policy=policy,
        trace=trace,
        profile=profile.name,
        rate=rate,
        per_s=round(per_s, 3),
        nodes=nodes,
        prefill=nodes - decode if decode else 0,
        decode=decode,
        seed=seed,
        conditions=conditions,
        requests=requests,
        completion=round(answered / requests, 4),
        ttft_ms=times_ms(result.ttft_s),
        tpot_ms=times_ms(one for one in result.tpot_s if one),
        slo_attainment=round(good / requests, 4),
        goodput_per_s=round(good / (result.arrivals_s or result.span_s or 1.0), 3),
        hit_ratio=round(result.cached_tokens / prompts, 4) if prompts else 0.0,
        load_max_over_mean=max(one.load_max_over_mean for one in (list(by_role.values()) or [load])),
        busy=load.busy,
        by_role=by_role,
        preemptions=result.preemptions,
        wall_s=round(result.wall_s, 2),
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds; the 95 % interval (Student's) is `mean` +/- `half`, 0 of one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ±{self.half:.2g}" if self.half else "")


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values of different seeds, and how sure it is."""
    number = len(values)
    mean = fsum(values) / number
    if number == 1 or not isfinite(mean):
        return Estimate(mean=mean, half=0.0)
    deviation = sqrt(fsum((value - mean) ** 2 for value in values) / (number - 1))
    student = STUDENT[min(number - 2, len(STUDENT) - 1)]
    return Estimate(mean=mean, half=student * deviation / sqrt(number))


def by_rate(runs: Iterable[Run]) -> dict[tuple[str, float], list[Run]]:
    """Runs that differ in their seed alone, by policy and rate."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run.policy, run.rate), []).append(run)
    return found


def knees(runs: Iterable[Run]) -> dict[str, float]:
    """The knee of each policy: where the mean over the seeds of its share of good requests crosses."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for (policy, rate), same in by_rate(runs).items():
        curves.setdefault(policy, []).append((rate, estimate([run.slo_attainment for run in same]).mean))
    return {policy: told(knee(curve)) for policy, curve in curves.items()}


def knees_by_seed(runs: Sequence[Run]) -> dict[str, Estimate]:
    """The mean over the seeds of each one's own knee, read off the same rates."""
    of_seeds = [
        knees(run for run in runs if run.seed == seed) for seed in dict.fromkeys(run.seed for run in runs)
    ]
    return {policy: estimate([one[policy] for one in of_seeds]) for policy in of_seeds[0]}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of the table."""

    name: str
    width: int
    digits: int
    value: Callable[[Run], float]
    unit: str = ""

    def cell(self, runs: Sequence[Run]) -> str:
        """The figure, with its interval when there are several seeds."""
        found = estimate([self.value(run) for run in runs])
        interval = f" ±{found.half:.{self.digits}f}" if len(runs) > 1 else ""
        return f"{found.mean:.{self.digits}f}{interval}{self.unit}"


COLUMNS = (
    Column(name="rate", width=8, digits=0, value=lambda run: run.rate),
    Column(name="req/s", width=8, digits=2, value=lambda run: run.per_s),
    Column(name="TTFT mean", width=10, digits=0, value=lambda run: run.ttft_ms.mean),
    Column(name="p50", width=8, digits=0, value=lambda run: run.ttft_ms.p50),
    Column(name="p90", width=8, digits=0, value=lambda run: run.ttft_ms.p90),
    Column(name="p99", width=8, digits=0, value=lambda run: run.ttft_ms.p99),
    Column(name="TPOT p50", width=9, digits=1, value=lambda run: run.tpot_ms.p50),
    Column(name="p99", width=7, digits=1, value=lambda run: run.tpot_ms.p99),
    Column(name="good", width=7, digits=1, unit="%", value=lambda run: 100 * run.slo_attainment),
    Column(name="good/s", width=8, digits=2, value=lambda run: run.goodput_per_s),
    Column(name="done", width=7, digits=1, unit="%", value=lambda run: 100 * run.completion),
    Column(name="hit", width=7, digits=1, unit="%", value=lambda run: 100 * run.hit_ratio),
    Column(name="max/mean", width=9, digits=2, value=lambda run: run.load_max_over_mean),
    Column(name="busy", width=6, digits=0, unit="%", value=lambda run: 100 * run.busy),
    Column(name="wall s", width=7, digits=1, value=lambda run: run.wall_s),
)


def _by_role(role: str) -> tuple[Column, ...]:
    return (
        Column(
            name=f"{role[0].upper()} max/mean",
            width=11,
            digits=2,
            value=lambda run: run.by_role[role].load_max_over_mean,
        ),
        Column(name="busy", width=6, digits=0, unit="%", value=lambda run: 100 * run.by_role[role].busy),
    )


LOADS = ("max/mean", "busy")
APART_COLUMNS = (
    *(column for column in COLUMNS[:-1] if column.name not in LOADS),
    *_by_role("prefill"),
    *_by_role("decode"),
    COLUMNS[-1],
)
"""Where prefill and decode are apart the load is told of each."""
PLAIN = ("rate", "req/s", "wall s")
"""Columns that are told without an interval."""
INTERVAL_WIDTH = 7


def table(report: Report, objectives: Objectives) -> str:
    """The report for a terminal. Times are milliseconds; `±` is a 95 % interval over the seeds."""
    rows = by_rate(report.runs)
    columns = APART_COLUMNS if any(run.decode for run in report.runs) else COLUMNS
    is_seeded = any(len(same) > 1 for same in rows.values())
    widths = [
        column.width + (INTERVAL_WIDTH if is_seeded and column.name not in PLAIN else 0) for column in columns
    ]
    first = 2 + max(len("policy"), *(len(policy) for policy, _ in rows))
    lines = [_line("policy", first, [column.name for column in columns], widths)]
    for (policy, rate), same in rows.items():
        cells = [
            f"{rate:g}" if column.name == "rate" else column.cell(same[:1] if column.name in PLAIN else same)
            for column in columns
        ]
        lines.append(_line(policy, first, cells, widths))
    lines += ["", f"good: {objectives}"]
    lines += [f"nodes: {told_nodes(run.nodes, run.decode)} (P, D)" for run in report.runs[:1] if run.decode]
    lines += [f"amiss: {run.conditions}" for run in report.runs[:1] if str(run.conditions)]
    if report.knee:
        lines += _told_knees(report, first)
    return "\n".join(lines)


def _line(name: str, first: int, cells: Iterable[str], widths: Iterable[int]) -> str:
    return f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _told_knees(report: Report, first: int) -> Iterable[str]:
    """What a sweep found, and what it cost."""
    yield f"knee, the highest rate with {ATTAINED:.0%} of requests good, to {RESOLUTION:.0%}:"
    seeds = knees_by_seed(report.runs)
    missed = {
        policy
        for (policy, _), same in by_rate(report.runs).items()
        if estimate([run.slo_attainment for run in same]).mean < ATTAINED
    }
    per_s = report.runs[0].per_s / report.runs[0].rate
    for policy, rate in report.knee.items():
        bound = "" if policy in missed else ", the highest tried: it never fell short"
        interval = f"  (by seed {seeds[policy]})" if seeds[policy].half else ""
        yield f"  {policy:<{first}} {rate:.4g}  {rate * per_s:.2f} req/s{interval}{bound}"
    yield f"{len(report.runs)} runs"
