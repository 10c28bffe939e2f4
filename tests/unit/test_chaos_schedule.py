"""The schedule of faults: repeatable, fair to every kind, within the run."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from dispatcher.errors import SettingsError
from dispatcher.local.chaos_schedule import CALM_S, LASTS_S, LEAST_SLOT_S, FaultKind, plan_faults

FEW = [FaultKind.KILL_LEADER, FaultKind.FREEZE_REDIS, FaultKind.CUT_AGENT]


def test_a_seed_plans_the_same_run_whatever_the_order_of_kinds() -> None:
    assert plan_faults(7, 200, FEW, overlap=True) == plan_faults(7, 200, FEW[::-1] + FEW, overlap=True)


def test_seeds_differ_in_order_time_and_victim() -> None:
    one, other = (plan_faults(seed, 300, list(FaultKind), overlap=True) for seed in (1, 2))
    assert [fault.kind for fault in one] != [fault.kind for fault in other]
    assert {fault.at_s for fault in one}.isdisjoint(fault.at_s for fault in other)
    assert {fault.draw for fault in one}.isdisjoint(fault.draw for fault in other)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seconds", [180, 400, 1000])
def test_every_kind_comes_up_equally_often_within_the_run(seconds: float, overlap: bool) -> None:
    planned = plan_faults(3, seconds, list(FaultKind), overlap=overlap)
    counts = Counter(fault.kind for fault in planned)
    assert set(counts) == set(FaultKind)
    assert len(set(counts.values())) == 1
    assert planned[0].at_s >= CALM_S
    assert planned[-1].at_s <= seconds - CALM_S
    assert all(LASTS_S[fault.kind][0] <= fault.lasts_s <= LASTS_S[fault.kind][1] for fault in planned)


def test_a_longer_run_has_more_rounds_and_overlap_more_than_twice_as_many() -> None:
    assert len(plan_faults(0, 34, FEW, overlap=False)) == 3
    assert len(plan_faults(0, 58, FEW, overlap=False)) == 6
    assert len(plan_faults(0, 58, FEW, overlap=True)) == 15


def test_five_minutes_have_every_kind_three_times() -> None:
    counts = Counter(fault.kind for fault in plan_faults(1, 300, list(FaultKind), overlap=True))
    assert set(counts.values()) == {3}
    assert sum(counts.values()) >= 60


def test_faults_without_overlap_keep_their_distance() -> None:
    planned = plan_faults(5, 180, list(FaultKind), overlap=False)
    assert all(b.at_s - a.at_s >= 0.9 * LEAST_SLOT_S for a, b in pairwise(planned))


def test_a_run_too_short_for_every_kind_is_refused_with_what_it_needs() -> None:
    with pytest.raises(SettingsError, match=r"at least 0\.40 for 3 kinds of fault, seen 0\.20"):
        plan_faults(0, 12, FEW, overlap=False)
    assert len(plan_faults(0, 24, FEW, overlap=False)) == 3


def test_every_draw_names_one_of_the_candidates() -> None:
    planned = plan_faults(4, 4000, FEW, overlap=True)
    assert {fault.victim(3) for fault in planned} == {0, 1, 2}
    assert {fault.victim(1) for fault in planned} == {0}
