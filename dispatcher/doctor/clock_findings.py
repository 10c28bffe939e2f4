"""Whether another clock agrees with this host's."""

from __future__ import annotations

from dispatcher.doctor.facts import ClockReading, Finding, Status

WARN_S = 0.5
FAIL_S = 5.0
SYNCHRONISE = "synchronise clocks: timedatectl set-ntp true (or chrony) on this host and that server"


def clock_finding(check: str, reading: ClockReading | None) -> Finding:
    """Judge what is certain of the difference: what lies beyond the reading's own uncertainty."""
    if reading is None:
        return Finding(check=check, status=Status.UNKNOWN, found="its time could not be read")
    sure_s = max(0.0, abs(reading.offset_s) - reading.within_s)
    side = "ahead of" if reading.offset_s > 0 else "behind"
    found = f"{abs(reading.offset_s):.3f} s {side} this host, within {reading.within_s:.3f} s"
    if sure_s >= FAIL_S:
        return Finding(
            check=check, status=Status.FAIL, found=f"{found}: deadlines are off by that", fix=SYNCHRONISE
        )
    if sure_s >= WARN_S:
        return Finding(check=check, status=Status.WARN, found=found, fix=SYNCHRONISE)
    return Finding(check=check, status=Status.OK, found=found)
