"""The batching window: what goes together, and when."""

from __future__ import annotations

import random

import pytest

from dispatcher.scheduling.batches import Batches


def window(wait_s: float = 0.1, size: int = 3) -> Batches[str]:
    return Batches(wait_s=wait_s, size=size)


@pytest.mark.parametrize("batches", [window(wait_s=0.0), window(size=1), Batches[str]()])
def test_without_a_window_each_is_due_at_once_and_alone(batches: Batches[str]) -> None:
    assert not batches.is_on
    for one in ("a", "b"):
        batches.add("n", one, 5.0)
    assert batches.wait_s("n", 5.0) == 0
    assert batches.take_due(5.0, most=10) == [["a"], ["b"]]
    assert len(batches) == 0


def test_a_batch_is_due_when_its_first_has_waited() -> None:
    batches = window()
    batches.add("n", "a", 1.0)
    batches.add("n", "b", 1.09)
    assert batches.next_at_s == pytest.approx(1.1)
    assert batches.take_due(1.09, most=10) == []
    assert batches.take_due(1.1, most=10) == [["a", "b"]]
    assert batches.next_at_s is None


def test_a_full_batch_is_due_at_once_and_another_begins() -> None:
    batches = window()
    for number, one in enumerate("abcd"):
        batches.add("n", one, 1.0 + number / 100)
    assert batches.take_due(1.03, most=10) == [["a", "b", "c"]]
    assert batches.next_at_s == pytest.approx(1.13), "the window of the next begins with its own first"
    assert batches.take_due(1.13, most=10) == [["d"]]


def test_nodes_wait_for_their_own_only() -> None:
    batches = window()
    batches.add("n", "a", 1.0)
    batches.add("m", "b", 1.05)
    assert batches.take_due(1.1, most=10) == [["a"]]
    assert batches.take_due(1.15, most=10) == [["b"]]


def test_one_that_goes_alone_waits_for_nobody() -> None:
    batches = window()
    batches.add("n", "a", 1.0)
    batches.add("n", "b", 1.0, is_alone=True)
    assert batches.take_due(1.0, most=10) == [["b"]]
    assert len(batches) == 1


def test_no_batch_is_halved_and_the_rest_comes_next() -> None:
    batches = window()
    for node in "lmn":
        for one in "abc":
            batches.add(node, node + one, 1.0)
    assert [len(batch) for batch in batches.take_due(1.0, most=7)] == [3, 3]
    assert batches.next_at_s == float("-inf"), "one is due already"
    assert batches.take_due(1.0, most=1) == [["na", "nb", "nc"]], (
        "one that is larger than a call goes all the same"
    )


def test_the_wait_of_one_more_is_what_the_original_adds() -> None:
    batches = window()
    assert batches.wait_s("n", 1.0) == pytest.approx(0.1), "it would begin a batch"
    batches.add("n", "a", 1.0)
    assert batches.wait_s("n", 1.04) == pytest.approx(0.06)
    batches.add("n", "b", 1.04)
    assert batches.wait_s("n", 1.05) == 0, "it would fill the batch"


def test_a_timer_that_is_a_rounding_early_finds_the_batch_due() -> None:
    rng = random.Random(3)
    for _ in range(1_000):
        now_s, batches = rng.random() * 1e6, window(wait_s=rng.random())
        batches.add("n", "a", now_s)
        at_s = batches.next_at_s
        assert at_s is not None
        assert batches.take_due(now_s + (at_s - now_s), most=1) == [["a"]]


def test_nothing_is_lost_or_repeated_and_none_waits_longer_than_the_window() -> None:
    rng = random.Random(7)
    batches, now_s = window(wait_s=0.5, size=4), 0.0
    added: list[str] = []
    taken: list[str] = []
    since: dict[str, float] = {}
    for number in range(2_000):
        now_s += rng.random() / 10
        for batch in batches.take_due(now_s, most=5):
            assert len({one.partition(":")[0] for one in batch}) == 1
            assert len(batch) <= 4
            taken += batch
        assert all(now_s - since[one] <= 0.6 or one in taken[-20:] for one in added[-5:])
        one = f"{rng.choice('lmn')}:{number}"
        since[one] = now_s
        added.append(one)
        batches.add(one[0], one, now_s)
        assert len(added) == len(taken) + len(batches)
    taken += [one for batch in batches.take_due(now_s + 1, most=1_000) for one in batch]
    assert sorted(taken) == sorted(added)
