"""Half an hour on a busy machine: does anybody lead, or get fenced, who should not have?

A whole stack under a steady load, with processes beside it that keep all cores busy to a share. Nothing is
broken, so every election beyond the first and every fenced node is a false alarm. Variables:
FLEXLB_SOAK_MINUTES (default 30), FLEXLB_SOAK_BUSY (the share, default 0.8).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.audit import audit
from dispatcher.client.client import Client
from dispatcher.local.stack import LocalServers, LocalStack, Member, StackSettings
from tests.bench.failover import loaded
from tests.bench.machine import percentile

MINUTES = float(os.environ.get("FLEXLB_SOAK_MINUTES", "30"))
BUSY = float(os.environ.get("FLEXLB_SOAK_BUSY", "0.8"))
RATE = 40.0
NODES, DISPATCHERS = 8, 3
LEADER_TTL_S = 1.0
SETTLE_S = 20.0
WATCHED = {
    "flexlb_elections_total": "elections",
    "flexlb_depositions_total": "depositions",
    "flexlb_nodes_fenced_total": "nodes fenced",
    "flexlb_requeued_total": "requests moved",
}
BURNER = """
import sys, threading, time
share = 0.0
def listen():
    global share
    for line in sys.stdin:
        share = float(line)
threading.Thread(target=listen, daemon=True).start()
while True:
    until = time.perf_counter() + 0.05 * share
    while time.perf_counter() < until:
        pass
    time.sleep(max(0.0005, 0.05 * (1 - share)))
"""


def _cpu_times() -> tuple[float, float]:
    """(busy, all) jiffies of the machine so far."""
    numbers = [float(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


class _Burners:
    """A process per core that burns what is missing to the wanted share."""

    def __init__(self) -> None:
        self._processes: list[asyncio.subprocess.Process] = []
        self.shares: list[float] = []

    async def run(self, until_s: float) -> None:
        """Keep the machine busy until then; notes its share each second."""
        for _ in range(os.cpu_count() or 1):
            self._processes.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, "-c", BURNER, stdin=asyncio.subprocess.PIPE
                )
            )
        burn, (busy, total) = 0.0, _cpu_times()
        try:
            while time.monotonic() < until_s:
                await asyncio.sleep(1.0)
                now_busy, now_total = _cpu_times()
                share = (now_busy - busy) / max(1.0, now_total - total)
                busy, total = now_busy, now_total
                self.shares.append(share)
                burn = min(0.95, max(0.0, burn + 0.3 * (BUSY - share)))
                for process in self._processes:
                    assert process.stdin is not None
                    process.stdin.write(f"{burn}\n".encode())
        finally:
            for process in self._processes:
                process.kill()
                await process.wait()


async def _counts(members: Sequence[Member]) -> dict[str, float]:
    found = dict.fromkeys(WATCHED.values(), 0.0)
    async with aiohttp.ClientSession() as session:
        for member in members:
            async with session.get(f"{member.url}/metrics") as response:
                for family in text_string_to_metric_families(await response.text()):
                    for one in family.samples:
                        if one.name in WATCHED:
                            found[WATCHED[one.name]] += one.value
    return found


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    settings = StackSettings(
        nodes=NODES, dispatchers=DISPATCHERS, dispatcher_flags=("--leader-ttl-s", str(LEADER_TTL_S))
    )
    with TemporaryDirectory(prefix="flexlb-", ignore_cleanup_errors=True) as folder:
        async with (
            LocalServers(settings, Path(folder), tell=print) as servers,
            LocalStack(settings, folder=Path(folder), servers=servers) as stack,
            Client(stack.kafka, settings.pool) as client,
        ):
            before = await _counts(stack.dispatchers)
            burners = _Burners()
            async with loaded(stack, client, RATE, "soak") as load:
                await burners.run(time.monotonic() + MINUTES * 60)
            found = await audit(stack.kafka, settings.pool, settle_s=SETTLE_S)
            after = await _counts(stack.dispatchers)
    waits_ms = [(end - sent) * 1000 for sent, end in load.answered]
    result: dict[str, Any] = {
        "minutes": MINUTES,
        "leader_ttl_s": LEADER_TTL_S,
        "busy_p50": round(percentile(burners.shares, 0.5), 3),
        "busy_p10": round(percentile(burners.shares, 0.1), 3),
        "requests": found.requests,
        "lost": len(found.lost),
        "duplicated": len(found.duplicated),
        "e2e_p50_ms": round(percentile(waits_ms, 0.5), 1),
        "e2e_p99_ms": round(percentile(waits_ms, 0.99), 1),
        **{name.replace(" ", "_"): after[name] - before[name] for name in WATCHED.values()},
    }
    for name, value in result.items():
        print(f"{name:20} {value}")
    return result
