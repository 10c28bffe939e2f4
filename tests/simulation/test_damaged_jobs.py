"""Jobs that nobody can read, in virtual time, while processes die: nothing is lost or answered twice."""

from __future__ import annotations

import pytest

from tests.support.cluster import simulate

KINDS = ("damage_jobs", "damage_jobs", "kill_agent", "freeze_dispatcher", "strike_between_effects")


@pytest.mark.parametrize("seed", range(12))
def test_a_cluster_whose_jobs_are_damaged_answers_everything_once(seed: int) -> None:
    found = simulate(seed, faults=KINDS)
    assert found.violations == []
    assert found.outcomes


SPOIL = (
    "spoil_jobs",
    "spoil_jobs",
    "spoil_jobs",
    "kill_agent",
    "cordon",
    "freeze_dispatcher",
    "strike_between_effects",
)


@pytest.mark.parametrize("is_split", [False, True], ids=["fused", "prefill and decode"])
@pytest.mark.parametrize("seed", range(12))
def test_a_cluster_whose_leader_meets_damaged_jobs_answers_everything_once(seed: int, is_split: bool) -> None:
    """Jobs are deleted, or have rubbish in a field, while their leader goes on."""
    found = simulate(seed, faults=SPOIL, is_split=is_split)
    assert found.violations == []
    assert found.outcomes
