"""Requests of `pending` that are not to be bound yet: until their time, then for a token of the retry budget.

Those whose time has come wait for tokens in the order of their coming, so that a thousand failures of one
moment return as a stream and not as a wave.
"""

from __future__ import annotations

import heapq
from collections import deque

from dispatcher.scheduling.retry_budget import RetryBudget
from dispatcher.scheduling.window import Waiting


class Delayed:
    """Delayed requests of one pool, by ref."""

    def __init__(self, budget: RetryBudget) -> None:
        self.budget = budget
        self.held_up = 0
        """How often a retry found no token at its time."""
        self._times: list[tuple[float, str]] = []
        self._requests: dict[str, Waiting] = {}
        self._paid: set[str] = set()
        self._due: deque[str] = deque()

    def push(self, waiting: Waiting, due_s: float, *, is_paid: bool) -> None:
        """Hold a request until `due_s` (monotonic); then until a token is there, when `is_paid`."""
        ref = waiting.envelope.ref
        self._requests[ref] = waiting
        if is_paid:
            self._paid.add(ref)
        heapq.heappush(self._times, (due_s, ref))

    def due(self, now_s: float) -> tuple[list[Waiting], float | None]:
        """Take out what may be bound now; and seconds until there may be more, None when nothing is held."""
        found = []
        while self._times and self._times[0][0] <= now_s:
            ref = heapq.heappop(self._times)[1]
            if ref not in self._requests:
                continue
            if ref in self._paid:
                self._due.append(ref)
                self.held_up += self.budget.tokens(now_s) < len(self._due)
            else:
                found.append(self._requests.pop(ref))
        while self._due:
            if self._due[0] not in self._requests:
                self._due.popleft()
            elif self.budget.take(now_s):
                ref = self._due.popleft()
                self._paid.discard(ref)
                found.append(self._requests.pop(ref))
            else:
                break
        waits = [self._times[0][0] - now_s] if self._times else []
        if self._due:
            waits.append(self.budget.next_s(now_s))
        return found, min(waits, default=None)

    @property
    def without_token(self) -> int:
        """Retries whose time has come and that wait for a token."""
        return len(self._due)

    def get(self, ref: str) -> Waiting | None:
        """The request of `ref`, if it is held here."""
        return self._requests.get(ref)

    def withdraw(self, ref: str) -> Waiting | None:
        """Take a request out."""
        self._paid.discard(ref)
        return self._requests.pop(ref, None)

    def all(self) -> list[Waiting]:
        """All that is held."""
        return list(self._requests.values())
