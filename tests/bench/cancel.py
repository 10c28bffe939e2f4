"""From the append of a cancel to an engine that loses its connection, on an idle system of real processes.

The clock starts before the producer's `send` and stops when the engine's HTTP server learns that its
client has closed the connection of a stream that would go on for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from typing import Any

from aiohttp import web

from dispatcher.client import Client
from dispatcher.local.stack import LocalStack, StackSettings
from tests.bench.machine import percentile

REQUESTS = 200
MEAN_GAP_S = 0.05
TOKEN_S = 0.2


class _Engine:
    """Streams for ever, and notes when each stream's client is gone."""

    def __init__(self) -> None:
        self.begun: dict[str, asyncio.Event] = {}
        self.gone: dict[str, asyncio.Future[float]] = {}

    def expect(self, prompt: str) -> None:
        """Make room for what will be known of a request."""
        self.begun[prompt] = asyncio.Event()
        self.gone[prompt] = asyncio.get_running_loop().create_future()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        prompt = (await request.json())["prompt"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chunk = json.dumps({"choices": [{"index": 0, "text": "x"}]}).encode()
        with contextlib.suppress(ConnectionError):
            try:
                while True:
                    await response.write(b"data: " + chunk + b"\n\n")
                    self.begun[prompt].set()
                    await asyncio.sleep(TOKEN_S)
            finally:
                self.gone[prompt].set_result(time.perf_counter())
        return response


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    engine = _Engine()
    app = web.Application()
    app.router.add_post("/v1/completions", engine.complete)
    app.router.add_get("/health", _ok)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with LocalStack(StackSettings(nodes=1, dispatchers=1, engines=(url,)), tell=print) as stack:
            broker = stack.broker.description if stack.broker else stack.kafka
            aborts_ms, outcomes_ms = await _cancel_all(stack, engine)
    finally:
        await runner.cleanup()
    result = {
        "broker": broker,
        "requests": len(aborts_ms),
        "cancel_to_abort_ms": _summary(aborts_ms),
        "cancel_to_outcome_ms": _summary(outcomes_ms),
    }
    print(f"{'':28} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} {'max ms':>8}")
    for title in ("cancel_to_abort_ms", "cancel_to_outcome_ms"):
        row = result[title]
        assert isinstance(row, dict)
        print(f"{title:28} " + " ".join(f"{row[key]:8.2f}" for key in ("p50", "p90", "p99", "max")))
    return result


async def _ok(_: web.Request) -> web.Response:
    return web.json_response({})


async def _cancel_all(stack: LocalStack, engine: _Engine) -> tuple[list[float], list[float]]:
    rng = random.Random(1)
    aborts_ms, outcomes_ms = [], []
    async with Client(stack.kafka, stack.settings.pool) as client, asyncio.timeout(120):
        for number in range(REQUESTS):
            prompt = f"bench-{number}"
            engine.expect(prompt)
            id = await client.submit(stack.settings.model, "/v1/completions", {"prompt": prompt})
            await engine.begun[prompt].wait()
            await asyncio.sleep(rng.expovariate(1 / MEAN_GAP_S))
            began = time.perf_counter()
            await client.cancel(id)
            aborts_ms.append((await engine.gone[prompt] - began) * 1000)
            await client.outcome(id)
            outcomes_ms.append((time.perf_counter() - began) * 1000)
    return aborts_ms, outcomes_ms


def _summary(values: list[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(percentile(values, share), 3) for name, share in shares.items()}
