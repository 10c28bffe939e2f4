"""What an agent costs: CPU for each request, and for each token of many streams, beside a bare reader.

A real `flexlb agent` process between real Kafka and Valkey and an engine that is this process: it answers
short requests at once, and streams at a fixed pace to all its streams by one clock. The same engine then
streams to a process that only reads. Every token of every stream must be in its outcome.
Variables: FLEXLB_BENCH_STREAMS (default 256; the target is for 512).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.client import Client
from dispatcher.local.stack import LocalStack, StackSettings
from tests.bench.machine import cpu_s, load_average

STREAMS = int(os.environ.get("FLEXLB_BENCH_STREAMS", "256"))
TOKENS = 250
TOKENS_PER_S = 50
REQUESTS = 2000
IN_FLIGHT = 32
WAIT_S = 240.0
ENDPOINT = "/v1/completions"
CHUNKS = "flexlb_agent_chunks_total"
TARGET_CORE = 0.5
TARGET_STREAMS = 512
TOKEN = b'data: {"id":"c","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'
LAST = b'data: {"id":"c","choices":[{"index":0,"text":".","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'


class _Engine:
    """Streams one token a tick to everybody; a prompt that begins with `short` is answered at once."""

    def __init__(self) -> None:
        self._tick: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Be the clock."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + 1 / TOKENS_PER_S, loop.time() - 1.0)
            await asyncio.sleep(max(0.0, due - loop.time()))
            tick, self._tick = self._tick, loop.create_future()
            tick.set_result(None)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """An answer."""
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if not body["prompt"].startswith("short"):
            for _ in range(TOKENS - 1):
                await asyncio.shield(self._tick)
                await response.write(TOKEN)
        await response.write(LAST)
        return response


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    engine = _Engine()
    app = web.Application()
    app.router.add_post(ENDPOINT, engine.complete)
    app.router.add_get("/health", _ok)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    ticking = asyncio.create_task(engine.run())
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    settings = StackSettings(nodes=1, dispatchers=1, engines=(url,), max_running=STREAMS)
    try:
        async with LocalStack(settings, tell=print) as stack:
            short = await _short(stack)
            streamed = await _streams(stack)
        bare = await _bare(url)
    finally:
        ticking.cancel()
        await runner.cleanup()
    per_token = (streamed["cpu_s"] - STREAMS * short["cpu_us_per_request"] / 1e6) / streamed["tokens"] * 1e6
    bare_us = bare["cpu_s"] / bare["tokens"] * 1e6
    result = {
        "load_average": load,
        "requests_per_s": round(short["requests_per_s"], 1),
        "cpu_us_per_request": round(short["cpu_us_per_request"], 1),
        "streams": STREAMS,
        "tokens": streamed["tokens"],
        "chunks": streamed["chunks"],
        "tokens_per_s_achieved": round(streamed["tokens"] / streamed["seconds"], 1),
        "cpu_us_per_token": round(per_token, 2),
        "cpu_us_per_chunk": round(per_token * streamed["tokens"] / streamed["chunks"], 2),
        "bare_reader_us_per_token": round(bare_us, 2),
        "ratio_to_bare_reader": round(per_token / bare_us, 2),
        "cores_for_512_streams": round(TARGET_STREAMS * TOKENS_PER_S * per_token / 1e6, 3),
        "target_cores": TARGET_CORE,
    }
    for name, value in result.items():
        print(f"{name:28} {value}")
    return result


async def _ok(_: web.Request) -> web.Response:
    return web.json_response({})


async def _short(stack: LocalStack) -> dict[str, float]:
    """Many short requests, so many at once."""
    room = asyncio.Semaphore(IN_FLIGHT)
    async with Client(stack.kafka, stack.settings.pool) as client:

        async def one(number: int) -> None:
            async with room:
                body = {"prompt": f"short {number}", "max_tokens": 1}
                id = await client.submit(stack.settings.model, ENDPOINT, body)
                outcome = await client.outcome(id)
                assert outcome.choices[0].text == ".", f"unexpected outcome {outcome}"

        async def all_of(count: int) -> None:
            async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(one(number))

        await all_of(IN_FLIGHT)
        before, began_s = cpu_s(stack.agents[0].pid), time.monotonic()
        await all_of(REQUESTS)
        took_s = time.monotonic() - began_s
        used_s = cpu_s(stack.agents[0].pid) - before
    return {"requests_per_s": REQUESTS / took_s, "cpu_us_per_request": used_s / REQUESTS * 1e6}


async def _streams(stack: LocalStack) -> dict[str, Any]:
    """All streams at once."""
    agent = stack.agents[0]
    async with Client(stack.kafka, stack.settings.pool) as client:

        async def one(number: int) -> int:
            body = {"prompt": f"long {number}", "max_tokens": TOKENS}
            id = await client.submit(stack.settings.model, ENDPOINT, body)
            outcome = await client.outcome(id)
            return outcome.choices[0].text.count(" word") + 1

        chunks, before, began_s = await _chunks(agent.url), cpu_s(agent.pid), time.monotonic()
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            streams = [group.create_task(one(number)) for number in range(STREAMS)]
        tokens = sum(stream.result() for stream in streams)
        used_s, took_s = cpu_s(agent.pid) - before, time.monotonic() - began_s
        chunks = await _chunks(agent.url) - chunks
    assert tokens == STREAMS * TOKENS, f"expected {STREAMS * TOKENS} tokens, seen {tokens}"
    return {"cpu_s": used_s, "seconds": took_s, "tokens": tokens, "chunks": int(chunks)}


async def _chunks(url: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        return sum(one.value for family in families for one in family.samples if one.name == CHUNKS)


async def _bare(url: str) -> dict[str, float]:
    """The same streams, only read."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.sse_reader", url, str(STREAMS)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    told: dict[str, float] = json.loads(output.splitlines()[-1])
    assert told["tokens"] == STREAMS * TOKENS, f"expected {STREAMS * TOKENS} tokens, seen {told}"
    return told
