"""The long profile: the demo broken in mid-run, ten runs of ten, each way."""

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
