"""A listening socket whose end loses nobody: who was let in by the kernel is served, later ones are refused.

Closing a listening socket resets the connections that the kernel has completed and nobody has accepted,
with requests that their clients believe to be on their way. So those are accepted first.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

BACKLOG = 128


class Listener:
    """Accepts connections for one protocol."""

    def __init__(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._protocol = protocol
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; the port.

        Raises:
            OSError: the port is in use.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, host, port, backlog=BACKLOG)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Listen no more; connections go on."""
        server, self._server = self._server, None
        if server is None:
            return
        loop = asyncio.get_running_loop()
        waiting: list[socket.socket] = []
        for listening in server.sockets:
            loop.remove_reader(listening.fileno())
            with listening.dup() as twin:
                twin.setblocking(False)
                waiting += _accepted(twin)
        # Nothing may be awaited between the last look and this.
        server.close()
        for connection in waiting:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)


def _accepted(listening: socket.socket) -> list[socket.socket]:
    """Accept whoever waits."""
    found = []
    while True:
        try:
            found.append(listening.accept()[0])
        except OSError:  # nobody more, or one that left meanwhile
            return found
