"""The demo's figures: one run's, two runs side by side, and whether they are good. Pure.

Times are in milliseconds of the engines' clock: wall milliseconds over the time scale. What the path itself
costs (Kafka, Redis, Python) is wall time and so looks as many times longer as the engines are faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from dispatcher.audit import AuditResult
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.replay.report import Report, Spread, is_clean

COLUMN = 15
"""Width of a column whose policy has no longer name."""


class Times(TypedDict):
    """How a time was distributed, in milliseconds; None when there are no values."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Figures(TypedDict):
    """One run. Hits are those that engines reported; `busy_s` is each engine's computing time.

    `lost`, `duplicated` and `reexecuted` are the audit's, from the raw topics.
    """

    policy: str
    requests: int
    outcomes: dict[str, int]
    lost: int
    duplicated: int
    reexecuted: int
    ttft_ms: Times
    tpot_ms: Times
    e2e_ms: Times
    hit_ratio: float | None
    predicted_hit_ratio: float | None
    ideal_hit_ratio: float
    per_node: dict[str, int]
    busy_s: dict[str, float]
    busy_max_over_mean: float | None
    clean: bool


def figures(
    report: Report,
    found: AuditResult,
    *,
    policy: str,
    time_scale: float,
    ideal_hit_ratio: float,
    busy_s: Mapping[str, float],
) -> Figures:
    """Put one run together."""
    prompt_tokens = report["prompt_tokens"]
    predicted = report["predicted_cached_tokens"]
    return Figures(
        policy=policy,
        requests=report["requests"],
        outcomes=report["outcomes"],
        lost=len(found.lost) + len(found.unanswered),
        duplicated=len(found.duplicated),
        reexecuted=len(found.reexecuted),
        ttft_ms=_times(report["ttft_ms"], time_scale),
        tpot_ms=_times(report["tpot_ms"], time_scale),
        e2e_ms=_times(report["total_ms"], time_scale),
        hit_ratio=report["cached_share"],
        predicted_hit_ratio=round(predicted / prompt_tokens, 4) if prompt_tokens else None,
        ideal_hit_ratio=round(ideal_hit_ratio, 4),
        per_node=report["nodes"],
        busy_s={node: round(seconds, 2) for node, seconds in busy_s.items()},
        busy_max_over_mean=_unevenness(busy_s),
        clean=is_clean(report) and not found.findings,
    )


def _times(spread: Spread, time_scale: float) -> Times:
    def scaled(value: float | None) -> float | None:
        return round(value / time_scale, 3) if value is not None else None

    return Times(
        mean=scaled(spread["mean"]),
        p50=scaled(spread["p50"]),
        p90=scaled(spread["p90"]),
        p99=scaled(spread["p99"]),
    )


def _unevenness(busy_s: Mapping[str, float]) -> float | None:
    total = sum(busy_s.values())
    return round(max(busy_s.values()) * len(busy_s) / total, 3) if total else None


def completed(run: Figures) -> int:
    """Requests that completed."""
    return run["outcomes"].get(OutcomeKind.COMPLETED, 0)


def is_good(ours: Figures, baseline: Figures | None) -> bool:
    """Whether nothing was lost, nothing answered twice, and both runs completed equally many."""
    if baseline is None:
        return ours["clean"]
    return ours["clean"] and baseline["clean"] and completed(ours) == completed(baseline)


def comparison(ours: Figures, baseline: Figures | None) -> str:
    """Lay one run out for people, or two side by side."""
    runs = [ours] if baseline is None else [baseline, ours]
    width = max(COLUMN, *(len(run["policy"]) + 2 for run in runs))

    def line(name: str, *cells: str) -> str:
        return f"{name:<28}" + "".join(f"{cell:>{width}}" for cell in cells)

    lines = [line("", *(run["policy"] for run in runs), *(["ours / theirs"] if baseline else []))]
    rows: list[tuple[str, Any]] = [
        ("first token, mean ms", lambda run: run["ttft_ms"]["mean"]),
        ("             p50", lambda run: run["ttft_ms"]["p50"]),
        ("             p90", lambda run: run["ttft_ms"]["p90"]),
        ("             p99", lambda run: run["ttft_ms"]["p99"]),
        ("later tokens, mean ms each", lambda run: run["tpot_ms"]["mean"]),
        ("whole answer, mean ms", lambda run: run["e2e_ms"]["mean"]),
        ("              p99", lambda run: run["e2e_ms"]["p99"]),
    ]
    for name, value in rows:
        values = [value(run) for run in runs]
        ratio = [] if baseline is None else [_ratio(values[1], values[0])]
        lines.append(line(name, *map(_number, values), *ratio))
    lines += [
        line("prompt tokens from cache", *(_share(run["hit_ratio"]) for run in runs)),
        line("  as predicted at binding", *(_share(run["predicted_hit_ratio"]) for run in runs)),
        line("  at most, by the workload", *(_share(run["ideal_hit_ratio"]) for run in runs)),
        line("busiest GPU over the mean", *(_number(run["busy_max_over_mean"], 2) for run in runs)),
        line("completed", *(f"{completed(run)} of {run['requests']}" for run in runs)),
        line("lost, answered twice", *(f"{run['lost']}, {run['duplicated']}" for run in runs)),
    ]
    others = {
        kind: count
        for run in runs
        for kind, count in run["outcomes"].items()
        if kind != OutcomeKind.COMPLETED
    }
    if others:
        lines.append("other outcomes: " + ", ".join(f"{count} {kind}" for kind, count in others.items()))
    return "\n".join(lines)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours is not None and theirs else "-"
