"""Every producer waits for all replicas and is idempotent: what Kafka acknowledged stays, once."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import dispatcher
import workers_agent
from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.dead_log import DeadLog
from dispatcher.backends.outcome_log import OutcomeLog
from dispatcher.backends.reply_log import ReplyLog
from dispatcher.client.client import Client
from dispatcher.errors import LogUnavailable
from dispatcher.protocol.names import Lane, Names

PRODUCERS = {
    "dispatcher/backends/dead_log.py",
    "dispatcher/backends/outcome_log.py",
    "dispatcher/backends/reply_log.py",
    "dispatcher/client/client.py",
    "dispatcher/doctor/ask_kafka.py",
}


class Recorder:
    """A client that keeps its arguments, and a broker that is away."""

    made: list[dict[str, Any]]

    def __init__(self) -> None:
        self.made = []

    def clients(self) -> KafkaClients:
        return KafkaClients(consumer=self.make, producer=self.make, admin=self.make)

    def make(self, *topics: str, **options: Any) -> Recorder:
        self.made.append(options)
        return self

    async def start(self) -> None:
        raise OSError("no broker here")

    async def stop(self) -> None:
        pass


async def test_producers_are_idempotent_and_wait_for_all_replicas() -> None:
    recorder, names = Recorder(), Names()
    OutcomeLog(recorder.clients(), names)
    ReplyLog(recorder.clients(), names)
    with pytest.raises(LogUnavailable):
        await Client(recorder.clients()).__aenter__()
    with pytest.raises(LogUnavailable):
        await DeadLog(recorder.clients(), names).append(Lane.INTERACTIVE, "a", b"{}")
    assert len(recorder.made) == len(PRODUCERS) - 1  # the doctor's aborts what it writes
    for options in recorder.made:
        assert (options["acks"], options["enable_idempotence"]) == ("all", True)


def test_no_other_module_makes_a_producer() -> None:
    """And each call names both arguments itself."""
    found = set()
    for package in (dispatcher, workers_agent):
        root = Path(package.__path__[0])
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and _name(node.func) == "producer":
                    found.add(path.relative_to(root.parent).as_posix())
                    said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert said.get("acks") == "'all'", path
                    assert said.get("enable_idempotence") == "True", path
    assert found == PRODUCERS


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else ""
