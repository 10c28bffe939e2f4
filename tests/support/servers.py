"""One real Kafka broker for a whole test session, and what happens when there can be none.

With pytest-xdist the workers share it: each user holds a shared lock for its session, and the worker
that started the broker stops it at its own session's end, after an exclusive lock on the same file,
so when every other user has left or died. The kernel counts the users; a crash can't leak one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, TypeVar

import pytest

from dispatcher.backends.connect import KafkaClients, connect_kafka
from dispatcher.errors import ServerError
from dispatcher.local.apache_kafka import ApacheKafka, provision
from dispatcher.local.processes import accepts_connections

T = TypeVar("T")
NO_KAFKA = "no Apache Kafka: "
"""How the reason of every skip for want of a broker begins."""
REQUIRE_KAFKA = "FLEXLB_REQUIRE_KAFKA"


@dataclass(frozen=True, kw_only=True)
class KafkaAddress:
    """Where the session's broker is. Tests share it: never kill it, use topics of your own `pool`."""

    bootstrap: str

    @property
    def clients(self) -> KafkaClients:
        """Constructors of clients that point at it."""
        return connect_kafka(self.bootstrap)


def run(work: Coroutine[object, object, T]) -> T:
    """Run a coroutine outside any event loop, leaving the current loop of the thread alone."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(work)


@functools.cache
def why_no_kafka() -> str | None:
    """Why Apache Kafka can't run here, None when it can; fetches its jars the first time."""
    try:
        provision()
    except ServerError as error:
        return str(error)
    return None


def give_up(reason: str) -> NoReturn:
    """Skip the test for want of a broker, or fail it where one is required."""
    if os.environ.get(REQUIRE_KAFKA) == "1":
        pytest.fail(f"{NO_KAFKA}{reason} ({REQUIRE_KAFKA}=1 forbids to skip)", pytrace=False)
    pytest.skip(f"{NO_KAFKA}{reason}")


class SharedKafka:
    """This process's share in the session's broker."""

    def __init__(self, folder: Path) -> None:
        """Meet the others in `folder`, which every worker of the session names alike."""
        self._folder = folder
        self._users: IO[str] | None = None
        self._own: ApacheKafka | None = None

    def join(self) -> KafkaAddress:
        """Use the broker, starting it if nobody has.

        Raises:
            ServerError: it can't be provisioned or started.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._users is None:
            self._users = (self._folder / "users.lock").open("w")
            fcntl.flock(self._users, fcntl.LOCK_SH)
        with self._starting():
            if (port := self._known_port()) and run(accepts_connections(port)):
                return KafkaAddress(bootstrap=f"127.0.0.1:{port}")
            self._own = ApacheKafka(self._folder / f"kafka-{os.getpid()}")
            run(self._own.start())
            self._state.write_text(json.dumps({"port": self._own.port, "pid": self._own.pid}))
            return KafkaAddress(bootstrap=self._own.bootstrap)

    def leave(self) -> None:
        """Give up the share; whoever started the broker waits for the others and stops it."""
        if self._users is None:
            return
        if self._own is not None:
            fcntl.flock(self._users, fcntl.LOCK_EX)
            self._state.unlink(missing_ok=True)
            run(self._own.stop())
            shutil.rmtree(self._own.folder, ignore_errors=True)
            self._own = None
        self._users.close()
        self._users = None

    @property
    def _state(self) -> Path:
        return self._folder / "state.json"

    def _known_port(self) -> int | None:
        try:
            return int(json.loads(self._state.read_text())["port"])
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        with (self._folder / "start.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
