"""Whether pools beside each other cost a request more: 1, 2 and 4 pools on the same Kafka and Valkey.

Each pool has its own dispatcher, leader lock, topics and nodes; all get a burst at the same moment. On a
machine with fewer cores than dispatchers the rate can't rise: what is to stay is the CPU time of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dispatcher.local.stack import LocalServers
from tests.bench.machine import cpu_s, load_average
from tests.bench.pool import Pool, local_servers

POOLS = (1, 2, 4)
NODES = 200
RECORDS = 3000
MAX_RUNNING = 512
FLAGS = (
    *("--heartbeat-ttl-s", "30", "--log-level", "WARNING"),
    *("--lookahead-min-s", "10", "--lookahead-max-s", "60"),
)
BURST_S = 200.0
POLL_S = 0.02


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    rows: dict[str, dict[str, float]] = {}
    print(f"{'pools':>6} {'dispatcher us':>14} {'redis us':>9} {'kafka us':>9} {'assignments/s':>14}")
    for count in POOLS:
        with TemporaryDirectory(prefix="flexlb-bench-") as folder:
            async with local_servers(Path(folder)) as servers:
                row = rows[str(count)] = await _measure(servers, count)
        print(
            f"{count:6} {row['dispatcher_us']:14.1f} {row['redis_us']:9.1f} {row['kafka_us']:9.1f} "
            f"{row['assignments_per_s']:14.0f}",
            flush=True,
        )
    first, last = (rows[str(count)]["dispatcher_us"] for count in (POOLS[0], POOLS[-1]))
    return {
        "nodes_of_each": NODES,
        "records_of_each": RECORDS,
        "load_average": load,
        "by_pools": rows,
        "most_pools_by_one": round(last / first, 3),
    }


async def _measure(servers: LocalServers, count: int) -> dict[str, float]:
    assert servers.valkey is not None
    assert servers.broker is not None
    async with contextlib.AsyncExitStack() as stack:
        pools = []
        for number in range(count):
            pool = Pool(FLAGS, name=f"p{number}", servers=servers)
            pools.append(await stack.enter_async_context(pool))
            await pool.start_dispatcher()
            await pool.start_nodes(NODES, "--max-running", str(MAX_RUNNING), "--views", "--idle")
        shared = {"redis": servers.valkey.pid, "kafka": servers.broker.pid}
        before = {role: cpu_s(pid) for role, pid in shared.items()}
        dispatchers = [cpu_s(pool.dispatcher.pid) for pool in pools]
        began_s = time.monotonic()
        await asyncio.gather(*(pool.preload(RECORDS, NODES, "burst") for pool in pools))
        async with asyncio.timeout(BURST_S):
            while sum([await pool.marks() for pool in pools]) < count * RECORDS:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        took_s = time.monotonic() - began_s
        used = sum(cpu_s(pool.dispatcher.pid) for pool in pools) - sum(dispatchers)
        requests = count * RECORDS
        return {
            "dispatcher_us": round(used / requests * 1e6, 1),
            **{
                f"{role}_us": round((cpu_s(pid) - before[role]) / requests * 1e6, 1)
                for role, pid in shared.items()
            },
            "assignments_per_s": round(requests / took_s, 1),
        }
