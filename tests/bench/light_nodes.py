"""`python -m tests.bench.light_nodes`: many nodes in one process, with an instant engine or with none.

Each registers, reports, claims and completes by the agents' own `NodeStore`; only the transport is lean
(`lean_redis`), and there is no engine: an outcome is made of the envelope at once. Commands come on stdin, a
line each, answers go to stdout as a line of JSON: `stats` tells what was done since `reset`; the end of stdin
ends the process.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from dispatcher.backends.clock import Clock
from dispatcher.backends.node_store import Busy, Claimed, Ending, NodeStore
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.protocol import codec
from dispatcher.protocol.names import JobId, Names
from dispatcher.protocol.node import BlockEvent, BlockEventKind, NodeIdentity, NodeReport
from dispatcher.protocol.outcome import Choice, Outcome, OutcomeKind, Reason, Timing, Usage
from tests.bench import prompts
from tests.bench.lean_redis import LeanConnection, LeanRedis
from tests.bench.machine import cpu_s

BELL_S = 30.0
CLAIMED_AT_ONCE = 32
REGISTERING = 64
EVERYTHING = 1 << 40
"""Above any assignment's number."""


@dataclass
class Stats:
    """What all nodes did since the last reset. `latency_ms` counts claims by their age since the append."""

    claimed: int = 0
    claims: int = 0
    completed: int = 0
    lost: int = 0
    reports: int = 0
    latency_ms: Counter[int] = field(default_factory=Counter)

    def reset(self) -> None:
        """Begin anew."""
        self.claimed = self.claims = self.completed = self.lost = self.reports = 0
        self.latency_ms.clear()


class LightNode:
    """One node."""

    def __init__(
        self,
        number: int,
        store: NodeStore,
        stats: Stats,
        *,
        max_running: int,
        report_s: float,
        is_told: bool,
        seen: int = 0,
    ) -> None:
        self._number = number
        self._store = store
        self._stats = stats
        self._report_s = report_s
        self._clock = Clock()
        self._is_told = is_told
        self.identity = NodeIdentity(
            node=store.node,
            incarnation=f"light{number}",
            models=(prompts.MODEL,),
            max_running=max_running,
            engine_block_size=prompts.ENGINE_BLOCK,
            routing_block_size=prompts.BLOCK_TOKENS if is_told else 0,
        )
        self._generation = ""
        self._sequence = 0
        self._seen = seen
        self._claims = 0
        self._blocks_sequence = 0

    async def register(self) -> None:
        """Become known."""
        answer = await self._store.register(self.identity, {}, now_iso=self._clock.now_iso())
        assert not isinstance(answer, Busy), f"another {self.identity.node} lives in this pool"
        assert answer is not None, "nobody fences a light node"
        self._generation = answer

    async def publish_view(self, nodes: int) -> None:
        """Tell of the blocks that it holds."""
        events = []
        for blocks in prompts.view(self._number, nodes):
            self._blocks_sequence += 1
            events.append(
                BlockEvent(
                    node=self.identity.node,
                    incarnation=self.identity.incarnation,
                    sequence=self._blocks_sequence,
                    kind=BlockEventKind.STORED,
                    hashes=blocks,
                )
            )
        assert await self._store.publish_blocks(events) == self._blocks_sequence

    async def report(self) -> None:
        """Say that it lives and what it has seen."""
        while True:
            self._sequence += 1
            report = NodeReport(
                node=self.identity.node,
                incarnation=self.identity.incarnation,
                sequence=self._sequence,
                seen_seq=self._seen,
                cache_sequence=self._blocks_sequence,
            )
            generation = await self._store.report(report)
            self._stats.reports += 1
            if generation != self._generation:
                await self.register()
            await asyncio.sleep(self._report_s)

    async def drain(self) -> None:
        """Claim and answer at once, for ever."""
        stats, incarnation = self._stats, self.identity.incarnation
        is_empty = False
        while True:
            if is_empty and not await self._store.wait_for_work(BELL_S):
                continue
            self._claims += 1
            claim = await self._store.claim(
                incarnation, self._claims, CLAIMED_AT_ONCE, now_iso=self._clock.now_iso()
            )
            is_empty = len(claim.jobs) < CLAIMED_AT_ONCE
            if not claim.jobs:
                continue
            stats.claims += 1
            stats.claimed += len(claim.jobs)
            self._seen = max(self._seen, *(job.seq for job in claim.jobs))
            now_ms = self._clock.epoch_s() * 1000
            endings = [self._answered(job, now_ms) for job in claim.jobs]
            answers = await self._store.complete(incarnation, endings)
            stats.completed += answers.count("ok")
            stats.lost += answers.count("lost")

    def _answered(self, claimed: Claimed, now_ms: float) -> Ending:
        """What an instant engine makes of a job."""
        envelope = codec.envelopes.decode(claimed.envelope)
        self._stats.latency_ms[round(now_ms - envelope.appended_ms)] += 1
        outcome = Outcome(
            id=envelope.id,
            ref=envelope.ref,
            kind=OutcomeKind.COMPLETED,
            reason=Reason.FINISHED,
            tenant=envelope.tenant,
            fingerprint=envelope.fingerprint,
            attempt=str(JobId.parse(claimed.job).attempt),
            node=self.identity.node,
            model=envelope.model,
            choices=(Choice(text="x", finish_reason="stop"),),
            usage=Usage(
                prompt_tokens=envelope.prompt_tokens, completion_tokens=1, cached_tokens=claimed.hit_tokens
            ),
            timing=Timing(
                appended=envelope.appended_ms,
                claimed=int(now_ms),
                first_token=int(now_ms),
                ended=int(now_ms),
            ),
            predicted_cached_tokens=claimed.hit_tokens,
        )
        return Ending(
            job=claimed.job, kind="outcome", ref=envelope.ref, id=envelope.id, payload=codec.encode(outcome)
        )


async def _serve(options: argparse.Namespace) -> None:
    stats = Stats()
    shared = await LeanConnection.connect(options.redis)
    names = Names(options.pool)
    nodes = []
    for number in range(options.first, options.first + options.count):
        own = await LeanConnection.connect(options.redis)
        store = NodeStore(
            ScriptRunner(LeanRedis(shared, own)),
            names,
            prompts.node_name(number),
            heartbeat_ttl_s=options.heartbeat_ttl_s,
            lease_s=60,
        )
        nodes.append(
            LightNode(
                number,
                store,
                stats,
                max_running=options.max_running,
                report_s=options.report_s,
                is_told=options.views,
                seen=EVERYTHING if options.idle else 0,
            )
        )
    room = asyncio.Semaphore(REGISTERING)

    async def begin(node: LightNode) -> None:
        async with room:
            await node.register()
            if options.views:
                await node.publish_view(options.nodes)

    await asyncio.gather(*map(begin, nodes))
    gc.freeze()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for place, node in enumerate(nodes):
            if options.drain:
                tasks.append(group.create_task(node.drain()))
            tasks.append(group.create_task(_later(node, options.report_s * place / len(nodes))))
        _say({"ready": len(nodes)})
        await _obey(stats)
        for task in tasks:
            task.cancel()


async def _later(node: LightNode, wait_s: float) -> None:
    """Reports of different nodes come at different times."""
    await asyncio.sleep(wait_s)
    await node.report()


async def _obey(stats: Stats) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    pid = os.getpid()
    while line := await reader.readline():
        if line == b"reset\n":
            stats.reset()
        _say(
            {
                "at_s": time.time(),
                "cpu_s": cpu_s(pid),
                "claimed": stats.claimed,
                "claims": stats.claims,
                "completed": stats.completed,
                "lost": stats.lost,
                "reports": stats.reports,
                "latency_ms": sorted(stats.latency_ms.items()),
            }
        )


def _say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    """Be the nodes until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.light_nodes")
    parser.add_argument("--redis", required=True)
    parser.add_argument("--pool", default="default")
    parser.add_argument("--first", type=int, default=0, help="number of the first of these nodes")
    parser.add_argument("--count", type=int, required=True, help="how many nodes this process is")
    parser.add_argument("--nodes", type=int, required=True, help="how many nodes there are in all")
    parser.add_argument("--max-running", type=int, default=32)
    parser.add_argument("--report-s", type=float, default=1.0)
    parser.add_argument("--heartbeat-ttl-s", type=float, default=30.0)
    parser.add_argument("--views", action="store_true", help="tell of the blocks that each holds")
    parser.add_argument("--idle", action="store_true", help="report all that is ever assigned as computed")
    parser.add_argument("--drain", action="store_true", help="claim and answer what is assigned")
    asyncio.run(_serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
