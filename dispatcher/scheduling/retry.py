"""What to do with an attempt that ended without an outcome: again, later, or never.

Only failures of the engine count toward the cap; work that was merely given back (draining,
overloaded, fenced) returns at once and costs nothing. The delay is capped exponential with full
jitter (AWS architecture blog, "Exponential backoff and jitter").
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from dispatcher.protocol.outcome import FailureCause, Reason

MAX_FAILURES = 4
BASE_DELAY_S = 0.1
MAX_DELAY_S = 5.0

_GIVEN_BACK = frozenset(
    {FailureCause.DRAINING, FailureCause.NODE_LOST, FailureCause.LEASE_EXPIRED, FailureCause.OVERLOADED}
)
_NEVER = {FailureCause.REFUSED: Reason.ENGINE_REFUSED, FailureCause.BODY_UNREADABLE: Reason.BODY_UNREADABLE}


@dataclass(frozen=True, kw_only=True)
class RetryAfter:
    """Bind it again after `delay_s`, elsewhere when `exclude`."""

    delay_s: float
    failures: int
    exclude: bool


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """It has failed for good."""

    reason: Reason


def decide(cause: FailureCause, failures: int, rng: random.Random) -> RetryAfter | GiveUp:
    """Decide about an attempt that failed by `cause` after `failures` earlier engine failures."""
    if cause in _NEVER:
        return GiveUp(reason=_NEVER[cause])
    if cause in _GIVEN_BACK:
        delay = rng.uniform(0.02, BASE_DELAY_S) if cause is FailureCause.OVERLOADED else 0.0
        return RetryAfter(delay_s=delay, failures=failures, exclude=cause is not FailureCause.OVERLOADED)
    if failures + 1 >= MAX_FAILURES:
        return GiveUp(reason=Reason.ATTEMPTS_EXHAUSTED)
    ceiling = min(MAX_DELAY_S, BASE_DELAY_S * 2**failures)
    return RetryAfter(delay_s=rng.uniform(0, ceiling), failures=failures + 1, exclude=True)
