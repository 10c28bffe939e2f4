"""A stream of chunks while Kafka takes nothing: bounded, in order, whole."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.reply_log import ReplyLog
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta, ChunkKind
from dispatcher.protocol.names import Attempt, Names
from dispatcher.protocol.request import Endpoint
from workers_agent.engines.engine import Piece
from workers_agent.metrics import AgentMetrics
from workers_agent.services.reply_stream import MOST_GATHERED_TOKENS, Pacer, ReplyStream

WORK = Work(ref="i0_1", id="r", model="m", endpoint=Endpoint.COMPLETIONS)
TURNS = 20
"""Enough turns of the loop for whoever can run to have run."""


class Producer:
    """A Kafka producer that takes records while it is open."""

    def __init__(self, **options: Any) -> None:
        self.values: list[bytes] = []
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def send(self, topic: str, value: bytes, **route: Any) -> asyncio.Future[Any]:
        await self.is_open.wait()
        self.values.append(value)
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        done.set_result(SimpleNamespace(partition=0, offset=len(self.values)))
        return done


def token(number: int) -> Piece:
    return Piece(choices=(ChoiceDelta(index=0, text=f"{number} "),), tokens=1)


async def test_what_gathers_while_kafka_takes_nothing_is_bounded() -> None:
    producer = Producer()
    clients = KafkaClients(consumer=Producer, producer=lambda **_: producer, admin=Producer)
    pacer = Pacer(0.0)
    stream = ReplyStream(
        ReplyLog(clients, Names()), WORK, Attempt.parse("1_1"), "n", pacer, AgentMetrics(CollectorRegistry())
    )
    pacing = asyncio.create_task(pacer.run())
    many = 5 * MOST_GATHERED_TOKENS
    taken = 1

    async def engine() -> None:
        nonlocal taken
        for number in range(1, many):
            await stream.add(token(number))
            taken = number + 1
        await stream.end("stop")

    await stream.begin()
    await stream.add(token(0))
    producer.is_open.clear()
    running = asyncio.create_task(engine())
    for _ in range(TURNS):
        await asyncio.sleep(0)
    assert taken <= 1 + 2 * MOST_GATHERED_TOKENS, "a chunk that waits, and what gathers behind it"
    producer.is_open.set()
    await running
    chunks = [codec.chunks.decode(value) for value in producer.values]
    assert [chunk.kind for chunk in chunks][:: len(chunks) - 1] == [ChunkKind.BEGIN, ChunkKind.END]
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == "".join(f"{number} " for number in range(many))
    assert max(chunk.tokens for chunk in chunks) <= MOST_GATHERED_TOKENS
    pacing.cancel()
    await asyncio.wait([pacing])
