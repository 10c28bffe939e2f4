"""The demo's figures: clocks, hits, evenness, when a run is good, and how it looks."""

from __future__ import annotations

import json
from typing import Any

from dispatcher.audit import AuditResult
from dispatcher.local.demo_report import Figures, comparison, figures, is_good
from dispatcher.replay.replay import ReplayResult, RequestResult
from dispatcher.replay.report import summarise


def request(id: str, **fields: Any) -> RequestResult:
    told = {
        "late_ms": 0.0,
        "prompt_tokens": 100,
        "kind": "Completed",
        "reason": "finished",
        "node": "node-1",
        "cached_tokens": 25,
        "predicted_cached_tokens": 24,
        "completion_tokens": 11,
        "attempts": 1,
        "outcomes": 1,
        "ttft_ms": 20.0,
        "total_ms": 70.0,
        **fields,
    }
    return RequestResult(id=id, **told)


def run(
    *requests: RequestResult, policy: str = "prefill_cost", busy_s: dict[str, float] | None = None
) -> Figures:
    replayed = ReplayResult(
        requests=list(requests), began_ms=0, ended_ms=1, duration_s=1.0, speed=1.0, token_scale=1.0
    )
    return figures(
        summarise(replayed),
        audited(),
        policy=policy,
        time_scale=0.2,
        ideal_hit_ratio=0.3,
        busy_s=busy_s if busy_s is not None else {"node-1": 3.0, "node-2": 1.0},
    )


def audited() -> AuditResult:
    return AuditResult(from_ms=0, to_ms=1)


def test_milliseconds_are_of_the_engines_clock() -> None:
    found = run(request("r"))
    assert found["ttft_ms"]["mean"] == 100.0
    assert found["e2e_ms"]["p99"] == 350.0
    assert found["tpot_ms"]["p50"] == 25.0  # 50 wall ms for ten tokens after the first


def test_hits_and_evenness() -> None:
    found = run(request("r"), request("s", cached_tokens=35, predicted_cached_tokens=36))
    assert (found["hit_ratio"], found["predicted_hit_ratio"], found["ideal_hit_ratio"]) == (0.3, 0.3, 0.3)
    assert found["busy_max_over_mean"] == 1.5
    assert run(request("r"), busy_s={})["busy_max_over_mean"] is None


def test_a_run_is_good_when_clean_and_equally_complete() -> None:
    both = run(request("r"), request("s"))
    assert is_good(both, None)
    assert is_good(both, run(request("r"), request("s"), policy="random"))
    refused = run(request("r"), request("s", kind="Rejected", reason="unknown_model"), policy="random")
    assert not is_good(both, refused)
    lost = run(request("r"), request("s", kind="", outcomes=0))
    assert not is_good(lost, None)
    assert not is_good(both, lost)


def test_it_tells_people_and_machines() -> None:
    ours = run(request("r"))
    text = comparison(ours, run(request("r", ttft_ms=40.0), policy="random"))
    head, first_token = text.splitlines()[:2]
    assert head.split() == ["random", "prefill_cost", "ours", "/", "theirs"]
    assert first_token.split()[-3:] == ["200.0", "100.0", "0.50"]
    assert "1 of 1" in text
    assert "other outcomes" not in text
    long = comparison(ours, run(request("r", ttft_ms=40.0), policy="round_robin_lowest_concurrency"))
    head, *rows = long.splitlines()
    assert head.split()[0] == "round_robin_lowest_concurrency"
    assert len({len(row) for row in (head, *rows[:7])}) == 1, "one below the other"
    assert json.loads(json.dumps(ours)) == ours


def test_nothing_measured_is_shown_as_such() -> None:
    text = comparison(run(request("r", kind="Failed", reason="attempts_exhausted"), busy_s={}), None)
    assert "-" in text.splitlines()[1]
    assert "other outcomes: 1 Failed" in text
