"""Waiting for a condition in tests: bounded, with a name, never a bare sleep."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.02


async def wait_until(
    predicate: Callable[[], bool | Awaitable[bool]], what: str, *, timeout_s: float = 60.0
) -> None:
    """Return once `predicate` holds.

    Raises:
        AssertionError: it does not within `timeout_s`; names `what` was waited for.
    """
    until = time.monotonic() + timeout_s
    while True:
        answer = predicate()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return
        if time.monotonic() > until:
            raise AssertionError(f"waited {timeout_s} s for {what}")
        await asyncio.sleep(POLL_S)
