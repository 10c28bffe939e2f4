"""The retry decision: what was given back costs nothing, what the engine broke is counted, some never."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol.outcome import FailureCause, Reason
from dispatcher.scheduling.retry import (
    BASE_DELAY_S,
    MAX_DELAY_S,
    MAX_FAILURES,
    GiveUp,
    RetryAfter,
    decide,
)

GIVEN_BACK = {
    FailureCause.DRAINING,
    FailureCause.NODE_LOST,
    FailureCause.LEASE_EXPIRED,
    FailureCause.OVERLOADED,
}
NEVER = {FailureCause.REFUSED: Reason.ENGINE_REFUSED, FailureCause.BODY_UNREADABLE: Reason.BODY_UNREADABLE}
COUNTED = {
    FailureCause.CONNECT,
    FailureCause.ENGINE_ERROR,
    FailureCause.PROTOCOL,
    FailureCause.TRUNCATED,
    FailureCause.STALLED,
    FailureCause.REPLY_UNWRITABLE,
}


def test_every_cause_is_decided_on_purpose() -> None:
    assert GIVEN_BACK | set(NEVER) | COUNTED == set(FailureCause)


@pytest.mark.parametrize("cause", sorted(GIVEN_BACK))
@pytest.mark.parametrize("failures", [0, MAX_FAILURES - 1, 1_000])
def test_work_given_back_returns_for_ever_and_is_not_counted(cause: FailureCause, failures: int) -> None:
    verdict = decide(cause, failures, random.Random(1))
    assert isinstance(verdict, RetryAfter)
    assert verdict.failures == failures
    assert verdict.delay_s <= BASE_DELAY_S


def test_an_overloaded_node_may_be_asked_again_after_a_pause() -> None:
    verdict = decide(FailureCause.OVERLOADED, 0, random.Random(1))
    assert isinstance(verdict, RetryAfter)
    assert not verdict.exclude
    assert verdict.delay_s > 0


@pytest.mark.parametrize("cause", sorted(GIVEN_BACK - {FailureCause.OVERLOADED}))
def test_work_of_a_node_that_is_gone_returns_at_once_and_elsewhere(cause: FailureCause) -> None:
    assert decide(cause, 2, random.Random(1)) == RetryAfter(delay_s=0.0, failures=2, exclude=True)


@pytest.mark.parametrize(("cause", "reason"), NEVER.items())
def test_what_no_node_can_do_is_given_up_at_once(cause: FailureCause, reason: Reason) -> None:
    assert decide(cause, 0, random.Random(1)) == GiveUp(reason=reason)


@pytest.mark.parametrize("cause", sorted(COUNTED))
def test_an_engines_failures_are_retried_elsewhere_up_to_the_cap(cause: FailureCause) -> None:
    rng = random.Random(1)
    failures, tries = 0, 1
    while isinstance(verdict := decide(cause, failures, rng), RetryAfter):
        assert verdict.exclude
        assert verdict.failures == failures + 1
        failures, tries = verdict.failures, tries + 1
    assert verdict == GiveUp(reason=Reason.ATTEMPTS_EXHAUSTED)
    assert tries == MAX_FAILURES


@given(failures=st.integers(min_value=0, max_value=MAX_FAILURES - 2), seed=st.integers())
def test_a_delay_is_within_the_capped_exponential(failures: int, seed: int) -> None:
    verdict = decide(FailureCause.CONNECT, failures, random.Random(seed))
    assert isinstance(verdict, RetryAfter)
    assert 0 <= verdict.delay_s <= min(MAX_DELAY_S, BASE_DELAY_S * 2**failures)


def test_delays_are_spread_over_their_whole_range() -> None:
    rng = random.Random(1)
    delays = []
    for _ in range(1_000):
        verdict = decide(FailureCause.CONNECT, 1, rng)
        assert isinstance(verdict, RetryAfter)
        delays.append(verdict.delay_s)
    assert min(delays) < 0.02
    assert max(delays) > 0.18
    assert 0.09 < sum(delays) / len(delays) < 0.11


@given(cause=st.sampled_from(FailureCause), failures=st.integers(min_value=0, max_value=10**6))
def test_any_failure_has_a_verdict(cause: FailureCause, failures: int) -> None:
    verdict = decide(cause, failures, random.Random(0))
    assert isinstance(verdict, RetryAfter | GiveUp)
