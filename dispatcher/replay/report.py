"""What a replay came to: numbers for programs, a table for people. Pure.

Percentiles are nearest rank: the smallest value that at least p % of the values do not exceed, so each
is a value that some request really had. A lost request has no time and is counted, not averaged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypedDict

from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.replay.replay import ReplayResult, RequestResult

PERCENTS = (50, 90, 99)


class Spread(TypedDict):
    """How a quantity was distributed; None when there are no values."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


class Report(TypedDict):
    """A replay in numbers.

    `lost` requests were appended and have no outcome, `duplicated` have more than one, `reexecuted`
    had more than one attempt that began, `unsent` Kafka never acknowledged.
    """

    requests: int
    unsent: int
    outcomes: dict[str, int]
    reasons: dict[str, int]
    lost: int
    lost_ids: list[str]
    duplicated: int
    reexecuted: int
    ttft_ms: Spread
    ttft_local_ms: Spread
    total_ms: Spread
    total_local_ms: Spread
    tpot_ms: Spread
    late_ms: Spread
    prompt_tokens: int
    cached_tokens: int
    cached_share: float | None
    predicted_cached_tokens: int
    completion_tokens: int
    nodes: dict[str, int]
    duration_s: float
    requests_per_s: float
    speed: float
    token_scale: float
    began_ms: int
    ended_ms: int


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of values in ascending order; `percent` above 0, up to 100."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def spread(values: Iterable[float | None]) -> Spread:
    """Describe the values that are there."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return Spread(count=0, mean=None, p50=None, p90=None, p99=None, max=None)
    p50, p90, p99 = (round(percentile(ordered, percent), 3) for percent in PERCENTS)
    mean = round(math.fsum(ordered) / len(ordered), 3)
    return Spread(count=len(ordered), mean=mean, p50=p50, p90=p90, p99=p99, max=round(ordered[-1], 3))


def tpot_ms(request: RequestResult) -> float | None:
    """Time per output token after the first; None for answers of one token."""
    if request.ttft_ms is None or request.total_ms is None or request.completion_tokens < 2:
        return None
    return (request.total_ms - request.ttft_ms) / (request.completion_tokens - 1)


def summarise(result: ReplayResult) -> Report:
    """Count and describe a replay."""
    sent = [request for request in result.requests if not request.unsent]
    ended = [request for request in sent if request.kind]
    completed = [request for request in ended if request.kind == OutcomeKind.COMPLETED]
    lost = [request.id for request in sent if not request.kind]
    prompt_tokens = sum(request.prompt_tokens for request in completed)
    cached_tokens = sum(request.cached_tokens for request in completed)
    return Report(
        requests=len(result.requests),
        unsent=len(result.requests) - len(sent),
        outcomes=dict(Counter(request.kind for request in ended).most_common()),
        reasons=dict(Counter(request.reason for request in ended).most_common()),
        lost=len(lost),
        lost_ids=lost[:100],
        duplicated=sum(request.outcomes > 1 for request in sent),
        reexecuted=sum(request.attempts > 1 for request in sent),
        ttft_ms=spread(request.ttft_ms for request in completed),
        ttft_local_ms=spread(request.ttft_local_ms for request in completed),
        total_ms=spread(request.total_ms for request in completed),
        total_local_ms=spread(request.total_local_ms for request in completed),
        tpot_ms=spread(map(tpot_ms, completed)),
        late_ms=spread(request.late_ms for request in result.requests),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        cached_share=round(cached_tokens / prompt_tokens, 4) if prompt_tokens else None,
        predicted_cached_tokens=sum(request.predicted_cached_tokens for request in completed),
        completion_tokens=sum(request.completion_tokens for request in completed),
        nodes=dict(sorted(Counter(request.node for request in completed if request.node).items())),
        duration_s=round(result.duration_s, 3),
        requests_per_s=round(len(ended) / result.duration_s, 3) if result.duration_s else 0.0,
        speed=result.speed,
        token_scale=result.token_scale,
        began_ms=result.began_ms,
        ended_ms=result.ended_ms,
    )


def is_clean(report: Report) -> bool:
    """Whether every request was sent and got exactly one outcome."""
    return not (report["unsent"] or report["lost"] or report["duplicated"])


def table(report: Report) -> str:
    """Lay a report out for people."""
    outcomes = ", ".join(f"{count} {kind}" for kind, count in report["outcomes"].items()) or "none"
    share = report["cached_share"]
    lines = [
        f"requests   {report['requests']} in {report['duration_s']:.1f} s "
        f"({report['requests_per_s']:.1f} answered/s, trace at {report['speed']:g} times its pace)",
        f"outcomes   {outcomes}",
        f"integrity  {report['lost']} lost, {report['duplicated']} duplicated, "
        f"{report['unsent']} unsent; {report['reexecuted']} re-executed",
        f"tokens     {report['prompt_tokens']} prompt"
        + (f" ({share:.1%} from cache)" if share is not None else "")
        + f", {report['completion_tokens']} completion",
    ]
    if report["token_scale"] != 1:
        lines.append(
            f"scale      lengths are {report['token_scale']:g} times the trace's; times do not compare"
        )
    others = {reason: count for reason, count in report["reasons"].items() if reason != "finished"}
    if others:
        lines.append("reasons    " + ", ".join(f"{count} {reason}" for reason, count in others.items()))
    if report["lost_ids"]:
        lines.append("lost       " + " ".join(report["lost_ids"][:10]))
    lines += ["", f"{'milliseconds':<34}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
    lines += [
        _row("first token, broker's clock", report["ttft_ms"]),
        _row("first token, seen here", report["ttft_local_ms"]),
        _row("outcome, broker's clock", report["total_ms"]),
        _row("outcome, seen here", report["total_local_ms"]),
        _row("token after the first", report["tpot_ms"]),
        _row("sent late by", report["late_ms"]),
    ]
    return "\n".join(lines)


def _row(name: str, values: Spread) -> str:
    cells = (values["mean"], values["p50"], values["p90"], values["p99"], values["max"])
    return f"{name:<34}" + "".join(f"{'-' if cell is None else f'{cell:.1f}':>10}" for cell in cells)
