"""`flexlb config` as people run it: every process, sources, and what is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from dispatcher.backends.environment import TABLES
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.settings import DispatcherSettings


async def config(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run `flexlb config` without the test's own FLEXLB variables: exit code, stdout, stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLEXLB_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", "config", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**inherited, **environment},
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_config_of_all_tells_every_process_and_each_source(tmp_path: Path) -> None:
    file = tmp_path / "flexlb.toml"
    file.write_text('pool = "p"\n[agent]\nmax_running = 7\n[frontend]\nport = 8080\n')
    code, out, err = await config("--json", "--config", str(file), FLEXLB_REDIS="redis://:hush@h/0")
    assert (code, err) == (0, "")
    assert "hush" not in out
    found = {
        table: {row["setting"]: (row["value"], row["source"]) for row in told["settings"]}
        for table, told in json.loads(out).items()
    }
    assert set(found) == {"dispatcher", "agent", "frontend"}
    for table in found.values():
        assert table["pool"] == ("p", f"{file}: pool")
        assert table["redis"] == ("redis://:***@h/0", "FLEXLB_REDIS")
    assert found["agent"]["max_running"] == (7, f"{file}: agent.max_running")
    assert found["frontend"]["port"] == (8080, f"{file}: frontend.port")
    assert found["dispatcher"]["seed"] == (0, "default")
    assert set(found["dispatcher"]) == set(DispatcherSettings.model_fields)
    assert set(found["frontend"]) == set(FrontendSettings.model_fields)


@pytest.mark.parametrize("process", ["dispatcher", "agent", "frontend"])
async def test_config_of_one_process_is_that_process_s(process: str) -> None:
    code, out, err = await config(process)
    assert (code, err) == (0, "")
    assert out.startswith(f"[{process}]\n")
    assert out.count("\n[") == 0


async def test_verbose_config_tells_what_a_setting_is_and_may_be() -> None:
    code, out, _ = await config("dispatcher", "-v")
    assert code == 0
    assert "[agent]" not in out
    assert "leader lock TTL, seconds; a number from 0.2 to 60" in out


@pytest.mark.parametrize(
    ("process", "variable"),
    [
        ("dispatcher", "FLEXLB_SPAN_LIMIT"),
        ("agent", "FLEXLB_MAX_RUNNING"),
        ("frontend", "FLEXLB_MAX_IN_FLIGHT"),
    ],
)
async def test_wrong_value_is_told_by_the_process_it_belongs_to(process: str, variable: str) -> None:
    code, out, err = await config("all", **{variable: "0"})
    assert code == 2
    assert f"flexlb {process}: {variable}: expected " in err
    assert {f"[{one}]" for one in TABLES if one != process} == {
        line for line in out.split() if line[0] == "["
    }
    assert "Traceback" not in err


async def test_output_that_nobody_reads_to_its_end_is_no_failure_of_its_own() -> None:
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m dispatcher config dispatcher -v | true; exit ${{PIPESTATUS[0]}}",
        stderr=asyncio.subprocess.PIPE,
        executable="/bin/bash",
    )
    _, err = await process.communicate()
    assert process.returncode == 141
    assert err == b""


async def test_agent_refuses_to_start_when_the_engine_s_block_does_not_divide_the_pool_s() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers_agent", "--models=m", "--engine-url=http://127.0.0.1:1"),
        *("--engine-block-size=48", "--kv-events-endpoint=tcp://127.0.0.1:5557"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 2
    assert "flexlb agent: --block-size: expected a multiple of the engine's KV block of 48" in err.decode()
    assert "Traceback" not in err.decode()
