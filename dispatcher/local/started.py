"""Parts that are started together, or not at all, and stopped in the reverse order."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self


class Started:
    """`async with` starts it; what it entered into `_stack` is left at the end, or when a start fails."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()

    async def _start(self) -> None:
        """Start the parts, each of them entered into the stack."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
