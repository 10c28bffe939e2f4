"""A stack of real processes over Redis with Sentinels: what a failover may cost, and what it may not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from dispatcher.client.client import Client
from dispatcher.local.sentinel import ReplicatedValkey, detach
from dispatcher.local.stack import LocalStack
from tests.e2e.conftest import MakeStack
from tests.e2e.test_cli import flexlb
from tests.e2e.test_faults import BODY, all_completed, clean_audit, events, submit_for
from tests.support.wait import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[ReplicatedValkey]:
    """A primary, a replica and three Sentinels."""
    async with ReplicatedValkey(tmp_path / "redis") as servers:
        yield servers


async def recovered(stack: LocalStack, *, intact: bool) -> bool:
    """Whether some leader has begun on Redis data that were, or were not, what they should be."""
    return any(
        line["intact"] is intact for member in stack.dispatchers for line in events(member, "recovered")
    )


async def chat(stack: LocalStack) -> int:
    """The status of one request to the frontend."""
    async with aiohttp.ClientSession() as session:
        body = {"model": "sim", **BODY}
        async with session.post(f"{stack.frontends[0].url}/v1/completions", json=body) as answer:
            await answer.read()
            return answer.status


MISSED = "kill, and the replica missed writes"


@pytest.mark.parametrize(
    "how", [*(pytest.param(how, marks=pytest.mark.long) for how in ("failover", "kill")), MISSED]
)
async def test_failover_loses_nothing_and_answers_nothing_twice(
    make_stack: MakeStack, redis: ReplicatedValkey, how: str
) -> None:
    async with (
        make_stack(redis=redis.url, nodes=2, frontend_port=0) as stack,
        Client(stack.kafka, stack.settings.pool) as client,
    ):
        sent: list[str] = []
        enough = asyncio.Event()

        async def submit_on() -> None:
            while not enough.is_set():
                await submit_for(client, 0.5, per_s=40, ids=sent)

        load = asyncio.create_task(submit_on())
        await wait_until(lambda: len(sent) > 30, "some load")
        before = await redis.primary()
        if how == "failover":
            await redis.failover()
        else:
            if how == MISSED:
                (replica,) = (server for server in redis.servers if server is not before)
                await detach(replica)
                missed_from = len(sent)
                await wait_until(lambda: len(sent) > missed_from + 30, "writes that the replica misses")
            before.kill()
            await redis.until_promoted(before)
        promoted_at = len(sent)
        if how == MISSED:
            await wait_until(lambda: recovered(stack, intact=False), "a leader to see that Redis went back")
        await wait_until(lambda: len(sent) > promoted_at + 40, "load on the new primary")
        enough.set()
        await load
        await all_completed(client, sent)
        assert await chat(stack) == 200
        code, out, err = await flexlb("nodes", "--redis", redis.url, "--pool", stack.settings.pool)
        assert (code, out.count("node-")) == (0, 2), err
        assert all(member.is_running for member in stack.members)
        await clean_audit(stack)
