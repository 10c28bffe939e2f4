"""The window: envelopes read from the log or put back to pending, waiting to be bound.

Ordered by priority, then among tenants (`fair_queue`), then by deadline (put off for long prompts) and age,
per lane and model, so that a model without capacity holds up nobody else. Interactive requests go first;
batch gets spare capacity and one bind in twenty of each model, and a batch request older than its longest
wait competes as interactive.
Each lane has a share of the window of its own, so that a backlog of one keeps nobody from reading the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.handoff import Handoff, Stage
from dispatcher.protocol.names import Lane, Ref
from dispatcher.scheduling.backlog import Backlog
from dispatcher.scheduling.choice import Choice, Planned
from dispatcher.scheduling.fair_queue import FairQueue, Order
from dispatcher.scheduling.scheduler import Scheduler

BATCH_EVERY = 20
"""One bind in this many of a model is batch's, when it waits: 5 % of capacity."""
LANE_SHARE = {Lane.INTERACTIVE: 0.75, Lane.BATCH: 0.25}
"""How much of the window's bounds each lane may fill."""
LOOK_PAST = 32
"""How many heads of a queue whose best node is busy are looked past in a round for some that can be bound."""
MOST_PARKED = 256
"""How many heads that no eligible node could ever take are put aside in a round."""
PARK_MS = 1000
"""After this time they are looked at again: nodes may have come."""
PUT_OFF_SHARE = 0.25
"""A long prompt is put off by this share of the time it has at most: it must not be put off to its end."""
FEWEST_STALE = 1024
"""Orders of requests that are gone are swept out once they outnumber the others, and this."""
PREPARED = 128
"""How many of the next requests are priced together in a round."""
OWED, ORDINARY, SPARE = range(3)
"""Whose turn it is."""
ANSWER_TOKEN = 2.0
"""What a token of an answer counts of a tenant's service; a computed one of a prompt is 1 (as in VTC)."""
ENVELOPE_OVERHEAD_BYTES = 700
"""What an envelope without its data costs in memory, measured with tracemalloc, rounded up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A request in the window. `data` is empty when Redis keeps it (pending).

    `crashed` names the nodes whose engines died under it: with any, it is a suspect. With a `handoff` its
    prompt is computed, and it waits for a node to generate its answer. `entered_ms`: when it came here, 0
    when nobody noted it.
    """

    ref: Ref
    envelope: Envelope
    data: bytes = b""
    from_pending: bool = False
    failures: int = 0
    excluded: tuple[str, ...] = ()
    crashed: tuple[str, ...] = ()
    handoff: Handoff | None = None
    entered_ms: int = 0

    @property
    def key(self) -> Key:
        """The queue it stands in."""
        return self.ref.lane, self.envelope.model, self.handoff is not None

    @property
    def bytes(self) -> int:
        """What it costs the window's byte bound."""
        return len(self.data) + ENVELOPE_OVERHEAD_BYTES + 64 * len(self.envelope.block_hashes)


Key = tuple[Lane, str, bool]
"""(lane, model, whether its prompt is computed): a queue of its own, since other nodes are waited for."""


@dataclass(kw_only=True, slots=True)
class Waits:
    """What kept a request in the window.

    Args:
        put_off_ms: by so much its turn came later for the prefill that it takes.
        busy: how often it was passed over because its best node, last `busy_node`, had no room.
        unplaced: how often no eligible node could take it.
    """

    put_off_ms: int
    busy: int = 0
    busy_node: str = ""
    unplaced: int = 0


@dataclass(kw_only=True)
class Round:
    """One round of choices: how many were passed over, and the seconds of prefill they will cost nodes.

    `waits_of` tells of what was chosen in it why it had waited.
    """

    planned: Planned = field(default_factory=dict)
    passed: dict[Key, int] = field(default_factory=dict)
    prepared: set[Key] = field(default_factory=set)
    has_begun: bool = False
    chosen: dict[str, Order] = field(default_factory=dict)
    waits: dict[str, Waits] = field(default_factory=dict)

    def waits_of(self, envelope: Envelope) -> Waits:
        """What kept a request that was chosen in this round."""
        waits = self.waits.get(envelope.ref)
        return waits if waits is not None else _waits(self.chosen[envelope.ref], envelope)


def _waits(order: Order, envelope: Envelope) -> Waits:
    return Waits(put_off_ms=max(0, order[2] - envelope.deadline_at_ms))


class Window:
    """Waiting requests and their order.

    Args:
        max_batch_wait_ms: a batch request that waited longer competes as interactive.
        is_fair: whether tenants share capacity at all.
        weights: in what proportions, by tenant; 1 for one that is not named.

    `longer_ms` tells how much later than its deadline says a request's turn comes, at most `most_put_off_ms`.
    """

    def __init__(
        self,
        *,
        max_batch_wait_ms: int = 3_600_000,
        is_fair: bool = True,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.longer_ms: Callable[[Envelope], int] = lambda envelope: 0
        self.most_put_off_ms = 10_000
        self._is_fair = is_fair
        self._weights = weights if weights is not None else {}
        self._waiting: dict[str, Waiting] = {}
        self._queues: dict[Key, FairQueue] = {}
        self._urgent: set[str] = set()
        self._parked: list[tuple[Key, Order]] = []
        self._unpark_at_ms = 0
        self._stale = 0
        self._sequence = 0
        self._binds_since_batch: dict[str, int] = {}
        self._max_batch_wait_ms = max_batch_wait_ms
        self._counts = dict.fromkeys(Lane, 0)
        self._bytes = dict.fromkeys(Lane, 0)
        self._loras: Counter[tuple[str, str]] = Counter()
        self._backlogs: dict[str, Backlog] = {}
        self._waits: dict[str, Waits] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, ref: object) -> bool:
        return ref in self._waiting

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._waiting.values()))

    @property
    def bytes(self) -> int:
        """What all waiting requests cost."""
        return sum(self._bytes.values())

    def bytes_of(self, lane: Lane) -> int:
        """What the waiting requests of a lane cost."""
        return self._bytes[lane]

    @property
    def backlogs(self) -> Mapping[str, Backlog]:
        """What waits of the interactive lane, by model."""
        return self._backlogs

    def is_full(self, lane: Lane, *, requests: int, bytes: int) -> bool:
        """Whether a lane has used up its share of these bounds."""
        share = LANE_SHARE[lane]
        return self._counts[lane] >= requests * share or self._bytes[lane] >= bytes * share

    def get(self, ref: str) -> Waiting | None:
        """The request of `ref`, if it waits here."""
        return self._waiting.get(ref)

    def push(self, waiting: Waiting) -> None:
        """Enter a request."""
        ref = waiting.envelope.ref
        if ref in self._waiting:
            return
        self._waiting[ref] = waiting
        self._count(waiting, 1)
        if waiting.ref.lane is Lane.INTERACTIVE:
            backlog = self._backlogs.get(waiting.envelope.model)
            if backlog is None:
                backlog = self._backlogs[waiting.envelope.model] = Backlog(self._weight_of, self._tenant)
            backlog.push(waiting.envelope, waiting.bytes, is_fresh=not waiting.from_pending)
        self._stand(waiting.key, self._order(waiting), waiting.envelope)

    def _weight_of(self, tenant: str) -> float:
        """A tenant's weight."""
        return self._weights.get(tenant, 1.0)

    def _tenant(self, envelope: Envelope) -> str:
        return envelope.tenant if self._is_fair else ""

    def _stand(self, key: Key, order: Order, envelope: Envelope) -> None:
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = FairQueue(self._waiting, self._weight_of)
        queue.push(order, self._tenant(envelope))

    def _order(self, waiting: Waiting) -> Order:
        self._sequence += 1
        envelope = waiting.envelope
        urgent = 0 if envelope.ref in self._urgent else 1
        return (
            urgent,
            -envelope.priority,
            envelope.deadline_at_ms + self._put_off_ms(envelope),
            envelope.appended_ms,
            self._sequence,
            envelope.ref,
        )

    def _put_off_ms(self, envelope: Envelope) -> int:
        has_ms = max(0, envelope.deadline_at_ms - envelope.appended_ms)
        return min(self.longer_ms(envelope), self.most_put_off_ms, int(PUT_OFF_SHARE * has_ms))

    def _count(self, waiting: Waiting, change: int) -> None:
        lane, envelope = waiting.ref.lane, waiting.envelope
        self._counts[lane] += change
        self._bytes[lane] += change * waiting.bytes
        if envelope.lora:
            pair = (envelope.model, envelope.lora)
            self._loras[pair] += change
            if not self._loras[pair]:
                del self._loras[pair]

    def remove(self, ref: str) -> Waiting | None:
        """Take a request out, wherever it stands."""
        waiting = self._take(ref)
        if waiting is not None:
            self._stale += 1
            if self._stale > max(FEWEST_STALE, len(self._waiting)):
                self._sweep()
        return waiting

    def _take(self, ref: str, *, is_bound: bool = False) -> Waiting | None:
        waiting = self._waiting.pop(ref, None)
        if waiting is not None:
            self._count(waiting, -1)
            self._urgent.discard(ref)
            self._waits.pop(ref, None)
            model = waiting.envelope.model
            if waiting.ref.lane is Lane.INTERACTIVE:
                backlog = self._backlogs[model]
                backlog.remove(waiting.envelope, waiting.bytes, is_bound=is_bound)
                if not backlog.requests:
                    del self._backlogs[model]
        return waiting

    def _sweep(self) -> None:
        """Drop the orders of requests that are gone, which a head that can't be bound keeps in the heaps."""
        self._stale = 0
        for key, queue in list(self._queues.items()):
            queue.sweep()
            if not len(queue):
                del self._queues[key]
        self._parked = [entry for entry in self._parked if entry[1][5] in self._waiting]

    def hurry(self, ref: str) -> None:
        """Bind this one first of its model: it holds back its partition's mark."""
        waiting = self._waiting.get(ref)
        if waiting is not None and ref not in self._urgent:
            self._urgent.add(ref)
            # Its queue may be gone for now: what is put aside stands in none.
            self._stand(waiting.key, self._order(waiting), waiting.envelope)

    def hurry_batch_after(self, wait_ms: int) -> None:
        """Let a batch request compete as interactive after this time, if that is sooner."""
        self._max_batch_wait_ms = min(self._max_batch_wait_ms, wait_ms)

    def models(self) -> set[str]:
        """Models that something waits for."""
        return {model for _, model, _ in (*self._queues, *(key for key, _ in self._parked))}

    def loras(self) -> set[tuple[str, str]]:
        """Models and LoRA adapters of theirs that something waits for."""
        return set(self._loras)

    def begin_round(self) -> Round:
        """Begin to choose: what is passed over in a round is not looked at again before `end_round`."""
        return Round()

    def end_round(self, round: Round) -> None:
        """Put back what was passed over, in its old order."""
        for key in round.passed:
            if key in self._queues:
                self._queues[key].end_round()

    def choose(self, scheduler: Scheduler, round: Round, now_ms: int) -> tuple[Waiting, Choice] | None:
        """Take out the next request that some node can take now; None when there is none.

        The choice is not reserved yet: the caller does that before it calls again. A request whose best
        node is busy is passed over, and what it will cost that node counts for those after it.
        """
        self._unpark(now_ms)
        heads = []
        for key in list(self._queues):
            head = self._head(key)
            if head is not None and scheduler.has_room(key[1], is_decode=key[2]):
                heads += [(turn, head, key) for turn in self._turns(key, head, now_ms)]
        for turn, _, key in sorted(heads):
            look_past = 1 if turn == OWED else LOOK_PAST
            found = self._choose_from(key, scheduler, round, now_ms, look_past=look_past)
            if found is not None:
                self._note_bind(key)
                return found
        return None

    def _turns(self, key: Key, head: Order, now_ms: int) -> tuple[int, ...]:
        """When a queue is looked at: batch that is owed a bind, interactive, then batch in spare capacity.

        What is owed is looked at by its head alone, which may hold one busy node free for itself.
        """
        lane, model, is_decode = key
        if lane is Lane.INTERACTIVE or is_decode or now_ms - head[3] > self._max_batch_wait_ms:
            return (ORDINARY,)
        return (OWED, SPARE) if self._binds_since_batch.get(model, 0) >= BATCH_EVERY - 1 else (SPARE,)

    def _note_bind(self, key: Key) -> None:
        """Count toward batch's next turn. What is owed stays owed until batch could be bound."""
        lane, model, is_decode = key
        if is_decode:
            return
        if lane is Lane.BATCH or (Lane.BATCH, model, False) not in self._queues:
            self._binds_since_batch.pop(model, None)
        else:
            self._binds_since_batch[model] = self._binds_since_batch.get(model, 0) + 1

    def _unpark(self, now_ms: int) -> None:
        # A clock that was set back by more than the pause must not prolong it.
        if self._unpark_at_ms - PARK_MS <= now_ms < self._unpark_at_ms:
            return
        parked, self._parked = self._parked, []
        self._unpark_at_ms = now_ms + PARK_MS
        for key, order in parked:
            waiting = self._waiting.get(order[5])
            if waiting is not None:
                self._stand(key, order, waiting.envelope)

    def _head(self, key: Key) -> Order | None:
        queue = self._queues.get(key)
        if queue is None:
            return None
        head = queue.head()
        if head is None and not len(queue):
            del self._queues[key]
        return head

    def _prepare(self, key: Key, queue: FairQueue, scheduler: Scheduler, round: Round) -> None:
        """Have the requests priced together whose turns come next, before the first of them is chosen for."""
        if not round.has_begun:
            round.has_begun = True
            scheduler.begin_round()
        if key in round.prepared or key[2] or not scheduler.wants_batch(key[1]):
            return
        round.prepared.add(key)
        upcoming = [self._waiting[ref] for ref in queue.upcoming(PREPARED)]
        scheduler.prepare([one.envelope for one in upcoming if not one.excluded and not one.crashed])

    def _choose_from(
        self, key: Key, scheduler: Scheduler, round: Round, now_ms: int, *, look_past: int
    ) -> tuple[Waiting, Choice] | None:
        round.passed.setdefault(key, 0)
        parked = 0
        while round.passed[key] < look_past and parked < MOST_PARKED and self._head(key) is not None:
            queue = self._queues[key]
            self._prepare(key, queue, scheduler, round)
            order, tenant = queue.pop()
            waiting = self._waiting[order[5]]
            choice = scheduler.choose(
                waiting.envelope,
                waiting.excluded,
                round.planned,
                is_suspect=bool(waiting.crashed),
                is_decode=waiting.handoff is not None and now_ms < waiting.handoff.expires_ms,
            )
            if choice is None:
                queue.part(order, tenant)
                self._parked.append((key, order))
                parked += 1
                self._waits_of(order, waiting).unplaced += 1
                if key[0] is Lane.INTERACTIVE:
                    self._backlogs[key[1]].stick(waiting.envelope)
                continue
            tokens = _service_tokens(waiting.envelope, choice)
            if choice.has_room:
                queue.serve(order, tenant, tokens)
                round.chosen[order[5]] = order
                if order[5] in self._waits:
                    round.waits[order[5]] = self._waits[order[5]]
                self._take(order[5], is_bound=True)
                return waiting, choice
            queue.look_past(order, tenant, tokens)
            round.passed[key] += 1
            name = choice.node.name
            waits = self._waits_of(order, waiting)
            waits.busy += 1
            waits.busy_node = name
            round.planned[name] = round.planned.get(name, 0.0) + choice.prefill_s
        return None

    def _waits_of(self, order: Order, waiting: Waiting) -> Waits:
        waits = self._waits.get(order[5])
        if waits is None:
            waits = self._waits[order[5]] = _waits(order, waiting.envelope)
        return waits


def _service_tokens(envelope: Envelope, choice: Choice) -> float:
    """What a request costs of its tenant's service: what is to be computed of its prompt, and its answer."""
    answer = 0.0
    if choice.stage is not Stage.PREFILL:
        answer = ANSWER_TOKEN * choice.node.answers.typical(envelope.max_tokens)
    return answer if choice.stage is Stage.DECODE else choice.uncached_tokens + answer
