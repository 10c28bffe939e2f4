"""Retention: warn when Kafka may drop records that a request still needs, and let none wait that long.

Looked at when a session begins and each hour. The doctor says the same before anything runs.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.retention import retention_ms
from dispatcher.errors import LogUnavailable
from dispatcher.protocol.names import Lane
from dispatcher.services.state import LeaderState

LOOK_S = 3600.0


class Retention:
    """Compares the topics' retention with the longest deadline."""

    def __init__(self, state: LeaderState, kafka: KafkaClients, *, longest_deadline_ms: int) -> None:
        self._state = state
        self._kafka = kafka
        self._need_ms = 2 * longest_deadline_ms

    async def run(self) -> None:
        """Look each hour until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """One look."""
        state, names = self._state, self._state.names
        batch = names.requests(Lane.BATCH)
        topics = [names.requests(Lane.INTERACTIVE), batch, names.bodies, names.outcomes]
        try:
            kept = await retention_ms(self._kafka, topics)
        except LogUnavailable as error:
            state.log.warning("retention not looked at", error=str(error))
            return
        for topic in topics:
            kept_ms = kept.get(topic)
            is_short = kept_ms is not None and kept_ms < self._need_ms
            state.metrics.retention_short.labels(topic).set(is_short)
            if is_short:
                state.log.error(
                    "topic keeps records for too short a time: a request may outlive its record",
                    topic=topic,
                    retention_ms=kept_ms,
                    expected_ms=self._need_ms,
                    fix=f"kafka-configs.sh --alter --topic {topic} --add-config retention.ms={self._need_ms}",
                )
        if batch in kept:
            state.window.hurry_batch_after(kept[batch] // 2)
