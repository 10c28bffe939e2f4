"""What a failure costs those who wait: a killed leader, a frozen agent, a Redis that lost everything.

Real processes on this machine. Leader: from `kill -9` to the first attempt bound by the next leader that
an agent has begun, so that the agent's claim is inside. Agent: the longest pause that a client sees in any
stream while the busiest agent is frozen, and whether each text equals that of an unbroken run. Redis: from
the moment it serves again, empty, to the first answer to a request that was sent after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from aiokafka import TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.backends.connect import close_kafka_client, connect_kafka
from dispatcher.client.client import Client
from dispatcher.client.reader import TextAdded
from dispatcher.local.stack import LocalServers, LocalStack, Member, StackSettings
from dispatcher.protocol import codec
from dispatcher.protocol.names import Attempt
from tests.bench.machine import percentile

LEADER_TTL_S = 1.0
LEADER_KILLS = int(os.environ.get("FLEXLB_BENCH_KILLS", "10"))
AGENT_FREEZES = 5
REDIS_LOSSES = 3
RATE = 50.0
LOSS_RATE = 200.0
STREAMS = 24
STREAM_TOKENS = 1000
FROZEN_S = 5.0
RUNNING = "flexlb_agent_running"
ENDPOINT = "/v1/completions"
ALLOWED_LEADER_S = LEADER_TTL_S + 0.2
ALLOWED_GAP_S = 3.0
ALLOWED_BACK_S = 5.0


class Load:
    """Short requests at a steady rate; notes which were answered when."""

    def __init__(self, client: Client, model: str, rate: float, prefix: str) -> None:
        self._client = client
        self._model = model
        self._rate = rate
        self._prefix = prefix
        self._waiting: set[asyncio.Task[None]] = set()
        self.answered: list[tuple[float, float]] = []

    async def run(self) -> None:
        """Send until cancelled."""
        began_s = time.monotonic()
        number = 0
        while True:
            await asyncio.sleep(max(0.0, began_s + number / self._rate - time.monotonic()))
            task = asyncio.create_task(self._ask(f"{self._prefix}-{number}"))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
            number += 1

    async def drain(self) -> None:
        """Wait for all answers."""
        await asyncio.gather(*self._waiting)

    async def _ask(self, id: str) -> None:
        sent_s = time.monotonic()
        body = {"prompt": f"{id}: " + "word " * 20, "max_tokens": 4}
        await self._client.submit(self._model, ENDPOINT, body, id=id)
        await self._client.outcome(id)
        self.answered.append((sent_s, time.monotonic()))


@contextlib.asynccontextmanager
async def loaded(stack: LocalStack, client: Client, rate: float, prefix: str) -> AsyncIterator[Load]:
    """A load while the block runs; everything it sent is answered when it ends."""
    load = Load(client, stack.settings.model, rate, prefix)
    sending = asyncio.create_task(load.run())
    try:
        yield load
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending
        async with asyncio.timeout(120):
            await load.drain()


class _Begun:
    """Follows the reply topic: when the first attempt of each epoch began, by this machine's clock."""

    def __init__(self, stack: LocalStack) -> None:
        self._stack = stack
        self.first_s: dict[int, float] = {}
        self.changed = asyncio.Event()

    async def run(self, placed: asyncio.Event) -> None:
        """Follow until cancelled."""
        consumer = connect_kafka(self._stack.kafka).consumer(group_id=None, fetch_max_wait_ms=20)
        await consumer.start()
        try:
            topic = self._stack.names.replies
            parts = [TopicPartition(topic, number) for number in range(self._stack.settings.partitions)]
            consumer.assign(parts)
            await consumer.seek_to_end()
            placed.set()
            while True:
                for records in (await consumer.getmany(timeout_ms=20)).values():
                    for record in records:
                        epoch = Attempt.parse(codec.chunks.decode(record.value).attempt).epoch
                        if record.timestamp / 1000 < self.first_s.get(epoch, float("inf")):
                            self.first_s[epoch] = record.timestamp / 1000
                            self.changed.set()
        finally:
            await close_kafka_client(consumer)

    async def epoch_after(self, epoch: int) -> tuple[int, float]:
        """The first epoch above `epoch` in which anything began, and when."""
        async with asyncio.timeout(60):
            while (newest := max(self.first_s, default=0)) <= epoch:
                self.changed.clear()
                await self.changed.wait()
        return newest, self.first_s[newest]


async def _leader_of(stack: LocalStack) -> Member:
    leaders: list[Member] = []

    async def leads() -> bool:
        leader = await stack.leader()
        if leader is not None:
            leaders.append(leader)
        return leader is not None

    await stack.until(leads, "a leader", 30)
    return leaders[-1]


async def _kill_leaders(stack: LocalStack) -> list[float]:
    """Seconds from each kill to the first attempt begun under the next leader."""
    begun = _Begun(stack)
    took: list[float] = []
    placed = asyncio.Event()
    following = asyncio.create_task(begun.run(placed))
    try:
        async with Client(stack.kafka, stack.settings.pool) as client:
            await placed.wait()
            async with loaded(stack, client, RATE, "leader"):
                epoch, _ = await begun.epoch_after(0)
                for _ in range(LEADER_KILLS):
                    leader = await _leader_of(stack)
                    killed_s = time.time()
                    await leader.kill()
                    epoch, began_s = await begun.epoch_after(epoch)
                    took.append(began_s - killed_s)
                    await stack.start_member(leader)
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
    return took


async def _stream(client: Client, model: str, id: str, prompt: str) -> tuple[str, float]:
    """(text, longest pause within the stream in seconds) of one long answer."""
    body = {"prompt": prompt, "max_tokens": STREAM_TOKENS, "ignore_eos": True}
    await client.submit(model, ENDPOINT, body, id=id)
    longest_s, last_s = 0.0, None
    async for event in client.stream(id):
        now_s = time.monotonic()
        if isinstance(event, TextAdded):
            longest_s = max(longest_s, now_s - (last_s or now_s))
            last_s = now_s
    return (await client.outcome(id)).choices[0].text, longest_s


async def _busiest(stack: LocalStack) -> Member:
    """The agent that streams most, once all streams run."""
    while True:
        running = await asyncio.gather(*(_running(agent) for agent in stack.agents))
        if sum(running) >= STREAMS:
            return stack.agents[running.index(max(running))]
        await asyncio.sleep(0.1)


async def _running(agent: Member) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{agent.url}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        return sum(one.value for family in families for one in family.samples if one.name == RUNNING)


async def _freeze_agents(stack: LocalStack) -> tuple[list[float], list[float], int]:
    """(longest pauses unbroken, while an agent is frozen, texts that differ), over all streams."""
    prompts = [f"stream {number}: " + "word " * 50 for number in range(STREAMS)]
    model = stack.settings.model
    differing, broken = 0, []
    async with Client(stack.kafka, stack.settings.pool) as client:

        async def all_streams(run: str) -> list[tuple[str, float]]:
            asked = (_stream(client, model, f"{run}-{n}", prompt) for n, prompt in enumerate(prompts))
            return await asyncio.gather(*asked)

        whole = await all_streams("whole")
        for number in range(AGENT_FREEZES):
            streams = asyncio.create_task(all_streams(f"frozen-{number}"))
            agent = await _busiest(stack)
            agent.freeze()
            try:
                await asyncio.sleep(FROZEN_S)
            finally:
                agent.thaw()
            seen = await streams
            broken.append(max(pause_s for _, pause_s in seen))
            differing += sum(text != once for (text, _), (once, _) in zip(seen, whole, strict=True))
            await stack.until(stack.is_ready, "all nodes", 30)
    return [pause_s for _, pause_s in whole], broken, differing


async def _lose_redis(stack: LocalStack) -> list[float]:
    """Seconds from each moment Redis serves again, empty, to the first answer to a later request."""
    assert stack.valkey is not None
    took = []
    async with Client(stack.kafka, stack.settings.pool) as client:
        async with loaded(stack, client, LOSS_RATE, "redis") as load:
            for _ in range(REDIS_LOSSES):
                await asyncio.sleep(3.0)
                await stack.valkey.wipe()
                await asyncio.sleep(0.5)
                await stack.valkey.start()
                back_s = time.monotonic()
                async with asyncio.timeout(60):
                    while not any(sent_s >= back_s for sent_s, _ in load.answered):  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                took.append(min(end for sent, end in load.answered if sent >= back_s) - back_s)
                await stack.until(stack.is_ready, "a leader and all nodes", 30)
    return took


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    settings = StackSettings(nodes=4, dispatchers=3, dispatcher_flags=("--leader-ttl-s", str(LEADER_TTL_S)))
    with TemporaryDirectory(prefix="flexlb-", ignore_cleanup_errors=True) as folder:
        async with LocalServers(settings, Path(folder), tell=print) as servers:
            async with LocalStack(settings, folder=Path(folder), servers=servers) as stack:
                leader = await _kill_leaders(stack)
                whole, broken, differing = await _freeze_agents(stack)
                redis = await _lose_redis(stack)
    result: dict[str, Any] = {
        "leader_ttl_s": LEADER_TTL_S,
        "leader_killed_s": _summary(leader, ALLOWED_LEADER_S),
        "agent_frozen_stream_pause_s": _summary(broken, ALLOWED_GAP_S),
        "unbroken_stream_pause_s": _summary(whole, ALLOWED_GAP_S),
        "texts": STREAMS * AGENT_FREEZES,
        "texts_differing": differing,
        "redis_lost_s": _summary(redis, ALLOWED_BACK_S),
    }
    print(f"{'seconds':30} {'p50':>7} {'max':>7} {'within':>12}")
    for title, row in result.items():
        if isinstance(row, dict):
            within = f"{row['within']}/{row['count']}"
            print(f"{title:30} {row['p50']:7.2f} {row['max']:7.2f} {within:>7} of {row['allowed']:g} s")
    print(f"texts that differ from the unbroken run: {differing} of {STREAMS * AGENT_FREEZES}")
    return result


def _summary(values: list[float], allowed: float) -> dict[str, float]:
    return {
        "p50": round(percentile(values, 0.5), 3),
        "max": round(max(values), 3),
        "count": len(values),
        "allowed": allowed,
        "within": sum(value <= allowed for value in values),
    }
