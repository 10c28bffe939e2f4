"""The watching itself: after every effect only what it touched is read, and that must come to the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

from tests.support.cluster import Cluster, Outcome
from tests.support.sim.loop import run

Touched = Collection[bytes] | None


def watch(
    seed: int, *, is_split: bool = False, told: Callable[[Cluster, Touched], Touched] = lambda _, keys: keys
) -> tuple[Outcome, int]:
    """Run a seed, all places read anew after every effect: what came of it, and how many effects that were.

    Args:
        told: which keys the watching is told of.
    """
    effects = 0

    async def main() -> Outcome:
        cluster = Cluster(seed, is_split=is_split)
        watching = cluster.redis.observer
        assert watching is not None

        def observer(fields: Sequence[bytes], answer: Any, touched: Touched) -> None:
            nonlocal effects
            effects += 1
            watching(fields, answer, told(cluster, touched))
            cluster.invariants.check_places("read anew")

        cluster.redis.observer = observer
        return await cluster.run()

    return run(main()), effects


@pytest.mark.parametrize(("seed", "is_split"), [(1, False), (12, False), (4, True)])
def test_what_is_kept_of_places_is_what_is_there_after_every_effect(seed: int, is_split: bool) -> None:
    outcome, effects = watch(seed, is_split=is_split)
    assert effects > 100
    assert not outcome.violations, outcome.explain()


def test_a_key_that_the_watching_is_not_told_of_is_missed() -> None:
    def without_marks(cluster: Cluster, touched: Touched) -> Touched:
        marks = cluster.names.marks.encode()
        return touched and [key for key in touched if key != marks and b"above:" not in key]

    outcome, _ = watch(1, told=without_marks)
    assert any("watching went wrong" in violation for violation in outcome.violations)
