"""One member's network to Redis: a proxy before every server it may talk to, cut, slowed and healed as one.

Sentinels name the primary by its own address. What they say through such a network names its proxies instead,
as addresses that are announced do behind a NAT: their own ways of finding a primary stay the member's.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from dispatcher.errors import ServerError
from dispatcher.local.processes import HOST
from dispatcher.local.sentinel import ReplicatedValkey, sentinel_url
from dispatcher.local.tcp_proxy import TcpProxy
from dispatcher.local.valkey import ValkeyServer


class RedisNetwork:
    """`async with RedisNetwork(servers) as network`; the servers have their ports by then."""

    def __init__(self, redis: ValkeyServer | ReplicatedValkey) -> None:
        self._redis = redis
        self._proxies: list[TcpProxy] = []
        self._stack = AsyncExitStack()
        self.url = ""
        """Redis, for the member behind this network."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if isinstance(self._redis, ValkeyServer):
                proxy = await self._before(stack, self._redis, {})
                self.url = f"redis://{HOST}:{proxy.port}/0"
            else:
                ports: dict[bytes, bytes] = {}
                for server in self._redis.servers:
                    proxy = await self._before(stack, server, {})
                    ports |= renamed_port(server.port, proxy.port)
                sentinels = [await self._before(stack, one, ports) for one in self._redis.sentinels]
                self.url = sentinel_url(proxy.port for proxy in sentinels)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _before(
        self, stack: AsyncExitStack, server: ValkeyServer, lines: dict[bytes, bytes]
    ) -> TcpProxy:
        proxy = await stack.enter_async_context(TcpProxy(HOST, server.port, lines=lines))
        self._proxies.append(proxy)
        return proxy

    def cut(self) -> None:
        """Let nothing pass."""
        for proxy in self._proxies:
            proxy.cut()

    def slow(self, delay_s: float) -> None:
        """Let each piece wait, either way."""
        for proxy in self._proxies:
            proxy.delay_s = delay_s

    def heal(self) -> None:
        """Let everything pass at once, also what waited."""
        for proxy in self._proxies:
            proxy.heal()


def renamed_port(port: int, proxy_port: int) -> dict[bytes, bytes]:
    """What a Sentinel's line that is a port becomes.

    Raises:
        ServerError: it would be longer or shorter, which the line before it tells.
    """
    own, other = str(port).encode(), str(proxy_port).encode()
    if len(own) != len(other):
        raise ServerError(
            f"expected ports of as many digits, seen {port} and {proxy_port}: let the system give ports "
            "from 10000 on (net.ipv4.ip_local_port_range)"
        )
    return {own: other}
