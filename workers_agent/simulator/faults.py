"""What goes wrong on purpose. Which request meets what depends only on the seed and the order of requests."""

from __future__ import annotations

import os
import random
import signal
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

Share = Annotated[float, Meta(ge=0, le=1)]
Factor = Annotated[float, Meta(ge=1, le=10_000)]


class Fault(StrEnum):
    """What happens to a request: at once, half-way through its answer, or to each of its tokens."""

    NONE = "none"
    REFUSE = "refuse"
    CUT = "cut"
    DIE = "die"
    STALL = "stall"
    CRASH = "crash"
    SLOW = "slow"


_FAILURES = (Fault.REFUSE, Fault.CUT, Fault.DIE)


class Faults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shares of requests that go wrong, and how slow the engine is.

    `crash_after`: so many requests are answered from now on, the next one kills the process half-way.
    `slow_factor`: how many times as long the tokens of a slow request take; `step_factor`: each step of all.
    """

    fail_rate: Share = 0.0
    stall_rate: Share = 0.0
    crash_rate: Share = 0.0
    crash_after: Annotated[int, Meta(ge=0)] | None = None
    slow_rate: Share = 0.0
    slow_factor: Factor = 4.0
    step_factor: Factor = 1.0


class FaultPlan:
    """Draws each request's fault."""

    def __init__(self, faults: Faults, seed: int) -> None:
        self.faults = faults
        self._rng = random.Random(seed)
        self._drawn = 0

    def change(self, faults: Faults) -> None:
        """Go on with other shares; `crash_after` counts from here."""
        self.faults = faults
        self._drawn = 0

    def draw(self) -> Fault:
        """The fault of the next request."""
        # All are drawn each time: one share does not move the others' choices.
        fails, stalls = self._rng.random(), self._rng.random()
        failure = self._rng.choice(_FAILURES)
        crashes, slows = self._rng.random(), self._rng.random()
        faults = self.faults
        self._drawn += 1
        if faults.crash_after is not None and self._drawn > faults.crash_after:
            return Fault.CRASH
        if fails < faults.fail_rate:
            return failure
        if stalls < faults.stall_rate:
            return Fault.STALL
        if crashes < faults.crash_rate:
            return Fault.CRASH
        return Fault.SLOW if slows < faults.slow_rate else Fault.NONE


def kill_myself() -> None:
    """Die as by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)
