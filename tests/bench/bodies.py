"""What the size of a body and the length of a prompt cost the leader, Redis and the wire.

Bursts of requests that differ in their bodies alone, from 1 kB to 512 kB (above 16 kB by reference, as the
SDK sends them), and one of prompts of 128 k tokens. Real servers, nodes that answer at once; CPU time is the
kernel's, from the first append of a burst to its last published outcome. Bytes for each request are counted
in Kafka's own files and by Redis's own counters of its network. Then prompts of 128 k tokens come at 50/s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tests.bench import prompts
from tests.bench.machine import load_average
from tests.bench.open_loop import OpenLoop
from tests.bench.pool import PARTITIONS, Pool

NODES = 100
REQUESTS = 1000
BODIES = 20
"""Different bodies in the topic of bodies, which requests share: nobody reads them here."""
RATE, RATE_S = 50.0, 10.0
INLINE_BYTES = 16 << 10
FLAT = 1.2
TOKENS_PER_BLOCK = prompts.BLOCK_TOKENS
FLAGS = ("--heartbeat-ttl-s", "30", "--log-level", "WARNING")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Requests alike: the bytes of their bodies, the blocks of their prompts."""

    body_bytes: int
    blocks: int = prompts.BLOCKS


KINDS = {
    "1 kB": Kind(body_bytes=1 << 10),
    "16 kB": Kind(body_bytes=INLINE_BYTES),
    "64 kB": Kind(body_bytes=64 << 10),
    "512 kB": Kind(body_bytes=512 << 10),
    "512 kB, 128 k tokens": Kind(body_bytes=512 << 10, blocks=512),
}


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    rows: dict[str, dict[str, float]] = {}
    print(f"{'body':22} {'dispatcher us':>13} {'redis us':>9} {'record B':>9} {'kafka B':>9} {'redis B':>9}")
    async with Pool(FLAGS) as pool:
        await pool.start_dispatcher()
        await pool.start_nodes(NODES, "--drain", "--max-running", "256")
        async with OpenLoop(pool, NODES) as loop:
            await _burst(pool, loop, await _records(pool, "warm-up", KINDS["1 kB"], REQUESTS))
            for name, kind in KINDS.items():
                records = await _records(pool, name, kind, REQUESTS)
                row = rows[name] = await _burst(pool, loop, records)
                print(
                    f"{name:22} {row['dispatcher_us']:13.1f} {row['redis_us']:9.1f} "
                    f"{row['record_bytes']:9.0f} {row['kafka_bytes']:9.0f} {row['redis_bytes']:9.0f}",
                    flush=True,
                )
            long = await _records(pool, "rate", KINDS["512 kB, 128 k tokens"], int(RATE * RATE_S))
            paced = await loop.run(RATE, RATE_S, long)
    told = paced.told()
    print(
        f"128 k tokens at {RATE:.0f}/s: held {told['held']}, p50 {told['p50_ms']} ms, p99 {told['p99_ms']} ms"
    )
    by_size = [row for name, row in rows.items() if KINDS[name].blocks == prompts.BLOCKS]
    spread = {
        role: round(max(row[role] for row in by_size) / min(row[role] for row in by_size), 3)
        for role in ("dispatcher_us", "redis_us")
    }
    print(f"most by least, 1 kB to 512 kB: {spread}, allowed {FLAT}")
    return {
        "nodes": NODES,
        "requests": REQUESTS,
        "load_average": load,
        "by_body": rows,
        "spread": spread,
        "allowed": FLAT,
        "paced": told,
    }


async def _records(pool: Pool, run: str, kind: Kind, count: int) -> list[tuple[bytes, bytes]]:
    """Requests of a kind; bodies that don't travel inline are appended first."""
    body = {"prompt": "", "max_tokens": prompts.MAX_TOKENS}
    body["prompt"] = "x" * (kind.body_bytes - len(json.dumps(body)))
    encoded = json.dumps(body).encode()
    places = []
    if kind.body_bytes > INLINE_BYTES:
        async with pool.producer(max_request_size=2 << 20) as producer:
            for number in range(BODIES):
                key = f"{run}{number}".encode()
                at = await producer.send_and_wait(pool.names.bodies, encoded, key=key)
                places.append({"topic": at.topic, "partition": at.partition, "offset": at.offset})
    digest = {"bytes": len(encoded), "sha256": sha256(encoded).hexdigest()}
    records = []
    for number in range(count):
        id = f"{run}-{number}"
        request: dict[str, Any] = {"id": id, "model": prompts.MODEL, "endpoint": "/v1/completions"}
        hashes = [f"{number:08x}{block:08x}" for block in range(kind.blocks)]
        tokens = kind.blocks * TOKENS_PER_BLOCK - TOKENS_PER_BLOCK // 2
        request["tokens"] = {
            "count": tokens,
            "block_size": TOKENS_PER_BLOCK,
            "block_hashes": hashes[: tokens // TOKENS_PER_BLOCK],
        }
        if places:
            request["body_ref"] = places[number % BODIES] | digest
        else:
            request["body"] = body
        records.append((id.encode(), json.dumps(request).encode()))
    return records


async def _burst(pool: Pool, loop: OpenLoop, records: Sequence[tuple[bytes, bytes]]) -> dict[str, float]:
    """Show all of them at once, and measure until the last outcome is published."""
    before_files, before_net, before = _kafka_bytes(pool), await _redis_bytes(pool), pool.cpu_s()
    began_s = time.monotonic()
    await pool.append(records)
    loop.sent += len(records)
    await loop.drain()
    loop.sent += PARTITIONS  # the transaction's own marks, which offsets count from the next record on
    after, count = pool.cpu_s(), len(records)
    return {
        "seconds": round(time.monotonic() - began_s, 2),
        **{f"{role}_us": round((after[role] - before[role]) / count * 1e6, 1) for role in after},
        "record_bytes": round(sum(len(value) for _, value in records) / count, 1),
        "kafka_bytes": round((_kafka_bytes(pool) - before_files) / count, 1),
        "redis_bytes": round((await _redis_bytes(pool) - before_net) / count, 1),
    }


def _kafka_bytes(pool: Pool) -> int:
    """What its topics take on disk, but for the bodies, which are appended before."""
    return sum(path.stat().st_size for path in pool.kafka_files if pool.names.bodies not in str(path))


async def _redis_bytes(pool: Pool) -> int:
    """What came to Redis and went from it so far."""
    info = await pool.redis.info("stats")
    return int(info["total_net_input_bytes"]) + int(info["total_net_output_bytes"])
