"""How far a partition of requests has come: the *assigned* and the *finished* mark.

*Assigned* is the lowest offset not yet taken into Redis; *finished* the lowest without a published
outcome. Late binding and long generations take offsets out of order, and Kafka's offsets have gaps,
so both are minima of sets, kept in heaps with lazy deletion.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable

FEWEST_STALE = 1024
"""Entries of heaps that are gone are swept out once they outnumber the others, and this."""
MOST_ANSWERS = 4096
"""Groups of answers told apart; beyond, neighbours are taken together, as if all came with the earlier."""


class _Minimum:
    """A set of offsets with a cheap minimum; a least one that stays for long keeps no others in memory."""

    def __init__(self, members: Iterable[int] = ()) -> None:
        self.members = set(members)
        self._heap = sorted(self.members)

    def add(self, offset: int) -> None:
        if offset not in self.members:
            self.members.add(offset)
            heapq.heappush(self._heap, offset)

    def discard(self, offset: int) -> None:
        self.members.discard(offset)
        if len(self._heap) > 2 * len(self.members) + FEWEST_STALE:
            self._heap = sorted(self.members)

    def least(self) -> int | None:
        while self._heap and self._heap[0] not in self.members:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None


class SourceProgress:
    """One partition of one lane.

    Args:
        next_read: the offset where intake reads on.
        open_below: taken offsets below `next_read` that have no outcome yet.
        taken_above: offsets at or above `next_read` that are taken already: intake skips them.
        open_above: those of `taken_above` that have no outcome yet.

    Answers published before this leader count as its transaction 0: their position is the one that the
    previous commit noted.
    """

    def __init__(
        self,
        *,
        next_read: int,
        open_below: Iterable[int] = (),
        taken_above: Iterable[int] = (),
        open_above: Iterable[int] = (),
    ) -> None:
        self.next_read = next_read
        self._taken_above = set(taken_above)
        self._untaken = _Minimum()
        self._open = _Minimum([*open_below, *open_above])
        floor = max([next_read - 1, *self._taken_above], default=-1)
        self._answered_above: list[tuple[int, int]] = [(0, floor)]
        """(transaction, highest offset that it answered), both rising: what was answered no later by one
        that reaches no less far needs no entry."""

    def read(self, offset: int) -> bool:
        """Note that intake read `offset`; False when it is taken already and must be skipped."""
        self.next_read = max(self.next_read, offset + 1)
        if offset in self._taken_above:
            self._taken_above.discard(offset)
            return False
        self._untaken.add(offset)
        self._open.add(offset)
        return True

    def is_open(self, offset: int) -> bool:
        """Whether the request at `offset` has no published outcome yet, as far as this leader knows."""
        return offset in self._open.members

    def is_known(self, offset: int) -> bool:
        """Whether there is such a request: intake has read it, or Redis had it before."""
        return offset < self.next_read or offset in self._taken_above

    def take(self, offset: int) -> None:
        """Note that Redis has it."""
        self._untaken.discard(offset)

    def finish(self, offset: int, transaction: int) -> None:
        """Note that its outcome is in this leader's `transaction`-th transaction."""
        self._untaken.discard(offset)
        if offset in self._open.members:
            self._open.discard(offset)
            self._note_answer(transaction, offset)

    def _note_answer(self, transaction: int, offset: int) -> None:
        answers = self._answered_above
        if answers and answers[-1][1] >= offset:
            return
        if answers and answers[-1][0] == transaction:
            answers.pop()
        answers.append((transaction, offset))
        if len(answers) > MOST_ANSWERS:
            self._answered_above = [
                (answers[at][0], answers[min(at + 1, len(answers) - 1)][1])
                for at in range(0, len(answers), 2)
            ]

    def excuse(self, offset: int) -> None:
        """Note that it needs no outcome of its own: it repeats another record."""
        self._untaken.discard(offset)
        self._open.discard(offset)

    @property
    def assigned(self) -> int:
        """The *assigned* mark."""
        least = self._untaken.least()
        return self.next_read if least is None else least

    @property
    def finished(self) -> int:
        """The *finished* mark."""
        least = self._open.least()
        return self.next_read if least is None else min(least, self.next_read)

    @property
    def open_count(self) -> int:
        """Requests read or in Redis without an outcome."""
        return len(self._open.members)

    @property
    def span(self) -> int:
        """How far reading is ahead of the *assigned* mark: bounds the set above it in Redis."""
        return self.next_read - self.assigned

    def answering(self) -> list[int]:
        """The transactions that `earliest_answer` may yet name, rising."""
        self.earliest_answer()
        return [transaction for transaction, _ in self._answered_above]

    def earliest_answer(self) -> int | None:
        """A transaction as early as each that holds an outcome of an offset at or above *finished*."""
        answers, mark = self._answered_above, self.finished
        passed = bisect_left(answers, mark, key=lambda answer: answer[1])
        if passed:
            del answers[:passed]
        return answers[0][0] if answers else None
