"""Election: stand by with a warm mirror, lead while the lease holds, stand by again.

A session of leadership is one task group: when the lease is in doubt, a newer leader exists, Redis
lost data or Kafka failed in an unclear way, all of it is cancelled, and the next leader, here or
elsewhere, recovers from what Redis and Kafka hold.

With election off a dispatcher waits for nobody's lease: it deposes whoever holds the lock when it starts,
once. Whoever takes over from it later has the last word: it ends, so that two can't depose each other
for ever.
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
    Superseded,
)
from dispatcher.services.persist import until_answered
from dispatcher.services.watch import FleetMirror
from dispatcher.tasks import end_tasks, run_together, to_the_end
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

LONGEST_POLL_S = 0.2
EXPIRY_MARGIN_S = 0.002
"""Redis counts expiry in whole milliseconds."""
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
STANDSTILL_TTLS = 3

ENDS_SESSION = (Deposed, GenerationLost, LogUnavailable, LogRefused, StoreUnavailable, StoreRefused)


class Election:
    """Decides when this dispatcher leads.

    Args:
        lead: runs one session; returns only by an exception.
        close: closes what a session left open, after the lease is given back.
        is_on: whether another leader is waited for; without, it is deposed.
    """

    def __init__(
        self,
        lock: LeaderLock,
        mirror: FleetMirror,
        lead: Callable[[Lease], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        *,
        is_on: bool,
        ttl_s: float,
        new_id: Callable[[], str],
        clock: Clock,
        rng: random.Random,
        metrics: DispatcherMetrics,
        log: Log,
    ) -> None:
        self._lock = lock
        self._is_on = is_on
        self._mirror = mirror
        self._lead = lead
        self._close = close
        self._ttl_s = ttl_s
        self._poll_s = min(ttl_s / 5, LONGEST_POLL_S)
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._log = log
        self._backoff_s = FIRST_BACKOFF_S
        self._process = new_id()
        self._campaigns = 0
        self._epoch = 0
        self.leading = False

    async def run(self) -> None:
        """Stand by and lead until cancelled; gives the lease back when cancelled while leading.

        Raises:
            Superseded: election is off, and another dispatcher took over.
        """
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
        owner = self._new_owner()
        seen, seen_at = ("", 0), self._clock.monotonic()
        told = False
        while True:
            left_s = LONGEST_POLL_S
            try:
                now_s = self._clock.monotonic()
                may_depose = not self._is_on or now_s - seen_at > STANDSTILL_TTLS * self._ttl_s
                answer = await self._lock.acquire(owner, depose=seen[0] if may_depose else "")
                if isinstance(answer, Lease):
                    self._epoch = answer.epoch
                    answer.check()
                    return answer
                told = False
                if not self._is_on and answer.token != seen[0]:
                    self._check_may_depose(answer)
                    seen = (answer.token, answer.renewals)
                    continue
                seen, seen_at = self._observe(answer, seen, seen_at)
                left_s = answer.left_s
            except Deposed:
                owner = self._new_owner()
            except (StoreUnavailable, StoreRefused) as error:
                self._metrics.store_errors.inc()
                seen_at = self._clock.monotonic()
                if not told:
                    self._log.error("redis does not answer, trying again", error=str(error))
                    told = True
            # A lock that its leader does not renew is there to be taken the moment it expires.
            await asyncio.sleep(min(self._poll_s * self._rng.uniform(0.8, 1.2), left_s + EXPIRY_MARGIN_S))

    def _new_owner(self) -> str:
        """An owner for one lease, known as this process's own: a late answer may hold the lock for it."""
        self._campaigns += 1
        return f"{self._process}.{self._campaigns}"

    def _check_may_depose(self, held: Held) -> None:
        """Raise Superseded when `held` took over from this process, rather than led before it."""
        if not self._epoch or held.owner.startswith(f"{self._process}.") or held.epoch < self._epoch:
            self._log.warning("deposing: election is off", leader=held.token)
            return
        raise Superseded(
            f"election is off and expects one dispatcher, seen another that took over: {held.token}; run "
            "only one, or set election to true (--election, FLEXLB_ELECTION) on all"
        )

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
            await to_the_end(self._say_goodbye(lease))
        lasted = self._clock.monotonic() - began
        self._backoff_s = FIRST_BACKOFF_S if lasted > 10 else min(self._backoff_s * 2, LONGEST_BACKOFF_S)
        await asyncio.sleep(self._backoff_s * self._rng.uniform(0.5, 1.0))

    async def _run(self, lease: Lease) -> None:
        await self._lead(lease)

    async def begin_epoch(self, lease: Lease) -> None:
        """Begin another epoch under the same lease, for another session: as after a failover, nothing that
        the last one has sent and not heard of takes effect from here on, and its attempts rank below.

        Raises:
            Deposed: another dispatcher took the lock.
        """
        owner = self._new_owner()
        await until_answered(lambda: self._lock.begin_epoch(lease, owner), self._metrics)
        self._epoch = lease.epoch
        self._log.info("leading on", epoch=lease.epoch)

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

    async def _say_goodbye(self, lease: Lease) -> None:
        await self._resign(lease)
        await self._close()

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
