"""The proxy that cuts and slows: bytes pass whole, a cut is silent, what waited arrives afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dispatcher.local.processes import free_port
from dispatcher.local.tcp_proxy import TcpProxy
from tests.support.wait import wait_until

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo:
    """A server that says what it hears, and counts what it heard."""

    def __init__(self) -> None:
        self.heard = 0
        self.connections = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while data := await reader.read(1 << 16):
            self.heard += len(data)
            writer.write(data)
            await writer.drain()
        self.connections -= 1
        writer.close()


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Echo, TcpProxy]]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    echo.port = server.sockets[0].getsockname()[1]
    async with TcpProxy("127.0.0.1", echo.port) as proxy:
        yield echo, proxy
    await wait_until(lambda: echo.connections == 0, "the proxy's own connections to end")
    server.close()
    await server.wait_closed()


@asynccontextmanager
async def connected(proxy: TcpProxy) -> AsyncIterator[Ends]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_every_byte_passes_both_ways() -> None:
    async with proxied() as (_, proxy), connected(proxy) as (reader, writer):
        sent = bytes(range(256)) * 4096
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent


async def test_nothing_passes_a_cut_and_all_of_it_arrives_once_healed() -> None:
    async with proxied() as (echo, proxy), connected(proxy) as (reader, writer):
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        proxy.cut()
        writer.write(b"during")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.read(1)
        assert (echo.heard, proxy.is_cut) == (6, True)
        proxy.heal()
        assert await reader.readexactly(6) == b"during"


async def test_a_new_connection_gets_no_answer_during_a_cut_nor_is_it_refused() -> None:
    async with proxied() as (echo, proxy):
        proxy.cut()
        async with connected(proxy) as (reader, writer):
            writer.write(b"hello")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await reader.read(1)
            assert echo.connections == 0
            proxy.heal()
            assert await reader.readexactly(5) == b"hello"


async def test_whole_lines_of_the_server_are_replaced_however_they_arrive() -> None:
    async with proxied() as (echo, _), TcpProxy("127.0.0.1", echo.port, lines={b"111": b"222"}) as proxy:
        async with connected(proxy) as (reader, writer):
            for piece in (b"$3\r\n11", b"1\r", b"\n:1111\r\n111 \r\n\r\n1", b"11\r\n"):
                heard = echo.heard
                writer.write(piece)
                await writer.drain()
                await wait_until(lambda heard=heard: echo.heard > heard, "the server to hear it")  # type: ignore[misc]
            expected = b"$3\r\n222\r\n:1111\r\n111 \r\n\r\n222\r\n"
            assert await reader.readexactly(len(expected)) == expected


async def test_what_has_no_end_is_no_line_and_passes_with_the_servers_end() -> None:
    def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"111\r\n111")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with (
            TcpProxy("127.0.0.1", port, lines={b"111": b"222"}) as proxy,
            connected(proxy) as (reader, _),
        ):
            assert await reader.read() == b"222\r\n111"


async def test_a_slow_network_delays_each_way() -> None:
    async with proxied() as (_, proxy), connected(proxy) as (reader, writer):
        proxy.delay_s = 0.1
        began_s = asyncio.get_running_loop().time()
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        assert asyncio.get_running_loop().time() - began_s >= 0.2
        proxy.heal()
        assert proxy.delay_s == 0


async def test_either_end_closing_ends_the_other() -> None:
    async with proxied() as (echo, proxy):
        async with connected(proxy) as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            assert echo.connections == 1
        await wait_until(lambda: echo.connections == 0, "the server to see the client go")


async def test_a_server_that_is_away_closes_the_connection() -> None:
    async with TcpProxy("127.0.0.1", free_port()) as proxy, connected(proxy) as (reader, _):
        assert await reader.read(1) == b""


async def test_leaving_closes_what_is_open_also_in_a_cut() -> None:
    async with proxied() as (_, proxy):
        async with connected(proxy) as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            proxy.cut()
            await proxy.__aexit__(None, None, None)
            assert await reader.read(1) == b""
