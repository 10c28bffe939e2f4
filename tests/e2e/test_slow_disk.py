"""A stack of real processes whose Redis dies while its disk is slow: what was answered is not all kept."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher.backends.connect import connect_redis
from dispatcher.client.client import Client
from dispatcher.local.slow_disk import slow_disk, why_no_slow_disk
from tests.e2e.conftest import MakeStack
from tests.e2e.test_faults import all_completed, clean_audit, submit_for
from tests.e2e.test_redis_failover import recovered
from tests.support.wait import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

HELD_BACK_BYTES = 20_000


async def test_a_kill_while_the_disk_is_slow_loses_nothing_and_answers_nothing_twice(
    make_stack: MakeStack,
) -> None:
    if why := await why_no_slow_disk():
        pytest.skip(why)
    async with make_stack(nodes=2) as stack, Client(stack.kafka, stack.settings.pool) as client:
        sent: list[str] = []
        enough = asyncio.Event()

        async def submit_on() -> None:
            while not enough.is_set():
                await submit_for(client, 0.5, per_s=40, ids=sent)

        load = asyncio.create_task(submit_on())
        await wait_until(lambda: len(sent) > 30, "some load")
        valkey = stack.valkey
        assert valkey is not None
        redis = connect_redis(valkey.url, timeout_s=30.0)
        try:
            async with slow_disk(valkey.pid, valkey.files, write_s=0.0, sync_s=10.0):

                async def is_held_back() -> bool:
                    return int((await redis.info("persistence"))["aof_buffer_length"]) > HELD_BACK_BYTES

                await wait_until(is_held_back, "writes that wait for a sync")
                valkey.kill()
        finally:
            await redis.aclose()
        killed_at = len(sent)
        await valkey.start()
        await wait_until(lambda: recovered(stack, intact=False), "a leader to see that Redis went back")
        await wait_until(lambda: len(sent) > killed_at + 40, "load afterwards")
        enough.set()
        await load
        await all_completed(client, sent)
        assert all(member.is_running for member in stack.members)
        await clean_audit(stack)
