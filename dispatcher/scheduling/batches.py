"""The original's batching window: assignments to one node wait for each other, to be handed over together.

A node's batch is due once it is full or its first has waited long enough; with no wait, or a size of one,
every assignment is due at once. Each is bound while it waits: its node's capacity is taken, and what comes
after it is chosen for with it there.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

SLACK_S = 1e-9
"""A timer may fire this much early: sums of seconds are rounded."""


class Batches(Generic[T]):
    """What waits to be handed over, by node.

    Args:
        wait_s: how long the first of a batch waits for others.
        size: how many make it due at once.
    """

    def __init__(self, *, wait_s: float = 0.0, size: int = 1) -> None:
        self._wait_s = wait_s if size > 1 else 0.0
        self._size = size
        # Nodes in the order in which their batches began.
        self._filling: dict[str, tuple[float, list[T]]] = {}
        self._due: deque[list[T]] = deque()

    @property
    def is_on(self) -> bool:
        """Whether anything waits for others at all."""
        return self._wait_s > 0

    def __len__(self) -> int:
        return sum(map(len, self._due)) + sum(len(batch) for _, batch in self._filling.values())

    def add(self, node: str, one: T, now_s: float, *, is_alone: bool = False) -> None:
        """Enter an assignment; one that is `alone` waits for nobody, nor does anybody for it."""
        if is_alone or not self._wait_s:
            self._due.append([one])
            return
        _, batch = self._filling.setdefault(node, (now_s, []))
        batch.append(one)
        if len(batch) >= self._size:
            self._due.append(self._filling.pop(node)[1])

    def take_due(self, now_s: float, *, most: int) -> list[list[T]]:
        """Take out batches that are due, in their order: about `most` assignments, no batch halved."""
        while self._filling:
            node, (since_s, batch) = next(iter(self._filling.items()))
            if now_s < since_s + self._wait_s - SLACK_S:
                break
            self._due.append(batch)
            del self._filling[node]
        taken: list[list[T]] = []
        count = 0
        while self._due and (not count or count + len(self._due[0]) <= most):
            taken.append(self._due.popleft())
            count += len(taken[-1])
        return taken

    @property
    def next_at_s(self) -> float | None:
        """When the next batch is due; None when nothing waits."""
        if self._due:
            return float("-inf")
        first = next(iter(self._filling.values()), None)
        return first[0] + self._wait_s if first is not None else None

    def wait_s(self, node: str, now_s: float) -> float:
        """How long one more assignment to a node would wait, if nobody followed."""
        since_s, batch = self._filling.get(node, (now_s, []))
        if len(batch) >= self._size - 1:
            return 0.0
        return max(0.0, since_s + self._wait_s - now_s)
