"""A slow disk by strace, on real servers: writes wait, reads do not, and it is over when it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dispatcher.backends.connect import connect_redis
from dispatcher.errors import ServerError
from dispatcher.local.slow_disk import slow_disk, why_no_slow_disk
from dispatcher.local.valkey import ValkeyServer
from tests.support.wait import wait_until


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ValkeyServer]:
    """A Valkey that may be traced."""
    if why := await why_no_slow_disk():
        pytest.skip(why)
    async with ValkeyServer(tmp_path / "valkey") as one:
        yield one


def tracer_of(pid: int) -> int:
    """Who traces a process, 0 for nobody."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("TracerPid:")[1].split()[0])


async def test_writes_wait_for_a_slow_disk_and_reads_do_not(server: ValkeyServer) -> None:
    client = connect_redis(server.url, timeout_s=30.0)

    async def seconds(command: str, *words: str) -> float:
        began_s = time.monotonic()
        await client.execute_command(command, *words)
        return time.monotonic() - began_s

    try:
        await client.set("k", "v")
        async with slow_disk(server.pid, server.files, write_s=1.0, sync_s=0.0):
            assert tracer_of(server.pid) != 0
            assert await seconds("SET", "k", "w") >= 1.0
            assert await seconds("GET", "k") < 0.9
        assert tracer_of(server.pid) == 0
        assert await seconds("SET", "k", "x") < 0.9
        assert await client.get("k") == b"x"
    finally:
        await client.aclose()


async def test_a_write_is_held_back_while_a_sync_is_slow_and_lost_with_the_process(
    server: ValkeyServer,
) -> None:
    """What makes it a fault of its own: a kill alone loses nothing that was answered."""
    client = connect_redis(server.url, timeout_s=30.0)
    try:
        async with slow_disk(server.pid, server.files, write_s=0.0, sync_s=5.0):

            async def is_held_back() -> bool:
                await client.incr("k")
                return int((await client.info("persistence"))["aof_buffer_length"]) > 0

            await wait_until(is_held_back, "a write that waits for a sync")
            answered = int(await client.get("k") or 0)
            server.kill()
        await client.aclose()
        await server.start()
        client = connect_redis(server.url, timeout_s=30.0)
        assert int(await client.get("k") or 0) < answered
    finally:
        await client.aclose()


async def test_what_cannot_be_traced_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    child = await asyncio.create_subprocess_exec("true")
    await child.wait()
    with pytest.raises(ServerError, match="strace"):
        async with slow_disk(child.pid, [], write_s=0.1, sync_s=0.1):
            pytest.fail("nothing is there to be slow")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServerError, match="no strace in PATH"):
        async with slow_disk(child.pid, [], write_s=0.1, sync_s=0.1):
            pytest.fail("nobody is there to slow it")
