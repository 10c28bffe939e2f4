"""Whether a request costs more as everything around it grows: nodes, known blocks, prompts, bodies.

Microseconds of CPU: of a decision (`decision`) by nodes, of a match by the entries of the index, of reading a
record by the length of its prompt and by the size of its body, whose bytes lie elsewhere above 16 kB. Each is
also told as a ratio to its row's first. The decision by prompt length is in `decision.json`.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from typing import Any

from dispatcher.protocol.names import Lane, Ref
from dispatcher.protocol.node import Medium
from dispatcher.scheduling.admission import AdmissionLimits, Admitted, admit
from dispatcher.scheduling.prefix_index import PrefixIndex
from tests.bench.apart import apart, resident_bytes
from tests.bench.decision import decide_round
from tests.bench.machine import load_average
from tests.bench.steady_fleet import SteadyFleet

NODES = (10, 100, 1000, 5000)
BLOCKS = 16
CACHED_BLOCKS = 160
ENTRIES = (10_000, 1_000_000, 10_000_000)
HOLDERS = 1000
MATCH_BLOCKS = 64
PROMPTS = (4, 16, 64, 256, 512)
BODIES = (1 << 10, 16 << 10, 128 << 10, 512 << 10)
REPEATS = 300
WARM_UP, ROUNDS = 5, 20
FLAT = 1.2
"""A body's size may change the leader's cost by so much."""


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    by_entries = {f"{entries}": apart(measure_entries, entries) for entries in ENTRIES}
    result = {
        "decision_us_by_nodes": {f"{nodes}": apart(measure_nodes, nodes) for nodes in NODES},
        "match_us_by_entries": {entries: row["match_us"] for entries, row in by_entries.items()},
        "admit_us_by_prompt_blocks": {f"{blocks}": _admit(blocks, 600) for blocks in PROMPTS},
        "admit_us_by_body_bytes": {f"{size}": _admit(8, size) for size in BODIES},
    }
    for title, row in result.items():
        first = next(iter(row.values()))
        told = (f"{name}: {us:.1f} ({us / first:.2f})" for name, us in row.items())
        print(f"{title:28} {'  '.join(told)}")
    print("bytes per entry: " + ", ".join(f"{name}: {row['bytes']:.0f}" for name, row in by_entries.items()))
    bodies = list(result["admit_us_by_body_bytes"].values())
    return {
        "load_average": load,
        **result,
        "entry_bytes": {entries: row["bytes"] for entries, row in by_entries.items()},
        "flat_in_body": max(bodies) <= FLAT * min(bodies),
    }


def measure_nodes(nodes: int) -> float:
    """Median microseconds of a decision."""
    fleet = SteadyFleet(nodes, BLOCKS, cached_blocks=CACHED_BLOCKS)
    batch = min(128, 4 * nodes)
    took = []
    for turn in range(WARM_UP + ROUNDS):
        for _ in range(batch):
            fleet.state.enter(fleet.request())
        began = time.process_time()
        chosen = decide_round(fleet, batch)
        if turn >= WARM_UP:
            took.append((time.process_time() - began) / len(chosen) * 1e6)
        fleet.pass_time(chosen, batch)
    return round(statistics.median(took), 2)


def measure_entries(entries: int) -> dict[str, float]:
    """Microseconds of a match in an index of so many entries, and bytes for each of them."""
    rng = random.Random(5)
    index = PrefixIndex()
    held = []
    before = resident_bytes()
    for number in range(entries // MATCH_BLOCKS):
        blocks = tuple(rng.randbytes(8) for _ in range(MATCH_BLOCKS))
        index.store(f"n{number % HOLDERS}", Medium.GPU, blocks)
        if number % max(1, entries // MATCH_BLOCKS // 1000) == 0:
            held.append(blocks)
    size = (resident_bytes() - before) / entries
    took = []
    for turn in range(2000):
        prompt = held[turn * 379 % len(held)]
        began = time.thread_time_ns()
        found = index.match(prompt)
        took.append((time.thread_time_ns() - began) / 1000)
        assert found[0].blocks == MATCH_BLOCKS
    return {"match_us": round(statistics.median(took), 2), "bytes": round(size, 1)}


def _admit(blocks: int, body_bytes: int) -> float:
    """Median microseconds of reading one record; a large body travels by reference, as the SDK sends it."""
    names = {"requests": "requests", "bodies": "bodies"}
    limits = AdmissionLimits(
        max_record_bytes=4 << 20,
        default_deadline_ms=600_000,
        max_deadline_ms=600_000,
        request_topic=names["requests"],
        bodies_topic=names["bodies"],
        reply_topics={"replies": 4},
    )
    record: dict[str, Any] = {
        "id": "bench",
        "model": "m",
        "endpoint": "/v1/completions",
        "tokens": {"count": blocks * 256 + 9, "block_hashes": [f"{n:016x}" for n in range(blocks)]},
    }
    if body_bytes > 16 << 10:
        place = {"topic": names["bodies"], "partition": 0, "offset": 7, "bytes": body_bytes}
        record["body_ref"] = place | {"sha256": "0" * 64}
    else:
        record["body"] = {"prompt": "x" * (body_bytes - 40), "max_tokens": 64}
    value = json.dumps(record).encode()
    took = []
    for offset in range(REPEATS):
        began = time.thread_time_ns()
        decision = admit(
            Ref(Lane.INTERACTIVE, 0, offset),
            b"bench",
            value,
            appended_ms=0,
            now_ms=0,
            traceparent="",
            limits=limits,
            carry_bodies=True,
        )
        took.append((time.thread_time_ns() - began) / 1000)
        assert isinstance(decision, Admitted)
    return round(statistics.median(took), 2)
