"""The prefix index, and how a leader follows caches: matches, memory, events in bulk, churn, its start.

- match: a prompt of 256 blocks of which 1,000 nodes hold beginnings of different lengths;
- memory: bytes for each (block, node) entry, of blocks that one node holds and of blocks that ten hold;
- events: from a real Valkey, read, decoded and applied by the leader's own service, blocks a second of CPU;
- churn: blocks come and go at constant size, as many as 1,000 nodes change in an hour at one a second; memory
  at the end is to be what it was halfway;
- rebuild: a new leader reads the views of 1,000 nodes from Redis.

Microseconds and seconds are CPU time of this process, but for the rebuild, whose wall time is told as well.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import connect_redis
from dispatcher.backends.node_store import NodeStore
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.backends.store_view import StoreView
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Names
from dispatcher.protocol.node import BlockEvent, BlockEventKind, Medium, NodeIdentity
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.services.registry import Registry
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics
from tests.bench.apart import apart, resident_bytes
from tests.bench.machine import load_average

NODES = 1000
MATCH_BLOCKS = 256
MATCHES = 2000
ENTRIES = 1_000_000
SHARERS = 10
EVENT_BLOCKS = 64
EVENTS = 12_000
"""Below what the stream keeps (20,000), so that none is read as a gap."""
CHURNED = 4_000_000
VIEW_BLOCKS = 500
NOW_ISO = "2026-01-01T00:00:00.000000Z"
BLOCK_SIZE = 256
TARGETS = {"match_us": 50.0, "entry_bytes": 150.0, "blocks_per_cpu_s": 500_000.0, "rebuild_s": 2.0}


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    result: dict[str, Any] = {
        "match_us": apart(measure_match),
        "entry_bytes": {
            "own": apart(measure_memory, 1),
            f"of {SHARERS} nodes": apart(measure_memory, SHARERS),
        },
        "churn": apart(measure_churn),
    }
    with tempfile.TemporaryDirectory(prefix="flexlb-bench-") as folder:
        async with ValkeyServer(Path(folder)) as valkey:
            result |= await _follow(valkey)
    rows = {
        f"match of {MATCH_BLOCKS} blocks, {NODES} holders: median us": result["match_us"]["median"],
        "the same, worst of 100: us": result["match_us"]["p99"],
        **{f"bytes per entry, {kind} block": bytes for kind, bytes in result["entry_bytes"].items()},
        "churn: blocks/s of CPU": result["churn"]["blocks_per_cpu_s"],
        "churn: growth of memory, second half": result["churn"]["grown"],
        "events followed: blocks/s of CPU": result["events"]["blocks_per_cpu_s"],
        f"rebuild of {NODES} views of {VIEW_BLOCKS}: s": result["rebuild"]["seconds"],
    }
    for name, value in rows.items():
        print(f"{name:54} {value:14,.2f}")
    return {"load_average": load, "nodes": NODES, **result, "targets": TARGETS}


def _name(number: int) -> str:
    return f"n{number}"


def measure_match() -> dict[str, float]:
    """Microseconds of a match, by the number of blocks its prompt has in common with nobody."""
    rng = random.Random(1)
    index = PrefixIndex()
    prompts = [[rng.randbytes(8) for _ in range(MATCH_BLOCKS)] for _ in range(20)]
    for number in range(NODES):
        for prompt in prompts:
            index.store(_name(number), Medium.GPU, prompt[: rng.randrange(1, MATCH_BLOCKS + 1)])
    took = []
    for turn in range(MATCHES):
        prompt = prompts[turn % len(prompts)]
        began = time.thread_time_ns()
        found = index.match(prompt)
        took.append((time.thread_time_ns() - began) / 1000)
        assert found[0].blocks > MATCH_BLOCKS // 2
    took.sort()
    return {"median": round(statistics.median(took), 2), "p99": round(took[len(took) * 99 // 100], 2)}


def measure_memory(sharers: int) -> float:
    """Bytes of resident memory for each (block, node) entry."""
    rng = random.Random(2)
    index = PrefixIndex()
    for number in range(NODES):
        index.number(_name(number))
    gc.collect()
    before = resident_bytes()
    for at in range(0, ENTRIES, 100 * sharers):
        blocks = [rng.randbytes(8) for _ in range(100)]
        first = at // (100 * sharers)
        for turn in range(sharers):
            index.store(_name((first + turn * 97) % NODES), Medium.GPU, blocks)
    gc.collect()
    held = sum(len(blocks) for n in range(NODES) for blocks in index.held_by(_name(n)).values())
    assert held == ENTRIES, f"expected {ENTRIES} entries, seen {held}"
    return round((resident_bytes() - before) / ENTRIES, 1)


def measure_churn() -> dict[str, float]:
    """Blocks come and go at constant size: how fast, and whether memory grows."""
    rng = random.Random(3)
    index = PrefixIndex()
    views: list[list[list[bytes]]] = [[] for _ in range(NODES)]
    sizes = []
    changed = 0
    began = time.process_time()
    turn = 0
    while changed < CHURNED:
        number = turn % NODES
        blocks = [rng.randbytes(8) for _ in range(EVENT_BLOCKS)]
        index.store(_name(number), Medium.GPU, blocks)
        views[number].append(blocks)
        changed += EVENT_BLOCKS
        if len(views[number]) > VIEW_BLOCKS // EVENT_BLOCKS:
            index.remove(_name(number), Medium.GPU, views[number].pop(0))
            changed += EVENT_BLOCKS
        turn += 1
        if turn % (5 * NODES) == 0:
            sizes.append(resident_bytes())
    took = time.process_time() - began
    half = sizes[len(sizes) // 2]
    return {
        "blocks": changed,
        "blocks_per_cpu_s": round(changed / took),
        "resident_half_bytes": half,
        "resident_end_bytes": sizes[-1],
        "grown": round(sizes[-1] / half - 1, 4),
    }


async def _follow(valkey: ValkeyServer) -> dict[str, Any]:
    """Views in a real Redis: a new leader's reading of all, then events as they come."""
    rng = random.Random(4)
    names = Names()
    client = connect_redis(valkey.url, timeout_s=30.0)
    runner = ScriptRunner(client)
    stores = [NodeStore(runner, names, _name(n), heartbeat_ttl_s=600, lease_s=60) for n in range(NODES)]
    fleet, index = Fleet(), PrefixIndex()
    for store in stores:
        identity = NodeIdentity(
            node=store.node, incarnation="x", models=("m",), routing_block_size=BLOCK_SIZE
        )
        await store.register(identity, {}, now_iso=NOW_ISO)
        fleet.admit(identity, 0.0)
        hashes = [rng.randbytes(8).hex() for _ in range(VIEW_BLOCKS)]
        await store.publish_blocks([_event(store.node, 1, hashes)])
    metrics = DispatcherMetrics(CollectorRegistry())
    registry = Registry(
        StoreView(client, names),
        fleet,
        index,
        block_size=BLOCK_SIZE,
        clock=Clock(),
        metrics=metrics,
        log=Log(),
    )
    began, began_s = time.process_time(), time.monotonic()
    await registry.step(block_ms=None)
    rebuild = {"cpu_s": time.process_time() - began, "seconds": time.monotonic() - began_s}
    assert index.blocks == NODES * VIEW_BLOCKS, f"expected {NODES * VIEW_BLOCKS} blocks, seen {index.blocks}"
    for number in range(EVENTS):
        store = stores[number % NODES]
        hashes = [rng.randbytes(8).hex() for _ in range(EVENT_BLOCKS)]
        await store.publish_blocks([_event(store.node, 2 + number // NODES, hashes)])
    expected = index.blocks + EVENTS * EVENT_BLOCKS
    began = time.process_time()
    while index.blocks < expected:
        before = index.blocks
        await registry.step(block_ms=None)
        assert index.blocks > before, f"expected {expected} blocks, seen no more than {before}"
    took = time.process_time() - began
    await client.aclose()
    return {
        "rebuild": {name: round(value, 3) for name, value in rebuild.items()},
        "events": {
            "events": EVENTS,
            "blocks_each": EVENT_BLOCKS,
            "blocks_per_cpu_s": round(EVENTS * EVENT_BLOCKS / took),
        },
    }


def _event(node: str, sequence: int, hashes: list[str]) -> BlockEvent:
    return BlockEvent(
        node=node, incarnation="x", sequence=sequence, kind=BlockEventKind.STORED, hashes=tuple(hashes)
    )
