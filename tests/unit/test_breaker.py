"""When a node is trusted, put on probation, and tried again."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol.outcome import FailureCause
from dispatcher.scheduling.breaker import (
    ENGINE_FAILURES,
    FAILURES,
    FIRST_PROBATION_S,
    LONGEST_PROBATION_S,
    Breaker,
    BreakerState,
)

RNG = random.Random(0)


def opened(now_s: float = 0.0) -> Breaker:
    breaker = Breaker()
    assert [breaker.failed("r", now_s, RNG) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


def test_failures_in_a_row_open_it_and_an_answer_between_them_does_not_let_them_add_up() -> None:
    breaker = Breaker()
    for _ in range(10):
        assert not breaker.failed("r", 0.0, RNG)
        assert not breaker.succeeded(1e9)
    assert breaker.admits
    assert not opened().admits


def test_after_its_probation_one_request_at_a_time_is_tried() -> None:
    breaker = opened(100.0)
    assert not breaker.tick(100.0 + FIRST_PROBATION_S / 2 - 0.01)
    assert breaker.tick(100.0 + FIRST_PROBATION_S)
    tried = []
    for ref in ("r1", "r2"):
        tried.append(breaker.admits)
        breaker.bound(ref)
    assert tried == [True, False]
    for ref, admits in (("r2", False), ("r1", True)):
        breaker.released(ref)
        assert breaker.admits is admits


def test_an_answer_closes_it_and_a_failed_try_opens_it_for_longer() -> None:
    breaker = opened()
    lasted = []
    now_s = 0.0
    for _ in range(10):
        lasted.append(breaker.probation_s)
        now_s += LONGEST_PROBATION_S
        assert breaker.tick(now_s)
        breaker.bound("r")
        assert breaker.failed("r", now_s, RNG)
        breaker.released("r")
    assert lasted[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert max(lasted) == LONGEST_PROBATION_S
    now_s += LONGEST_PROBATION_S
    assert breaker.tick(now_s)
    assert breaker.succeeded(1e9)
    assert breaker.state is BreakerState.CLOSED
    assert not breaker.failed("r", now_s, RNG)
    assert breaker.probation_s == 0


def test_another_life_of_the_node_is_tried_at_once() -> None:
    breaker = opened()
    breaker.renewed()
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.admits
    healthy = Breaker()
    healthy.renewed()
    assert healthy.state is BreakerState.CLOSED


def test_only_the_engines_own_failures_count() -> None:
    assert FailureCause.REFUSED not in ENGINE_FAILURES
    assert FailureCause.OVERLOADED not in ENGINE_FAILURES
    assert FailureCause.NODE_LOST not in ENGINE_FAILURES


def test_it_is_ailing_when_it_fails_more_than_one_request_and_until_it_answers() -> None:
    breaker = opened()
    assert not breaker.is_ailing, "one bad request opens a breaker too"
    ailing = []
    breaker.failed("other", 0.0, RNG)
    ailing.append(breaker.is_ailing)
    breaker.tick(LONGEST_PROBATION_S)  # a try that is not answered yet proves nothing
    ailing.append(breaker.is_ailing)
    breaker.succeeded(1e9)
    ailing.append(breaker.is_ailing)
    for ref in ("r1", "r2"):
        breaker.failed(ref, 0.0, RNG)  # still closed, which is trust
    ailing.append(breaker.is_ailing)
    breaker.failed("r1", 0.0, RNG)
    assert [*ailing, breaker.is_ailing] == [True, True, False, False, True]


@given(st.lists(st.sampled_from(["fail", "answer", "tick", "bind", "release", "renew"]), max_size=60))
def test_whatever_happens_it_admits_again_within_the_longest_probation(events: list[str]) -> None:
    breaker, now_s = Breaker(), 0.0
    for event in events:
        now_s += 0.1
        match event:
            case "fail":
                breaker.failed("r", now_s, RNG)
            case "answer":
                breaker.succeeded(1e9)
            case "tick":
                breaker.tick(now_s)
            case "bind" if breaker.admits:
                breaker.bound("r")
            case "release":
                breaker.released("r")
            case "renew":
                breaker.renewed()
    breaker.released("r")
    breaker.tick(now_s + LONGEST_PROBATION_S)
    assert breaker.admits


def test_answers_that_were_under_way_do_not_tell_that_it_is_well_since() -> None:
    breaker = Breaker()
    for now_s, ref in ((10.0, "a"), (11.0, "b")):
        breaker.failed(ref, now_s, RNG)
        breaker.succeeded(9.0)
    assert (breaker.state, breaker.fails_others) == (BreakerState.CLOSED, True)
    breaker.succeeded(11.5)
    assert (breaker.state, breaker.fails_others) == (BreakerState.CLOSED, False)
    breaker.failed("a", 12.0, RNG)
    breaker.failed("a", 13.0, RNG)
    assert (breaker.state, breaker.fails_others) == (BreakerState.CLOSED, False)
