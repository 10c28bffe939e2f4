"""Ending tasks for certain.

A cancellation can be lost: on Python 3.11 `asyncio.wait_for`, which client libraries use, swallows one
that arrives while its inner future completes (python/cpython#86296). A service that missed it would run
on for ever and hold up whoever waits for its end, so whoever ends tasks says it again until they did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

SAY_AGAIN_S = 1.0


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel `tasks` and return once each has ended, however."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=SAY_AGAIN_S)


async def to_the_end(goodbye: Coroutine[Any, Any, None]) -> None:
    """Run `goodbye`, which bounds its own time, to its end, however often this task is cancelled meanwhile.

    Raises:
        CancelledError: afterwards, when it was.
    """
    task = asyncio.create_task(goodbye)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


async def run_together(**running: Coroutine[Any, Any, None]) -> None:
    """Run coroutines until one of them fails or all have ended; then end the others.

    Raises:
        BaseExceptionGroup: what they raised, cancellations aside.
    """
    tasks = [asyncio.create_task(coroutine, name=name) for name, coroutine in running.items()]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await end_tasks(tasks)
    errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
    if errors:
        raise BaseExceptionGroup("services failed", errors)
