"""Held outcomes: tell when a transaction that is none of ours holds up every reader of `outcomes`.

Whoever may write to the topic can begin one and leave it open until its timeout. Our answers are committed
behind it, and no client sees them. The leader can't end it: Kafka lets an operator do so.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.stable_ends import stable_ends
from dispatcher.errors import LogUnavailable
from dispatcher.scheduling.standstill import Standstill
from dispatcher.services.state import LeaderState

LOOK_S = 15.0
HELD_S = 10.0
"""Held up for longer than any transaction of ours takes while Kafka answers."""


class HeldOutcomes:
    """Looks at the ends of one pool's `outcomes`."""

    def __init__(self, state: LeaderState, kafka: KafkaClients) -> None:
        self._state = state
        self._kafka = kafka
        self._standstill = Standstill()
        self._told: set[int] = set()

    async def run(self) -> None:
        """Look four times a minute until cancelled."""
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                await self.look()
        finally:
            self._state.metrics.outcomes_held_s.clear()  # it is the next leader's to tell

    async def look(self) -> None:
        """One look."""
        state = self._state
        topic = state.names.outcomes
        try:
            ends = await stable_ends(self._kafka, topic)
        except LogUnavailable as error:
            state.log.warning("ends of outcomes not looked at", error=str(error))
            return
        pairs = {partition: (found.stable, found.end) for partition, found in ends.items()}
        held = self._standstill.look(pairs, state.clock.monotonic())
        for partition, held_s in held.items():
            state.metrics.outcomes_held_s.labels(str(partition)).set(held_s)
            if held_s < HELD_S:
                self._told.discard(partition)
            elif partition not in self._told:
                self._told.add(partition)
                state.log.error(
                    "an open transaction holds up all readers of outcomes",
                    partition=partition,
                    since_offset=ends[partition].stable,
                    held_s=round(held_s, 1),
                    fix=f"kafka-transactions.sh abort --topic {topic} --partition {partition} "
                    f"--start-offset {ends[partition].stable}",
                )
