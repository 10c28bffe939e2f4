"""Trace readers and the schedule made from them."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import SettingsError
from dispatcher.replay.arrivals import poisson_times, schedule, spread
from dispatcher.replay.traces import TraceRequest, parse_trace, read_excerpt, read_trace

MOONCAKE = b"""\
{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 600, "output_length": 6, "hash_ids": [0, 2], "new_field": 1}

"""
RTP_LLM = b'{"ts": 56, "il": 1100, "ol": 0, "ttfb": 346.7, "bh": ["9208787762351212073"], "priority": 70}\n'
AZURE = b"""\
TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:16:50.9951690,396,109\r
"""


def parse(data: bytes) -> list[TraceRequest]:
    return parse_trace(io.BytesIO(data), "t")


def test_mooncake_lines_are_read() -> None:
    assert parse(MOONCAKE) == [
        TraceRequest(arrival_s=0, prompt_tokens=700, output_tokens=5, block_ids=(0, 1), block_tokens=512),
        TraceRequest(arrival_s=3, prompt_tokens=600, output_tokens=6, block_ids=(0, 2), block_tokens=512),
    ]


def test_rtp_llm_lines_are_read() -> None:
    (request,) = parse(RTP_LLM)
    assert (request.prompt_tokens, request.output_tokens) == (1100, 0)
    assert (request.block_ids, request.block_tokens) == ((9208787762351212073,), 1024)


def test_azure_rows_are_read_and_time_counts_from_the_first() -> None:
    first, second = parse(AZURE)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0, 374, 44)
    assert second.arrival_s == pytest.approx(64.314579, abs=1e-5)
    assert (second.block_ids, second.block_tokens) == ((), 0)


@pytest.mark.parametrize("data", [MOONCAKE, RTP_LLM, AZURE, b"\xef\xbb\xbf" + MOONCAKE])
def test_gzip_is_told_by_content(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_bytes(gzip.compress(data, mtime=0))
    assert read_trace(path) == parse(data)


def test_requests_come_in_order_of_arrival() -> None:
    lines = MOONCAKE.split(b"\n")
    assert parse(b"\n".join([lines[1], lines[0]])) == parse(MOONCAKE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected requests, seen none"),
        (b"\n\n", "expected requests, seen none"),
        (b"a,b\n1,2\n", "t line 1: expected Mooncake .* or RTP-LLM .* or Azure .* plain or gzip.*seen 'a,b'"),
        (b'{"id":"s","requests":[]}', "t line 1: expected Mooncake"),
        (b"[" * 10_000, "t line 1: expected Mooncake"),
        (b"\xff\xfe\n", "t line 1: .*utf-8"),
        (
            MOONCAKE + b'{"timestamp": 1}\n',
            "t line 4: .*input_length.*expected a line of the format Mooncake",
        ),
        (MOONCAKE + b"{\n", "t line 4: .*Mooncake"),
        (MOONCAKE.replace(b"700", b"-1"), r"t line 1: .*\$.input_length.*Mooncake"),
        (MOONCAKE.replace(b"600", b'"600"'), r"t line 2: .*\$.input_length.*Mooncake"),
        (RTP_LLM + RTP_LLM.replace(b'"9208787762351212073"', b'"x"'), "t line 2: .*'x'.*RTP-LLM"),
        (AZURE + b"2023-11-16 18:15:46,1\n", "t line 4: expected 3 cells .*seen 2.*Azure"),
        (AZURE + b"yesterday,1,2\n", "t line 4: .*yesterday.*Azure"),
        (AZURE + b"2023-11-16 18:15:46,1,-2\n", "t line 4: expected token counts from 0"),
        (gzip.compress(MOONCAKE, mtime=0)[:-12], "broken gzip data"),
        (gzip.compress(MOONCAKE, mtime=0)[:20] + b"junk", "broken gzip data"),
    ],
)
def test_what_is_no_trace_is_refused_with_line_and_formats(data: bytes, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(data)


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.jsonl: No such file"):
        read_trace(tmp_path / "nowhere.jsonl")


@given(st.binary(max_size=200))
def test_bytes_are_read_or_refused_never_anything_else(data: bytes) -> None:
    for prefix in (b"", MOONCAKE, RTP_LLM, AZURE, b"\x1f\x8b"):
        try:
            assert parse(prefix + data)
        except SettingsError as error:
            assert str(error).startswith("trace t")  # noqa: PT017


def test_the_excerpt_comes_with_the_package() -> None:
    requests = read_excerpt()
    assert len(requests) == 2000
    assert requests[0].block_ids[0] == requests[1999].block_ids[0] == 0
    assert all(request.block_tokens == 512 for request in requests)


def trace(*arrivals_s: float) -> list[TraceRequest]:
    return [
        TraceRequest(arrival_s=arrival_s, prompt_tokens=number, output_tokens=1)
        for number, arrival_s in enumerate(arrivals_s)
    ]


def test_arrivals_of_one_tick_are_spread_over_it() -> None:
    assert spread([0, 0, 0, 3, 3, 6]) == [0, 1, 2, 3, 4.5, 6]
    assert spread([0, 3, 3, 3]) == [0, 3, 4, 5]
    assert spread([0, 0]) == [0, 0]
    assert spread([]) == []


def test_speed_divides_times_and_limit_cuts() -> None:
    requests = trace(0, 2, 4, 8)
    planned = schedule(requests, speed=2, limit=3)
    assert planned == [(0, requests[0]), (1, requests[1]), (2, requests[2])]


def test_poisson_keeps_the_mean_rate_and_the_seed_decides() -> None:
    arrivals = [float(number) for number in range(2001)]
    times = poisson_times(arrivals, Random(7))
    assert times == poisson_times(arrivals, Random(7))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000, rel=0.1)
    assert poisson_times([5.0], Random(7)) == [5.0]
    assert [request for _, request in schedule(trace(0, 1, 2), poisson=Random(1))] == trace(0, 1, 2)


@pytest.mark.parametrize("wrong", [{"speed": 0}, {"speed": -1}, {"speed": float("nan")}, {"limit": 0}])
def test_a_schedule_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match="expected"):
        schedule(trace(0), **wrong)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 5), max_size=30), st.floats(0.1, 100))
def test_a_schedule_keeps_order_and_loses_nobody(ticks: list[int], speed: float) -> None:
    requests = trace(*sorted(float(tick) for tick in ticks))
    planned = schedule(requests, speed=speed)
    assert [request for _, request in planned] == requests
    times = [time for time, _ in planned]
    assert times == sorted(times)
