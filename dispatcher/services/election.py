"""Election: stand by with a warm mirror, lead while the lease holds, stand by again.

A session of leadership is one task group: when the lease is in doubt, a newer leader exists, Redis
lost data or Kafka failed in an unclear way, all of it is cancelled, and the next leader, here or
elsewhere, recovers from what Redis and Kafka hold.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from dispatcher.backends.clock import Clock
from dispatcher.backends.leader_lock import Held, LeaderLock, Lease
from dispatcher.errors import (
    Deposed,
    FlexLBError,
    GenerationLost,
    LogRefused,
    LogUnavailable,
    StoreRefused,
    StoreUnavailable,
)
from dispatcher.services.watch import FleetMirror
from dispatcher.tasks import end_tasks, run_together
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

LONGEST_POLL_S = 0.2
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
STANDSTILL_TTLS = 3

ENDS_SESSION = (Deposed, GenerationLost, LogUnavailable, LogRefused, StoreUnavailable, StoreRefused)


class Election:
    """Decides when this dispatcher leads.

    Args:
        lead: runs one session; returns only by an exception.
        close: closes what a session left open, after the lease is given back.
    """

    def __init__(
        self,
        lock: LeaderLock,
        mirror: FleetMirror,
        lead: Callable[[Lease], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        *,
        ttl_s: float,
        new_id: Callable[[], str],
        clock: Clock,
        rng: random.Random,
        metrics: DispatcherMetrics,
        log: Log,
    ) -> None:
        self._lock = lock
        self._mirror = mirror
        self._lead = lead
        self._close = close
        self._ttl_s = ttl_s
        self._poll_s = min(ttl_s / 5, LONGEST_POLL_S)
        self._new_id = new_id
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._log = log
        self._backoff_s = FIRST_BACKOFF_S
        self.leading = False

    async def run(self) -> None:
        """Stand by and lead until cancelled; gives the lease back when cancelled while leading."""
        while True:
            lease = await self._stand_by()
            await self._session(lease)

    async def _stand_by(self) -> Lease:
        async with asyncio.TaskGroup() as group:
            mirror = group.create_task(self._mirror.run())
            lease = await self._campaign()
            await end_tasks([mirror])
        return lease

    async def _campaign(self) -> Lease:
        owner = self._new_id()
        seen, seen_at = ("", 0), self._clock.monotonic()
        told = False
        while True:
            try:
                now_s = self._clock.monotonic()
                stands_still = seen[0] and now_s - seen_at > STANDSTILL_TTLS * self._ttl_s
                answer = await self._lock.acquire(owner, depose=seen[0] if stands_still else "")
                if isinstance(answer, Lease):
                    answer.check()
                    return answer
                seen, seen_at = self._observe(answer, seen, seen_at)
                told = False
            except Deposed:
                owner = self._new_id()
            except (StoreUnavailable, StoreRefused) as error:
                self._metrics.store_errors.inc()
                seen_at = self._clock.monotonic()
                if not told:
                    self._log.error("redis does not answer, trying again", error=str(error))
                    told = True
            await asyncio.sleep(self._poll_s * self._rng.uniform(0.8, 1.2))

    def _observe(self, held: Held, seen: tuple[str, int], seen_at: float) -> tuple[tuple[str, int], float]:
        if (held.token, held.renewals) == seen:
            return seen, seen_at
        if held.token != seen[0]:
            self._log.info("standing by", leader=held.token)
        return (held.token, held.renewals), self._clock.monotonic()

    async def _session(self, lease: Lease) -> None:
        self._metrics.elections.inc()
        self._metrics.leading.set(1)
        self.leading = True
        self._log.info("leading", epoch=lease.epoch)
        began = self._clock.monotonic()
        reason = "stopped"
        try:
            await run_together(keep=self._keep(lease), lead=self._run(lease))
        except* ENDS_SESSION as ended:
            reason = _first_words(ended)
        finally:
            self.leading = False
            self._metrics.leading.set(0)
            self._metrics.depositions.inc()
            self._log.warning("leadership ended", epoch=lease.epoch, reason=reason)
            await self._resign(lease)
            await self._close()
        lasted = self._clock.monotonic() - began
        self._backoff_s = FIRST_BACKOFF_S if lasted > 10 else min(self._backoff_s * 2, LONGEST_BACKOFF_S)
        await asyncio.sleep(self._backoff_s * self._rng.uniform(0.5, 1.0))

    async def _run(self, lease: Lease) -> None:
        await self._lead(lease)

    async def _keep(self, lease: Lease) -> None:
        """Renew at a third of the TTL; raise Deposed when the lease may have run out."""
        pause = self._ttl_s / 3
        while True:
            await asyncio.sleep(pause)
            lease.check()
            try:
                async with asyncio.timeout(lease.until - self._clock.monotonic()):
                    await self._lock.renew(lease)
                pause = self._ttl_s / 3
            except (StoreUnavailable, TimeoutError):
                pause = min(0.05, self._ttl_s / 20)

    async def _resign(self, lease: Lease) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._lock.resign(lease)
        except (FlexLBError, TimeoutError) as error:
            self._log.warning("lease not given back, it will run out", error=str(error))


def _first_words(group: BaseExceptionGroup[FlexLBError]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
