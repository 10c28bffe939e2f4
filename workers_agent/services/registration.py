"""Registration: make this incarnation known, again when Redis forgot it, and say things until heard.

Every script of an agent goes through `say`: an unanswered call is repeated; when Redis does not know us
(it lost its data) we register again with what we hold and repeat it; when we were fenced, Fenced ends
the incarnation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dispatcher.backends.node_store import Busy, NodeStore
from dispatcher.errors import Fenced, StoreUnavailable
from workers_agent.state import AgentState

T = TypeVar("T")
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
ADOPTION_S = 10.0
TELL_EVERY_S = 5.0


class Registration:
    """The registration of one incarnation."""

    def __init__(self, state: AgentState, store: NodeStore) -> None:
        self._state = state
        self._store = store
        self._lock = asyncio.Lock()
        self._count = 0
        self._told_at_s = float("-inf")

    async def begin(self) -> None:
        """Register, waiting while another incarnation of this node lives.

        Raises:
            Fenced: this incarnation was fenced.
        """
        async with self._lock:
            await self._register()

    async def renew(self) -> None:
        """Register again with what is held, once for all who noticed together."""
        count = self._count
        async with self._lock:
            if count != self._count:
                return
            self._state.adoption_until_s = self._state.clock.monotonic() + ADOPTION_S
            await self._register()
            self._state.log.warning(
                "registered again", held=len(self._state.held), generation=self._state.generation
            )

    async def _register(self) -> None:
        state = self._state
        while True:
            answer = await self._heard(
                lambda: self._store.register(state.identity, state.inventory(), now_iso=state.clock.now_iso())
            )
            if isinstance(answer, Busy):
                if self._count:
                    raise Fenced(f"incarnation {answer.incarnation} took this node over")
                self._tell("waiting for another agent of this node to be gone", other=answer.incarnation)
                await asyncio.sleep(max(answer.wait_ms, 50) / 1000)
                continue
            if answer is None:
                raise Fenced("this incarnation was fenced")
            state.generation = answer
            state.note_clock()
            self._count += 1
            state.metrics.registrations.inc()
            state.backlog = True
            state.changed.set()
            return

    async def say(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call of this node's store until it is heard.

        Raises:
            Fenced: this incarnation was fenced or replaced.
        """
        while True:
            count = self._count
            try:
                return await self._heard(call)
            except Fenced:
                if count == self._count:
                    await self.renew()

    async def _heard(self, call: Callable[[], Awaitable[T]]) -> T:
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await call()
            except StoreUnavailable as error:
                self._state.metrics.store_errors.inc()
                self._tell("redis does not answer, trying again", error=str(error))
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE_S, pause * 2)

    def _tell(self, event: str, **fields: object) -> None:
        now_s = self._state.clock.monotonic()
        if now_s - self._told_at_s >= TELL_EVERY_S:
            self._told_at_s = now_s
            self._state.log.warning(event, **fields)
