"""Servers for tests: one Kafka per session, one Valkey per test, and loud skips without a broker."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import hypothesis
import pytest

from dispatcher.backends.connect import KafkaClients, connect_redis
from dispatcher.backends.scripts import Redis
from dispatcher.errors import ServerError
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.valkey import ValkeyServer
from tests.support.servers import NO_KAFKA, REQUIRE_KAFKA, KafkaAddress, SharedKafka, give_up, why_no_kafka

# No deadlines: a busy machine would break them.
# A busy machine makes examples slow, not wrong.
patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("gate", patient)
hypothesis.settings.register_profile("long", patient, max_examples=2000)
hypothesis.settings.load_profile("long" if os.environ.get("FLEXLB_TEST_PROFILE") == "long" else "gate")

SHARED_KAFKA = pytest.StashKey[SharedKafka]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kafka") and (reason := why_no_kafka()) is not None:
        give_up(reason)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Not in a fixture: waiting for other workers must not count toward the last test's timeout.
    if (shared := session.config.stash.get(SHARED_KAFKA, None)) is not None:
        shared.leave()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    ]
    missed = [reason for reason in reasons if reason.startswith(NO_KAFKA)]
    if missed:
        terminalreporter.write_line(
            f"{len(missed)} tests did NOT run: {missed[0]} ({REQUIRE_KAFKA}=1 makes them fail)",
            red=True,
            bold=True,
        )


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KafkaAddress:
    """The session's Apache Kafka, shared by all tests and workers."""
    if (reason := why_no_kafka()) is not None:
        give_up(reason)
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent
    shared = request.config.stash.setdefault(SHARED_KAFKA, SharedKafka(root / "shared-kafka"))
    try:
        return shared.join()
    except ServerError as error:
        give_up(str(error))


@pytest.fixture(scope="session")
def kafka_clients(kafka: KafkaAddress) -> KafkaClients:
    """Constructors of clients of the session's broker."""
    return kafka.clients


@pytest.fixture
async def own_kafka(tmp_path: Path) -> AsyncIterator[ApacheKafka]:
    """An Apache Kafka for one test alone, which may kill and freeze it; starts in about 2 s."""
    if (reason := why_no_kafka()) is not None:
        give_up(reason)
    async with ApacheKafka(tmp_path / "kafka") as broker:
        yield broker


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[ValkeyServer]:
    """A fresh Valkey for one test, which may kill, freeze, wipe and restart it."""
    async with ValkeyServer(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
async def redis_client(valkey: ValkeyServer) -> AsyncIterator[Redis]:
    """A client of the test's Valkey."""
    client = connect_redis(valkey.url)
    yield client
    await client.aclose()


@pytest.fixture
def pool() -> str:
    """A pool name that no other test has."""
    return f"t{uuid.uuid4().hex}"
