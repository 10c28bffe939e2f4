"""Many seeds in several processes: what violates an invariant, and how many schedules a minute that makes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tests.support.cluster import Outcome, simulate

PROGRESS_S = 10.0
SHARE = 5
"""Seeds that a process takes at a time."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far it is: the seed that ended last, and all so far.

    `cpu_s` is the processor time of the simulations alone, `wall_s` the time since the first was handed out.
    """

    last: Outcome
    done: int
    seeds: int
    bad: int
    wall_s: float
    cpu_s: float

    def __str__(self) -> str:
        by_wall = 60 * self.done / self.wall_s
        by_cpu = 60 * self.done / self.cpu_s
        return (
            f"{self.done} of {self.seeds} seeds, {self.bad} violate an invariant; "
            f"{by_wall:.0f} schedules a minute, {by_cpu:.0f} a minute and core"
        )


def run_many(
    seeds: Sequence[int], *, jobs: int, hostile_records: int = 0, is_split: bool = False
) -> Iterator[Progress]:
    """Run all of the seeds in so many processes; tells of each as it ends, in no order."""
    # No fork: a child would inherit what the parent's threads hold.
    context = multiprocessing.get_context("spawn")
    began_s = time.monotonic()
    bad = 0
    spent_s = 0.0
    with context.Pool(jobs) as pool:
        run = partial(_run, hostile_records, is_split)
        for done, (outcome, cpu_s) in enumerate(pool.imap_unordered(run, seeds, chunksize=SHARE), 1):
            bad += bool(outcome.violations)
            spent_s += cpu_s
            yield Progress(
                last=outcome,
                done=done,
                seeds=len(seeds),
                bad=bad,
                wall_s=time.monotonic() - began_s,
                cpu_s=spent_s,
            )


def _run(hostile_records: int, is_split: bool, seed: int) -> tuple[Outcome, float]:
    began_s = time.process_time()
    outcome = simulate(seed, hostile_records=hostile_records, is_split=is_split)
    return outcome, time.process_time() - began_s


def report(run: Iterable[Progress]) -> int:
    """Print each violation when it is found, and how far it is now and then; 1 when there was a violation."""
    told_s = 0.0
    progress = None
    for progress in run:
        if progress.last.violations:
            print(progress.last.explain(), flush=True)
        if progress.wall_s - told_s >= PROGRESS_S:
            told_s = progress.wall_s
            print(progress, flush=True)
    assert progress is not None, "a range of seeds is never empty"
    print(progress, flush=True)
    return 1 if progress.bad else 0
