"""Leases of clients: when an unfinished request counts as nobody's any more."""

from __future__ import annotations

import pytest

from dispatcher.scheduling.leases import LONGEST_TTL_S, SHORTEST_TTL_S, LeaseKey, Leases

A: LeaseKey = ("acme", "a")
B: LeaseKey = ("acme", "b")


def test_a_lease_runs_out_after_its_time_of_proven_silence() -> None:
    leases = Leases()
    leases.hear(A, 15_000)
    leases.hold("i0_1", A)
    assert leases.prove(100.0) == []  # its silence begins here, whenever it was heard before
    assert leases.prove(114.9) == []
    assert not leases.orphans
    assert leases.prove(115.0) == [(A, 1)]
    assert list(leases.orphans) == ["i0_1"]
    leases.drop("i0_1")
    assert not leases.orphans
    assert len(leases) == 0


def test_each_sign_of_life_starts_the_silence_anew() -> None:
    leases = Leases()
    leases.hold("i0_1", A)
    for now_s in range(0, 200, 10):
        leases.hear(A, 15_000)
        assert leases.prove(float(now_s)) == []
    assert not leases.orphans


def test_a_lease_that_nobody_told_of_runs_for_the_longest_time() -> None:
    leases = Leases()
    leases.hold("i0_1", A)
    leases.prove(0.0)
    leases.prove(LONGEST_TTL_S - 0.1)
    assert not leases.orphans
    leases.prove(LONGEST_TTL_S)
    assert list(leases.orphans) == ["i0_1"]


def test_an_end_counts_at_once_and_for_requests_that_are_read_later() -> None:
    leases = Leases()
    leases.hear(A, 15_000)
    leases.hold("i0_1", A)
    leases.hear(A, 0)
    leases.hold("i0_2", A)
    assert list(leases.orphans) == ["i0_1", "i0_2"]
    assert not leases.are_held
    leases.hear(A, 15_000)
    leases.hold("i0_3", A)
    assert "i0_3" not in leases.orphans


def test_a_request_after_the_lease_ran_out_is_a_client_that_came_back() -> None:
    leases = Leases()
    leases.hear(A, 3_000)
    leases.hold("i0_1", A)
    leases.prove(0.0)
    leases.prove(3.0)
    leases.hold("i0_2", A)
    assert list(leases.orphans) == ["i0_1"]


def test_leases_of_other_tenants_are_other_leases() -> None:
    leases = Leases()
    leases.hold("i0_1", A)
    leases.hear(("other", "a"), 0)
    assert not leases.orphans


def test_a_repeated_request_is_for_every_client_that_sent_it() -> None:
    leases = Leases()
    leases.hold("i0_1", A)
    leases.share("i0_1", B)
    leases.hear(A, 0)
    assert not leases.orphans
    leases.hear(B, 0)
    assert list(leases.orphans) == ["i0_1"]


@pytest.mark.parametrize("is_held", [True, False])
def test_a_request_that_was_repeated_without_a_lease_depends_on_none(is_held: bool) -> None:
    leases = Leases()
    if is_held:
        leases.hold("i0_1", A)
    leases.share("i0_1", None)
    leases.share("i0_1", B)
    leases.hear(A, 0)
    leases.hear(B, 0)
    assert not leases.orphans
    assert not leases.are_held


def test_what_is_remembered_is_bounded_and_forgetting_cancels_nobody() -> None:
    leases = Leases(most_idle=10)
    leases.hear(A, 3_000)
    leases.hold("i0_1", A)
    for number in range(100):
        leases.hear(("acme", f"idle{number}"), 3_000)
        leases.hear(("acme", f"ended{number}"), 0)
    assert len(leases) == 11
    leases.hold("i0_2", ("acme", "ended0"))
    leases.hold("i0_3", ("acme", "idle0"))
    leases.prove(0.0)
    leases.prove(3.0)
    assert list(leases.orphans) == ["i0_1"]
    for ref in ("i0_1", "i0_2", "i0_3"):
        leases.drop(ref)
    leases.prove(LONGEST_TTL_S + 1)
    assert len(leases) == 0


def test_trouble_starts_the_silence_of_all_anew() -> None:
    leases = Leases()
    leases.hear(A, 3_000)
    leases.hold("i0_1", A)
    leases.prove(0.0)
    leases.restart()
    leases.prove(10.0)
    leases.prove(12.9)
    assert not leases.orphans
    leases.prove(13.0)
    assert list(leases.orphans) == ["i0_1"]


def test_too_short_a_time_to_live_is_made_longer() -> None:
    leases = Leases()
    leases.hear(A, 1)
    leases.hold("i0_1", A)
    leases.prove(0.0)
    leases.prove(SHORTEST_TTL_S - 0.1)
    assert not leases.orphans
    leases.prove(SHORTEST_TTL_S)
    assert list(leases.orphans) == ["i0_1"]
