"""By how much a host's wall clock is ahead of Redis's: shown by a gauge, told when it is too much.

Deadlines go by Redis's clock, so that an offset moves none; it still spoils logs, and tells of a broken NTP.
"""

from __future__ import annotations

from prometheus_client import Gauge

from dispatcher.telemetry.logging import Log

MOST_AHEAD_S = 1.0
"""A wall clock that differs from Redis's by more is told of."""


class ClockOffset:
    """The offset of one process's host."""

    def __init__(self, gauge: Gauge, log: Log) -> None:
        self._gauge = gauge
        self._log = log
        self._is_off = False

    def note(self, ahead_s: float) -> None:
        """Show it; once for each time that it is too far."""
        self._gauge.set(ahead_s)
        is_off = abs(ahead_s) > MOST_AHEAD_S
        if is_off and not self._is_off:
            self._log.warning(
                "this host's clock differs from Redis's, which deadlines go by",
                ahead_s=round(ahead_s, 3),
                fix="synchronise the clocks of all hosts, as with NTP",
            )
        self._is_off = is_off
