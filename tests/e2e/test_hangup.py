"""SIGHUP as operators send it: a settings file changes under running processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.topics import create_topics
from dispatcher.protocol.names import Names
from tests.e2e.test_cli import started
from tests.support.servers import KafkaAddress

COMMANDS = {
    "dispatcher": ["dispatcher"],
    "agent": ["agent", "--node", "n1", "--models", "m", "--engine-url", "http://127.0.0.1:9"],
    "frontend": ["frontend", "--port", "0"],
}
READY = {"dispatcher": "dispatcher ready", "agent": "agent starting", "frontend": "frontend ready"}


async def told(process: asyncio.subprocess.Process, event: str) -> dict[str, Any]:
    """The next log line that tells of `event`."""
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while line := await process.stderr.readline():
            found: dict[str, Any] = json.loads(line) if line.startswith(b"{") else {}
            if found.get("event", "").startswith(event):
                return found
    raise AssertionError(f"ended before {event!r}")


async def check_hangups(name: str, write: Callable[[str], object], file: str, servers: str) -> None:
    """Change the file of a running process twice, and spoil it once."""
    write(servers)
    async with started(*COMMANDS[name], "--config", file) as process:
        await told(process, READY[name])

        async def hang_up(text: str, event: str) -> dict[str, Any]:
            write(text)
            os.kill(process.pid, signal.SIGHUP)
            return await told(process, event)

        renewed = await hang_up(f'log_level = "WARNING"\nmetrics_port = 9\n{servers}', "settings renewed")
        assert renewed["changed"] == ["log_level"]
        assert renewed["waiting_for_restart"] == ([] if name == "frontend" else ["metrics_port"])
        refused = await hang_up(f'log_level = "LOUD"\n{servers}', "settings not renewed")
        assert "log_level" in refused["error"]
        renewed = await hang_up(f'log_level = "INFO"\n{servers}', "settings renewed")
        assert (renewed["changed"], renewed["waiting_for_restart"]) == (["log_level"], [])


@pytest.mark.parametrize("name", ["dispatcher", "agent"])
async def test_a_changed_file_is_taken_and_a_broken_one_is_told(tmp_path: Path, name: str) -> None:
    file = tmp_path / "flexlb.toml"
    # Nobody listens there: what a process does without its servers is not the matter here.
    await check_hangups(
        name, file.write_text, str(file), 'redis = "redis://127.0.0.1:9/0"\nkafka = "127.0.0.1:9"\n'
    )


@pytest.mark.kafka
async def test_a_frontend_takes_a_changed_file(
    tmp_path: Path, kafka: KafkaAddress, kafka_clients: KafkaClients, pool: str
) -> None:
    file = tmp_path / "flexlb.toml"
    await create_topics(kafka_clients, Names(pool), partitions=1, replication_factor=1)
    await check_hangups(
        "frontend", file.write_text, str(file), f'kafka = "{kafka.bootstrap}"\npool = "{pool}"\n'
    )
