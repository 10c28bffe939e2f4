"""What a shadow reads of Kafka: requests of both lanes and outcomes, from now on, as long as it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dispatcher.backends.outcome_tail import OutcomeTail
from dispatcher.backends.request_log import RequestLog
from dispatcher.errors import LogUnavailable
from dispatcher.scheduling.admission import AdmissionLimits
from dispatcher.services.shadow import ShadowLedger

PAUSE_S = 0.5
READ_TIMEOUT_MS = 500
READ_LIMIT = 1000


class RecordFollower:
    """Reads both lanes from now on."""

    def __init__(
        self,
        ledger: ShadowLedger,
        log: Callable[[], RequestLog],
        limits: Callable[[RequestLog], AdmissionLimits],
        errors: Callable[[], None],
    ) -> None:
        self._ledger, self._log, self._limits, self._errors = ledger, log, limits, errors

    async def run(self) -> None:
        """Follow until cancelled; begins anew when Kafka was away or a topic has grown."""
        while True:
            await _as_long_as_it_answers(self._follow, self._errors)

    async def _follow(self) -> None:
        log = self._log()
        try:
            await log.start()
            limits = self._limits(log)
            log.seek(await log.log_ends())
            while True:
                for record in await log.read(timeout_ms=READ_TIMEOUT_MS, limit=READ_LIMIT):
                    self._ledger.take_record(record, limits)
        finally:
            await log.stop()


class OutcomeFollower:
    """Reads outcomes from now on."""

    def __init__(
        self, ledger: ShadowLedger, tail: Callable[[], OutcomeTail], errors: Callable[[], None]
    ) -> None:
        self._ledger, self._tail, self._errors = ledger, tail, errors

    async def run(self) -> None:
        """Follow until cancelled; begins anew when Kafka was away."""
        while True:
            await _as_long_as_it_answers(self._follow, self._errors)

    async def _follow(self) -> None:
        tail = self._tail()
        try:
            await tail.start()
            while True:
                for value in await tail.read(timeout_ms=READ_TIMEOUT_MS):
                    self._ledger.take_outcome(value)
        finally:
            await tail.stop()


async def _as_long_as_it_answers(follow: Callable[[], Awaitable[None]], errors: Callable[[], None]) -> None:
    try:
        await follow()
    except LogUnavailable:
        errors()
        await asyncio.sleep(PAUSE_S)
