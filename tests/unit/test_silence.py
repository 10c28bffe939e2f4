"""Silence: only healthy time counts, and many silent nodes at once get a second window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.scheduling.silence import LONGEST_STEP_S, HealthyClock, silent_nodes

WINDOW_S = 2.0


def test_healthy_time_is_the_sum_of_short_steps() -> None:
    clock = HealthyClock()
    for moment in (100.0, 100.1, 100.4, 100.9):
        clock.answered(moment)
    assert clock.now_s == pytest.approx(0.9)
    assert clock.since_trouble_s == pytest.approx(0.9)


def test_a_long_step_counts_as_nothing() -> None:
    clock = HealthyClock()
    clock.answered(100.0)
    clock.answered(100.25)
    clock.answered(160.0)
    assert clock.now_s == 0.25
    assert clock.since_trouble_s == 0
    clock.answered(160.25)
    assert clock.now_s == 0.5
    assert clock.since_trouble_s == 0.25


def test_time_since_a_failure_counts_as_nothing() -> None:
    clock = HealthyClock()
    clock.answered(100.0)
    clock.answered(100.25)
    clock.failed()
    clock.answered(100.5)
    assert clock.now_s == 0.25
    assert clock.since_trouble_s == 0


@given(
    steps=st.lists(
        st.tuples(st.floats(min_value=0, max_value=3, allow_nan=False), st.booleans()), max_size=40
    )
)
def test_healthy_time_never_exceeds_real_time_nor_goes_back(steps: list[tuple[float, bool]]) -> None:
    clock = HealthyClock()
    real, healthy_before = 0.0, 0.0
    clock.answered(real)
    for step, answers in steps:
        real += step
        if answers:
            clock.answered(real)
        else:
            clock.failed()
        assert healthy_before <= clock.now_s <= healthy_before + min(step, LONGEST_STEP_S) + 1e-9
        assert 0 <= clock.since_trouble_s <= clock.now_s
        healthy_before = clock.now_s
    assert clock.now_s <= real + 1e-9


def fenced(heard: dict[str, float], now_s: float, warned: set[str] | None = None) -> list[str]:
    """Nodes to fence."""
    return silent_nodes(
        heard, now_s, window_s=WINDOW_S, already_warned=warned if warned is not None else set()
    )


def test_a_single_silent_node_is_fenced_after_its_window() -> None:
    heard = {"a": 10.0, "b": 13.0, "c": 13.0}
    assert fenced(heard, 12.0) == []
    assert fenced(heard, 12.01) == ["a"]


def test_up_to_three_nodes_of_a_small_fleet_are_fenced_at_once() -> None:
    heard = {f"n{i}": 10.0 for i in range(3)}
    assert fenced(heard, 12.5) == ["n0", "n1", "n2"]


def test_up_to_a_tenth_of_a_large_fleet_is_fenced_at_once() -> None:
    heard = {f"n{i}": (10.0 if i < 10 else 12.0) for i in range(100)}
    assert len(fenced(heard, 12.5)) == 10


def test_many_silent_nodes_get_a_second_window() -> None:
    heard = {f"n{i}": 10.0 for i in range(4)}
    warned: set[str] = set()
    assert fenced(heard, 12.5, warned) == []
    assert warned == set(heard)
    assert fenced(heard, 13.9, warned) == []
    assert fenced(heard, 14.01, warned) == sorted(heard)


def test_a_node_that_speaks_again_is_spared_and_its_warning_forgotten() -> None:
    heard = {f"n{i}": 10.0 for i in range(4)}
    warned: set[str] = set()
    assert fenced(heard, 12.5, warned) == []
    heard["n0"] = 13.0
    assert fenced(heard, 14.01, warned) == ["n1", "n2", "n3"]
    assert "n0" not in warned
    assert fenced({"n0": 13.0}, 15.01, warned) == ["n0"]


def test_a_node_that_falls_silent_later_does_not_delay_those_warned_before() -> None:
    heard = {f"n{i}": 10.0 for i in range(5)} | {"late": 12.0}
    warned: set[str] = set()
    assert fenced(heard, 12.5, warned) == []
    assert fenced(heard, 14.1, warned) == [f"n{i}" for i in range(5)]


@given(
    heard=st.dictionaries(
        st.text(alphabet="abcdefgh", min_size=1, max_size=2),
        st.floats(min_value=0, max_value=20, allow_nan=False),
        max_size=30,
    ),
    moments=st.lists(st.floats(min_value=0, max_value=30, allow_nan=False), max_size=6).map(sorted),
)
def test_nobody_is_fenced_early_and_nobody_is_spared_for_ever(
    heard: dict[str, float], moments: list[float]
) -> None:
    warned: set[str] = set()
    for now_s in moments:
        gone = set(fenced(heard, now_s, warned))
        assert gone <= {node for node, last in heard.items() if now_s - last > WINDOW_S}
        assert gone >= {node for node, last in heard.items() if now_s - last > 2 * WINDOW_S}
        assert warned <= set(heard)
