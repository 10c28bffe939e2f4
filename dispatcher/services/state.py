"""What a leader keeps in memory while it leads: the one object that its services share.

Everything here can be rebuilt: from Redis's places while Redis is intact, from Kafka when it is not.
A single thread touches it, and never across an await in a half-changed state.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from dataclasses import dataclass, field

from dispatcher.backends.clock import Clock
from dispatcher.backends.store_view import Placed
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.handoff import Handoff, Stage
from dispatcher.protocol.names import JobId, Names, Ref
from dispatcher.protocol.outcome import OutcomeKind, Reason
from dispatcher.scheduling.delayed import Delayed
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.leases import Leases
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.progress import SourceProgress
from dispatcher.scheduling.retry import MAX_DELAY_S
from dispatcher.scheduling.retry_budget import RetryBudget
from dispatcher.scheduling.scheduler import blocks_of
from dispatcher.scheduling.window import Waiting, Window
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

FEWEST_PAST = 1024
"""Deadlines of finished requests are swept out once there are more of them than of others, and than this."""
EVENTS_S = 1.0
"""Within this time a node's block events tell of what a finished request left in its cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A request at a node; with the `handoff` that a decode stage goes on from."""

    envelope: Envelope
    job: JobId
    failures: int
    excluded: tuple[str, ...]
    crashed: tuple[str, ...] = ()
    hit_tokens: int = 0
    stage: Stage = Stage.WHOLE
    handoff: Handoff | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Doom:
    """An ending decided for a request that must now be carried out wherever the request is."""

    envelope: Envelope
    kind: OutcomeKind
    reason: Reason
    message: str
    since_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyCancel:
    """A cancel whose request is not known: `appended_ms` by the broker, `since_s` when it was read."""

    appended_ms: int
    since_s: float


@dataclass(kw_only=True)
class LeaderState:
    """The ledger of a leading dispatcher."""

    names: Names
    fleet: Fleet
    index: PrefixIndex
    clock: Clock
    rng: random.Random
    metrics: DispatcherMetrics
    log: Log
    window: Window = field(default_factory=Window)
    retries: Delayed = field(default_factory=lambda: Delayed(RetryBudget()))
    progress: dict[str, SourceProgress] = field(default_factory=dict)
    bound: dict[str, Bound] = field(default_factory=dict)
    identities: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    generation: str = ""
    untold_linger_s: float = 300.0
    early_cancels: dict[tuple[str, str], EarlyCancel] = field(default_factory=dict)
    leases: Leases = field(default_factory=Leases)
    doomed: dict[str, Doom] = field(default_factory=dict)
    held: dict[str, Envelope] = field(default_factory=dict)
    """Requests whose endings wait in `closing` and can't be read."""
    misread: dict[str, Placed] = field(default_factory=dict)
    """Requests whose jobs can't be read, by ref, until they are mended."""
    misread_found: asyncio.Event = field(default_factory=asyncio.Event)
    deadlines: list[tuple[int, str]] = field(default_factory=list)
    closed: set[str] = field(default_factory=set)
    """Requests that this leader has ended and not published yet."""
    closing_read_s: float = float("-inf")
    """When the last read of `closing` began that met its end and was carried out whole (monotonic)."""
    work: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    _identity_of: dict[str, tuple[str, str]] = field(default_factory=dict)

    def enter(self, waiting: Waiting) -> None:
        """Let a request wait to be bound."""
        self._know(waiting.envelope)
        self.window.push(waiting)
        self.work.set()

    def _know(self, envelope: Envelope) -> None:
        if envelope.ref in self._identity_of:
            return
        identity = (envelope.tenant, envelope.id)
        self._identity_of[envelope.ref] = identity
        self.identities.setdefault(identity, (envelope.ref, envelope.fingerprint))
        if envelope.lease:
            self.leases.hold(envelope.ref, (envelope.tenant, envelope.lease))
        heapq.heappush(self.deadlines, (envelope.deadline_at_ms, envelope.ref))
        if len(self.deadlines) > 2 * len(self._identity_of) + FEWEST_PAST:
            self.deadlines = [entry for entry in self.deadlines if entry[1] in self._identity_of]
            heapq.heapify(self.deadlines)

    def bind(
        self,
        ref: str,
        bound: Bound,
        *,
        uncached_tokens: int = 0,
        prefill_s: float = 0.0,
        number: int = 0,
    ) -> None:
        """Note a request at a node: its capacity is taken, its blocks will be cached there.

        Args:
            uncached_tokens: prompt tokens it has to compute, 0 when the node's reports cover it already.
            prefill_s: what that is predicted to take.
            number: its assignment number, 0 while it has none.
        """
        self.bound[ref] = bound
        envelope, node = bound.envelope, bound.job.node
        self._know(envelope)
        known = self.fleet.nodes.get(node)
        self.fleet.reserve(
            node,
            ref,
            known.expected_tokens(envelope) if known is not None else envelope.cost_tokens,
            uncached_tokens=uncached_tokens,
            prefill_s=prefill_s,
            number=number,
            now_s=self.clock.monotonic(),
            is_suspect=bool(bound.crashed),
        )
        self.index.expect(node, ref, blocks_of(envelope.block_hashes))

    def unbind(self, ref: str, *, answered: bool = False) -> Bound | None:
        """Note that it is not at a node any more; its capacity is free.

        Args:
            answered: its blocks were computed: where no view will tell of them they are expected for a while.
        """
        bound = self.bound.pop(ref, None)
        if bound is not None:
            now_s = self.clock.monotonic()
            name = bound.job.node
            self.fleet.release(name, ref, now_s)
            self.index.settle(ref, now_s, linger_s=self._linger_s(bound) if answered else 0.0)
            self.work.set()
        return bound

    def _linger_s(self, bound: Bound) -> float:
        node = self.fleet.nodes.get(bound.job.node)
        envelope = bound.envelope
        is_told = node is not None and node.identity.routing_block_size == envelope.block_size
        if is_told and envelope.block_size and not envelope.text_hashed:
            return EVENTS_S
        return self.untold_linger_s

    def delay(self, waiting: Waiting, not_before_ms: int, *, is_paid: bool = False) -> None:
        """Let a pending request wait until `not_before_ms`, then to be bound; for a token when `is_paid`.

        What is left is counted by the monotonic clock, and never more than the longest delay: a wall clock
        that is set back would otherwise hold the request for as long.
        """
        left_s = min(MAX_DELAY_S, (not_before_ms - self.clock.now_ms()) / 1000)
        if left_s <= 0 and not is_paid:
            self.enter(waiting)
            return
        self._know(waiting.envelope)
        self.retries.push(waiting, self.clock.monotonic() + left_s, is_paid=is_paid)
        self.work.set()

    def release_due(self) -> float | None:
        """Enter the delayed requests that may be bound; returns seconds until the next, None when none."""
        retries, held_up = self.retries, self.retries.held_up
        due, next_s = retries.due(self.clock.monotonic())
        for waiting in due:
            self.enter(waiting)
        self.metrics.retries_held_up.inc(retries.held_up - held_up)
        self.metrics.retries_without_token.set(retries.without_token)
        return next_s

    def delayed(self) -> list[Waiting]:
        """Pending requests whose time has not come, or that wait for a token of the retry budget."""
        return self.retries.all()

    def hold(self, envelope: Envelope) -> None:
        """Note a request whose ending can't be read: its deadline or a cancel is to end it."""
        self._know(envelope)
        self.held[envelope.ref] = envelope

    def note_misread(self, found: Placed) -> None:
        """Note a request whose job can't be read: it is to be mended."""
        self.metrics.foreign.inc()
        self.misread[str(found.ref)] = found
        self.misread_found.set()

    def withdraw(self, ref: str) -> Waiting | None:
        """Take a waiting request out, delayed or not."""
        return self.retries.withdraw(ref) or self.window.remove(ref)

    def waiting(self, ref: str) -> Waiting | None:
        """The waiting request of `ref`, delayed or not."""
        return self.retries.get(ref) or self.window.get(ref)

    def forget(self, ref: str) -> None:
        """Drop what only an unfinished request needs."""
        identity = self._identity_of.pop(ref, None)
        if identity is not None:
            known = self.identities.get(identity)
            if known is not None and known[0] == ref:
                del self.identities[identity]
        self.attempts.pop(ref, None)
        self.doomed.pop(ref, None)
        self.held.pop(ref, None)
        self.closed.discard(ref)
        self.leases.drop(ref)

    def is_unfinished(self, ref: str) -> bool:
        """Whether a request that was entered has no published outcome yet, wherever it is."""
        return ref in self._identity_of

    def envelope_of(self, ref: str) -> Envelope | None:
        """The envelope of an unfinished request, wherever it is."""
        waiting = self.waiting(ref)
        if waiting is not None:
            return waiting.envelope
        bound = self.bound.get(ref)
        return bound.envelope if bound is not None else self.held.get(ref)

    def progress_of(self, ref: Ref) -> SourceProgress:
        """The marks of the partition that `ref` lies in."""
        return self.progress[ref.source]
