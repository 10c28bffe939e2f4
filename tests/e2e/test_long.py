"""The long profile: the demo's figures, and the demo broken in mid-run, ten runs of ten, each way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_cli import flexlb

pytestmark = [pytest.mark.long, pytest.mark.kafka, pytest.mark.timeout(240)]

EVERYTHING = ("--kill", "dispatcher", "--kill", "agent", "--kill", "engine", "--kill", "redis")
DATA = ("--kill", "redis-data")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kills", [EVERYTHING, DATA], ids=["everything", "data"])
async def test_demo_broken_in_mid_run_is_clean(tmp_path: Path, kills: tuple[str, ...], seed: int) -> None:
    report = tmp_path / "report.json"
    code, out, err = await flexlb("demo", "--json", str(report), "--seed", str(seed), *kills, timeout_s=230)
    assert code == 0, out + err
    found = json.loads(report.read_text())
    assert (found["requests"], found["lost"], found["duplicated"]) == (500, 0, 0)


async def test_demo_beats_random_by_what_it_promises(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, err = await flexlb("demo", "--json", str(report), timeout_s=230)
    assert code == 0, out + err
    ours = json.loads(report.read_text())
    random = ours["baseline"]
    assert ours["outcomes"] == random["outcomes"] == {"Completed": 500}
    assert ours["ttft_ms"]["mean"] <= 0.5 * random["ttft_ms"]["mean"]
    assert ours["hit_ratio"] >= 0.85 * ours["ideal_hit_ratio"]
    assert abs(ours["predicted_hit_ratio"] - ours["hit_ratio"]) <= 0.02 * ours["hit_ratio"]
    assert ours["busy_max_over_mean"] <= 1.25
