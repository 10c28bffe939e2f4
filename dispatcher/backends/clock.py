"""The clocks that services read, as arguments, so that a simulation can own time.

Loop time is for waiting and leases; epoch milliseconds are data (deadlines, timings). Leases inside
Redis use the server's TIME and appear nowhere in Python.
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
        return datetime.fromtimestamp(self.epoch_s(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
