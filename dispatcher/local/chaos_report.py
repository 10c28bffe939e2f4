"""What a chaos run found: gaps in service from outcome times, the report, and its words. Pure.

All times are seconds of the sender's monotonic clock. A gap is time without any outcome while somebody waited
for one: a lull of the load is none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypedDict

from dispatcher.audit import AuditResult
from dispatcher.local.chaos_schedule import FaultKind


@dataclass(kw_only=True, slots=True)
class Sent:
    """One request as its sender saw it. `ended_s` is infinite while it has no outcome."""

    submitted_s: float
    late_s: float = 0.0
    ended_s: float = math.inf
    kind: str = ""
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class DoneFault:
    """A fault that was done: to whom, and when it struck."""

    kind: FaultKind
    victim: str
    began_s: float


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A stretch without outcomes while at least one request waited."""

    from_s: float
    to_s: float


class Increments:
    """The sum of counters that begin again at 0 whenever their process does."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self.total = 0.0

    def see(self, name: str, value: float) -> None:
        """Note a counter's value."""
        last = self._last.get(name, 0.0)
        self.total += value - last if value >= last else value
        self._last[name] = value


class FaultFigures(TypedDict):
    """One kind of fault. Gaps are in milliseconds; `reexecuted` counts requests that began more than once."""

    count: int
    gap_p50_ms: float
    gap_max_ms: float
    reexecuted: int


class ChaosReport(TypedDict):
    """A whole run. `lost`, `duplicated` and `reexecuted` are the audit's; `unseen` outcomes never reached the
    sender; `calm_gap_max_ms` is the longest gap before the first fault. `resumed_tokens` is what agents told,
    less what each told last before it was killed."""

    lost: int
    duplicated: int
    other_findings: int
    requests: int
    unseen: int
    outcomes: dict[str, int]
    faults: dict[str, FaultFigures]
    reexecuted: int
    resumed_tokens: int
    calm_gap_max_ms: float
    late_p99_ms: float
    seed: int
    minutes: float
    rate: float
    nodes: int
    dispatchers: int
    overlap: bool
    machine: str


def service_gaps(requests: Iterable[Sent], until_s: float) -> list[Gap]:
    """Every stretch between two outcomes that follow each other, less the time when nobody waited.

    Args:
        until_s: when watching ended, for requests without an outcome.
    """
    ordered = sorted(requests, key=lambda sent: sent.ended_s)
    waiting_since = [math.inf] * len(ordered)
    earliest = math.inf
    for index in range(len(ordered) - 1, -1, -1):
        earliest = min(earliest, ordered[index].submitted_s)
        waiting_since[index] = earliest
    gaps: list[Gap] = []
    before_s = -math.inf
    for sent, since_s in zip(ordered, waiting_since, strict=True):
        ended_s = min(sent.ended_s, until_s)
        from_s = max(before_s, since_s)
        if ended_s > from_s:
            gaps.append(Gap(from_s=from_s, to_s=ended_s))
        before_s = ended_s
    return gaps


def longest_gap_s(gaps: Iterable[Gap], from_s: float, to_s: float) -> float:
    """The longest stretch of a gap that lies between two times, 0 without any."""
    return max(0.0, *(min(gap.to_s, to_s) - max(gap.from_s, from_s) for gap in gaps), 0.0)


def fault_figures(
    faults: Sequence[DoneFault], requests: Sequence[Sent], until_s: float
) -> dict[str, FaultFigures]:
    """Each kind's gaps and re-executions.

    A fault answers for the time until the next one strikes, and for the requests that it was the first to
    strike while they waited, or that were sent and ended before another struck.
    """
    ordered = sorted(faults, key=lambda fault: fault.began_s)
    strikes = [fault.began_s for fault in ordered]
    gaps = service_gaps(requests, until_s)
    found: dict[str, list[float]] = {}
    for fault, next_s in zip(ordered, [*strikes[1:], until_s], strict=False):
        longest_s = longest_gap_s(gaps, fault.began_s, next_s)
        found.setdefault(fault.kind, []).append(longest_s)
    again: Counter[str] = Counter()
    for sent in requests:
        if sent.attempts > 1:
            index = bisect_left(strikes, sent.submitted_s)
            if index == len(strikes) or (strikes[index] > sent.ended_s and index > 0):
                index -= 1
            if index >= 0 and strikes[index] <= sent.ended_s:
                again[ordered[index].kind] += 1
    return {
        kind: FaultFigures(
            count=len(found[kind]),
            gap_p50_ms=round(median(found[kind]) * 1000, 1),
            gap_max_ms=round(max(found[kind]) * 1000, 1),
            reexecuted=again[kind],
        )
        for kind in sorted(found)
    }


def lateness_p99_s(requests: Sequence[Sent]) -> float:
    """How late the sender itself was, at the 99th percentile."""
    late = sorted(sent.late_s for sent in requests)
    return late[min(len(late) - 1, int(0.99 * len(late)))] if late else 0.0


def chaos_report(
    found: AuditResult,
    faults: Sequence[DoneFault],
    requests: Sequence[Sent],
    until_s: float,
    *,
    resumed_tokens: int,
    seed: int,
    minutes: float,
    rate: float,
    nodes: int,
    dispatchers: int,
    overlap: bool,
    machine: str,
) -> ChaosReport:
    """Put a run together."""
    first_s = min((fault.began_s for fault in faults), default=until_s)
    gaps = service_gaps(requests, until_s)
    return ChaosReport(
        lost=len(found.lost),
        duplicated=len(found.duplicated),
        other_findings=len(found.orphans) + len(found.unreadable),
        requests=found.requests,
        unseen=sum(math.isinf(sent.ended_s) for sent in requests),
        outcomes=dict(found.outcomes),
        faults=fault_figures(faults, requests, until_s),
        reexecuted=len(found.reexecuted),
        resumed_tokens=resumed_tokens,
        calm_gap_max_ms=round(longest_gap_s(gaps, -math.inf, first_s) * 1000, 1),
        late_p99_ms=round(lateness_p99_s(requests) * 1000, 1),
        seed=seed,
        minutes=minutes,
        rate=rate,
        nodes=nodes,
        dispatchers=dispatchers,
        overlap=overlap,
        machine=machine,
    )


def is_clean(report: ChaosReport) -> bool:
    """Whether the audit found nothing, and every outcome reached the sender."""
    return not any((report["lost"], report["duplicated"], report["other_findings"], report["unseen"]))


def as_text(report: ChaosReport) -> str:
    """Lay a run out for people."""
    lines = [f"{'fault':<20}{'count':>7}{'gap p50 ms':>13}{'gap max ms':>13}{'run again':>11}"]
    for kind, figures in report["faults"].items():
        lines.append(
            f"{kind:<20}{figures['count']:>7}{figures['gap_p50_ms']:>13,.0f}{figures['gap_max_ms']:>13,.0f}"
            f"{figures['reexecuted']:>11}"
        )
    lines += [
        f"{'(before any fault)':<20}{'':>7}{'':>13}{report['calm_gap_max_ms']:>13,.0f}",
        f"requests     {report['requests']} records: {_counts(report['outcomes'])}",
        f"run again    {report['reexecuted']}, resumed tokens {report['resumed_tokens']}",
        f"audit        {report['lost']} lost, {report['duplicated']} duplicated, "
        f"{report['other_findings']} other findings; {report['unseen']} outcomes not seen by the sender",
        f"seed {report['seed']}, {report['minutes']:g} minutes at {report['rate']:g} requests/s, "
        f"{report['nodes']} nodes, {report['dispatchers']} dispatchers; {report['machine']}",
    ]
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
