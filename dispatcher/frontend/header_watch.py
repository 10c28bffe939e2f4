"""Connections that bring no whole request in time: each would hold a socket and memory for ever (slowloris).

A connection has so long from its beginning, and from the first byte after an answer, until a request's
headers are complete. One that sent a part of them is told 408; one that sent nothing is closed. The HTTP
library limits how long a connection may be idle after an answer, and a body has a limit of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dispatcher.frontend.problem import Problem


class HeaderWatch:
    """Makes protocols for connections, and watches each for as long as it brings headers.

    Args:
        make: the HTTP library's protocol of one connection.
        timeout_s: for the headers of a request to come in.
    """

    def __init__(self, make: Callable[[], asyncio.Protocol], timeout_s: float) -> None:
        self._make = make
        self._timeout_s = timeout_s
        self._watched: dict[asyncio.BaseProtocol, _Watched] = {}

    def __call__(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        inner = self._make()
        watched = _Watched(inner, self._timeout_s, lambda: self._watched.pop(inner, None))
        self._watched[inner] = watched
        return watched

    def begin(self, inner: asyncio.BaseProtocol) -> None:
        """Note that a request has come in whole but for its body."""
        if (watched := self._watched.get(inner)) is not None:
            watched.begin()

    def end(self, inner: asyncio.BaseProtocol) -> None:
        """Note that it is answered."""
        if (watched := self._watched.get(inner)) is not None:
            watched.end()


class _Watched(asyncio.Protocol):
    """Passes everything on to the HTTP library, and knows whether headers are awaited."""

    def __init__(self, inner: asyncio.Protocol, timeout_s: float, forget: Callable[[], object]) -> None:
        self._inner = inner
        self._timeout_s = timeout_s
        self._forget = forget
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_answering = False
        self._has_part = False

    def begin(self) -> None:
        self._is_answering, self._has_part = True, False
        self._stop_timer()

    def end(self) -> None:
        self._is_answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._start_timer()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if not self._is_answering:
            self._has_part = True
            self._start_timer()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        self._forget()
        self._inner.connection_lost(error)

    def _start_timer(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._timeout_s, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        transport = self._transport
        if self._is_answering or transport is None or transport.is_closing():
            return
        if self._has_part:
            transport.write(_too_slow(self._timeout_s))
        transport.close()


def _too_slow(timeout_s: float) -> bytes:
    message = f"headers: expected them within {timeout_s:g} s, seen a part"
    body = Problem(status=408, message=message).body
    head = (
        "HTTP/1.1 408 Request Timeout\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body
