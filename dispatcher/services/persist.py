"""Say it until Redis answers: the one retry loop of a leader.

Scripts may be repeated, so an unanswered call is simply made again, for as long as the lease holds;
`lease.check()` inside each call ends the loop by raising Deposed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dispatcher.errors import StoreUnavailable
from dispatcher.telemetry.metrics import DispatcherMetrics

T = TypeVar("T")
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.25


async def until_answered(call: Callable[[], Awaitable[T]], metrics: DispatcherMetrics) -> T:
    """Repeat `call` until it answers; other errors than StoreUnavailable pass through."""
    pause = FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except StoreUnavailable:
            metrics.store_errors.inc()
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE_S, pause * 2)
