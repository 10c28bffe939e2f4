"""From a Kafka append to who runs the request: on an idle system, and by rate with many light nodes.

Idle, of real processes: the clock starts before the producer's `send` and stops when the engine's HTTP server
has read the request, so that producing, intake, assign, claim and the HTTP call are all inside.

By rate, open loop, on Apache Kafka: from the broker's append time to the claim's answer in a node's hands, in
whole milliseconds. Rates rise until one is not held.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

from aiohttp import web

from dispatcher.backends.connect import connect_kafka
from dispatcher.local.stack import LocalStack, StackSettings
from dispatcher.protocol.names import Lane
from tests.bench.machine import load_average, percentile
from tests.bench.open_loop import OpenLoop
from tests.bench.pool import Pool

REQUESTS = 300
WARM_UP = 30
FLEETS = (100, 1000, 1250)
RATES = (200.0, 1000.0, 2000.0, 5000.0, 10_000.0)
RATE_S = 4.0
TARGETS = {"5000": {"p50_ms": 5, "p99_ms": 20}, "10000": {"p99_ms": 40}}
MEAN_GAP_S = 0.05


class _Engine:
    """Answers one token at once and notes when each request came."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen[body["prompt"]] = time.perf_counter()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chunk = {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n")
        return response


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    engine = _Engine()
    app = web.Application()
    app.router.add_post("/v1/completions", engine.complete)
    app.router.add_get("/health", lambda _: _ok())
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with LocalStack(StackSettings(nodes=1, dispatchers=1, engines=(url,)), tell=print) as stack:
            broker = stack.broker.description if stack.broker else stack.kafka
            sent, acked = await _send(stack)
            await _until_seen(engine, len(sent))
    finally:
        await runner.cleanup()
    names = sorted(sent, key=lambda name: sent[name])[WARM_UP:]
    from_send = [(engine.seen[name] - sent[name]) * 1000 for name in names]
    from_ack = [(engine.seen[name] - acked[name]) * 1000 for name in names]
    result = {
        "broker": broker,
        "requests": len(names),
        "send_to_engine_ms": _summary(from_send),
        "acknowledged_to_engine_ms": _summary(from_ack),
    }
    print(f"{'':28} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} {'max ms':>8}")
    for title in ("send_to_engine_ms", "acknowledged_to_engine_ms"):
        row = result[title]
        assert isinstance(row, dict)
        print(f"{title:28} " + " ".join(f"{row[key]:8.2f}" for key in ("p50", "p90", "p99", "max")))
    return {**result, "load_average": load_average(), "by_nodes": await _by_rate(), "targets": TARGETS}


async def _by_rate() -> dict[str, Any]:
    """Runs by number of nodes, then by rate."""
    fleets: dict[str, Any] = {}
    print(f"{'nodes':>6} {'rate':>7} {'held':>5} {'p50 ms':>7} {'p99 ms':>7} {'dispatcher us':>13}")
    async with Pool(("--heartbeat-ttl-s", "30", "--log-level", "WARNING")) as pool:
        await pool.start_dispatcher()
        async with OpenLoop(pool, FLEETS[-1]) as loop:
            for nodes in FLEETS:
                await pool.start_nodes(nodes, "--views", "--drain", of=FLEETS[-1])
                rows = fleets[str(nodes)] = {}
                for rate in RATES:
                    told = rows[f"{rate:.0f}"] = (await loop.run(rate, RATE_S)).told()
                    print(
                        f"{nodes:6} {rate:7.0f} {'yes' if told['held'] else 'no':>5} {told['p50_ms']:7} "
                        f"{told['p99_ms']:7} {told['cpu_us']['dispatcher']:13.1f}",
                        flush=True,
                    )
                    if not told["held"]:
                        break
    return fleets


async def _ok() -> web.Response:
    return web.json_response({})


async def _send(stack: LocalStack) -> tuple[dict[str, float], dict[str, float]]:
    producer = connect_kafka(stack.kafka).producer(acks="all", enable_idempotence=True)
    await producer.start()
    rng = random.Random(1)
    sent: dict[str, float] = {}
    acked: dict[str, float] = {}
    topic = stack.names.requests(Lane.INTERACTIVE)
    try:
        for number in range(WARM_UP + REQUESTS):
            name = f"bench-{number}"
            record = {
                "id": name,
                "model": stack.settings.model,
                "endpoint": "/v1/completions",
                "body": {"prompt": name, "max_tokens": 1},
            }
            sent[name] = time.perf_counter()
            await producer.send_and_wait(topic, json.dumps(record).encode(), key=name.encode())
            acked[name] = time.perf_counter()
            await asyncio.sleep(rng.expovariate(1 / MEAN_GAP_S))
    finally:
        await producer.stop()
    return sent, acked


async def _until_seen(engine: _Engine, count: int) -> None:
    async with asyncio.timeout(60):
        while len(engine.seen) < count:  # noqa: ASYNC110 - bounded above, ends a benchmark
            await asyncio.sleep(0.05)


def _summary(values: list[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(percentile(values, share), 3) for name, share in shares.items()}
