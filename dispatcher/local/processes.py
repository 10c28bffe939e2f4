"""Child servers that never outlive us and never share a data folder or a port.

A child dies with its parent (Linux parent-death signal), holds a lock on its folder for exactly its
own lifetime (the locked descriptor is inherited and our copy closed), and listens on a port that
stays reserved for it over kills and restarts. Every local server is made of these three parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from dispatcher.errors import ServerError

HOST = "127.0.0.1"
LOCK_FILE = ".lock"
LOCK_WAIT_S = 1.0
"""A killed server's own children may hold its lock for a moment longer."""
FREEZE_WAIT_S = 1.0
POLL_S = 0.01
TAIL_BYTES = 4096
TAIL_LINES = 20
PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """A TCP port that was free on 127.0.0.1 a moment ago; use `ReservedPort` where the moment matters."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class ReservedPort:
    """A port of 127.0.0.1 that the system gives to nobody else while this object holds it.

    On Linux a bound socket that does not listen keeps the number out of the system's hands, and yet
    lets one server with SO_REUSEADDR listen there. Elsewhere only the check at the start remains.
    """

    def __init__(self, port: int = 0) -> None:
        """Take `port`, or any free one for 0.

        Raises:
            ServerError: another process listens there, or the number is not a port we may use.
        """
        holder = socket.socket()
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((HOST, port))
        except (OSError, OverflowError) as error:
            holder.close()
            raise ServerError(
                f"expected port {port} of {HOST} to be free, but binding it failed: {error}; "
                "stop the process that listens there, or give port 0 for any free one"
            ) from error
        self.port = int(holder.getsockname()[1])
        self._holder = holder
        if sys.platform != "linux":
            holder.close()

    def release(self) -> None:
        """Give the number back; a server that listens there goes on."""
        self._holder.close()


class ServerProcess:
    """One server process on one data folder: started, killed, frozen and started again."""

    def __init__(self, name: str, folder: Path, *, own_session: bool = True) -> None:
        """Describe the process; nothing starts yet.

        Args:
            name: what messages call it.
            folder: its data folder, made at start; holds the lock and `<name>.log`.
            own_session: keep a Ctrl-C at the terminal from reaching it, so that it stops when told to.
        """
        self.name = name
        self.folder = folder.absolute()
        self.log_path = self.folder / f"{name}.log"
        self.start_s = 0.0
        """How long the last start took until ready."""
        self._own_session = own_session
        self._child: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._is_killed = False

    @property
    def is_running(self) -> bool:
        """Whether the process exists, frozen or not."""
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the last start, 0 before the first."""
        return self._child.pid if self._child else 0

    async def start(
        self,
        argv: Sequence[str],
        *,
        ready: Callable[[], Awaitable[bool]],
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process and return once `ready` holds.

        The process dies with the *thread* that calls this: call from one that lives as long as the
        server should, such as the main thread.

        Raises:
            ServerError: the folder is in use, the program is missing, it exited, or it was not ready
                in time; the last two carry the end of its log.
        """
        if self._is_killed:
            await self.wait_exit()
        if self.is_running:
            raise ServerError(f"{self.name} already runs on {self.folder} as pid {self.pid}; stop it first")
        began = time.monotonic()
        lock = await self._lock_folder()
        try:
            self._spawn(argv, lock, environment)
        finally:
            os.close(lock)
        try:
            await self._until_ready(ready, began + timeout_s, timeout_s)
        except BaseException:
            self.kill()
            await self.wait_exit()
            raise
        self.start_s = time.monotonic() - began

    async def stop(self, grace_s: float = 10.0) -> None:
        """Ask the process to end, kill it after `grace_s`; return once it is gone. Also fine when it is."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # a frozen process would not see the SIGTERM
        try:
            async with asyncio.timeout(grace_s):
                await self.wait_exit()
        except TimeoutError:
            self.kill()
            await self.wait_exit()

    async def wait_exit(self) -> None:
        """Return once the process is gone."""
        while self.is_running:  # noqa: ASYNC110 - servers outlive event loops, so no loop's watcher has them
            await asyncio.sleep(POLL_S)

    def kill(self) -> None:
        """SIGKILL, without waiting for the end; `start` waits for it."""
        self._is_killed = True
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing; returns once all its threads stand."""
        self._signal(signal.SIGSTOP)
        until = time.monotonic() + FREEZE_WAIT_S
        while self.is_running and not _has_stopped(self.pid) and time.monotonic() < until:
            time.sleep(0.001)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def log_since_start(self) -> str:
        """What this start has written so far."""
        with contextlib.suppress(FileNotFoundError), self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")
        return ""

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send_signal(number)

    async def _lock_folder(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        until = time.monotonic() + LOCK_WAIT_S
        try:
            while not _try_lock(descriptor):
                if time.monotonic() > until:
                    holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                    raise ServerError(
                        f"expected {self.folder} to be free for {self.name}, but the process with "
                        f"pid {holder} holds it; stop that process or give another folder"
                    )
                await asyncio.sleep(POLL_S)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _spawn(self, argv: Sequence[str], lock: int, environment: Mapping[str, str] | None) -> None:
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._child = subprocess.Popen(
                    argv,
                    cwd=self.folder,
                    env={**os.environ, **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                    start_new_session=self._own_session,
                    preexec_fn=death_with_parent(),
                )
            except OSError as error:
                raise ServerError(f"expected {self.name} to start from {argv[0]}, but: {error}") from error
        self._is_killed = False
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{self.pid}\n".encode(), 0)

    async def _until_ready(
        self, ready: Callable[[], Awaitable[bool]], until: float, timeout_s: float
    ) -> None:
        while True:
            if not self.is_running:
                code = self._child.returncode if self._child else None
                raise ServerError(f"{self.name} ended with status {code} instead of serving.{self._tail()}")
            if await ready():
                return
            if time.monotonic() > until:
                raise ServerError(f"{self.name} was not ready within {timeout_s} s.{self._tail()}")
            await asyncio.sleep(POLL_S)

    def _tail(self) -> str:
        lines = self.log_since_start()[-TAIL_BYTES:].splitlines()[-TAIL_LINES:]
        return "".join(f"\n    {line}" for line in [f" The end of {self.log_path}:", *lines])


def _has_stopped(pid: int) -> bool:
    if not hasattr(os, "waitid"):
        return True
    options = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, pid, options) is not None
    except ChildProcessError:
        return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def accepts_connections(port: int) -> bool:
    """Whether something listens on `port` of 127.0.0.1."""
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def death_with_parent() -> Callable[[], None] | None:
    """What the child does before it becomes the server; nothing where the system lacks prctl."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    parent = os.getpid()

    def arm() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before the signal was armed
            os._exit(1)

    return arm
