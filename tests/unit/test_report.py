"""The report of a replay: counts, nearest-rank percentiles, a table."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.replay.replay import ReplayResult, RequestResult, Tally
from dispatcher.replay.report import is_clean, percentile, spread, summarise, table


def answered(id: str, ms: float, **fields: Any) -> RequestResult:
    given_fields = {
        "late_ms": 0.5,
        "prompt_tokens": 100,
        "kind": "Completed",
        "reason": "finished",
        "node": "n1",
        "cached_tokens": 25,
        "predicted_cached_tokens": 20,
        "completion_tokens": 10,
        "attempts": 1,
        "outcomes": 1,
        "ttft_ms": ms,
        "ttft_local_ms": ms + 1,
        "total_ms": 2 * ms,
        "total_local_ms": 2 * ms + 1,
        **fields,
    }
    return RequestResult(id=id, **given_fields)


def result(*requests: RequestResult, token_scale: float = 1.0) -> ReplayResult:
    return ReplayResult(
        requests=list(requests), began_ms=1, ended_ms=2, duration_s=2.0, speed=4.0, token_scale=token_scale
    )


def test_percentiles_are_nearest_rank() -> None:
    values = [15.0, 20.0, 35.0, 40.0, 50.0]
    assert [percentile(values, p) for p in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert percentile([7.0], 99) == 7


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_covers_its_share(values: list[float], percent: int) -> None:
    found = percentile(sorted(values), percent)
    assert found in values
    covered = sum(value <= found for value in values)
    assert covered * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


def test_a_spread_of_nothing_is_nothing() -> None:
    assert spread([None, None]) == {
        "count": 0,
        "mean": None,
        "p50": None,
        "p90": None,
        "p99": None,
        "max": None,
    }
    assert spread([None, 4.0])["p99"] == 4.0


def test_a_replay_is_counted() -> None:
    report = summarise(
        result(
            *(answered(f"r{number}", float(number)) for number in range(1, 101)),
            answered("twice", 1.0, outcomes=2),
            answered("again", 1.0, attempts=3, node="n2"),
            RequestResult(id="lost", late_ms=0, attempts=1),
            RequestResult(id="unsent", late_ms=9.0, unsent="Kafka was away"),
            RequestResult(id="no", late_ms=0, kind="Rejected", reason="unknown_model", outcomes=1),
        )
    )
    assert report["requests"] == 105
    assert report["outcomes"] == {"Completed": 102, "Rejected": 1}
    assert report["reasons"] == {"finished": 102, "unknown_model": 1}
    assert (report["lost"], report["lost_ids"], report["unsent"]) == (1, ["lost"], 1)
    assert (report["duplicated"], report["reexecuted"]) == (1, 1)
    assert report["ttft_ms"]["count"] == 102
    assert (report["ttft_ms"]["p50"], report["ttft_ms"]["p99"], report["ttft_ms"]["max"]) == (
        49.0,
        99.0,
        100.0,
    )
    assert report["ttft_ms"]["mean"] == pytest.approx(math.fsum([*range(1, 101), 1, 1]) / 102, abs=1e-3)
    assert report["total_local_ms"]["max"] == 201
    assert report["late_ms"]["max"] == 9
    assert (report["cached_share"], report["completion_tokens"]) == (0.25, 1020)
    assert report["predicted_cached_tokens"] == 102 * 20
    assert report["tpot_ms"]["count"] == 102
    assert report["tpot_ms"]["max"] == pytest.approx(100 / 9, abs=1e-3)
    assert report["nodes"] == {"n1": 101, "n2": 1}
    assert report["requests_per_s"] == 51.5
    assert not is_clean(report)
    assert json.loads(json.dumps(report)) == report


def test_a_tally_knows_first_tokens_and_hits_of_what_completed() -> None:
    tally = Tally(planned=3)
    assert (tally.ttft_ms, tally.hit_ratio) == (None, None)
    for one in (
        answered("r", 10.0),
        answered("s", 30.0, cached_tokens=75),
        answered("t", 99.0, kind="Failed"),
    ):
        tally.note(one)
    assert (tally.answered, tally.ttft_ms, tally.hit_ratio) == (3, 20.0, 0.5)


def test_only_requests_answered_once_are_clean() -> None:
    assert is_clean(summarise(result(answered("r", 1.0))))
    assert is_clean(summarise(result()))
    for wrong in (
        answered("r", 1.0, outcomes=2),
        RequestResult(id="r", late_ms=0),
        RequestResult(id="r", late_ms=0, unsent="no"),
    ):
        assert not is_clean(summarise(result(wrong)))


def test_the_table_tells_people() -> None:
    text = table(summarise(result(answered("r", 12.0), RequestResult(id="gone", late_ms=0))))
    assert "1 Completed" in text
    assert "1 lost, 0 duplicated" in text
    assert "25.0% from cache" in text
    assert "lost       gone" in text
    assert "12.0" in text
    assert "scale" not in text


def test_the_table_says_that_lengths_were_scaled() -> None:
    assert "lengths are 0.1 times the trace's" in table(summarise(result(token_scale=0.1)))


def test_the_table_of_nothing_is_a_table() -> None:
    text = table(summarise(result()))
    assert "requests   0" in text
    assert "none" in text
