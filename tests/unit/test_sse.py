"""The event parser: the standard's rules, any cut of the stream, bounded memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers_agent.engines.sse import EventParser


def parse(*parts: bytes, max_event_bytes: int = 1 << 20) -> list[bytes]:
    parser = EventParser(max_event_bytes=max_event_bytes)
    return [event for part in parts for event in parser.feed(part)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\r", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a: b\n\n", [b"a: b"]),
        (b"data\n\n", [b""]),
        (b"data\ndata\n\n", [b"\n"]),
        (b": ping\n\n\n\ndata: a\n\n", [b"a"]),
        (b"event: token\nid: 3\nretry: 10\nodd\ndata: a\n\n", [b"a"]),
        (b"database: no\n data: no\n\n", []),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
        (b"data: a\n\ndata: unfinished\n", [b"a"]),
        (b"", []),
    ],
)
def test_events_follow_the_standard(stream: bytes, events: list[bytes]) -> None:
    assert parse(stream) == events
    assert parse(*(stream[place : place + 1] for place in range(len(stream)))) == events


LINES = st.sampled_from(
    [
        b"data: a",
        b"data:\xc3\xa9\xe6\x97\xa5",
        b"data",
        b"",
        b"",
        b": c",
        b"id: 1",
        b"\xef\xbb\xbfdata: b",
        b"\xff",
    ]
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(
    lines=st.lists(st.tuples(LINES, ENDS), max_size=30),
    cuts=st.lists(st.integers(min_value=0, max_value=200), max_size=20),
)
def test_any_cut_gives_the_same_events(lines: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    stream = b"".join(line + end for line, end in lines)
    places = [0, *sorted(cuts), len(stream)]
    parts = [stream[start:end] for start, end in pairwise(places)]
    assert parse(*parts) == parse(stream)


@given(st.binary(max_size=300), st.integers(min_value=0, max_value=300))
def test_any_bytes_are_parsed_alike_when_cut(stream: bytes, cut: int) -> None:
    assert parse(stream[:cut], stream[cut:]) == parse(stream)


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=8))
def test_what_is_sent_is_what_comes_out(payloads: list[str]) -> None:
    stream = "".join(f"data: {payload}\n\n" for payload in payloads).encode()
    assert parse(stream) == [payload.encode() for payload in payloads]


@pytest.mark.parametrize("stream", [b"data: " + b"x" * 100, b": " + b"x" * 100, b"data: xxx\n" * 40])
def test_an_event_above_the_bound_is_refused_before_it_is_whole(stream: bytes) -> None:
    with pytest.raises(ValueError, match="at most 64 bytes"):
        parse(*(stream[place : place + 8] for place in range(0, len(stream), 8)), max_event_bytes=64)


def test_many_small_events_are_not_above_the_bound() -> None:
    assert len(parse(b"data: xxxxxxxx\n\n" * 100, max_event_bytes=64)) == 100
