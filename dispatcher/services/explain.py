"""Explain: keep why requests went where they went, for operators, beside the path of the requests.

A decision is looked at when it is made, and told only once the script has made it true. What can't be written
is dropped and counted: nothing waits for an explanation, and a Redis that refuses them costs no request
anything.
"""

from __future__ import annotations

import asyncio
from collections import deque

from dispatcher.backends.leader_store import LeaderStore
from dispatcher.errors import StoreRefused, StoreUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.explanation import Explanation
from dispatcher.protocol.names import Attempt
from dispatcher.scheduling.choice import Choice
from dispatcher.scheduling.explanation import explain
from dispatcher.scheduling.sampling import Sampler
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import Round, Waiting
from dispatcher.services.state import LeaderState

GATHER_S = 0.1
"""Explanations are written so far apart, many at a time."""
BATCH = 32
MOST_UNWRITTEN = 512
REFUSED_PAUSE_S = 30.0
"""After Redis refused one; most likely its user has no right to the keys yet."""


class Explain:
    """Explains one pool's decisions."""

    def __init__(
        self, state: LeaderState, store: LeaderStore, scheduler: Scheduler, *, share: float, per_s: float
    ) -> None:
        self._state = state
        self._store = store
        self._scheduler = scheduler
        self._sampler = Sampler(share=share, per_s=per_s)
        self._made: dict[str, Explanation] = {}
        self._unwritten: deque[Explanation] = deque()
        self._news = asyncio.Event()

    def begin(self) -> None:
        """Begin a round of decisions."""
        self._sampler.begin(self._state.clock.monotonic())

    def look(self, waiting: Waiting, choice: Choice, round: Round, attempt: Attempt) -> None:
        """Look at a decision, before it is reserved."""
        ref = waiting.envelope.ref
        if self._sampler.takes(ref):
            self._made[ref] = explain(
                self._scheduler,
                waiting,
                choice,
                round.planned,
                waits=round.waits_of(waiting.envelope),
                attempt=attempt,
                now_ms=self._state.clock.now_ms(),
            )

    def tell(self, ref: str, *, is_bound: bool) -> None:
        """Tell of a decision if it was made true, and forget it otherwise."""
        made = self._made.pop(ref, None)
        if made is None or not is_bound:
            return
        if len(self._unwritten) >= MOST_UNWRITTEN:
            self._unwritten.popleft()
            self._state.metrics.explanations_lost.inc()
        self._unwritten.append(made)
        self._news.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._news.wait()
            await asyncio.sleep(GATHER_S)
            await self._write()

    async def _write(self) -> None:
        metrics = self._state.metrics
        batch = [self._unwritten.popleft() for _ in range(min(BATCH, len(self._unwritten)))]
        if not self._unwritten:
            self._news.clear()
        try:
            await self._store.explain([(one.tenant, one.id, codec.encode(one)) for one in batch])
            metrics.explanations.inc(len(batch))
        except StoreUnavailable:
            metrics.explanations_lost.inc(len(batch))
        except StoreRefused as error:
            metrics.explanations_lost.inc(len(batch))
            self._state.log.error(
                "explanations can't be written, trying again",
                error=str(error),
                fix="give the dispatchers' Redis user the rights of dispatcher/deploy/redis-acl.conf",
            )
            await asyncio.sleep(REFUSED_PAUSE_S)
