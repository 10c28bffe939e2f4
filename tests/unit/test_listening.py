"""Who can reach a process: this machine alone unless told otherwise, and never everybody in silence."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import pytest
from prometheus_client import CollectorRegistry
from pydantic_settings import BaseSettings

from dispatcher.frontend.serve import is_open_to_others
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.local.processes import HOST
from dispatcher.settings import DispatcherSettings
from dispatcher.telemetry.metrics import serve_metrics
from workers_agent.settings import AgentSettings
from workers_agent.simulator.__main__ import parser

PROCESSES: tuple[type[BaseSettings], ...] = (DispatcherSettings, AgentSettings, FrontendSettings)


@pytest.mark.parametrize("settings", PROCESSES, ids=lambda settings: settings.__name__)
def test_every_process_listens_on_this_machine_alone_by_default(settings: type[BaseSettings]) -> None:
    listening = {
        name: field.default for name, field in settings.model_fields.items() if name.endswith("host")
    }
    assert listening, "an address to listen on"
    for name, host in listening.items():
        assert ip_address(host).is_loopback, name


def test_the_simulated_engine_and_local_servers_listen_on_this_machine_alone() -> None:
    assert ip_address(parser().get_default("host")).is_loopback
    assert ip_address(HOST).is_loopback


@pytest.mark.parametrize(
    ("host", "keys", "is_open"),
    [
        ("127.0.0.1", "", False),
        ("127.8.9.1", "", False),
        ("::1", "", False),
        ("[::1]", "", False),
        ("localhost", "", False),
        ("0.0.0.0", "", True),
        ("::", "", True),
        ("", "", True),
        ("10.1.2.3", "", True),
        ("gateway", "", True),
        ("0.0.0.0", "keys", False),
    ],
)
def test_a_frontend_that_others_reach_without_keys_is_open(host: str, keys: str, is_open: bool) -> None:
    assert is_open_to_others(FrontendSettings(host=host, api_keys_file=keys)) is is_open


@pytest.mark.parametrize(
    "headers", [b"X: v\r\n" * 200, b"X: " + b"v" * 20_000 + b"\r\n"], ids=["many", "long"]
)
async def test_headers_beyond_the_bounds_are_refused_before_anything_reads_them(headers: bytes) -> None:
    asked = []

    def health() -> dict[str, object]:
        asked.append(1)
        return {"ok": True}

    runner, port = await serve_metrics(CollectorRegistry(), HOST, 0, health)
    try:
        answers = []
        for more in (b"", headers):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n")
            answers.append((await reader.readline()).split()[1])
            writer.close()
        assert answers == [b"200", b"400"]
        assert len(asked) == 1
    finally:
        await runner.cleanup()
