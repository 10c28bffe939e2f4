"""A Redis client for thousands of nodes in one process: what `NodeStore` needs, with many commands in flight.

The real client takes a connection of a pool for each command and waits for its answer. Here one connection
carries the commands of all nodes, in the order they were made, and what one turn of the loop makes is written
at once. Blocking pops need a connection each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, cast
from urllib.parse import urlsplit

import hiredis
from redis.exceptions import NoScriptError, ResponseError

from dispatcher.errors import StoreUnavailable


def _error(text: str) -> ResponseError:
    return NoScriptError(text) if text.startswith("NOSCRIPT") else ResponseError(text)


class LeanConnection(asyncio.Protocol):
    """One connection: commands go out in order, so do their answers."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(replyError=_error)
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._out: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()

    @staticmethod
    async def connect(url: str) -> LeanConnection:
        """Connect to `redis://host:port/0`."""
        address = urlsplit(url)
        assert address.hostname
        assert address.port
        _, protocol = await asyncio.get_running_loop().create_connection(
            LeanConnection, address.hostname, address.port
        )
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(StoreUnavailable(f"the connection is lost: {exc}"))
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (answer := self._reader.gets()) is not False:
            waiting = self._waiting.popleft()
            if waiting.done():
                continue
            if isinstance(answer, Exception):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)

    def command(self, *words: str | bytes | int | float) -> asyncio.Future[Any]:
        """Send a command; its answer."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        if self._transport is None:
            answer.set_exception(StoreUnavailable("there is no connection"))
            return answer
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(hiredis.pack_command(cast(Any, words)))
        self._waiting.append(answer)
        return answer

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None:
            self._transport.write(b"".join(out))

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()


class LeanRedis:
    """One node's client: scripts over what all share, blocking pops over its own connection."""

    def __init__(self, shared: LeanConnection, own: LeanConnection) -> None:
        self._shared = shared
        self._own = own

    def evalsha(self, digest: str, *words: str | bytes | int | float) -> asyncio.Future[Any]:
        """Run a script by its digest."""
        return self._shared.command("EVALSHA", digest, *words)

    def eval(self, source: str, *words: str | bytes | int | float) -> asyncio.Future[Any]:
        """Run a script by its text."""
        return self._shared.command("EVAL", source, *words)

    def blmove(self, first: str, second: str, timeout_s: float, src: str, dest: str) -> asyncio.Future[Any]:
        """Move an element as soon as there is one."""
        return self._own.command("BLMOVE", first, second, src, dest, timeout_s)
