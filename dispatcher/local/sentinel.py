"""A replicated Valkey on this machine: a primary, a replica and Sentinels that promote it.

For tests and `flexlb chaos`. Everything is known to everybody from the first start, so it is ready at once;
which server is the primary is the Sentinels' to say, see `primary()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from dispatcher.errors import ServerError
from dispatcher.local.processes import HOST
from dispatcher.local.started import Started
from dispatcher.local.valkey import ValkeyServer

SERVICE = "flexlb"
DOWN_AFTER_MS = 1000
"""Silence after which a Sentinel takes the primary for dead."""
FAILOVER_TIMEOUT_MS = 3000
READY_TIMEOUT_S = 30.0
POLL_S = 0.05
NOBODY = "nobody-has-this-password"
REPLICA = {"repl-diskless-sync-delay": "0"}


class ReplicatedValkey(Started):
    """Two Valkeys and `sentinels` Sentinels: `async with ReplicatedValkey(folder) as redis`.

    Args:
        folder: where all their data lives.
    """

    def __init__(self, folder: Path, *, sentinels: int = 3) -> None:
        self.servers = [ValkeyServer(folder / f"valkey-{name}", options=REPLICA) for name in ("a", "b")]
        self.sentinels = [
            ValkeyServer(folder / f"sentinel-{number}", options={}, is_sentinel=True)
            for number in range(1, sentinels + 1)
        ]
        self._quorum = sentinels // 2 + 1
        super().__init__()

    @property
    def url(self) -> str:
        """Its address for every process of a pool."""
        return sentinel_url(sentinel.port for sentinel in self.sentinels)

    @property
    def description(self) -> str:
        """One line for people."""
        return f"Valkey with a replica and {len(self.sentinels)} Sentinels, {self.url}"

    async def _start(self) -> None:
        for server in (*self.servers, *self.sentinels):
            self._stack.push_async_callback(server.stop)
            server.reserve()
        async with asyncio.TaskGroup() as group:
            for server in self.servers:
                group.create_task(server.start())
        primary, replica = self.servers
        await command(replica, "REPLICAOF", HOST, primary.port)
        await until(lambda: is_in_sync(replica), "the replica to be in sync")
        async with asyncio.TaskGroup() as group:
            for sentinel in self.sentinels:
                sentinel.configure(self._configuration(sentinel))
                group.create_task(sentinel.start())
        await self.until_healthy()

    def _configuration(self, sentinel: ValkeyServer) -> list[str]:
        others = [one for one in self.sentinels if one is not sentinel]
        primary, replica = self.servers
        return [
            f"sentinel myid {_id(sentinel)}",
            f"sentinel monitor {SERVICE} {HOST} {primary.port} {self._quorum}",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {SERVICE} {FAILOVER_TIMEOUT_MS}",
            f"sentinel known-replica {SERVICE} {HOST} {replica.port}",
            *(f"sentinel known-sentinel {SERVICE} {HOST} {one.port} {_id(one)}" for one in others),
        ]

    async def primary(self) -> ValkeyServer:
        """The server that the Sentinels which answer call the primary.

        Raises:
            ServerError: they do not agree, or none answers.
        """
        named = set()
        for sentinel in self.sentinels:
            with contextlib.suppress(RedisError, OSError):
                _, port = await command(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
                named.add(int(port))
        found = [server for server in self.servers if server.port in named]
        if len(found) != 1:
            raise ServerError(f"expected Sentinels to name one primary, seen ports {sorted(named)}")
        return found[0]

    async def is_healthy(self) -> bool:
        """Whether all Sentinels agree on a living primary with a replica that is in sync."""
        try:
            for sentinel in self.sentinels:
                state = dict(_pairs(await command(sentinel, "SENTINEL", "MASTER", SERVICE)))
                agrees = state["flags"] == "master" and int(state["num-slaves"]) == 1
                if not agrees or int(state["num-other-sentinels"]) != len(self.sentinels) - 1:
                    return False
            return await is_in_sync(await self.replica())
        except (RedisError, OSError, ServerError):
            return False

    async def replica(self) -> ValkeyServer:
        """The server that is not the primary.

        Raises:
            ServerError: as `primary`.
        """
        primary = await self.primary()
        (other,) = (server for server in self.servers if server is not primary)
        return other

    async def wait_before_vote(self, down_after_ms: int) -> None:
        """Have the Sentinels take a primary for dead after so long a silence, from now on."""
        for sentinel in self.sentinels:
            await command(sentinel, "SENTINEL", "SET", SERVICE, "down-after-milliseconds", down_after_ms)

    async def until_healthy(self) -> None:
        """Wait until everybody agrees on a living primary, and its replica is in sync.

        Raises:
            ServerError: they do not in time.
        """
        await until(self.is_healthy, "every Sentinel to see the primary, its replica and the others")

    async def failover(self) -> None:
        """Have the Sentinels swap primary and replica while both live; returns once they agree on it."""
        before = await self.primary()
        await command(self.sentinels[0], "SENTINEL", "FAILOVER", SERVICE)
        await self.until_promoted(before)

    async def until_promoted(self, before: ValkeyServer) -> ValkeyServer:
        """Wait until another server than `before` is the primary, for its Sentinels and for itself."""

        async def is_promoted() -> bool:
            try:
                now = await self.primary()
                return now is not before and bool((await command(now, "ROLE"))[0] == b"master")
            except (RedisError, OSError, ServerError):
                return False

        await until(is_promoted, "Sentinels to promote the replica")
        return await self.primary()


async def detach(replica: ValkeyServer) -> None:
    """Cut a replica off from its primary for good: it misses all that is written from here on."""
    await command(replica, "CONFIG", "SET", "primaryauth", NOBODY)
    await command(replica, "CLIENT", "KILL", "TYPE", "primary")
    await until(lambda: _is_cut_off(replica), "the replica to lose its primary")


async def attach(replica: ValkeyServer) -> None:
    """Let a server that was detached follow a primary again, when it is to."""
    await command(replica, "CONFIG", "SET", "primaryauth", "")


async def is_in_sync(replica: ValkeyServer) -> bool:
    """Whether a replica follows its primary."""
    try:
        role = await command(replica, "ROLE")
    except (RedisError, OSError):
        return False
    return bool(role[0] == b"slave" and role[3] == b"connected")


async def _is_cut_off(replica: ValkeyServer) -> bool:
    return not await is_in_sync(replica)


async def command(server: ValkeyServer, *words: str | int) -> Any:
    """One command to one server, on a connection of its own."""
    client = Redis(host=HOST, port=server.port, socket_timeout=2.0, protocol=2)
    try:
        return await client.execute_command(*words)  # type: ignore[no-untyped-call]
    finally:
        await client.aclose()


async def until(holds: Any, what: str) -> None:
    """Return once `holds` does.

    Raises:
        ServerError: it does not in time.
    """
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await holds():  # noqa: ASYNC110 - other processes are asked, no event tells
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise ServerError(f"expected {what} within {READY_TIMEOUT_S:.0f} s") from None


def sentinel_url(ports: Iterable[int]) -> str:
    """The address of a pool's Redis by the ports of its Sentinels on this machine."""
    return f"redis+sentinel://{','.join(f'{HOST}:{port}' for port in ports)}/{SERVICE}/0"


def _id(sentinel: ValkeyServer) -> str:
    return hashlib.sha1(str(sentinel.port).encode()).hexdigest()


def _pairs(flat: list[bytes]) -> list[tuple[str, str]]:
    words = [word.decode() for word in flat]
    return list(zip(words[::2], words[1::2], strict=True))
