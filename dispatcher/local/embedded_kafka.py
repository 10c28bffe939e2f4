"""A Kafka-protocol broker for machines without Java: the binary that the `noida-db` wheel carries.

It has transactions and read_committed, but it is not durable: its data is one file, rewritten about
a second after a change, so `kill()` may lose what was acknowledged. Local use only.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Self

from dispatcher.errors import ServerError
from dispatcher.local.processes import HOST, ReservedPort, ServerProcess, accepts_connections

START_TIMEOUT_S = 30.0


def shipped_binary(package: str = "noida_db") -> Path:
    """Find the broker inside the wheel, without importing it.

    Raises:
        ServerError: the wheel is not installed or carries no binary.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            f"the embedded broker needs the package {package!r}, which is not installed; "
            "install flexlb[local], or point FLEXLB_KAFKA at a broker of your own"
        )
    binary = Path(spec.submodule_search_locations[0]) / "noida-db"
    if not binary.is_file():
        raise ServerError(
            f"expected the embedded broker's binary at {binary}, but there is none; "
            "reinstall flexlb[local], or point FLEXLB_KAFKA at a broker of your own"
        )
    return binary


def why_unavailable() -> str | None:
    """Why this machine can't run the embedded broker, None when it can."""
    try:
        shipped_binary()
    except ServerError as error:
        return str(error)
    return None


class EmbeddedKafka:
    """One embedded broker on one folder. End every use with `stop()`, also after `kill()`."""

    def __init__(self, folder: Path, *, port: int | None = 0, binary: Path | None = None) -> None:
        """Describe the broker; nothing starts yet.

        Args:
            folder: where its data lives; one broker at a time.
            port: its port on 127.0.0.1; 0 or None for one that the system gives at the first start.
            binary: another binary than the one in the wheel.
        """
        self._process = ServerProcess("embedded-kafka", folder)
        self._port = port or 0
        self._reserved: ReservedPort | None = None
        self._binary = binary

    @property
    def folder(self) -> Path:
        """Its data folder."""
        return self._process.folder

    @property
    def port(self) -> int:
        """Its port; the same over restarts. 0 before the first start when the system is to give it."""
        return self._port

    @property
    def bootstrap(self) -> str:
        """Its address for Kafka clients."""
        return f"{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether its process exists, frozen or not."""
        return self._process.is_running

    @property
    def start_s(self) -> float:
        """How long the last start took, seconds."""
        return self._process.start_s

    @property
    def description(self) -> str:
        """One line for people."""
        return f"embedded broker at {self.bootstrap}, NOT durable, data in {self.folder}"

    async def start(self) -> None:
        """Start and return once it accepts connections.

        Raises:
            ServerError: no binary, port or folder in use, or it did not come up.
        """
        binary = self._binary or shipped_binary()
        if self._reserved is None:
            self._reserved = ReservedPort(self._port)
            self._port = self._reserved.port
        try:
            await self._process.start(
                [str(binary), "start", *self._arguments()], ready=self._accepts, timeout_s=START_TIMEOUT_S
            )
        except BaseException:
            self._release()
            raise

    async def stop(self, grace_s: float = 10.0) -> None:
        """Stop; the data of a clean stop is kept."""
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

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _arguments(self) -> list[str]:
        return [
            *("--data-dir", str(self.folder / "data")),
            *("--host", HOST),
            *("--only", "kafka"),
            *("--kafka-port", str(self._port)),
        ]

    async def _accepts(self) -> bool:
        return await accepts_connections(self._port)

    def _release(self) -> None:
        if self._reserved is not None:
            self._reserved.release()
            self._reserved = None
