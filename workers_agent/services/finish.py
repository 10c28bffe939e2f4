"""Finish: make endings known to Redis, in batches, until they are accepted.

An outcome lives only in this process until `complete` has stored it, so it is repeated for as long as
the incarnation lives; while Redis is away it is kept, and counts against capacity.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.node_store import NodeStore
from workers_agent.services.registration import Registration
from workers_agent.state import AgentState

BATCH = 128
ADOPTION_PAUSE_S = 0.2


class Finish:
    """Completes for one incarnation."""

    def __init__(self, state: AgentState, store: NodeStore, registration: Registration) -> None:
        self._state = state
        self._store = store
        self._registration = registration

    async def run(self) -> None:
        """Complete until cancelled."""
        state = self._state
        while True:
            await state.ended.wait()
            state.ended.clear()
            endings = [held.ending for held in state.held.values() if held.ending is not None][:BATCH]
            if not endings:
                continue
            state.metrics.unaccepted.set(len(endings))
            batch = list(endings)
            answers = await self._registration.say(
                lambda batch=batch: self._store.complete(state.identity.incarnation, batch)  # type: ignore[misc]
            )
            waits = False
            for ending, answer in zip(batch, answers, strict=True):
                if answer == "lost" and state.awaits_adoption:
                    waits = True
                    continue
                if answer == "lost":
                    state.metrics.lost.inc()
                    state.log.warning("ending refused: the attempt was superseded", job=ending.job)
                state.drop(ending.job)
            if waits:
                await asyncio.sleep(ADOPTION_PAUSE_S)
            if any(held.ending is not None for held in state.held.values()):
                state.ended.set()
            state.metrics.unaccepted.set(0)
