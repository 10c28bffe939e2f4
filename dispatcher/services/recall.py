"""Recall: what a request's record tells, read again by its ref, when what Redis keeps of it can't be read.

The record is judged as at its append: a deadline that has passed since is its own ending's matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from dispatcher.backends.request_log import LogRecord, RequestLog
from dispatcher.protocol.names import Ref
from dispatcher.scheduling.admission import AdmissionLimits, Admitted, Refused, admit, lane_limits
from dispatcher.services.state import LeaderState


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """A record, and what intake decides about it."""

    record: LogRecord
    decision: Admitted | Refused


class Recall:
    """Reads records of one pool again."""

    def __init__(self, state: LeaderState, log: RequestLog, limits: AdmissionLimits) -> None:
        self._state = state
        self._log = log
        self._limits = limits

    async def read(self, ref: Ref) -> Recalled | None:
        """What the record at `ref` tells; None when it is gone.

        Raises:
            LogUnavailable: it can't be read now.
        """
        record = await self._log.record_at(ref)
        if record is None:
            return None
        decision = admit(
            ref,
            record.key,
            record.value,
            appended_ms=record.timestamp_ms,
            now_ms=record.timestamp_ms,
            traceparent=record.traceparent,
            limits=lane_limits(self._limits, ref, self._state.names),
            carry_bodies=False,
        )
        return Recalled(record=record, decision=decision)
