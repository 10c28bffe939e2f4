"""The retry decision: what was given back costs nothing, what the engine broke is counted, some never."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol.outcome import FailedAttempt, FailureCause, Reason
from dispatcher.scheduling.outage import NO_OUTAGE, Outage
from dispatcher.scheduling.retry import (
    BASE_DELAY_S,
    MAX_DELAY_S,
    MAX_FAILURES,
    POISON_CRASHES,
    GiveUp,
    Nodes,
    Past,
    RetryAfter,
    decide,
    is_given_back,
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
    FailureCause.TRANSFER,
}
MOST_AIL = Outage(nodes=4, ailing=3, down=3)


def verdict_on(
    cause: FailureCause,
    failures: int = 0,
    *,
    node: str = "n1",
    crash: bool = False,
    crashed: tuple[str, ...] = (),
    outage: Outage = NO_OUTAGE,
    seed: int = 1,
) -> RetryAfter | GiveUp:
    failed = FailedAttempt(attempt="1_1", node=node, cause=cause, crash=crash)
    past = Past(failures=failures, crashed=crashed)
    return decide(failed, past, random.Random(seed), outage=outage)


def retry_after(cause: FailureCause, failures: int = 0, **fields: object) -> RetryAfter:
    verdict = verdict_on(cause, failures, **fields)  # type: ignore[arg-type]
    assert isinstance(verdict, RetryAfter)
    return verdict


def test_every_cause_is_decided_on_purpose() -> None:
    assert GIVEN_BACK | set(NEVER) | COUNTED == set(FailureCause)
    assert {cause for cause in FailureCause if is_given_back(cause)} == GIVEN_BACK


@pytest.mark.parametrize("cause", sorted(GIVEN_BACK))
@pytest.mark.parametrize("failures", [0, MAX_FAILURES - 1, 1_000])
def test_work_given_back_returns_for_ever_and_is_neither_counted_nor_paid_for(
    cause: FailureCause, failures: int
) -> None:
    verdict = retry_after(cause, failures)
    assert verdict.past.failures == failures
    assert not verdict.is_paid
    assert verdict.delay_s <= BASE_DELAY_S


def test_an_overloaded_node_may_be_asked_again_after_a_pause() -> None:
    verdict = retry_after(FailureCause.OVERLOADED)
    assert not verdict.exclude
    assert verdict.delay_s > 0


@pytest.mark.parametrize("cause", sorted(GIVEN_BACK - {FailureCause.OVERLOADED}))
def test_work_of_a_node_that_is_gone_returns_at_once_and_elsewhere(cause: FailureCause) -> None:
    assert verdict_on(cause, 2) == RetryAfter(delay_s=0.0, past=Past(failures=2), exclude=True, is_paid=False)


@pytest.mark.parametrize(("cause", "reason"), NEVER.items())
@pytest.mark.parametrize("outage", [NO_OUTAGE, MOST_AIL])
def test_what_no_node_can_do_is_given_up_at_once(cause: FailureCause, reason: Reason, outage: Outage) -> None:
    assert verdict_on(cause, outage=outage) == GiveUp(reason=reason)


@pytest.mark.parametrize("cause", sorted(COUNTED))
def test_an_engines_failures_are_retried_elsewhere_up_to_the_cap_and_paid_for(cause: FailureCause) -> None:
    failures, tries = 0, 1
    while isinstance(verdict := verdict_on(cause, failures, seed=tries), RetryAfter):
        assert verdict.exclude
        assert verdict.is_paid
        assert verdict.past.failures == failures + 1
        failures, tries = verdict.past.failures, tries + 1
    assert verdict == GiveUp(reason=Reason.ATTEMPTS_EXHAUSTED)
    assert tries == MAX_FAILURES


@given(failures=st.integers(min_value=0, max_value=MAX_FAILURES - 2), seed=st.integers())
def test_a_delay_is_within_the_capped_exponential(failures: int, seed: int) -> None:
    verdict = retry_after(FailureCause.CONNECT, failures, seed=seed)
    assert 0 <= verdict.delay_s <= min(MAX_DELAY_S, BASE_DELAY_S * 2**failures)


def test_delays_are_spread_over_their_whole_range() -> None:
    delays = [retry_after(FailureCause.CONNECT, 1, seed=seed).delay_s for seed in range(1_000)]
    assert min(delays) < 0.02
    assert max(delays) > 0.18
    assert 0.09 < sum(delays) / len(delays) < 0.11


@given(
    cause=st.sampled_from(FailureCause),
    failures=st.integers(min_value=0, max_value=10**6),
    crash=st.booleans(),
    ailing=st.integers(min_value=0, max_value=4),
)
def test_any_failure_has_a_verdict(cause: FailureCause, failures: int, crash: bool, ailing: int) -> None:
    outage = Outage(nodes=4, ailing=ailing, down=ailing)
    assert isinstance(verdict_on(cause, failures, crash=crash, outage=outage), RetryAfter | GiveUp)


# Outages


@pytest.mark.parametrize("cause", sorted(COUNTED))
def test_while_most_nodes_fail_everything_no_failure_counts_but_each_is_paid_for(cause: FailureCause) -> None:
    verdict = retry_after(cause, MAX_FAILURES - 1, outage=MOST_AIL)
    assert verdict.past.failures == MAX_FAILURES - 1
    assert verdict.is_paid
    delays = [retry_after(cause, 0, outage=MOST_AIL, seed=seed).delay_s for seed in range(100)]
    assert max(delays) > 0.9 * MAX_DELAY_S, "it is tried as if it had failed often"


def test_half_of_the_nodes_are_not_most() -> None:
    half = Outage(nodes=4, ailing=2, down=2)
    assert verdict_on(FailureCause.CONNECT, MAX_FAILURES - 1, outage=half) == GiveUp(
        reason=Reason.ATTEMPTS_EXHAUSTED
    )


# Poison


def test_a_crash_makes_a_suspect_and_one_on_another_node_convicts_it() -> None:
    first = retry_after(FailureCause.TRUNCATED, node="n1", crash=True)
    assert first.past == Past(failures=1, crashed=("n1",))
    second = verdict_on(FailureCause.CONNECT, 1, node="n2", crash=True, crashed=("n1",))
    assert second == GiveUp(reason=Reason.POISON)


def test_an_ordinary_failure_between_is_no_crash() -> None:
    verdict = retry_after(FailureCause.TRUNCATED, 1, node="n2", crashed=("n1",))
    assert verdict.past == Past(failures=2, crashed=("n1",))


def test_crashes_of_one_node_convict_later_it_may_be_the_node() -> None:
    crashed: tuple[str, ...] = ()
    for _ in range(POISON_CRASHES - 1):
        crashed = retry_after(FailureCause.TRUNCATED, crash=True, crashed=crashed).past.crashed
    assert crashed == ("n1",) * (POISON_CRASHES - 1)
    assert verdict_on(FailureCause.TRUNCATED, crash=True, crashed=crashed) == GiveUp(reason=Reason.POISON)


def test_poison_is_found_also_while_two_engines_that_it_killed_are_most_of_the_pool() -> None:
    both = Outage(nodes=2, ailing=2, down=2)
    verdict = verdict_on(FailureCause.TRUNCATED, node="n2", crash=True, crashed=("n1",), outage=both)
    assert verdict == GiveUp(reason=Reason.POISON)


def test_more_engines_down_than_one_poison_kills_are_no_request_s_doing() -> None:
    many = Outage(nodes=5, ailing=0, down=3)
    verdict = retry_after(FailureCause.TRUNCATED, node="n2", crash=True, crashed=("n1",), outage=many)
    assert verdict.past.crashed == ("n1",)
    few = Outage(nodes=6, ailing=0, down=3)
    verdict_of_few = verdict_on(FailureCause.TRUNCATED, node="n2", crash=True, crashed=("n1",), outage=few)
    assert verdict_of_few == GiveUp(reason=Reason.POISON)


@pytest.mark.parametrize(
    ("tried", "well", "is_at_fault"),
    [(4, 0, False), (4, 1, False), (4, 2, True), (4, 4, True), (1, 0, False), (1, 1, True), (0, 0, True)],
)
def test_the_last_failure_counts_only_where_enough_of_its_nodes_fail_no_others(
    tried: int, well: int, is_at_fault: bool
) -> None:
    failed = FailedAttempt(attempt="1_4", node="n1", cause=FailureCause.ENGINE_ERROR)
    nodes = Nodes(tried=tried, well=well)
    last = decide(failed, Past(failures=MAX_FAILURES - 1), random.Random(1), nodes=nodes)
    if is_at_fault:
        assert last == GiveUp(reason=Reason.ATTEMPTS_EXHAUSTED)
    else:
        assert isinstance(last, RetryAfter)
        assert last.past.failures == MAX_FAILURES - 1
        assert last.is_paid
    before = decide(failed, Past(failures=1), random.Random(1), nodes=nodes)
    assert isinstance(before, RetryAfter)
    assert before.past.failures == 2
