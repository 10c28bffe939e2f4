"""Connections of the Redis client whose writes can be cancelled.

On Python 3.11 the client's own write goes through `asyncio.wait_for`, which loses a cancellation that
arrives while the write ends (python/cpython#86296): a service told to stop would run on. It also starts
a task for each command. This write is the same without both.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Iterable
from typing import Any

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.exceptions import ConnectionError, TimeoutError


class _PromptWrites:
    """Overrides one method of the client's connection classes."""

    socket_timeout: float | None
    is_connected: bool
    _writer: Any

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        if not self.is_connected:
            await self.connect_check_health(check_health=False)  # type: ignore[attr-defined]
        encoded = command.encode() if isinstance(command, str) else command
        try:
            self._writer.writelines([encoded] if isinstance(encoded, bytes) else encoded)
            async with asyncio.timeout(self.socket_timeout):
                await self._writer.drain()
        except builtins.TimeoutError:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise TimeoutError("Timeout writing to socket") from None
        except OSError as error:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise ConnectionError(f"Error while writing to socket: {error}") from error
        except BaseException:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise


class _Tcp(_PromptWrites, Connection):
    pass


class _Tls(_PromptWrites, SSLConnection):
    pass


class _Unix(_PromptWrites, UnixDomainSocketConnection):
    pass


def make_pool(url: str, **options: Any) -> ConnectionPool:
    """A pool of such connections for `redis://`, `rediss://` or `unix://` URLs.

    Raises:
        ValueError: the URL has another scheme.
    """
    parsed: dict[str, Any] = dict(parse_url(url))
    theirs = parsed.pop("connection_class", Connection)
    ours = {SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}.get(theirs, _Tcp)
    return ConnectionPool(connection_class=ours, **{**options, **parsed})
