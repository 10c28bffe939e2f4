"""A client's lease: the signs of life by which the leader knows that somebody still waits for answers.

They go to one partition, the one chosen at the start, so that their order holds and none goes where a
leader does not look yet when the topic grows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dispatcher.errors import LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.request import MAX_LEASE_TTL_MS, LeaseRecord

MIN_TTL_S = 3.0
MAX_TTL_S = MAX_LEASE_TTL_MS / 1000
PAUSE_S = 0.5
END_TIMEOUT_S = 3.0


class LeaseKeeper:
    """Keeps one lease.

    Args:
        append: writes a record and returns once Kafka has it; raises LogUnavailable.
        ttl_s: how long it runs without a sign of life; one is given each third of that.
    """

    def __init__(
        self, append: Callable[[bytes], Awaitable[object]], lease: str, tenant: str, ttl_s: float
    ) -> None:
        if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
            raise ValueError(f"lease_ttl_s: expected {MIN_TTL_S:g} to {MAX_TTL_S:g} s, seen {ttl_s:g}")
        self.lease = lease
        self._append = append
        self._tenant = tenant
        self._ttl_s = ttl_s

    async def begin(self) -> None:
        """Tell of it for the first time, before any request names it.

        Raises:
            LogUnavailable: Kafka did not acknowledge it.
        """
        await self._say(int(self._ttl_s * 1000))

    async def run(self) -> None:
        """Prolong it until cancelled; while Kafka is away, as soon as it is back."""
        pause_s = self._ttl_s / 3
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._say(int(self._ttl_s * 1000))
                pause_s = self._ttl_s / 3
            except LogUnavailable:
                pause_s = min(PAUSE_S, self._ttl_s / 3)

    async def end(self) -> None:
        """End it: what is unfinished and not detached is cancelled. Without Kafka it runs out by itself."""
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._say(0)
        except (LogUnavailable, TimeoutError):
            pass

    async def _say(self, ttl_ms: int) -> None:
        record = LeaseRecord(lease=self.lease, ttl_ms=ttl_ms, tenant=self._tenant)
        await self._append(codec.encode(record))
