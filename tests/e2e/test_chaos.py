"""`flexlb chaos` as people run it: several kinds of fault, nothing lost, nothing twice, nothing left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dispatcher.local.chaos_schedule import FaultKind
from dispatcher.local.slow_disk import why_no_slow_disk
from tests.e2e.test_cli import children_of, flexlb, started, still_there

pytestmark = [pytest.mark.kafka]

FEW = "kill-leader,freeze-agent,refuse-redis"


async def report_of(tmp_path: Path, *flags: str, timeout_s: float) -> dict[str, Any]:
    """Run it, clean; its report."""
    file = tmp_path / "report.json"
    code, out, err = await flexlb("chaos", *flags, "--json", str(file), timeout_s=timeout_s)
    assert code == 0, out + err
    found: dict[str, Any] = json.loads(file.read_text())
    assert (found["lost"], found["duplicated"], found["unseen"]) == (0, 0, 0)
    assert sum(found["outcomes"].values()) == found["requests"]
    assert all(figures["gap_p50_ms"] <= figures["gap_max_ms"] for figures in found["faults"].values())
    return found


@pytest.mark.timeout(180)
async def test_several_kinds_of_fault_lose_nothing_and_answer_once(tmp_path: Path) -> None:
    flags = ("--seed", "1", "--minutes", "0.4", "--rate", "20", "--nodes", "2", "--dispatchers", "2")
    found = await report_of(tmp_path, *flags, "--faults", FEW, timeout_s=170)
    assert found["requests"] == found["outcomes"]["Completed"] >= 480
    assert {kind: figures["count"] for kind, figures in found["faults"].items()} == dict.fromkeys(
        FEW.split(","), 1
    )
    # A leader that was killed is missed for its TTL; the gap that was measured must show it.
    assert found["faults"]["kill-leader"]["gap_max_ms"] > 1000


@pytest.mark.timeout(180)
async def test_a_failover_and_slow_disks_lose_nothing_and_answer_once(tmp_path: Path) -> None:
    if why := await why_no_slow_disk():
        pytest.skip(why)
    flags = ("--seed", "3", "--minutes", "0.4", "--rate", "20", "--nodes", "2", "--dispatchers", "2")
    kinds = "failover-redis,slow-disk-redis,slow-disk-kafka,cut-agent"
    found = await report_of(tmp_path, *flags, "--faults", kinds, timeout_s=170)
    assert found["requests"] == found["outcomes"]["Completed"] >= 480
    assert set(found["faults"]) == set(kinds.split(","))
    # The dead primary is missed for as long as the Sentinels wait before they vote.
    assert found["faults"]["failover-redis"]["gap_max_ms"] > 1000


@pytest.mark.timeout(180)
async def test_sigterm_in_mid_run_leaves_nothing(tmp_path: Path) -> None:
    flags = ("--seed", "1", "--minutes", "5", "--rate", "5", "--nodes", "1", "--faults", "freeze-agent")
    async with started("chaos", *flags, environment={"TMPDIR": str(tmp_path)}) as process:
        assert process.stderr is not None
        async with asyncio.timeout(90):
            while b"freeze-agent: agent-1" not in await process.stderr.readline():
                assert process.returncode is None
        children = children_of(process.pid)
        assert len(children) >= 7
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            await process.communicate()
    assert process.returncode == 130
    assert still_there(children) == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "1", "--minutes", "0.2"], "--minutes: expected at least"),
        (["--seed", "1", "--minutes", "1", "--faults", "kill-cat"], "kill-cat"),
        (
            ["--seed", "1", "--minutes", "1", "--dispatchers", "1", "--faults", "kill-standby"],
            "--dispatchers: expected at least 2",
        ),
        (
            ["--seed", "1", "--minutes", "1", "--faults", "slow-disk-redis,kill-agent"],
            "slow-disk-redis: expected the right to trace by strace, seen none: there is no strace in PATH",
        ),
    ],
    ids=["too short", "unknown kind", "no standby", "no strace"],
)
async def test_what_cannot_be_run_is_refused_before_anything_starts(flags: list[str], words: str) -> None:
    code, _, err = await flexlb("chaos", *flags, environment={"PATH": "/nowhere"})
    assert code == 2
    assert words in err
    assert "Valkey at" not in err


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("overlap", [False, True], ids=["one at a time", "overlapping"])
@pytest.mark.parametrize("seed", range(3))
async def test_every_kind_of_fault_loses_nothing_and_answers_once(
    tmp_path: Path, seed: int, overlap: bool
) -> None:
    flags = ("--seed", str(seed), "--minutes", "3", "--rate", "40", "--nodes", "4")
    found = await report_of(tmp_path, *flags, *([] if overlap else ["--one-at-a-time"]), timeout_s=590)
    assert set(found["faults"]) == set(FaultKind)
