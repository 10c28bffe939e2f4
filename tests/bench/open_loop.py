"""Requests at a fixed rate, whatever becomes of them, and what became of them.

Requests are made before the clock runs and sent when they are due. A backlog is everything between the append
and the published outcome, which a reader of committed outcomes counts. The *finished* mark, the committed
offset of the pool's group, is told beside it: it moves in the log's order, and so stands while one early
request waits, whatever ends behind it. A run has ended once that mark has passed all of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import TopicPartition

from tests.bench import prompts
from tests.bench.pool import PARTITIONS, Pool

TICK_S = 0.002
LOOK_S = 0.25
DRAINED_S = 240.0
LAGGING_S = 0.5
"""A producer that is later than this did not keep its rate."""
GROWN_S = 0.25
"""A backlog that grew by less than so many seconds of requests is flat."""
LEAST_PUBLISHED = 0.9
"""Of the rate, by outcomes within the run: a backlog may be flat and high in a short one."""


@dataclass(kw_only=True)
class Run:
    """One run at a rate. `backlog` is what was sent and has no outcome yet, each `LOOK_S`.

    `behind` is how far the *finished* mark was behind what was sent, when the last was.
    """

    rate: float
    seconds: float
    sent: int = 0
    lag_s: float = 0.0
    backlog: list[int] = field(default_factory=list)
    behind: int = 0
    cpu_us: dict[str, float] = field(default_factory=dict)
    latency_ms: list[tuple[int, int]] = field(default_factory=list)
    published_per_s: float = 0.0
    drained_s: float = 0.0

    @property
    def grown(self) -> float:
        """By how much the backlog of the last quarter is larger than that of the second."""
        quarter = max(1, len(self.backlog) // 4)
        early, late = self.backlog[quarter : 2 * quarter], self.backlog[-quarter:]
        return sum(late) / max(1, len(late)) - sum(early) / max(1, len(early))

    @property
    def is_held(self) -> bool:
        """Whether the rate was produced and as many outcomes came, and the backlog stayed flat."""
        is_answered = self.published_per_s >= LEAST_PUBLISHED * self.rate
        return is_answered and self.lag_s <= LAGGING_S and self.grown <= GROWN_S * self.rate

    def percentile_ms(self, share: float) -> int:
        """A percentile of the time from append to a node's hands: milliseconds."""
        return percentile_of(self.latency_ms, share)

    def told(self) -> dict[str, Any]:
        """For people and files."""
        return {
            "rate": round(self.rate, 1),
            "seconds": self.seconds,
            "sent": self.sent,
            "held": self.is_held,
            "published_per_s": round(self.published_per_s, 1),
            "finished_mark_behind": self.behind,
            "producer_lag_s": round(self.lag_s, 3),
            "backlog_first": self.backlog[0] if self.backlog else 0,
            "backlog_last": self.backlog[-1] if self.backlog else 0,
            "backlog_grown": round(self.grown, 1),
            "drained_s": round(self.drained_s, 2),
            "cpu_us": {role: round(us, 1) for role, us in self.cpu_us.items()},
            "p50_ms": self.percentile_ms(0.5),
            "p99_ms": self.percentile_ms(0.99),
        }


def percentile_of(counts: Iterable[tuple[int, int]], share: float) -> int:
    """The nearest-rank percentile of values with counts; 0 for none."""
    ordered = sorted(counts)
    left = share * sum(count for _, count in ordered)
    for value, count in ordered:
        left -= count
        if left <= 0:
            return value
    return 0


class OpenLoop:
    """Runs at rates against one pool, one after the other: `async with OpenLoop(pool, nodes) as loop`."""

    def __init__(self, pool: Pool, nodes: int) -> None:
        self._pool = pool
        self._nodes = nodes
        self._runs = 0
        self.sent = 0
        self.published = 0
        self._partitions = [TopicPartition(pool.topic, number) for number in range(PARTITIONS)]

    async def __aenter__(self) -> OpenLoop:
        self._looker = self._pool.kafka.consumer(group_id=self._pool.names.group)
        await self._looker.start()
        self._looker.assign(self._partitions)
        self._outcomes = self._pool.kafka.consumer(
            group_id=None, isolation_level="read_committed", auto_offset_reset="earliest"
        )
        await self._outcomes.start()
        outcomes = [TopicPartition(self._pool.names.outcomes, number) for number in range(PARTITIONS)]
        self._outcomes.assign(outcomes)
        self._counting = asyncio.create_task(self._count())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._counting.cancel()
        await asyncio.wait([self._counting])
        await self._outcomes.stop()
        await self._looker.stop()

    async def _count(self) -> None:
        while True:
            batches = await self._outcomes.getmany(timeout_ms=100, max_records=5000)
            self.published += sum(map(len, batches.values()))

    async def finished(self) -> int:
        """How many requests lie below the *finished* marks."""
        marks = [await self._looker.committed(partition) for partition in self._partitions]
        return sum(mark or 0 for mark in marks)

    async def run(
        self, rate: float, seconds: float, records: Sequence[tuple[bytes, bytes]] | None = None
    ) -> Run:
        """Send at a rate for so long, then let everything end.

        Args:
            records: what to send, as many as the rate makes of the time; requests of `prompts` when absent.
        Raises:
            TimeoutError: it does not end.
        """
        run = Run(rate=rate, seconds=seconds)
        self._runs += 1
        count = int(rate * seconds)
        if records is None:
            records = [prompts.record(number, self._nodes, f"run{self._runs}") for number in range(count)]
        assert len(records) == count, f"expected {count} records, seen {len(records)}"
        for light in self._pool.light:
            await light.ask("reset")
        before_sent, before, began_cpu = self.sent, self.published, self._pool.cpu_s()
        own = time.process_time()
        async with self._pool.producer() as producer:
            began_s = time.monotonic()
            looking = asyncio.create_task(self._look(run, before_sent - before))
            await self._send(producer, records, run)
            took_s = time.monotonic() - began_s
            looking.cancel()
            await asyncio.wait([looking])
        run.published_per_s = (self.published - before) / took_s
        run.behind = self.sent - await self.finished()
        run.cpu_us["producer"] = (time.process_time() - own) / count * 1e6
        run.drained_s = await self.drain()
        used = self._pool.cpu_s()
        run.cpu_us |= {role: (used[role] - began_cpu[role]) / count * 1e6 for role in used}
        latency: list[tuple[int, int]] = []
        for light in self._pool.light:
            latency += [(ms, number) for ms, number in (await light.ask())["latency_ms"]]
        run.latency_ms = latency
        run.sent = self.sent - before_sent
        return run

    async def _send(self, producer: Any, records: Sequence[tuple[bytes, bytes]], run: Run) -> None:
        began_s, at = time.monotonic(), 0
        last = None
        while at < len(records):
            due = min(len(records), int((time.monotonic() - began_s) * run.rate) + 1)
            while at < due:
                key, value = records[at]
                last = await producer.send(self._pool.topic, value, key=key)
                at += 1
                self.sent += 1
            await asyncio.sleep(TICK_S)
        if last is not None:
            await last
        run.lag_s = max(0.0, time.monotonic() - began_s - run.seconds)

    async def _look(self, run: Run, base: int) -> None:
        """Note the backlog; `base` is what the counts differ by when nothing is under way."""
        while True:
            run.backlog.append(self.sent - self.published - base)
            await asyncio.sleep(LOOK_S)

    async def drain(self) -> float:
        """Wait until everything that was sent is finished; how long that took, seconds.

        Raises:
            TimeoutError: it does not end.
        """
        began_s = time.monotonic()
        async with asyncio.timeout(DRAINED_S):
            while await self.finished() < self.sent:
                if self._counting.done():
                    self._counting.result()
                await asyncio.sleep(0.05)
        return time.monotonic() - began_s
