"""Redis or Kafka away for a minute (Redis for seconds in the gate): what may not happen meanwhile.

No process ends, none grows, none fills its log; afterwards everything that was sent is answered once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dispatcher.backends.connect import connect_redis
from dispatcher.client.client import Client
from dispatcher.errors import LogUnavailable
from dispatcher.local.stack import LocalStack, Member
from dispatcher.protocol.outcome import OutcomeKind
from tests.e2e.conftest import MakeStack
from tests.e2e.test_faults import clean_audit, events
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka

SHORT_S, LONG_S = 5.0, 60.0
"""How long a server is away. The scenario itself, not a wait."""
PER_S = 10
MOST_LINES_PER_S = 3.0
"""Log lines a second of one process while a server is away."""
USUAL_LINES = 40
MOST_GROWTH_KIB = 60 << 10
RESEND_PAUSE_S = 0.2
SLOW_DELAY_S = 0.5
"""Each way."""
LONG_ANSWER_TOKENS = 800
"""More than gathers before an agent stops reading its engine: 512."""


async def freeze_kafka(stack: LocalStack, seconds: float) -> None:
    assert stack.broker is not None
    stack.broker.freeze()
    await asyncio.sleep(seconds)
    stack.broker.thaw()


async def kill_kafka(stack: LocalStack, seconds: float) -> None:
    assert stack.broker is not None
    stack.broker.kill()
    await asyncio.sleep(seconds)
    await stack.broker.start()


async def kill_redis(stack: LocalStack, seconds: float) -> None:
    assert stack.valkey is not None
    stack.valkey.kill()
    await asyncio.sleep(seconds)
    await stack.valkey.start()


async def refuse_redis(stack: LocalStack, seconds: float) -> None:
    """The server lives and has room for one client, us."""
    assert stack.valkey is not None
    client = connect_redis(stack.valkey.url, timeout_s=30.0, max_connections=1)
    await client.config_set("maxclients", 1)
    await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await asyncio.sleep(seconds)
    await client.config_set("maxclients", 10_000)
    await client.aclose()


@dataclass(frozen=True, kw_only=True)
class Look:
    """One process at one moment."""

    pid: int
    lines: int
    rss_kib: int

    @staticmethod
    def at(member: Member) -> Look:
        status = Path(f"/proc/{member.pid}/status").read_text()
        (rss,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
        lines = member.log_path.read_bytes().count(b"\n")
        return Look(pid=member.pid, lines=lines, rss_kib=int(rss))


class Load:
    """Requests at a steady pace, each sent again under its id until Kafka has it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.asked: list[asyncio.Task[OutcomeKind]] = []

    def ask(self, max_tokens: int = 30) -> asyncio.Task[OutcomeKind]:
        task = asyncio.create_task(self._ask(f"r{len(self.asked)}", max_tokens))
        self.asked.append(task)
        return task

    async def _ask(self, id: str, max_tokens: int) -> OutcomeKind:
        body: dict[str, Any] = {"prompt": f"{id}: one two three", "max_tokens": max_tokens}
        while True:
            try:
                await self._client.submit("sim", "/v1/completions", body, id=id)
                break
            except LogUnavailable:
                await asyncio.sleep(RESEND_PAUSE_S)
        return (await self._client.outcome(id)).kind

    @asynccontextmanager
    async def going_on(self) -> Any:
        async def run() -> None:
            while True:
                self.ask()
                await asyncio.sleep(1 / PER_S)

        running = asyncio.create_task(run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])


Outage = Callable[[LocalStack, float], Awaitable[None]]


GATE = pytest.mark.timeout(180)
LONG = [pytest.mark.long, pytest.mark.timeout(400)]
OUTAGES = (freeze_kafka, kill_kafka, kill_redis, refuse_redis)


@pytest.mark.parametrize(
    ("outage", "seconds"),
    [
        pytest.param(refuse_redis, SHORT_S, marks=GATE),
        *(pytest.param(outage, LONG_S, marks=LONG) for outage in OUTAGES),
    ],
    ids=lambda value: f"{value:.0f} s" if isinstance(value, float) else value.__name__,
)
async def test_outage_ends_grows_and_floods_nothing(
    make_stack: MakeStack, outage: Outage, seconds: float
) -> None:
    async with (
        make_stack(nodes=2, frontend_port=0, engine_flags=("--decode-step-ms", "10")) as stack,
        Client(stack.kafka, stack.settings.pool) as client,
    ):
        load = Load(client)
        async with load.going_on():
            long_answer = load.ask(LONG_ANSWER_TOKENS)
            await wait_until(lambda: len(load.asked) > PER_S, "some load")
            before = {member.name: Look.at(member) for member in stack.members}
            await outage(stack, seconds)
            after = {member.name: Look.at(member) for member in stack.members}
            assert await load.ask() is OutcomeKind.COMPLETED
        assert set(await asyncio.gather(*load.asked)) == {OutcomeKind.COMPLETED}
        assert long_answer.done()
        for member in stack.members:
            then, now = before[member.name], after[member.name]
            assert member.is_running
            assert member.pid == then.pid
            assert now.lines - then.lines <= USUAL_LINES + MOST_LINES_PER_S * seconds, member.log_path
            assert now.rss_kib - then.rss_kib <= MOST_GROWTH_KIB, member.name
        await clean_audit(stack)


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_slow_kafka_delays_answers_and_changes_nothing_else(make_stack: MakeStack) -> None:
    """Each request to Kafka takes a second; a publication is several of them, one after the other."""
    async with (
        make_stack(nodes=2, kafka_proxy=True) as stack,
        Client(stack.kafka, stack.settings.pool) as client,
    ):
        proxy = stack.servers.kafka_proxy
        assert proxy is not None
        assert stack.broker is not None
        assert stack.kafka == f"127.0.0.1:{proxy.port}" != stack.broker.bootstrap
        load = Load(client)
        assert await load.ask() is OutcomeKind.COMPLETED
        proxy.delay_s = SLOW_DELAY_S
        began_s = time.monotonic()
        assert {await answer for answer in [load.ask() for _ in range(20)]} == {OutcomeKind.COMPLETED}
        assert time.monotonic() - began_s > 2 * SLOW_DELAY_S, "clients go through the proxy"
        proxy.heal()
        assert await load.ask() is OutcomeKind.COMPLETED
        assert [end for member in stack.dispatchers for end in events(member, "leadership ended")] == []
        await clean_audit(stack)
