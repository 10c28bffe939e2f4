"""The backlog of a model against a plain list of what waits, and the rate at which it is drained."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol.assignment import Envelope
from dispatcher.scheduling.backlog import Backlog
from dispatcher.scheduling.drain import MEMORY_S, TRUSTED_REQUESTS, TRUSTED_S, Drain

NOW_MS = 1_790_000_000_000
PATIENCES_MS = (1_000, 30_000, 600_000)


def envelope(
    n: int, priority: int, tokens: int, patience_ms: int, age_ms: int = 0, tenant: str = "t"
) -> Envelope:
    """A request that came `age_ms` ago."""
    appended_ms = NOW_MS - age_ms
    return Envelope(
        ref=f"i0_{n}",
        id=f"r{n}",
        model="m",
        tenant=tenant,
        priority=priority,
        prompt_tokens=tokens,
        max_tokens=0,
        appended_ms=appended_ms,
        deadline_at_ms=appended_ms + patience_ms,
    )


operations = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "pending", "remove", "bind", "stick"]),
        st.integers(min_value=1, max_value=4),
        st.integers(min_value=1, max_value=50),
        st.sampled_from(PATIENCES_MS),
    ),
    max_size=60,
)


@given(operations=operations, seed=st.integers(min_value=0, max_value=1 << 30))
def test_it_tells_what_a_plain_list_would_tell(
    operations: list[tuple[str, int, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    backlog = Backlog()
    waiting: dict[str, tuple[Envelope, bool]] = {}
    stuck: set[str] = set()
    bound_tokens = entered = 0
    for n, (kind, priority, tokens, patience_ms) in enumerate(operations):
        if kind in ("push", "pending"):
            one = envelope(n, priority, tokens, patience_ms, age_ms=1000 - n)
            waiting[one.ref] = (one, kind == "push")
            backlog.push(one, 10, is_fresh=kind == "push")
            entered += tokens
        elif waiting:
            ref = rng.choice(list(waiting))
            one = waiting[ref][0]
            if kind == "stick":
                stuck.add(ref)
                backlog.stick(one)
            else:
                del waiting[ref]
                stuck.discard(ref)
                backlog.remove(one, 10, is_bound=kind == "bind")
                bound_tokens += one.cost_tokens if kind == "bind" else 0
    counted = [one for one, _ in waiting.values() if one.ref not in stuck]
    fresh = [one for one, is_fresh in waiting.values() if is_fresh and one.ref not in stuck]

    assert (backlog.requests, backlog.bytes) == (len(waiting), 10 * len(waiting))
    assert backlog.tokens == sum(one.cost_tokens for one in counted)
    assert (backlog.bound_tokens, sum(backlog.entered_tokens.values())) == (bound_tokens, entered)
    for priority in range(6):
        assert backlog.higher_tokens(priority) == sum(o.cost_tokens for o in counted if o.priority > priority)
        for patience_ms in PATIENCES_MS:
            arriving = envelope(999, priority, 1, patience_ms)
            ahead = sum(
                one.cost_tokens
                for one in counted
                if one.priority > priority
                or (one.priority == priority and one.deadline_at_ms <= arriving.deadline_at_ms)
            )
            assert backlog.ahead_tokens(arriving) == ahead
    assert backlog.oldest_ms() == min((one.appended_ms for one in fresh), default=None)
    then_ms = NOW_MS - 980
    late = [one for _, level in backlog.appended_before(then_ms) for one in level]
    expected = sorted(
        (one for one in fresh if one.appended_ms < then_ms),
        key=lambda one: (one.priority, one.deadline_at_ms, one.appended_ms),
    )
    assert late == expected
    newest = backlog.newest_of_lowest()
    assert newest == max(fresh, key=lambda one: (-one.priority, int(one.ref[3:])), default=None)


def test_it_tells_whether_nothing_waited_at_some_moment() -> None:
    backlog = Backlog()
    one, other = envelope(1, 50, 10, 1000), envelope(2, 50, 10, 1000)
    backlog.push(one, 1, is_fresh=True)
    assert backlog.was_empty
    backlog.restart()
    backlog.push(other, 1, is_fresh=True)
    backlog.remove(one, 1, is_bound=True)
    told = [backlog.was_empty]
    # What no node can take is not what they drain.
    backlog.stick(other)
    told.append(backlog.was_empty)
    backlog.restart()
    assert [*told, backlog.was_empty] == [False, True, True]


def test_a_rate_is_trusted_after_some_time_and_some_requests() -> None:
    drain = Drain()
    while not drain.is_trusted:
        drain.observe(100, 1, 0.1)
    assert drain.tokens_per_s == pytest.approx(1000)
    few = Drain()
    few.observe(100, 1, 10 * TRUSTED_S)
    assert not few.is_trusted
    fast = Drain()
    fast.observe(100, 2 * TRUSTED_REQUESTS, TRUSTED_S / 2)
    assert not fast.is_trusted
    assert Drain().tokens_per_s == 0


def test_a_new_rate_replaces_the_old_one_within_seconds() -> None:
    drain = Drain()
    for tokens in [100] * 600 + [300] * round(20 * MEMORY_S):
        drain.observe(tokens, 1, 0.1)
    assert drain.tokens_per_s == pytest.approx(100 / 0.1 + 200 / 0.1 * (1 - 2.718 ** (-2)), rel=0.01)


@pytest.mark.parametrize("between_s", [1, 10, 60])
def test_the_rate_of_slow_work_does_not_swing_between_requests(between_s: int) -> None:
    """One request in a minute: ten seconds of memory would call it stopped most of the time."""
    drain = Drain()
    rates = []
    for tick in range(400 * between_s):
        is_end = tick % (10 * between_s) == 0
        drain.observe(1000 if is_end else 0, int(is_end), 0.1)
        if tick > 300 * between_s:
            rates.append(drain.tokens_per_s * between_s)
    assert min(rates) > 900
    assert max(rates) < 1100
    assert drain.is_trusted


def test_a_rate_follows_the_share_of_nodes_that_is_left() -> None:
    drain = Drain()
    for _ in range(100):
        drain.observe(100, 1, 0.1)
    drain.scale(0.5)
    assert drain.tokens_per_s == pytest.approx(500)


# Tenants


def test_only_its_share_of_the_others_work_is_ahead_of_a_tenants_request() -> None:
    weights = {"flood": 1.0, "paid": 4.0}
    backlog = Backlog(lambda tenant: weights.get(tenant, 1.0))
    for n in range(1_000):
        backlog.push(envelope(n, 50, 100, 30_000, tenant="flood"), 10, is_fresh=True)
    another = [envelope(2_000 + n, 50, 100, 30_000, tenant="small") for n in range(3)]
    assert backlog.ahead_tokens(another[0]) == 100
    backlog.push(another[0], 10, is_fresh=True)
    assert backlog.ahead_tokens(another[1]) == 100 + 200
    assert backlog.ahead_tokens(envelope(3_000, 50, 100, 30_000, tenant="paid")) == 50
    assert backlog.ahead_tokens(envelope(3_001, 50, 100, 30_000, tenant="flood")) == 100_000 + 100
    assert backlog.ahead_tokens(envelope(3_002, 60, 100, 30_000, tenant="small")) == 0
    assert backlog.ahead_tokens(envelope(3_003, 40, 100, 30_000, tenant="small")) == 100_100
    backlog.remove(another[0], 10, is_bound=True)
    assert backlog.ahead_tokens(another[1]) == 100


def test_what_waited_too_long_is_told_in_the_order_in_which_tenants_have_their_turns() -> None:
    backlog = Backlog(lambda tenant: 2.0 if tenant == "paid" else 1.0)
    for n, tenant in enumerate(["flood"] * 5 + ["paid"] * 3 + ["small"]):
        backlog.push(envelope(n, 50, 10, 30_000 + n, age_ms=20_000 - n, tenant=tenant), 10, is_fresh=True)
    ((_, late),) = backlog.appended_before(NOW_MS)
    assert [one.tenant for one in late] == [
        *("flood", "paid", "small", "paid", "flood", "paid", "flood", "flood", "flood")
    ]
    assert [one.id for one in late if one.tenant == "flood"] == ["r0", "r1", "r2", "r3", "r4"]
