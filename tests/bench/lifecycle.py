"""The whole life of requests at the highest rate that one dispatcher holds, with a flat backlog.

Appended to real Apache Kafka (acks=all), assigned through a Valkey that appends to its file each second,
claimed and completed by 1,250 nodes with an instant engine (all in one or two processes, by the agents' own
store), outcomes published in transactions, *finished* advanced. A first flood tells how much gets through at
all; from there rates are tried upwards while they are held, or downwards until one is. In the end `flexlb
audit` must find each request answered exactly once.

Variables: FLEXLB_BENCH_HOLD_S (default 20; the headline's is 60), FLEXLB_BENCH_NODES (1250).
"""

from __future__ import annotations

import os
from typing import Any

from dispatcher.audit import AuditResult, audit
from tests.bench.machine import load_average
from tests.bench.open_loop import OpenLoop, Run
from tests.bench.pool import Pool

HOLD_S = float(os.environ.get("FLEXLB_BENCH_HOLD_S", "20"))
NODES = int(os.environ.get("FLEXLB_BENCH_NODES", "1250"))
FLOOD_RATE, FLOOD_S = 4000.0, 3.0
UPWARDS, DOWNWARDS = (1.3, 1.7, 2.2), (0.8, 0.6, 0.45, 0.3)
"""Of what got through in the flood, once that itself was tried."""
TARGET_PER_S = 8000.0
FLAGS = ("--heartbeat-ttl-s", "30", "--log-level", "WARNING")


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    print(
        f"{'rate':>8} {'held':>5} {'outcomes/s':>10} {'backlog':>8} {'mark':>6} {'p50 ms':>7} {'p99 ms':>7}"
        "  us of CPU"
    )
    async with Pool(FLAGS) as pool:
        await pool.start_dispatcher()
        await pool.start_nodes(NODES, "--views", "--drain")
        async with OpenLoop(pool, NODES) as loop:
            flood = await loop.run(FLOOD_RATE, FLOOD_S)
            _print(flood)
            through = loop.sent / (FLOOD_S + flood.drained_s)
            tried = [await loop.run(through, HOLD_S)]
            _print(tried[0])
            is_up = tried[0].is_held
            for share in UPWARDS if is_up else DOWNWARDS:
                tried.append(await loop.run(max(10.0, share * through), HOLD_S))
                _print(tried[-1])
                if tried[-1].is_held is not is_up:
                    break
            sent = loop.sent
        result = await audit(pool.servers.kafka, pool.names.pool, settle_s=10.0)
    _judge(result, sent)
    held = max((run for run in tried if run.is_held), key=lambda run: run.rate, default=None)
    print(f"audit: {result.requests} requests, {result.outcomes}, {result.findings} findings")
    return {
        "nodes": NODES,
        "hold_s": HOLD_S,
        "load_average": load,
        "requests_per_s": round(held.rate, 1) if held else 0.0,
        "cpu_us": held.told()["cpu_us"] if held else {},
        "through_per_s": round(through, 1),
        "flood": flood.told(),
        "runs": [run.told() for run in tried],
        "audit": {
            "requests": result.requests,
            "outcomes": result.outcomes,
            "findings": result.findings,
            "executed again": len(result.reexecuted),
        },
        "target_per_s": TARGET_PER_S,
    }


def _judge(result: AuditResult, sent: int) -> None:
    """Every request was answered exactly once, by `Completed`."""
    assert result.findings == 0, f"the audit has findings: {result}"
    assert result.requests == sent, f"expected {sent} requests, seen {result.requests}"
    assert result.outcomes == {"Completed": sent}, f"expected all completed, seen {result.outcomes}"


def _print(run: Run) -> None:
    told = run.told()
    used = ", ".join(f"{role} {us:.0f}" for role, us in told["cpu_us"].items())
    print(
        f"{told['rate']:8.0f} {'yes' if run.is_held else 'no':>5} {told['published_per_s']:10.0f} "
        f"{told['backlog_last']:8} {told['finished_mark_behind']:6} {told['p50_ms']:7} "
        f"{told['p99_ms']:7}  {used}",
        flush=True,
    )
