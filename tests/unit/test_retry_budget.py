"""The retry budget: how many retries, when, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Lane, Ref
from dispatcher.scheduling.delayed import Delayed
from dispatcher.scheduling.retry_budget import ANSWERED_TOKENS, KEPT_S, RetryBudget
from dispatcher.scheduling.window import Waiting


def taken(budget: RetryBudget, now_s: float) -> int:
    """Take all that is there."""
    count = 0
    while budget.take(now_s):
        count += 1
    return count


def test_the_floor_alone_lets_so_many_a_second_and_saves_ten_seconds_worth() -> None:
    budget = RetryBudget(share=0.2, floor_per_s=5)
    assert taken(budget, 0.0) == 5 * KEPT_S
    assert [taken(budget, second) for second in (1.0, 2.0, 3.0)] == [5, 5, 5]
    assert taken(budget, 1_000.0) == 5 * KEPT_S


def test_each_first_bind_gives_its_share_for_ten_seconds() -> None:
    budget = RetryBudget(share=0.25, floor_per_s=0.1)
    assert taken(budget, 0.0) == 1
    for _ in range(40):
        budget.bound(0.5)
    assert budget.tokens(1.0) // 1 == 10
    for _ in range(40):
        budget.bound(5.0)
    assert taken(budget, 11.5) - 10 in (0, 1), "those of the first second are gone"


def test_an_answered_retry_pays_for_two() -> None:
    budget = RetryBudget(share=0, floor_per_s=0.1)
    taken(budget, 0.0)
    budget.answered(0.0)
    assert taken(budget, 0.0) == ANSWERED_TOKENS


@given(
    share=st.floats(min_value=0, max_value=2),
    floor_per_s=st.floats(min_value=0.1, max_value=50),
    steps=st.lists(st.tuples(st.floats(min_value=0, max_value=5), st.integers(0, 30)), max_size=30),
)
def test_no_more_is_ever_taken_than_was_given(
    share: float, floor_per_s: float, steps: list[tuple[float, int]]
) -> None:
    budget, now_s, spent, bound = RetryBudget(share=share, floor_per_s=floor_per_s), 0.0, 0, 0
    for pause_s, binds in steps:
        now_s += pause_s
        for _ in range(binds):
            budget.bound(now_s)
        bound += binds
        spent += taken(budget, now_s)
        assert spent <= max(1, floor_per_s * KEPT_S) + floor_per_s * now_s + share * bound + 1e-6
        assert budget.take(now_s + budget.next_s(now_s) + 1e-6), "the floor gives one when it says so"
        spent += 1
        now_s += budget.next_s(now_s) + 1e-6


def waiting(offset: int) -> Waiting:
    ref = Ref(Lane.INTERACTIVE, 0, offset)
    return Waiting(ref=ref, envelope=Envelope(ref=str(ref), id=f"r{offset}", model="m"), from_pending=True)


def offsets(found: list[Waiting]) -> list[int]:
    return [one.ref.offset for one in found]


def test_retries_of_one_moment_return_one_token_at_a_time_in_order() -> None:
    delayed = Delayed(RetryBudget(share=0, floor_per_s=1))
    for _ in range(KEPT_S):
        delayed.budget.take(0.0)
    for offset in range(3):
        delayed.push(waiting(offset), 0.125, is_paid=True)
    assert delayed.due(0.0625) == ([], 0.0625)
    returned = []
    now_s = 0.125
    for _ in range(3):
        found, next_s = delayed.due(now_s)
        returned.append(offsets(found))
        assert next_s is not None
        now_s += next_s
    found, next_s = delayed.due(now_s)
    assert [*returned, offsets(found)] == [[], [0], [1], [2]]
    assert next_s is None
    assert delayed.held_up == 3
    assert delayed.without_token == 0


def test_what_was_given_back_waits_for_no_token() -> None:
    delayed = Delayed(RetryBudget(share=0, floor_per_s=0.1))
    while delayed.budget.take(0.0):
        pass
    delayed.push(waiting(0), 0.0, is_paid=True)
    delayed.push(waiting(1), 0.0, is_paid=False)
    found, next_s = delayed.due(0.0)
    assert offsets(found) == [1]
    assert next_s == 10.0
    assert delayed.without_token == 1


def test_what_was_taken_out_while_it_waited_uses_no_token() -> None:
    delayed = Delayed(RetryBudget(share=0, floor_per_s=1))
    while delayed.budget.take(0.0):
        pass
    for offset in range(3):
        delayed.push(waiting(offset), 0.0, is_paid=True)
    assert delayed.due(0.0)[0] == []
    assert delayed.get("i0_0") is not None
    assert delayed.withdraw("i0_0") is not None
    assert offsets(delayed.all()) == [1, 2]
    assert offsets(delayed.due(1.0)[0]) == [1]
    assert delayed.withdraw("i0_2") is not None
    assert delayed.due(2.0) == ([], None)
    assert delayed.budget.take(2.0)
