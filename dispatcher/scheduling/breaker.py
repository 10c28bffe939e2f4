"""A node's circuit breaker: after repeated engine failures it gets no work for a while, then one request.

`closed` is trust. `open` after `FAILURES` engine failures in a row: nothing is bound to the node until its
probation ends. Then `half_open`: one request at a time, whose answer closes the breaker and whose failure
opens it for twice as long. Only failures of the engine count; refused requests and work given back do not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum

from dispatcher.protocol.outcome import FailureCause

FAILURES = 3
FIRST_PROBATION_S = 1.0
LONGEST_PROBATION_S = 30.0
ENGINE_FAILURES = frozenset(
    {
        FailureCause.CONNECT,
        FailureCause.ENGINE_ERROR,
        FailureCause.PROTOCOL,
        FailureCause.TRUNCATED,
        FailureCause.STALLED,
    }
)


class BreakerState(StrEnum):
    """How far a node is trusted."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(kw_only=True, slots=True)
class Breaker:
    """One node's. `probe` is the request that it is tried with while half open.

    `failed_requests` holds two of the requests that failed since it last answered one: enough to tell whether
    it was one request alone. `blamed` are the same since the last answer to what it was given after
    `blamed_at_s`, its last failure.
    """

    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    until_s: float = 0.0
    probation_s: float = 0.0
    probe: str = ""
    failed_requests: set[str] = field(default_factory=set)
    blamed: set[str] = field(default_factory=set)
    blamed_at_s: float = 0.0

    @property
    def fails_others(self) -> bool:
        """Whether it failed different requests, and answered none that it was given after them.

        Answers that were under way when an engine began to fail everything say nothing of how it is since.
        """
        return len(self.blamed) > 1

    @property
    def is_ailing(self) -> bool:
        """Whether it fails whatever it gets, and not one request alone."""
        return self.state is not BreakerState.CLOSED and len(self.failed_requests) > 1

    @property
    def admits(self) -> bool:
        """Whether a request may be bound to the node."""
        return self.state is BreakerState.CLOSED or (self.state is BreakerState.HALF_OPEN and not self.probe)

    def bound(self, ref: str) -> None:
        """Note a request that was bound to the node."""
        if self.state is BreakerState.HALF_OPEN and not self.probe:
            self.probe = ref

    def released(self, ref: str) -> None:
        """Note a request that is there no more, however it ended."""
        if self.probe == ref:
            self.probe = ""

    def failed(self, ref: str, now_s: float, rng: random.Random) -> bool:
        """Note an engine failure of a request; whether the breaker opened by it."""
        self.failures += 1
        if len(self.failed_requests) < 2:
            self.failed_requests.add(ref)
        if len(self.blamed) < 2:
            self.blamed.add(ref)
        self.blamed_at_s = now_s
        if self.state is BreakerState.OPEN:
            return False
        if self.state is BreakerState.CLOSED and self.failures < FAILURES:
            return False
        self.state, self.probe = BreakerState.OPEN, ""
        self.probation_s = min(LONGEST_PROBATION_S, 2 * self.probation_s or FIRST_PROBATION_S)
        self.until_s = now_s + self.probation_s * rng.uniform(0.5, 1.0)
        return True

    def succeeded(self, began_s: float) -> bool:
        """Note an answer, also one that was bound before the breaker opened; whether it closed by it.

        Args:
            began_s: when the node was given the request, by the clock of `failed`.
        """
        if began_s > self.blamed_at_s:
            self.blamed.clear()
        was_closed = self.state is BreakerState.CLOSED
        self.state, self.failures, self.probation_s, self.probe = BreakerState.CLOSED, 0, 0.0, ""
        self.failed_requests.clear()
        return not was_closed

    def tick(self, now_s: float) -> bool:
        """End a probation that is over; whether that happened now."""
        if self.state is not BreakerState.OPEN or now_s < self.until_s:
            return False
        self.state = BreakerState.HALF_OPEN
        return True

    def renewed(self) -> None:
        """Note another life of the node: what failed may be mended, so it is tried at once."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN
        self.probe = ""
