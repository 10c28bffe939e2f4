"""Lines of libraries are rationed, ours are not."""

from __future__ import annotations

import json
import logging
import re

import pytest
from aiohttp.http_exceptions import ContentEncodingError
from aiohttp.web import RequestPayloadError

from dispatcher.telemetry.logging import MOST_RATIONED, NoFault, Ration, configure_logging, where_broke


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


def test_an_exception_of_a_library_is_shown_without_its_text_and_ours_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    secret = "".join(("can", "ary"))
    try:
        configure_logging("INFO")
        for name in ("aiohttp.server", "flexlb"):
            try:
                raise ValueError(secret)
            except ValueError:
                logging.getLogger(name).exception("broke")
        theirs, ours = map(json.loads, capsys.readouterr().err.splitlines())
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert "canary" not in theirs["exception"]
    assert theirs["exception"].endswith("ValueError")
    assert "test_logging.py" in theirs["exception"]
    assert "ValueError: canary" in ours["exception"]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ContentEncodingError("no"), False),
        (RequestPayloadError(), False),
        (ValueError("ours"), True),
        (None, True),
    ],
)
def test_what_senders_do_to_themselves_is_left_out(error: Exception | None, passes: bool) -> None:
    one = record("Error handling request", logger="aiohttp.server")
    one.exc_info = (type(error), error, None) if error is not None else None
    assert NoFault().filter(one) is passes
    one.name = "flexlb"
    assert NoFault().filter(one)


def test_where_it_broke_is_told_without_what_it_was_given() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "canary\ud800".encode()
    assert "canary" in repr(caught.value)
    assert re.fullmatch(r"UnicodeEncodeError at test_logging\.py:\d+", where_broke(caught.value))
