"""A TCP proxy that can be cut and slowed: a bad network between one member and one server.

A cut is silence, as a network's is: connections stay open, nothing arrives, new ones get no answer, and what
was under way arrives once the cut is healed. Each delayed piece waits for the one before it, so a slow
network is narrow too. Lines of a server's may be replaced: addresses that it names, by those that lead here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import Self

PIECE_BYTES = 1 << 16
END = b"\r\n"


class TcpProxy:
    """One listener on 127.0.0.1 in front of one server: `async with TcpProxy(host, port) as proxy`.

    Args:
        lines: what the server's lines become that are exactly this, less their end (CR LF).
    """

    def __init__(self, host: str, port: int, *, lines: Mapping[bytes, bytes] | None = None) -> None:
        self._target = (host, port)
        self._lines = lines or {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._whole = asyncio.Event()
        self._whole.set()
        self.delay_s = 0.0
        """What each piece waits, either way."""
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def is_cut(self) -> bool:
        """Whether nothing passes."""
        return not self._whole.is_set()

    def cut(self) -> None:
        """Let nothing pass."""
        self._whole.clear()

    def heal(self) -> None:
        """Let everything pass at once, also what waited."""
        self.delay_s = 0.0
        self._whole.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._whole.wait()
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(*self._target)
                await self._join(reader, writer, far_reader, far_writer)
        finally:
            writer.close()

    async def _join(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Carry both ways until either side ends, which ends both."""
        there = asyncio.create_task(self._carry(reader, far_writer, {}))
        back = asyncio.create_task(self._carry(far_reader, writer, self._lines))
        try:
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in (there, back):
                way.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
            far_writer.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lines: Mapping[bytes, bytes]
    ) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                if lines:
                    # An unfinished line waits for its end: replies that are whole end with one.
                    *whole, rest = (rest + piece).split(END)
                    piece = b"".join(lines.get(line, line) + END for line in whole)
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._whole.wait()
                writer.write(piece)
                await writer.drain()
            await self._whole.wait()  # nor does an end pass through a cut
            writer.write(rest)
