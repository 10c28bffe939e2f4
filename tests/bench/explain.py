"""What explanations cost a leader, in microseconds of CPU per decision: without, above the cap, and of all.

A round of choices as the dispatch service makes them, with prompts of which every node holds some blocks. The
three are measured in turns, so that what else the machine does falls on all of them; told is the least.
"""

from __future__ import annotations

import random
import time
from typing import Any

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.leader_lock import Lease
from dispatcher.backends.leader_store import LeaderStore
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Attempt, Lane, Names, Ref
from dispatcher.protocol.node import Medium, NodeIdentity
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import Waiting
from dispatcher.services.explain import Explain
from dispatcher.services.state import LeaderState
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

FLEETS = (4, 32, 1_000)
REQUESTS = 512
TURNS = 7
WAYS = {"none": (0.0, 0.0), "above the cap": (1.0, 1.0), "every decision": (1.0, 1e9)}
"""Share and rate: nothing sampled, all but one a second refused by the rate, all taken."""


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    rows: dict[str, dict[str, float]] = {}
    print(f"{'nodes':>6} " + " ".join(f"{way:>15}" for way in WAYS) + f" {'encode':>8} {'bytes':>6}")
    for nodes in FLEETS:
        best = dict.fromkeys(WAYS, float("inf"))
        encode_us, size = float("inf"), 0.0
        for turn in range(TURNS):
            for way, (share, per_s) in WAYS.items():
                took_us, told = _decide(nodes, share, per_s, seed=turn)
                best[way] = min(best[way], took_us)
            began = time.process_time()
            encoded = [codec.encode(one) for one in told]
            encode_us = min(encode_us, (time.process_time() - began) / len(told) * 1e6)
            size = sum(map(len, encoded)) / len(encoded)
        rows[str(nodes)] = {**best, "encode": encode_us, "bytes": size}
        print(
            f"{nodes:6} " + " ".join(f"{best[way]:15.2f}" for way in WAYS) + f" {encode_us:8.2f} {size:6.0f}",
            flush=True,
        )
    return {"unit": "microseconds of CPU per decision", "requests": REQUESTS, "fleets": rows}


def _decide(nodes: int, share: float, per_s: float, *, seed: int) -> tuple[float, list[Any]]:
    """Choose and reserve for all requests; microseconds each, and what is to be told."""
    rng = random.Random(seed)
    fleet, index = Fleet(), PrefixIndex()
    state = LeaderState(
        names=Names(),
        fleet=fleet,
        index=index,
        clock=Clock(),
        rng=rng,
        metrics=DispatcherMetrics(CollectorRegistry()),
        log=Log(),
    )
    blocks = [rng.randbytes(8) for _ in range(64)]
    for number in range(nodes):
        node = fleet.admit(
            NodeIdentity(node=f"n{number}", incarnation="x", models=("m",), max_running=4 * REQUESTS), 0.0
        )
        node.admitted = True
        index.store(node.name, Medium.GPU, blocks[: rng.randrange(len(blocks))])
    scheduler = Scheduler(fleet, index, rng=rng, now_s=state.clock.monotonic)
    lease = Lease("1:bench", until=float("inf"), clock=state.clock.monotonic)
    store = LeaderStore(ScriptRunner(None), state.names, lease)
    explain = Explain(state, store, scheduler, share=share, per_s=per_s)
    for number in range(REQUESTS):
        ref = Ref(Lane.INTERACTIVE, 0, number)
        envelope = Envelope(
            ref=str(ref),
            id=f"r{number}",
            model="m",
            prompt_tokens=len(blocks) * 256 + 100,
            tokens_exact=True,
            block_size=256,
            block_hashes=tuple(block.hex() for block in blocks),
            deadline_at_ms=600_000,
        )
        state.window.push(Waiting(ref=ref, envelope=envelope))
    round = state.window.begin_round()
    explain.begin()
    decided = 0
    began = time.process_time()
    while (found := state.window.choose(scheduler, round, 0)) is not None:
        waiting, choice = found
        explain.look(waiting, choice, round, Attempt(1, 1))
        decided += 1
        if decided == REQUESTS:
            break
    took_s = time.process_time() - began
    assert decided == REQUESTS, f"{decided} of {REQUESTS} decided"
    return took_s / decided * 1e6, list(explain._made.values())
