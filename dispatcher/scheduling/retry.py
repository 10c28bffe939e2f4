"""What to do with an attempt that ended without an outcome: again, later, or never.

Only failures of the engine count toward the cap; work that was merely given back (draining,
overloaded, fenced) returns at once and costs nothing. While most of a model's nodes fail everything, a
failure says nothing of the request and does not count. That is known only after some failures of each
node: so the last failure that a request may have does not count either while the nodes that failed it fail
others as well. A request under which engines die is poison, and ends before it has been everywhere. The
delay is capped exponential with full jitter (AWS architecture blog, "Exponential backoff and jitter").
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from dispatcher.protocol.outcome import FailedAttempt, FailureCause, Reason
from dispatcher.scheduling.outage import NO_OUTAGE, Outage

MAX_FAILURES = 4
WITNESSES = 2
"""Of the nodes that failed a request so many must be well, or all of fewer, for it to be at fault."""
POISON_NODES = 2
"""Engines of so many nodes died under a request: it is poison."""
POISON_CRASHES = 3
"""As above where it had only one node to go to."""
BASE_DELAY_S = 0.1
MAX_DELAY_S = 5.0

_GIVEN_BACK = frozenset(
    {FailureCause.DRAINING, FailureCause.NODE_LOST, FailureCause.LEASE_EXPIRED, FailureCause.OVERLOADED}
)
_NEVER = {FailureCause.REFUSED: Reason.ENGINE_REFUSED, FailureCause.BODY_UNREADABLE: Reason.BODY_UNREADABLE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """What a request has behind it: failures that count, and the node of each crash under it."""

    failures: int = 0
    crashed: tuple[str, ...] = ()


class Nodes(NamedTuple):
    """Nodes that failed a request: how many, and how many of them fail no other."""

    tried: int
    well: int

    @property
    def accuse(self) -> bool:
        """Whether enough of them are well for the request to be at fault."""
        return self.well >= min(WITNESSES, self.tried)


UNKNOWN_NODES = Nodes(tried=0, well=0)
"""Nothing is known of them: the request is at fault."""


@dataclass(frozen=True, kw_only=True)
class RetryAfter:
    """Bind it again after `delay_s`, elsewhere when `exclude`; for a token of the budget when `is_paid`."""

    delay_s: float
    past: Past
    exclude: bool
    is_paid: bool


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """It has failed for good."""

    reason: Reason


def is_given_back(cause: FailureCause) -> bool:
    """Whether an attempt that ended so was merely given back: its engine is not to blame, nor is it."""
    return cause in _GIVEN_BACK


def decide(
    failed: FailedAttempt,
    past: Past,
    rng: random.Random,
    *,
    outage: Outage = NO_OUTAGE,
    nodes: Nodes = UNKNOWN_NODES,
) -> RetryAfter | GiveUp:
    """Decide about an attempt that failed, after what the request has behind it."""
    cause = failed.cause
    if cause in _NEVER:
        return GiveUp(reason=_NEVER[cause])
    if cause in _GIVEN_BACK:
        delay = rng.uniform(0.02, BASE_DELAY_S) if cause is FailureCause.OVERLOADED else 0.0
        return RetryAfter(
            delay_s=delay, past=past, exclude=cause is not FailureCause.OVERLOADED, is_paid=False
        )
    crashed = past.crashed
    if failed.crash and not outage.excuses_crash:
        crashed = (*crashed, failed.node)
        if len(set(crashed)) >= POISON_NODES or len(crashed) >= POISON_CRASHES:
            return GiveUp(reason=Reason.POISON)
    is_last = past.failures + 1 >= MAX_FAILURES
    is_excused = outage.excuses_failure or (is_last and not nodes.accuse)
    if is_last and not is_excused:
        return GiveUp(reason=Reason.ATTEMPTS_EXHAUSTED)
    ceiling = MAX_DELAY_S if is_excused else min(MAX_DELAY_S, BASE_DELAY_S * 2**past.failures)
    return RetryAfter(
        delay_s=rng.uniform(0, ceiling),
        past=Past(failures=past.failures + (not is_excused), crashed=crashed),
        exclude=True,
        is_paid=True,
    )
