"""An engine that sends without end: what an agent reads of it is bounded, page by page and frame by frame."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp import web

from dispatcher.protocol.assignment import Work
from dispatcher.protocol.request import Endpoint
from tests.support.wait import wait_until
from workers_agent.cache_view import Cleared, EngineEvent
from workers_agent.engines.engine import EngineFailure
from workers_agent.engines.engine_load import EngineLoad
from workers_agent.engines.kv_events import KVEventSource
from workers_agent.engines.openai_http import MAX_PAGE_BYTES, OpenAIEngine

WORK = Work(ref="i0_0", id="r", model="m", endpoint=Endpoint.COMPLETIONS)
PART = b" " * (1 << 20)


class Endless:
    """Whatever it is asked, it answers with so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.sent = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Blanks, which JSON and metrics allow, then an empty JSON object."""
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        self.sent = 0
        while self.sent < self.most_bytes:
            await response.write(PART)
            self.sent += len(PART)
        await response.write(b"{}")
        return response


@asynccontextmanager
async def engine_of(endless: Endless) -> AsyncIterator[OpenAIEngine]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", endless.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    engine = OpenAIEngine(f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        yield engine
    finally:
        await engine.close()
        await runner.cleanup()


async def test_no_page_of_an_engine_is_read_beyond_a_bound() -> None:
    endless = Endless(8 * MAX_PAGE_BYTES)
    async with engine_of(endless) as engine:
        assert await engine.load() is None
        for ask in (
            lambda: engine.models(),
            lambda: engine.prompt_ids(WORK, b"{}"),
            lambda: engine.text_of(WORK, [1]),
        ):
            with pytest.raises(EngineFailure):
                await ask()
            assert endless.sent < endless.most_bytes
        assert await engine.probe("m") is False
        assert (await engine.describe()).version == ""
        endless.most_bytes = MAX_PAGE_BYTES // 2
        assert await engine.load() == EngineLoad()


async def test_a_frame_of_kv_events_above_the_bound_is_dropped_and_later_ones_are_read() -> None:
    taken: list[EngineEvent] = []
    context = zmq.asyncio.Context()
    publisher = context.socket(zmq.PUB)
    publisher.linger = 0
    port = publisher.bind_to_random_port("tcp://127.0.0.1")
    source = KVEventSource(
        f"tcp://127.0.0.1:{port}",
        take=taken.append,
        forget=lambda _: None,
        moved=lambda: None,
        most_bytes=1000,
    )
    following = asyncio.create_task(source.run())
    sequence = 0

    async def publish(payload: bytes) -> None:
        nonlocal sequence
        await publisher.send_multipart([b"", sequence.to_bytes(8, "big"), payload])
        sequence += 1

    batch = msgspec.msgpack.encode([0.0, [["AllBlocksCleared"]], 0])
    huge = msgspec.msgpack.encode([0.0, [["AllBlocksCleared"]] * 5000, 0])

    async def more_is_taken() -> bool:
        await publish(batch)
        return len(taken) > before

    try:
        before = 0
        await wait_until(more_is_taken, "the first batch")
        before = len(taken)
        await publish(huge)
        await wait_until(more_is_taken, "a batch after the huge one")
        assert set(taken) == {Cleared()}
        assert len(taken) < 5000
    finally:
        following.cancel()
        await asyncio.wait([following])
        publisher.close()
        context.term()
