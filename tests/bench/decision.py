"""What a decision costs the leader: match, choose and reserve, in rounds of a batch, on a fleet under load.

Microseconds of CPU of this process with the collector as production has it. A fleet's rounds are timed in
turns: whole (time of the round by the requests it bound), and call by call, which tells choosing from
reserving and gives percentiles; the clock's own two readings are taken off. Building a fleet and letting its
time go by (`steady_fleet`) is not timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

from dispatcher.scheduling.choice import Choice
from dispatcher.scheduling.window import Waiting
from tests.bench.machine import load_average, percentile
from tests.bench.steady_fleet import SteadyFleet

BATCH = 128
WARM_UP = 10
ROUNDS = 30
NODES = (10, 100, 1250, 5000)
BLOCKS = (4, 64, 512)
USUAL_NODES, USUAL_BLOCKS = 1250, 64
CACHED_BLOCKS = 2000
MOST_ENTRIES = 5_000_000
"""(block, node) entries of a fleet: the machine's memory and the reader's time are bounded."""
TARGET_US = 20.0
PAST_FACTOR = 1.5
"""What 5,000 nodes, or 128 k-token prompts, may cost beside the usual fleet."""


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    print(
        f"{'nodes':>6} {'blocks':>6} {'prefixes':>8} {'round us':>9} {'enter':>7} {'match':>7} "
        f"{'choose p50':>10} {'p99':>7} {'reserve p50':>11} {'p99':>7}"
    )
    by_nodes = {str(nodes): _measure(nodes, USUAL_BLOCKS) for nodes in NODES}
    usual = by_nodes[str(USUAL_NODES)]
    by_blocks = {
        str(blocks): usual if blocks == USUAL_BLOCKS else _measure(USUAL_NODES, blocks) for blocks in BLOCKS
    }
    unshared = _measure(USUAL_NODES, USUAL_BLOCKS, is_shared=False)
    median_us = {nodes: row["round_us"] for nodes, row in by_nodes.items()}
    return {
        "unit": "microseconds of CPU per request",
        "batch": BATCH,
        "load_average": load,
        "median_us": median_us,
        "by_nodes": by_nodes,
        "by_blocks": by_blocks,
        "without_shared_prefixes": unshared,
        "target_us": TARGET_US,
        "within": {
            "usual": usual["round_us"] <= TARGET_US,
            "5000 nodes": median_us["5000"] <= PAST_FACTOR * usual["round_us"],
            "512 blocks": by_blocks["512"]["round_us"] <= PAST_FACTOR * usual["round_us"],
        },
    }


def _measure(nodes: int, blocks: int, *, is_shared: bool = True) -> dict[str, float]:
    cached = min(CACHED_BLOCKS, MOST_ENTRIES // nodes)
    fleet = SteadyFleet(nodes, blocks, cached_blocks=cached, is_shared=is_shared)
    batch = min(BATCH, 4 * nodes)
    whole: list[float] = []
    entered: list[float] = []
    matched: list[float] = []
    chooses: list[float] = []
    reserves: list[float] = []
    for turn in range(WARM_UP + ROUNDS):
        is_timed = turn >= WARM_UP
        requests = [fleet.request() for _ in range(batch)]
        began = time.process_time()
        for waiting in requests:
            fleet.state.enter(waiting)
        entered_s = time.process_time() - began
        if turn % 2:
            began = time.process_time()
            chosen = decide_round(fleet, batch)
            whole_s = time.process_time() - began
            if is_timed:
                whole.append(whole_s / len(chosen) * 1e6)
                entered.append(entered_s / batch * 1e6)
        else:
            spent: tuple[list[float], list[float]] = ([], [])
            chosen = _decide_by_calls(fleet, batch, *spent)
            if is_timed:
                chooses += spent[0]
                reserves += spent[1]
        began = time.process_time()
        for waiting, _ in chosen:
            fleet.scheduler.matches(waiting.envelope)
        matched.append((time.process_time() - began) / len(chosen) * 1e6)
        fleet.pass_time(chosen, batch)
    row = {
        "round_us": statistics.median(whole),
        "round_worst_us": max(whole),
        "enter_us": statistics.median(entered),
        "match_us": statistics.median(matched),
        "choose_us": percentile(chooses, 0.5),
        "choose_p99_us": percentile(chooses, 0.99),
        "reserve_us": percentile(reserves, 0.5),
        "reserve_p99_us": percentile(reserves, 0.99),
        "cached_blocks": cached,
    }
    print(
        f"{nodes:6} {blocks:6} {'shared' if is_shared else 'none':>8} {row['round_us']:9.1f} "
        f"{row['enter_us']:7.1f} {row['match_us']:7.1f} {row['choose_us']:10.1f} {row['choose_p99_us']:7.1f} "
        f"{row['reserve_us']:11.1f} {row['reserve_p99_us']:7.1f}",
        flush=True,
    )
    del fleet
    gc.collect()
    return {name: round(value, 2) for name, value in row.items()}


def decide_round(fleet: SteadyFleet, batch: int) -> list[tuple[Waiting, Choice]]:
    """One round, as `services.dispatch` goes through it."""
    window, now_ms = fleet.state.window, fleet.state.clock.now_ms()
    chosen: list[tuple[Waiting, Choice]] = []
    round = window.begin_round()
    while len(chosen) < batch:
        found = window.choose(fleet.scheduler, round, now_ms)
        if found is None:
            break
        waiting, choice = found
        fleet.bind(waiting, choice.node, uncached_tokens=choice.uncached_tokens, prefill_s=choice.prefill_s)
        chosen.append(found)
    window.end_round(round)
    assert chosen, "a fleet under an even load has room"
    return chosen


def _decide_by_calls(
    fleet: SteadyFleet, batch: int, chooses: list[float], reserves: list[float]
) -> list[tuple[Waiting, Choice]]:
    """The same, with the microseconds of each call put into the two lists."""
    window, now_ms, clock = fleet.state.window, fleet.state.clock.now_ms(), time.thread_time_ns
    own_ns = min(clock() - before for before in (clock() for _ in range(100)))
    chosen: list[tuple[Waiting, Choice]] = []
    round = window.begin_round()
    while len(chosen) < batch:
        began = clock()
        found = window.choose(fleet.scheduler, round, now_ms)
        chose = clock()
        if found is None:
            break
        waiting, choice = found
        fleet.bind(waiting, choice.node, uncached_tokens=choice.uncached_tokens, prefill_s=choice.prefill_s)
        reserves.append((clock() - chose - own_ns) / 1000)
        chooses.append((chose - began - own_ns) / 1000)
        chosen.append(found)
    window.end_round(round)
    assert chosen, "a fleet under an even load has room"
    return chosen
