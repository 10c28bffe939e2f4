"""`flexlb` as people run it: help, errors in words, the demo and the stack it leaves nothing of."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest

from dispatcher.local.processes import free_port
from tests.support.servers import give_up, why_no_kafka


async def flexlb(
    *arguments: str, timeout_s: float = 60, environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Run a command to its end: exit code, stdout, stderr."""
    async with started(*arguments, environment=environment) as process:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def started(
    *arguments: str, environment: dict[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a command; it is killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "dispatcher",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


COMMANDS = [
    *("demo", "up", "dispatcher", "frontend", "init", "replay", "audit", "dead", "config", "doctor", "chaos"),
    *("nodes", "cordon", "drain", "uncordon"),
    *("agent", "engine-sim"),
]


@pytest.mark.parametrize("command", COMMANDS)
async def test_every_command_explains_itself(command: str) -> None:
    code, out, err = await flexlb(command, "--help")
    assert (code, err) == (0, "")
    assert "usage:" in out


async def test_help_names_every_command() -> None:
    _, out, _ = await flexlb("--help")
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["dispatcher", "--pool", "a--b"], {}, "--pool: "),
        (["dispatcher", "--leader-ttl-s", "soon"], {}, "--leader-ttl-s: "),
        (["agent", "--node", "a/b"], {}, "--node: "),
        (["dispatcher"], {"FLEXLB_WINDOW_REQUESTS": "0"}, "FLEXLB_WINDOW_REQUESTS: "),
        (["dispatcher", "--redis", "http://x"], {}, "redis: expected a URL"),
        (["init", "--kafka", "127.0.0.1:1"], {}, "create topics"),
        (["audit", "--kafka", "127.0.0.1:1", "--from", "0"], {}, "127.0.0.1:1"),
        (["replay", "/nowhere/trace.jsonl"], {}, "/nowhere/trace.jsonl"),
        (["nonsense"], {}, "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_wrong_use_is_told_in_words(
    arguments: list[str], environment: dict[str, str], words: str
) -> None:
    code, _, err = await flexlb(*arguments, environment=environment)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["dispatcher", "agent", "engine-sim"])
async def test_port_in_use_is_told_in_words(command: str) -> None:
    flag = "--port" if command == "engine-sim" else "--metrics-port"
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        code, _, err = await flexlb(command, flag, str(holder.getsockname()[1]))
    assert code == 2
    assert "port" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["dispatcher", "agent"])
async def test_absent_servers_are_told_and_waited_for(command: str) -> None:
    absent = free_port()
    arguments = ["--redis", f"redis://127.0.0.1:{absent}", "--kafka", f"127.0.0.1:{absent}"]
    if command == "agent":
        arguments += ["--models", "m"]
    async with started(command, *arguments) as process:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while b"does not answer, trying again" not in await process.stderr.readline():
                assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            _, err = await process.communicate()
    assert process.returncode == 0, err.decode()


@pytest.mark.kafka
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kills", [[], ["dispatcher", "agent", "engine", "redis"], ["redis-data"]], ids=str)
async def test_demo_is_clean(tmp_path: Path, kills: list[str]) -> None:
    report = tmp_path / "report.json"
    flags = [word for kill in kills for word in ("--kill", kill)]
    code, out, err = await flexlb("demo", "--requests", "120", "--json", str(report), *flags, timeout_s=170)
    assert code == 0, out + err
    found = json.loads(report.read_text())
    runs = [found] if kills else [found, found["baseline"]]
    for run in runs:
        assert (run["requests"], run["lost"], run["duplicated"]) == (120, 0, 0)
        assert run["outcomes"] == {"Completed": 120}
        assert all(
            set(run[times]) == {"mean", "p50", "p90", "p99"} for times in ("ttft_ms", "tpot_ms", "e2e_ms")
        )
        assert sum(run["per_node"].values()) == 120
        # What was predicted at binding is what the engines found, unless they were killed in between.
        assert kills or abs(run["predicted_hit_ratio"] - run["hit_ratio"]) <= 0.02 * run["hit_ratio"]
    assert found["milliseconds"] == "simulated"
    assert "Milliseconds are simulated" in out
    assert [run["policy"] for run in runs] == ["prefill_cost", "random"][: len(runs)]
    assert err.count("kill -9") == len(kills)
    assert "nothing lost" in err
    assert err.count("audit clean") == len(runs)


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_demo_of_prefill_and_decode_nodes_is_clean_when_broken(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = ["--prefill", "2", "--decode", "2", "--kill", "engine", "--kill", "dispatcher", "--kill", "agent"]
    code, out, err = await flexlb("demo", "--requests", "120", "--json", str(report), *flags, timeout_s=170)
    assert code == 0, out + err
    found = json.loads(report.read_text())
    assert (found["lost"], found["duplicated"], found["outcomes"]) == (0, 0, {"Completed": 120})
    assert "2 for prompts and 2 for answers" in err
    assert set(found["per_node"]) >= {"node-3", "node-4"}


async def test_nodes_are_either_alike_or_split() -> None:
    for flags in (["--prefill", "2"], ["--prefill", "2", "--decode", "1", "--nodes", "3"]):
        code, _, err = await flexlb("up", *flags)
        assert code == 2
        assert "--prefill P and --decode D" in err


@pytest.mark.kafka
@pytest.mark.timeout(120)
async def test_up_is_ready_serves_a_request_and_leaves_nothing(tmp_path: Path) -> None:
    if (reason := why_no_kafka()) is not None:
        give_up(reason)
    async with started("up", "--nodes", "1", "--json", environment={"TMPDIR": str(tmp_path)}) as process:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            addresses = json.loads(await process.stdout.readline())
        children = children_of(process.pid)
        assert len(children) >= 7
        async with openai.AsyncOpenAI(base_url=addresses["api"], api_key="any", max_retries=0) as api:
            (model,) = (await api.models.list()).data
            answer = await api.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": "Hello"}], max_tokens=7
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 7
            assert answer.choices[0].message.content
        code, out, err = await flexlb(
            "replay", "--kafka", addresses["kafka"], "--limit", "3", "--speed", "10", "--json"
        )
        assert code == 0, err
        assert json.loads(out)["outcomes"] == {"Completed": 3}
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            await process.communicate()
    assert process.returncode == 0
    assert still_there(children) == []
    assert os.listdir(tmp_path) == []


def still_there(pids: list[int]) -> list[int]:
    """Those processes that exist."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def children_of(pid: int) -> list[int]:
    """Direct children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found
