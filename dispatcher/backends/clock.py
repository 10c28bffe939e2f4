"""The clocks that services read, as arguments, so that a simulation can own time.

Loop time is for waiting and leases; epoch milliseconds are data (deadlines, timings). Leases inside
Redis use the server's TIME. Agents and leaders judge deadlines by it too: a node whose own clock is wrong
would give up all that it gets, at once, and so get more; a leader would end every request, or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, kw_only=True)
class Clock:
    """`monotonic` in seconds from an arbitrary start, `epoch_s` in seconds since 1970."""

    monotonic: Callable[[], float] = time.monotonic
    epoch_s: Callable[[], float] = time.time

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        return int(self.epoch_s() * 1000)

    def now_iso(self) -> str:
        """The form in which RQ keeps times, e.g. `2026-01-31T12:00:00.000000Z`."""
        text = datetime.fromtimestamp(self.epoch_s(), UTC).isoformat(timespec="microseconds")
        return text.removesuffix("+00:00") + "Z"


DOUBT_PER_S = 0.01
"""How much worse a newer sample of a server's clock may be than the one in use, by the age of that."""


class ServerClock:
    """A server's wall clock, as its answers tell it; the own one until the first of them.

    Between answers it runs with the monotonic clock: a step of the own wall clock moves nothing. Its error is
    at most half of the time that the answer took, plus how far the two clocks drift apart until the next one.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._base_ms: float | None = None
        self._error_s = 0.0
        self._heard_s = 0.0

    def monotonic(self) -> float:
        """The own monotonic clock, in seconds."""
        return self._clock.monotonic()

    def heard(self, server_ms: int, asked_s: float) -> None:
        """Take what the server's clock said, between `asked_s` (monotonic) and now."""
        now_s = self._clock.monotonic()
        error_s = (now_s - asked_s) / 2
        doubt_s = self._error_s + (now_s - self._heard_s) * DOUBT_PER_S
        if self._base_ms is None or error_s <= doubt_s:
            self._base_ms = server_ms - (asked_s + error_s) * 1000
            self._error_s, self._heard_s = error_s, now_s

    def epoch_s(self) -> float:
        """Seconds since 1970."""
        if self._base_ms is None:
            return self._clock.epoch_s()
        return self._base_ms / 1000 + self._clock.monotonic()

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        if self._base_ms is None:
            return self._clock.now_ms()
        return int(self._base_ms + self._clock.monotonic() * 1000)

    def as_clock(self) -> Clock:
        """The same as a clock of this process: its wall clock is the server's."""
        return Clock(monotonic=self._clock.monotonic, epoch_s=self.epoch_s)

    @property
    def own_ahead_s(self) -> float:
        """By how much the own wall clock is ahead."""
        return (self._clock.now_ms() - self.now_ms()) / 1000
