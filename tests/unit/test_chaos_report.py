"""Chaos: gaps in service from outcome times, what a fault answers for, when a run is clean."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

import pytest

from dispatcher.audit import AuditResult, Finding
from dispatcher.local.chaos import until_silent
from dispatcher.local.chaos_report import (
    ChaosReport,
    DoneFault,
    Gap,
    Increments,
    Sent,
    as_text,
    chaos_report,
    fault_figures,
    is_clean,
    lateness_p99_s,
    longest_gap_s,
    service_gaps,
)
from dispatcher.local.chaos_schedule import FaultKind
from tests.support.sim.loop import run


def sent(submitted_s: float, ended_s: float = math.inf, attempts: int = 1) -> Sent:
    return Sent(submitted_s=submitted_s, ended_s=ended_s, attempts=attempts)


def fault(kind: FaultKind, began_s: float) -> DoneFault:
    return DoneFault(kind=kind, victim="node-1", began_s=began_s)


def longest(requests: list[Sent], until_s: float) -> float:
    return longest_gap_s(service_gaps(requests, until_s), -math.inf, math.inf)


def test_a_gap_is_between_outcomes_while_a_request_waits() -> None:
    requests = [sent(0, 1), sent(0.5, 4), sent(3, 4.5)]
    assert [(gap.from_s, gap.to_s) for gap in service_gaps(requests, 10)] == [(0, 1), (1, 4), (4, 4.5)]


def test_a_lull_of_the_load_is_no_gap() -> None:
    assert longest([sent(0, 1), sent(100, 101)], 200) == 1


def test_an_unanswered_request_waits_until_the_end() -> None:
    assert longest([sent(0, 1), sent(2), sent(3, 4)], 30) == 26


def test_nothing_sent_is_no_gap() -> None:
    assert service_gaps([], 5) == []
    assert longest_gap_s([], 0, 5) == 0


@pytest.mark.parametrize("seed", range(20))
def test_gaps_are_those_of_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    requests = []
    for _ in range(rng.randint(1, 30)):
        at_s = rng.randint(0, 100)
        requests.append(sent(at_s, at_s + rng.randint(1, 30) if rng.random() < 0.9 else math.inf))
    # By brute force: unit by unit, how long nobody was answered while somebody waited.
    longest_s = run_s = 0
    for at_s in range(200):
        waits = any(one.submitted_s <= at_s < one.ended_s for one in requests)
        run_s = run_s + 1 if waits else 0
        longest_s = max(longest_s, run_s)
        if any(one.ended_s == at_s + 1 for one in requests):
            run_s = 0
    assert longest(requests, 200) == longest_s


def test_only_the_part_of_a_gap_between_two_faults_counts() -> None:
    gaps = [Gap(from_s=1, to_s=9)]
    assert longest_gap_s(gaps, 3, 5) == 2
    assert longest_gap_s(gaps, 0, 5) == 4
    assert longest_gap_s(gaps, 3, 20) == 6
    assert longest_gap_s(gaps, 9, 12) == 0
    assert longest_gap_s(gaps, 0, 1) == 0


def test_a_fault_answers_for_the_time_until_the_next() -> None:
    requests = [sent(0, 1), sent(1, 6), sent(6, 6.5), sent(6.5, 8.5), sent(8, 9)]
    done = [
        fault(FaultKind.KILL_AGENT, 2),
        fault(FaultKind.KILL_REDIS, 7),
        fault(FaultKind.KILL_AGENT, 8.6),
    ]
    figures = fault_figures(done, requests, 10)
    assert figures["kill-agent"] == {"count": 2, "gap_p50_ms": 2200, "gap_max_ms": 4000, "reexecuted": 0}
    assert figures["kill-redis"] == {"count": 1, "gap_p50_ms": 1500, "gap_max_ms": 1500, "reexecuted": 0}


@pytest.mark.parametrize(
    ("submitted_s", "ended_s", "kind"),
    [
        (1, 3, "kill-agent"),  # struck while it waited
        (1, 9, "kill-agent"),  # the first of two
        (3, 9, "kill-redis"),
        (3, 4, "kill-agent"),  # sent after it, before the other
        (8, 9, "kill-redis"),
        (0, 1, None),  # before any fault
    ],
)
def test_a_request_run_again_counts_under_what_struck_it(
    submitted_s: float, ended_s: float, kind: str | None
) -> None:
    done = [fault(FaultKind.KILL_AGENT, 2), fault(FaultKind.KILL_REDIS, 7)]
    figures = fault_figures(done, [sent(submitted_s, ended_s, attempts=2), sent(0, 10)], 10)
    found = {name for name, one in figures.items() if one["reexecuted"]}
    assert found == ({kind} if kind else set())


def test_lateness_is_the_99th_percentile() -> None:
    requests = [Sent(submitted_s=0, late_s=number) for number in range(1000)]
    assert lateness_p99_s(requests) == 990
    assert lateness_p99_s([]) == 0


def test_counters_that_begin_again_are_summed() -> None:
    counted = Increments()
    for name, value in [("a", 5), ("b", 2), ("a", 8), ("a", 3), ("a", 3), ("b", 2)]:
        counted.see(name, value)
    assert counted.total == 8 + 3 + 2


def report(found: AuditResult, requests: list[Sent], **more: Any) -> ChaosReport:
    settings: dict[str, Any] = {
        "resumed_tokens": 0,
        "seed": 1,
        "minutes": 2.0,
        "rate": 50.0,
        "nodes": 4,
        "dispatchers": 3,
        "overlap": False,
        "machine": "a machine",
        **more,
    }
    return chaos_report(found, [fault(FaultKind.KILL_AGENT, 5)], requests, 10, **settings)


def audited(**findings: Any) -> AuditResult:
    return AuditResult(from_ms=0, to_ms=1, requests=2, outcomes={"Completed": 2}, **findings)


def test_a_run_is_clean_when_the_audit_is_and_every_outcome_was_seen() -> None:
    clean = report(audited(), [sent(0, 1), sent(4, 6)])
    assert is_clean(clean)
    assert clean["calm_gap_max_ms"] == 1000
    assert clean["faults"]["kill-agent"]["gap_max_ms"] == 1000
    assert (clean["lost"], clean["duplicated"], clean["requests"]) == (0, 0, 2)


@pytest.mark.parametrize("kind", ["lost", "duplicated", "orphans", "unreadable"])
def test_any_finding_of_the_audit_is_not_clean(kind: str) -> None:
    assert not is_clean(report(audited(**{kind: [Finding(ref="0:0:1")]}), [sent(0, 1)]))


def test_an_outcome_that_never_reached_the_sender_is_not_clean() -> None:
    unseen = report(audited(), [sent(0, 1), sent(2)])
    assert unseen["unseen"] == 1
    assert not is_clean(unseen)


def test_the_words_name_each_kind_and_the_seed() -> None:
    words = as_text(report(audited(), [sent(0, 1), sent(4, 6)], seed=42))
    for word in ("kill-agent", "1,000", "2 Completed", "0 lost, 0 duplicated", "seed 42", "a machine"):
        assert word in words


def test_answers_are_waited_for_as_long_as_some_come() -> None:
    async def main() -> tuple[int, float]:
        tasks = {asyncio.create_task(asyncio.sleep(after_s)) for after_s in (30, 80, 130, 500)}
        left = await until_silent(tasks, 60)
        ended_s = asyncio.get_running_loop().time()
        for task in left:
            task.cancel()
        assert await until_silent(set(), 60) == set()
        return len(left), ended_s

    assert run(main()) == (1, 240.0)
