"""A rolling restart under load: every process in turn, by SIGTERM, and no HTTP client notices."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import pytest

from dispatcher.audit import audit
from dispatcher.local.stack import LocalStack, Member
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.simulation.tokens import Answer, tokenise
from tests.support.wait import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

MakeStack = Callable[..., LocalStack]
PER_S = 20.0
TOKENS = 40
LIMIT_S = 60.0
GRACE_S = 40.0


@dataclass
class Load:
    """Steady load through the frontends, which are tried in turn where a connection is refused."""

    stack: LocalStack
    http: aiohttp.ClientSession
    sent: int = 0
    answered: int = 0
    refusals: int = 0
    wrong: list[str] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> None:
        """Ask until it is over, then wait for the last answers."""
        async with asyncio.TaskGroup() as group:
            while not self.is_over:
                group.create_task(self._ask(self.sent))
                self.sent += 1
                await asyncio.sleep(1 / PER_S)

    async def _ask(self, number: int) -> None:
        frontends = self.stack.frontends
        until = time.monotonic() + LIMIT_S
        for turn in itertools.count(number):
            try:
                await self._ask_at(frontends[turn % len(frontends)], number)
                return
            except aiohttp.ClientConnectorError as error:
                if not isinstance(error.os_error, ConnectionRefusedError) or time.monotonic() > until:
                    self.wrong.append(f"{number}: {error!r}")
                    return
                self.refusals += 1
                await asyncio.sleep(0.01)  # as a load balancer between its peers
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self.wrong.append(f"{number}: {error!r}")
                return

    async def _ask_at(self, frontend: Member, number: int) -> None:
        prompt = f"request {number}"
        body = {"model": "sim", "prompt": prompt, "max_tokens": TOKENS, "stream": number % 2 == 0}
        async with self.http.post(f"{frontend.url}/v1/completions", json=body) as response:
            said = await response.text()
        text = _streamed(said) if body["stream"] else _whole(said)
        if response.status != 200 or text != Answer(tokenise(prompt)).text(TOKENS):
            self.wrong.append(f"{number}: {response.status} {said[-500:]}")
        self.answered += 1


def _streamed(said: str) -> str:
    events = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: ")]
    if not events or events.pop() != "[DONE]":
        return "no end"
    chunks = map(json.loads, events)
    return "".join(choice["text"] for chunk in chunks for choice in chunk.get("choices", ()))


def _whole(said: str) -> str:
    try:
        return str(json.loads(said)["choices"][0]["text"])
    except (ValueError, LookupError):
        return "no answer"


@pytest.mark.parametrize(
    "is_whole", [pytest.param(False, id="one of each"), pytest.param(True, id="all", marks=pytest.mark.long)]
)
async def test_processes_are_restarted_and_no_client_notices(make_stack: MakeStack, is_whole: bool) -> None:
    stack = make_stack(
        nodes=2, frontend_port=0, frontends=2, engine_flags=("--decode-step-ms", "20"), dispatchers=2
    )
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    async with stack, aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        load = Load(stack, http)
        loading = asyncio.create_task(load.run())
        await wait_until(lambda: load.answered > 10, "some answers")
        leader = await stack.leader()
        assert leader is not None
        for member in (
            (*stack.dispatchers, *stack.agents, *stack.frontends)
            if is_whole
            else (leader, stack.agents[0], stack.frontends[0])
        ):
            await member.stop(GRACE_S)
            await stack.start_member(member)
            before = load.answered
            await stack.until(stack.is_ready, f"everything to work again after {member.name}", LIMIT_S)
            await wait_until(lambda before=before: load.answered > before + 10, "some answers")  # type: ignore[misc]
        load.is_over = True
        await loading
        assert load.wrong == []
        assert load.answered == load.sent
        found = await audit(stack.kafka, stack.settings.pool, settle_s=20)
    assert not found.findings, found
    assert found.outcomes == {OutcomeKind.COMPLETED: load.sent}, found
