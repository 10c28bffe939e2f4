"""Services on a loop in a thread of their own, and raw HTTP to them: what comes back, what was logged."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from dispatcher.telemetry.logging import NoFault

ANSWER_S = 5.0
Services = Callable[[], AbstractAsyncContextManager[dict[str, int]]]


@dataclass(frozen=True)
class Answer:
    """One answer; `status` 0 for none."""

    status: int
    body: bytes = b""


@dataclass
class Probed:
    """Running services: their ports, and what they logged that no input may cause."""

    ports: dict[str, int]
    complaints: list[str] = field(default_factory=list)

    def ask(self, service: str, raw: bytes, *, method: str = "GET", whole: bool = True) -> Answer:
        """Send bytes; the answer. `whole` is False for what its sender breaks off: none is waited for."""
        with socket.create_connection(("127.0.0.1", self.ports[service]), timeout=ANSWER_S) as connection:
            with contextlib.suppress(ConnectionError):  # refused before its end, as what is too large
                connection.sendall(raw)
            if not whole:
                return Answer(0)
            response = _Response(connection, method=method)
            response.begin()
            return Answer(response.status, response.read())


class _Response(http.client.HTTPResponse):
    """An answer in whatever version: the one that was asked in."""

    def _read_status(self) -> tuple[str, int, str]:
        _, status, reason = super()._read_status()  # type: ignore[misc]
        return "HTTP/1.1", status, reason


class _Complaints(logging.Handler):
    """Takes errors of aiohttp and asyncio, and ours."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._found = found
        self.addFilter(NoFault())

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        fields = getattr(record, "fields", "")
        self._found.append(f"{record.name}: {record.getMessage()} {fields} {error!r}")


@contextlib.contextmanager
def probed(services: Services, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[Probed]:
    """Run services, which tell their ports by name, in a thread."""
    started: queue.Queue[Any] = queue.Queue()
    complaints: list[str] = []

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(lambda _, context: complaints.append(f"loop: {context}"))
        async with services() as ports:
            started.put((ports, loop, stop))
            await stop.wait()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(main())
        except BaseException as error:
            started.put(error)
            complaints.append(f"ended: {error!r}")

    handler = _Complaints(complaints)
    logging.getLogger().addHandler(handler)
    thread = threading.Thread(target=run, name="probed")
    thread.start()
    try:
        found = started.get(timeout=30)
        if isinstance(found, BaseException):
            raise found
        ports, loop, stop = found
        try:
            yield Probed(ports, complaints)
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join(timeout=30)
        logging.getLogger().removeHandler(handler)
