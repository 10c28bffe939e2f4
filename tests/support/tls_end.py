"""A TLS end before a server that is built without it: the client's side of the connection is the real one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

from tests.support.certificates import Certificates

HANDSHAKE = b"\x16"
"""The first byte of a TLS connection, and of none of Redis's protocol."""


@contextlib.asynccontextmanager
async def tls_end(port: int, certificates: Certificates, *, also_plain: bool = False) -> AsyncIterator[int]:
    """A port that speaks TLS, wants a client's certificate, and passes the plain text on to `port`.

    Args:
        also_plain: it passes plain connections on too, for servers that talk to each other so.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificates.ca))
    context.load_cert_chain(certificates.cert, certificates.key)
    context.verify_mode = ssl.CERT_REQUIRED
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    async with asyncio.TaskGroup() as group:
        accepting = group.create_task(_accept(listening, port, context, group, also_plain=also_plain))
        try:
            yield listening.getsockname()[1]
        finally:
            accepting.cancel()
            await asyncio.wait([accepting])
            listening.close()


async def _accept(
    listening: socket.socket,
    port: int,
    context: ssl.SSLContext,
    group: asyncio.TaskGroup,
    *,
    also_plain: bool,
) -> None:
    serving: set[asyncio.Task[None]] = set()
    try:
        while True:
            accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
            task = group.create_task(_serve(accepted, port, context, also_plain=also_plain))
            serving.add(task)
            task.add_done_callback(serving.discard)
    finally:
        for task in serving:
            task.cancel()


async def _serve(accepted: socket.socket, port: int, context: ssl.SSLContext, *, also_plain: bool) -> None:
    with contextlib.ExitStack() as ends, contextlib.suppress(OSError):
        ends.callback(accepted.close)
        is_tls = not also_plain or await _first_byte(accepted) == HANDSHAKE
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader), accepted, ssl=context if is_tls else None
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        ends.callback(transport.abort)
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        ends.callback(inner_writer.transport.abort)
        await asyncio.gather(_pass_on(reader, inner_writer), _pass_on(inner_reader, writer))


async def _first_byte(accepted: socket.socket) -> bytes:
    """What a connection begins with, left for its reader."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(accepted, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(accepted)
    return accepted.recv(1, socket.MSG_PEEK)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
