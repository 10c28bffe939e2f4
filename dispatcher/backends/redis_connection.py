"""Connections of the Redis client: writes that can be cancelled, and a primary that may have moved.

On Python 3.11 the client's own write goes through `asyncio.wait_for`, which loses a cancellation that
arrives while the write ends (python/cpython#86296): a service told to stop would run on. It also starts
a task for each command. This write is the same without both.

A server that refuses a write because it is a replica by now is left at once: the next try connects anew, to
wherever the address leads then. With Sentinels that is the primary that they name; a server
that they name but that is no primary (a Sentinel may be late) is not used.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.exceptions import AuthenticationError, ConnectionError, ReadOnlyError, RedisError, TimeoutError

from dispatcher.backends.addresses import SentinelAddress

LOOK_EVERY_S = 1.0
SENTINEL_TIMEOUT_S = 1.0
"""A Sentinel without an answer for this long is passed over for the next."""


class _PromptWrites:
    """Overrides two methods of the client's connection classes."""

    socket_timeout: float | None
    is_connected: bool
    _writer: Any

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        if not self.is_connected:
            await self._connect_again()
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

    async def _connect_again(self) -> None:
        await self.connect_check_health(check_health=False)  # type: ignore[attr-defined]

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*arguments, **options)  # type: ignore[misc]
        except ReadOnlyError as error:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise ConnectionError(f"the server is no primary any more: {error}") from error


class _Tcp(_PromptWrites, Connection):
    pass


class _Tls(_PromptWrites, SSLConnection):
    pass


class _Unix(_PromptWrites, UnixDomainSocketConnection):
    pass


class _AtPrimary(_PromptWrites):
    """A connection to whom Sentinels call the primary, which has to agree."""

    async def _connect_again(self) -> None:
        await self.connect()  # type: ignore[attr-defined]

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health=check_health)  # type: ignore[misc]
        # HELLO tells the role and, unlike ROLE, needs no permission.
        await self.send_command("HELLO")  # type: ignore[attr-defined]
        told = await self.read_response()
        facts = told if isinstance(told, dict) else dict(zip(told[::2], told[1::2], strict=True))
        role = facts.get(b"role", facts.get("role", b""))
        if role not in (b"master", "master"):
            raise ConnectionError(
                f"expected the primary at {self.host}:{self.port}, as "  # type: ignore[attr-defined]
                f"Sentinels say, seen a server whose role is {role!r}; they may soon learn of a failover"
            )


class _TcpAtPrimary(_AtPrimary, SentinelManagedConnection):
    pass


class _TlsAtPrimary(_AtPrimary, SentinelManagedSSLConnection):
    pass


class _Sentinels(Sentinel):
    """Sentinels asked in turn, the one that answered last first; errors say what each of them did."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Where the primary is.

        Raises:
            ConnectionError: none of them names one that lives.
        """
        wrong = []
        # A copy: searches run beside each other, and each of them may change the order.
        for sentinel in list(self.sentinels):
            try:
                known: Any = await sentinel.sentinel_masters()
                state = known.get(service_name)
            except AuthenticationError as error:
                wrong.append(f"{_address(sentinel)} refused the login ({error}): set redis_sentinel_password")
                continue
            except (RedisError, OSError) as error:
                wrong.append(f"{_address(sentinel)}: {error or type(error).__name__}")
                continue
            if state and self.check_master_state(state, service_name):
                self.sentinels.remove(sentinel)
                self.sentinels.insert(0, sentinel)
                return str(state["ip"]), int(state["port"])
            wrong.append(
                f"{_address(sentinel)} {'takes it for dead' if state else 'knows none of that name'}"
            )
        raise ConnectionError(
            f"expected Sentinels to name the primary of {service_name!r}, seen {'; '.join(wrong)}"
        )


def _address(sentinel: Any) -> str:
    options = sentinel.connection_pool.connection_kwargs
    return f"{options['host']}:{options['port']}"


class _PrimaryPool(SentinelConnectionPool):
    """Connections to a primary; closing all of them closes those to its Sentinels too.

    A primary that was voted out but lives, or that only the Sentinels don't reach, goes on taking writes for
    seconds, all of which are lost. So while it is used, Sentinels are asked once a second, beside commands.
    """

    def __init__(self, service: str, sentinels: _Sentinels, **options: Any) -> None:
        super().__init__(service, sentinels, **options)  # type: ignore[no-untyped-call]
        self._looked_s = -math.inf
        self._looking: asyncio.Task[None] | None = None

    async def get_connection(self, *arguments: Any, **options: Any) -> Any:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._looked_s >= LOOK_EVERY_S and (self._looking is None or self._looking.done()):
            self._looked_s = now_s
            self._looking = asyncio.create_task(self._look())
        return await super().get_connection(*arguments, **options)  # type: ignore[no-untyped-call]

    async def _look(self) -> None:
        """Leave a server that is the primary no more; while nobody tells of another, stay."""
        with contextlib.suppress(RedisError, OSError):
            found = await self.sentinel_manager.discover_master(self.service_name)
            if self.master_address in (None, found):
                return
            probe = self.make_connection()  # type: ignore[no-untyped-call]
            try:
                await probe.connect_to(found)
            finally:
                await probe.disconnect(nowait=True)
            self.master_address = found
            await super().disconnect(inuse_connections=True)

    async def disconnect(self, inuse_connections: bool = True) -> None:
        if inuse_connections and self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.aclose()


def sentinels_of(client: Any) -> tuple[str, list[tuple[str, Any]]]:
    """The name that a client asks for, and each of its Sentinels as address and client; ("", []) without."""
    pool = client.connection_pool
    if not isinstance(pool, _PrimaryPool):
        return "", []
    found = [(_address(sentinel), sentinel) for sentinel in pool.sentinel_manager.sentinels]
    return str(pool.service_name), sorted(found, key=lambda pair: pair[0])


def make_pool(url: str, **options: Any) -> ConnectionPool:
    """A pool of such connections for `redis://`, `rediss://` or `unix://` URLs.

    Raises:
        ValueError: the URL has another scheme.
    """
    parsed: dict[str, Any] = dict(parse_url(url))
    theirs = parsed.pop("connection_class", Connection)
    ours = {SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}.get(theirs, _Tcp)
    return ConnectionPool(connection_class=ours, **{**options, **parsed})


def make_sentinel_pool(
    address: SentinelAddress,
    *,
    login: Mapping[str, str | None],
    asking: Mapping[str, str | None],
    common: Mapping[str, Any],
    max_connections: int,
) -> ConnectionPool:
    """A pool of such connections to the primary that Sentinels name.

    Args:
        login: `username` and `password` at the primary where the address has none.
        asking: the same at the Sentinels.
        common: further options of every connection, to either.
    """
    timeouts = {
        name: min(float(common[name]), SENTINEL_TIMEOUT_S)
        for name in ("socket_timeout", "socket_connect_timeout")
    }
    sentinels = _Sentinels([])  # type: ignore[no-untyped-call]
    sentinels.sentinels = [
        Redis.from_pool(
            ConnectionPool(
                connection_class=_Tls if address.has_tls else _Tcp,
                **{**common, **timeouts, **asking, "host": host, "port": port},
            )
        )
        for host, port in address.sentinels
    ]
    own = {"username": address.user or None, "password": address.password or None}
    return _PrimaryPool(
        address.service,
        sentinels,
        connection_class=_TlsAtPrimary if address.has_tls else _TcpAtPrimary,
        max_connections=max_connections,
        db=address.database,
        **{**common, **login, **{name: value for name, value in own.items() if value}},
    )
