"""The leader lock: acquire makes an epoch, renew prolongs it, resign gives it back.

The lock decides who may try; the epoch, compared by every leader script, is what keeps a deposed
leader from writing. `Lease` is the local half: by its own monotonic clock, counted from before the
request was sent, a leader stops when in doubt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from dispatcher.backends.scripts import Argument, ScriptRunner
from dispatcher.errors import Deposed
from dispatcher.protocol.names import Names


def epoch_of(token: str) -> int:
    """The number in a token, '<epoch>:<owner>'; 0 in one that another maker wrote."""
    number = token.partition(":")[0]
    return int(number) if number.isdecimal() else 0


@dataclass(frozen=True, kw_only=True)
class Held:
    """Somebody else leads; `renewals` stands still when that leader does.

    `left_s`: its lock expires so long after the answer unless it is renewed; two are equal without it.
    """

    token: str
    renewals: int
    left_s: float = field(default=0.0, compare=False)

    @property
    def epoch(self) -> int:
        """The number in the token."""
        return epoch_of(self.token)

    @property
    def owner(self) -> str:
        """Who holds the lock."""
        return self.token.partition(":")[2]


class Lease:
    """Leadership as this process may believe in it: a token and a local deadline."""

    def __init__(self, token: str, *, until: float, clock: Callable[[], float]) -> None:
        self.token = token
        self.until = until
        self._clock = clock

    @property
    def epoch(self) -> int:
        """The number in the token: the first half of every attempt made under it."""
        return epoch_of(self.token)

    def check(self) -> None:
        """Raise Deposed when the lease may have run out; called before each act."""
        if self._clock() >= self.until:
            raise Deposed("the lease ran out by this process's own clock")


def _unheard(server_ms: int, asked_s: float) -> None:
    """Take no notice of the server's clock."""


class LeaderLock:
    """The lock of one pool.

    Args:
        clock: the own monotonic clock.
        heard: takes what each answer says of the server's wall clock, and when it was asked (`clock`).
    """

    def __init__(
        self,
        runner: ScriptRunner,
        names: Names,
        *,
        ttl_s: float,
        clock: Callable[[], float],
        heard: Callable[[int, float], None] = _unheard,
    ) -> None:
        self._runner = runner
        self._keys = (names.leader, names.epoch, names.renewals)
        self._ttl_ms = int(ttl_s * 1000)
        self._clock = clock
        self._heard = heard
        self._one_at_a_time = asyncio.Lock()

    async def acquire(self, owner: str, *, depose: str = "") -> Lease | Held:
        """Try once. `owner` is new for each lease and repeated for each try; `depose` names the token of
        a leader whose lease is not waited for: it stood still for three TTLs, or election is off.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        sent = self._clock()
        arguments: list[Argument] = [owner, self._ttl_ms, depose]
        got, now_ms, token, *rest = await self._runner.run("acquire", self._keys, arguments)
        self._heard(now_ms, sent)
        if got:
            return Lease(token.decode(), until=sent + self._ttl_ms / 1000, clock=self._clock)
        return Held(token=token.decode(), renewals=int(rest[0]), left_s=max(0, int(rest[1])) / 1000)

    async def renew(self, lease: Lease) -> None:
        """Prolong `lease`, or raise Deposed."""
        async with self._one_at_a_time:
            sent = self._clock()
            leads, now_ms = await self._runner.run("renew", self._keys, [lease.token, self._ttl_ms])
            self._heard(now_ms, sent)
            if not leads:
                raise Deposed("another dispatcher took the lock")
            lease.until = sent + self._ttl_ms / 1000

    async def begin_epoch(self, lease: Lease, owner: str) -> None:
        """Give `lease` an epoch of its own: what was written under the one before is refused from here on.

        Args:
            owner: new for each epoch, and repeated for each try.
        Raises:
            Deposed: another dispatcher took the lock.
            StoreUnavailable: Redis did not answer.
        """
        async with self._one_at_a_time:
            lease.check()
            begun = await self.acquire(owner, depose=lease.token)
            if isinstance(begun, Held):
                raise Deposed("another dispatcher took the lock")
            lease.token, lease.until = begun.token, begun.until

    async def resign(self, lease: Lease) -> None:
        """Give the lock back so that a standby leads at once."""
        await self._runner.run("resign", self._keys[:1], [lease.token])
