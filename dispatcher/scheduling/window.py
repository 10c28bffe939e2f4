"""The window: envelopes read from the log or put back to pending, waiting to be bound.

Ordered by priority, then deadline, then age, per lane and model, so that a model without capacity
holds up nobody else. Interactive requests go first; batch gets spare capacity and one bind in
twenty, and a batch request older than its longest wait competes as interactive.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Lane, Ref
from dispatcher.scheduling.scheduler import Choice, Planned, Scheduler

BATCH_EVERY = 20
"""One bind in this many is offered to batch first: 5 % of capacity."""
LOOK_PAST = 32
"""How many unbindable heads of a queue are looked past in a round for some that can be bound."""
ENVELOPE_OVERHEAD_BYTES = 600
"""What an envelope without its data costs in memory, measured with tracemalloc, rounded up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A request in the window. `data` is empty when Redis keeps it (pending)."""

    ref: Ref
    envelope: Envelope
    data: bytes = b""
    from_pending: bool = False
    failures: int = 0
    excluded: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """What it costs the window's byte bound."""
        return len(self.data) + ENVELOPE_OVERHEAD_BYTES + 64 * len(self.envelope.block_hashes)


Order = tuple[int, int, int, int, int, str]
"""(urgent first, -priority, deadline, append time, sequence, ref)"""


@dataclass(kw_only=True)
class Round:
    """One round of choices: what was passed over, and the seconds of prefill it will cost nodes."""

    planned: Planned = field(default_factory=dict)
    passed: dict[tuple[Lane, str], list[Order]] = field(default_factory=dict)


class Window:
    """Waiting requests and their order.

    Args:
        max_batch_wait_ms: a batch request that waited longer competes as interactive.
    """

    def __init__(self, *, max_batch_wait_ms: int = 3_600_000) -> None:
        self._waiting: dict[str, Waiting] = {}
        self._queues: dict[tuple[Lane, str], list[Order]] = {}
        self._urgent: set[str] = set()
        self._sequence = 0
        self._binds = 0
        self._max_batch_wait_ms = max_batch_wait_ms
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, ref: object) -> bool:
        return ref in self._waiting

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._waiting.values()))

    def get(self, ref: str) -> Waiting | None:
        """The request of `ref`, if it waits here."""
        return self._waiting.get(ref)

    def push(self, waiting: Waiting) -> None:
        """Enter a request."""
        ref = waiting.envelope.ref
        if ref in self._waiting:
            return
        self._waiting[ref] = waiting
        self.bytes += waiting.bytes
        queue = self._queues.setdefault((waiting.ref.lane, waiting.envelope.model), [])
        heapq.heappush(queue, self._order(waiting))

    def _order(self, waiting: Waiting) -> Order:
        self._sequence += 1
        envelope = waiting.envelope
        urgent = 0 if envelope.ref in self._urgent else 1
        return (
            urgent,
            -envelope.priority,
            envelope.deadline_at_ms,
            envelope.appended_ms,
            self._sequence,
            envelope.ref,
        )

    def remove(self, ref: str) -> Waiting | None:
        """Take a request out, wherever it stands."""
        waiting = self._waiting.pop(ref, None)
        if waiting is not None:
            self.bytes -= waiting.bytes
            self._urgent.discard(ref)
        return waiting

    def hurry(self, ref: str) -> None:
        """Bind this one first of its model: it holds back its partition's mark."""
        waiting = self._waiting.get(ref)
        if waiting is not None and ref not in self._urgent:
            self._urgent.add(ref)
            queue = self._queues[(waiting.ref.lane, waiting.envelope.model)]
            heapq.heappush(queue, self._order(waiting))

    def models(self) -> set[str]:
        """Models that something waits for."""
        return {model for _, model in self._queues}

    def begin_round(self) -> Round:
        """Begin to choose: what is passed over in a round is not looked at again before `end_round`."""
        return Round()

    def end_round(self, round: Round) -> None:
        """Put back what was passed over, in its old order."""
        for key, passed in round.passed.items():
            queue = self._queues.setdefault(key, [])
            for order in passed:
                heapq.heappush(queue, order)

    def choose(self, scheduler: Scheduler, round: Round, now_ms: int) -> tuple[Waiting, Choice] | None:
        """Take out the next request that some node can take now; None when there is none.

        The choice is not reserved yet: the caller does that before it calls again. A request whose best
        node is busy is passed over, and what it will cost that node counts for those after it.
        """
        lanes = [Lane.INTERACTIVE, Lane.BATCH]
        if self._binds % BATCH_EVERY == BATCH_EVERY - 1:
            lanes.reverse()
        for lane in lanes:
            chosen = self._choose_in(lane, scheduler, round, now_ms)
            if chosen is not None:
                self._binds += 1
                return chosen
        return None

    def _choose_in(
        self, lane: Lane, scheduler: Scheduler, round: Round, now_ms: int
    ) -> tuple[Waiting, Choice] | None:
        heads = []
        for key in list(self._queues):
            if key[0] is lane or self._is_overdue(key, now_ms):
                head = self._head(key)
                if head is not None and scheduler.has_room(key[1]):
                    heads.append((head, key))
        for _, key in sorted(heads):
            found = self._choose_from(key, scheduler, round)
            if found is not None:
                return found
        return None

    def _is_overdue(self, key: tuple[Lane, str], now_ms: int) -> bool:
        head = self._head(key)
        return key[0] is Lane.BATCH and head is not None and now_ms - head[3] > self._max_batch_wait_ms

    def _head(self, key: tuple[Lane, str]) -> Order | None:
        queue = self._queues.get(key, [])
        while queue and queue[0][5] not in self._waiting:
            heapq.heappop(queue)
        if not queue:
            self._queues.pop(key, None)
            return None
        return queue[0]

    def _choose_from(
        self, key: tuple[Lane, str], scheduler: Scheduler, round: Round
    ) -> tuple[Waiting, Choice] | None:
        passed = round.passed.setdefault(key, [])
        while len(passed) < LOOK_PAST and self._head(key) is not None:
            order = heapq.heappop(self._queues[key])
            waiting = self._waiting[order[5]]
            choice = scheduler.choose(waiting.envelope, waiting.excluded, round.planned)
            if choice is not None and choice.has_room:
                self.remove(order[5])
                return waiting, choice
            passed.append(order)
            if choice is not None:
                name = choice.node.name
                round.planned[name] = round.planned.get(name, 0.0) + choice.prefill_s
        return None
