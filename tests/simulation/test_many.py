"""Many seeds at once: every one is run and told of, and a violation is printed with how to replay it."""

from __future__ import annotations

import pytest

from tests.simulation.many import Progress, report, run_many
from tests.support.cluster import Outcome, simulate


def test_seeds_of_two_processes_are_those_of_one() -> None:
    told = list(run_many(range(7), jobs=2))
    assert [progress.done for progress in told] == list(range(1, 8))
    assert told[-1].bad == 0
    assert told[-1].cpu_s > 0
    by_seed = {progress.last.seed: progress.last for progress in told}
    assert sorted(by_seed) == list(range(7))
    assert by_seed[3] == simulate(3)


def progress(seed: int, violations: list[str], *, done: int, bad: int, wall_s: float) -> Progress:
    outcome = Outcome(seed=seed, violations=violations)
    return Progress(last=outcome, done=done, seeds=3, bad=bad, wall_s=wall_s, cpu_s=2 * wall_s)


def test_a_violation_is_printed_at_once_and_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        progress(5, [], done=1, bad=0, wall_s=1.0),
        progress(7, ["lost"], done=2, bad=1, wall_s=12.0),
        progress(6, [], done=3, bad=1, wall_s=18.0),
    ]
    assert report(run) == 1
    assert capsys.readouterr().out.splitlines() == [
        "lost",
        "replay: uv run python -m tests.simulation 7",
        "2 of 3 seeds, 1 violate an invariant; 10 schedules a minute, 5 a minute and core",
        "3 of 3 seeds, 1 violate an invariant; 10 schedules a minute, 5 a minute and core",
    ]


def test_a_run_without_violations_succeeds() -> None:
    assert report([progress(5, [], done=1, bad=0, wall_s=1.0)]) == 0
