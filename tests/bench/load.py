"""What following the fleet's load costs: 1,000 nodes that report five times a second, and nothing else.

Real dispatcher and Valkey. A busy machine may not get all 5,000 reports a second made: told is what was, and
what it would be at 5,000 were it all in proportion, which is too much where more reports come in one read.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tests.bench.machine import load_average
from tests.bench.pool import Pool

NODES = 1000
REPORT_S = 0.2
MEASURE_S = 10.0
SETTLE_S = 5.0
WANTED_PER_S = NODES / REPORT_S
FLAGS = ("--heartbeat-ttl-s", "30", "--log-level", "WARNING")
TARGETS = {"dispatcher": 0.10, "redis": 0.15}
"""Shares of a core at 5,000 reports a second."""


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    async with Pool(FLAGS) as pool:
        await pool.start_dispatcher()
        await pool.start_nodes(NODES, "--report-s", str(REPORT_S))
        measured = await _measure(pool)
    per_s = measured["reports_per_s"]
    wanted = {role: measured[role] * max(1.0, WANTED_PER_S / per_s) for role in TARGETS}
    print(f"{per_s:.0f} reports/s")
    print(f"{'share of a core':16} {'measured':>9} {'at 5,000/s':>11} {'allowed':>8}")
    for role, allowed in TARGETS.items():
        print(f"{role:16} {measured[role]:9.1%} {wanted[role]:11.1%} {allowed:8.0%}", flush=True)
    return {
        "nodes": NODES,
        "load_average": load,
        "measured": _rounded(measured),
        "core_share_at_5000_per_s": _rounded(wanted),
        "targets": TARGETS,
    }


async def _measure(pool: Pool) -> dict[str, float]:
    """Shares of a core, and reports a second."""
    await asyncio.sleep(SETTLE_S)
    (light,) = pool.light
    await light.ask("reset")
    before, began_s = pool.cpu_s(), time.monotonic()
    await asyncio.sleep(MEASURE_S)
    after, took_s = pool.cpu_s(), time.monotonic() - began_s
    reports = (await light.ask())["reports"]
    return {
        "reports_per_s": reports / took_s,
        **{role: (after[role] - before[role]) / took_s for role in after},
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
