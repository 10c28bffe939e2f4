"""Which Kafka-protocol broker this machine gets: Apache Kafka where it can run, else the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from dispatcher.errors import ServerError
from dispatcher.local import apache_kafka, embedded_kafka
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.embedded_kafka import EmbeddedKafka

BrokerKind = Literal["auto", "apache", "embedded"]


class Broker(Protocol):
    """One local broker on one folder and one port. End every use with `stop()`, also after `kill()`."""

    @property
    def bootstrap(self) -> str:
        """Its address for Kafka clients; final after the first start."""

    @property
    def pid(self) -> int:
        """The process id of the last start."""

    @property
    def is_running(self) -> bool:
        """Whether its process exists, frozen or not."""

    @property
    def start_s(self) -> float:
        """How long the last start took, seconds."""

    @property
    def description(self) -> str:
        """One line for people: what it is, where, and whether it is durable."""

    async def start(self) -> None:
        """Start and return once it serves."""

    async def stop(self, grace_s: float = ...) -> None:
        """Stop and keep the data."""

    async def restart(self) -> None:
        """Stop if it runs, and start on the same data and port."""

    def kill(self) -> None:
        """SIGKILL, without waiting for the end."""

    def freeze(self) -> None:
        """SIGSTOP."""

    def thaw(self) -> None:
        """SIGCONT."""


def choose_broker(kind: BrokerKind, folder: Path, *, port: int | None = 0) -> tuple[Broker, str]:
    """Choose a broker for `folder`, not yet started.

    Returns:
        The broker, and a sentence for people that says which one it is and why.

    Raises:
        ServerError: the broker asked for, or with `auto` any broker, can't run on this machine.
    """
    no_apache = apache_kafka.why_unavailable() if kind != "embedded" else None
    no_embedded = embedded_kafka.why_unavailable() if kind != "apache" else None
    if kind != "embedded" and no_apache is None:
        why = "Java and its jars are at hand" if kind == "auto" else "it was asked for"
        return ApacheKafka(folder, port=port), f"Using Apache Kafka: {why}."
    if kind == "apache":
        raise ServerError(f"Apache Kafka was asked for, but {no_apache}")
    if no_embedded is not None:
        raise ServerError(
            f"no Kafka-protocol broker can run here. Apache: {no_apache or 'not asked for'}. "
            f"Embedded: {no_embedded}"
        )
    why = "it was asked for" if kind == "embedded" else f"Apache Kafka can't run here: {no_apache}"
    return EmbeddedKafka(folder, port=port), f"Using the embedded broker, which is NOT durable: {why}."
