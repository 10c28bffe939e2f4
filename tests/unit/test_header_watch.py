"""How long a connection may take for a request's headers, in virtual time, with the HTTP library itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from dispatcher.frontend.header_watch import HeaderWatch
from tests.support.sim.loop import run

TIMEOUT_S = 30.0
HEAD = b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"


class Wire(asyncio.Transport):
    """What a server's end of a connection is told to do."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed_at_s: float | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take what is sent."""
        assert self.closed_at_s is None, "written after it was closed"
        self.written += bytes(data)

    def close(self) -> None:
        """Note when."""
        self.closed_at_s = self.closed_at_s or asyncio.get_running_loop().time()

    abort = close

    def is_closing(self) -> bool:
        """Whether it is closed."""
        return self.closed_at_s is not None

    def pause_reading(self) -> None:
        """Nothing comes of itself."""

    resume_reading = pause_reading


class Connection:
    """A client's side of one connection to a server whose handler takes `work_s`."""

    def __init__(self, work_s: float) -> None:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            self.watch.begin(request.protocol)
            try:
                await request.read()
                await asyncio.sleep(work_s)
                return web.Response(text="done")
            finally:
                self.watch.end(request.protocol)

        self.watch = HeaderWatch(web.Server(handle), TIMEOUT_S)
        self.wire = Wire()
        self.protocol = self.watch()
        self.protocol.connection_made(self.wire)
        self.began_s = asyncio.get_running_loop().time()

    def send(self, data: bytes) -> None:
        """Bytes arrive, unless the server has closed."""
        if self.wire.closed_at_s is None:
            self.protocol.data_received(data)

    async def at(self, after_s: float) -> None:
        """Wait until so long after the beginning."""
        await asyncio.sleep(self.began_s + after_s - asyncio.get_running_loop().time())

    @property
    def closed_after_s(self) -> float | None:
        """When the server closed, from the beginning."""
        at_s = self.wire.closed_at_s
        return None if at_s is None else round(at_s - self.began_s, 3)

    def end(self) -> None:
        """The connection is gone."""
        self.protocol.connection_lost(None)
        assert not self.watch._watched


def with_connection(body: Callable[[Connection], Awaitable[None]], work_s: float = 0.0) -> None:
    """Run `body` in virtual time."""

    async def main() -> None:
        connection = Connection(work_s)
        await body(connection)
        connection.end()
        await asyncio.sleep(0.1)

    run(main())


def test_headers_that_drip_in_get_a_408_at_the_limit() -> None:
    async def body(one: Connection) -> None:
        for number, byte in enumerate(HEAD):
            await one.at(number)
            one.send(bytes([byte]))
        await one.at(100)
        assert one.closed_after_s == TIMEOUT_S
        assert one.wire.written.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert b"headers: expected them within 30 s" in one.wire.written

    with_connection(body)


def test_a_connection_that_sends_nothing_is_closed_without_a_word() -> None:
    async def body(one: Connection) -> None:
        await one.at(100)
        assert (one.closed_after_s, one.wire.written) == (TIMEOUT_S, b"")

    with_connection(body)


@pytest.mark.parametrize("body_after_s", [0.0, 90.0])
def test_a_request_whose_headers_are_whole_has_its_own_time(body_after_s: float) -> None:
    async def body(one: Connection) -> None:
        one.send(HEAD + b"\r\n")
        await one.at(body_after_s)
        one.send(b"body")
        await one.at(body_after_s + 299)
        assert (one.closed_after_s, one.wire.written) == (None, b"")
        await one.at(body_after_s + 301)
        assert one.wire.written.startswith(b"HTTP/1.1 200 ")
        assert one.closed_after_s is None

    with_connection(body, work_s=300.0)


def test_the_next_request_on_a_connection_is_watched_from_its_first_byte() -> None:
    async def body(one: Connection) -> None:
        one.send(HEAD + b"\r\nbody")
        await one.at(20)
        assert one.wire.written.startswith(b"HTTP/1.1 200 ")
        one.send(b"POST /sl")
        await one.at(49)
        assert b" 408 " not in one.wire.written
        one.send(b"ow HTTP")
        await one.at(60)
        assert one.closed_after_s == 20 + TIMEOUT_S
        assert one.wire.written.count(b" 408 ") == 1

    with_connection(body)
