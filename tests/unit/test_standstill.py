"""Whether readers of committed records are held up, from looks at a topic's ends."""

from __future__ import annotations

from dispatcher.scheduling.standstill import Standstill


def test_a_stable_end_that_stands_still_before_the_end_is_held_up() -> None:
    found = Standstill()
    assert found.look({0: (5, 5), 1: (3, 9)}, 100.0) == {0: 0.0, 1: 0.0}
    assert found.look({0: (5, 5), 1: (3, 12)}, 115.0) == {0: 0.0, 1: 15.0}
    assert found.look({0: (5, 6), 1: (3, 12)}, 130.0) == {0: 0.0, 1: 30.0}


def test_a_stable_end_that_moves_is_not() -> None:
    found = Standstill()
    for at in range(10):
        assert found.look({0: (at, at + 2)}, float(at)) == {0: 0.0}


def test_one_that_is_let_go_and_held_up_again_counts_anew() -> None:
    found = Standstill()
    found.look({0: (3, 9)}, 0.0)
    assert found.look({0: (3, 9)}, 10.0) == {0: 10.0}
    assert found.look({0: (9, 9)}, 20.0) == {0: 0.0}
    assert found.look({0: (9, 11)}, 30.0) == {0: 0.0}
    assert found.look({0: (9, 11)}, 40.0) == {0: 10.0}
