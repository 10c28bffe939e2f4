"""Lines of libraries are rationed, ours are not."""

from __future__ import annotations

import logging

from dispatcher.telemetry.logging import MOST_RATIONED, Ration


def record(
    text: str, *arguments: object, logger: str = "aiokafka.client", level: int = logging.ERROR
) -> logging.LogRecord:
    return logging.LogRecord(logger, level, "f", 1, text, arguments, None)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_line_of_a_library_passes_once_a_period_and_then_counts_what_was_held_back() -> None:
    clock = Clock()
    ration = Ration(10.0, monotonic=clock)
    passed = []
    for number in range(250):
        clock.now_s = number / 10
        one = record("no broker: %s", number)
        if ration.filter(one):
            passed.append((number, getattr(one, "fields", {})))
    assert passed == [
        (0, {}),
        (100, {"held_back": 99, "in_s": 10.0}),
        (200, {"held_back": 99, "in_s": 10.0}),
    ]


def test_lines_that_differ_do_not_hold_each_other_back() -> None:
    ration = Ration(10.0, monotonic=Clock())
    assert ration.filter(record("a"))
    assert ration.filter(record("b"))
    assert ration.filter(record("a", logger="aiokafka.conn"))
    assert ration.filter(record("a", level=logging.WARNING))
    assert not ration.filter(record("a"))


def test_our_own_lines_always_pass() -> None:
    ration = Ration(10.0, monotonic=Clock())
    assert all(ration.filter(record("leading", logger="flexlb")) for _ in range(3))


def test_what_is_remembered_is_bounded() -> None:
    ration = Ration(10.0, monotonic=Clock())
    for number in range(3 * MOST_RATIONED):
        assert ration.filter(record(f"line {number}"))
        assert len(ration._passed_s) <= MOST_RATIONED
