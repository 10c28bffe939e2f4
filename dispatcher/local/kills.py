"""What the demo breaks in mid-run: kill -9 of one process at a time, started again after a moment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from dispatcher.local.stack import LocalStack, Member

FIRST_SHARE, LAST_SHARE = 0.25, 0.8
"""Of the run, between which the kills are spread."""
DOWN_S = 1.0

Tell = Callable[[str], None]
Kill = Callable[[LocalStack, random.Random, Tell], Coroutine[Any, Any, None]]


async def break_stack(
    stack: LocalStack, kills: Sequence[str], seconds: float, rng: random.Random, tell: Tell
) -> None:
    """Do each of `kills` in turn, spread over a run of `seconds`."""
    if not kills:
        return
    gap_s = (LAST_SHARE - FIRST_SHARE) * seconds / len(kills)
    await asyncio.sleep(FIRST_SHARE * seconds)
    for kill in kills:
        async with asyncio.TaskGroup() as group:
            group.create_task(KILLS[kill](stack, rng, tell))
            group.create_task(asyncio.sleep(gap_s))


async def _kill_dispatcher(stack: LocalStack, _: random.Random, tell: Tell) -> None:
    await _kill(stack, await stack.leader() or stack.dispatchers[0], tell)


async def _kill_agent(stack: LocalStack, rng: random.Random, tell: Tell) -> None:
    await _kill(stack, rng.choice(stack.agents), tell)


async def _kill_engine(stack: LocalStack, rng: random.Random, tell: Tell) -> None:
    await _kill(stack, rng.choice(stack.engines), tell)


async def _kill(stack: LocalStack, member: Member, tell: Tell) -> None:
    tell(f"kill -9 {member.name} (pid {member.pid})")
    await member.kill()
    await asyncio.sleep(DOWN_S)
    await stack.start_member(member)
    tell(f"{member.name} is back")


async def _kill_redis(stack: LocalStack, _: random.Random, tell: Tell) -> None:
    assert stack.valkey is not None
    tell(f"kill -9 redis (pid {stack.valkey.pid})")
    stack.valkey.kill()
    await asyncio.sleep(DOWN_S)
    await stack.valkey.start()
    tell("redis is back with its data")


async def _lose_redis(stack: LocalStack, _: random.Random, tell: Tell) -> None:
    assert stack.valkey is not None
    tell(f"kill -9 redis (pid {stack.valkey.pid}) and delete its data")
    await stack.valkey.wipe()
    await asyncio.sleep(DOWN_S)
    await stack.valkey.start()
    tell("redis is back, empty")


KILLS: Mapping[str, Kill] = {
    "dispatcher": _kill_dispatcher,
    "agent": _kill_agent,
    "engine": _kill_engine,
    "redis": _kill_redis,
    "redis-data": _lose_redis,
}
"""What can be killed, by its name on the command line; `redis-data` also deletes everything Redis held."""
