"""Endings that the leader decides: refused, evicted, cancelled, coalesced.

Each is written to Redis's `closing` under the epoch before anything is published, so that a leader
that dies in between leaves the decision to the next. Endings are batched; a caller waits only when
too many are under way.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque

from dispatcher.backends.leader_store import CloseItem, LeaderStore
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Ref
from dispatcher.protocol.outcome import DeadLetter, Outcome, OutcomeKind, Reason, Timing
from dispatcher.scheduling.window import Waiting
from dispatcher.services.persist import until_answered
from dispatcher.services.publication import ended
from dispatcher.services.state import Doom, LeaderState

BATCH = 128
BACKLOG = 2048
DEAD_RECORD_BYTES = 256 << 10
"""Larger poison is not copied into Redis; its dead letter says where it lies."""
LOST_S = 10.0
"""A request that was found in no place for this long, although its end was decided, may be lost; unless
its ending waits in `closing` for as long, as while Kafka is slow."""


class Endings:
    """Collects endings and writes them."""

    def __init__(self, state: LeaderState, store: LeaderStore) -> None:
        self._state = state
        self._store = store
        self._queue: asyncio.Queue[CloseItem] = asyncio.Queue(BACKLOG)
        self._asked: set[str] = set()
        self._withdrawn: deque[CloseItem] = deque()
        self._repeats: deque[CloseItem] = deque()

    async def run(self) -> None:
        """Write endings until cancelled."""
        while True:
            # Repeats pass the queue by: this loop alone empties it, and would wait for room for ever.
            items = [self._repeats.popleft() if self._repeats else await self._queue.get()]
            while len(items) < BATCH and self._repeats:
                items.append(self._repeats.popleft())
            while len(items) < BATCH and not self._queue.empty():
                items.append(self._queue.get_nowait())
            answers = await until_answered(
                lambda batch=items: self._store.close(batch),  # type: ignore[misc]
                self._state.metrics,
            )
            for item, answer in zip(items, answers, strict=True):
                self._written(item, answer)

    def _written(self, item: CloseItem, answer: str) -> None:
        self._asked.discard(str(item.ref))
        if answer.startswith("dup|"):
            owner, _, print_ = answer.removeprefix("dup|").partition("|")
            self._repeats.append(self.duplicate_item(item, owner, print_))
            return
        if item.place == "lost" and answer == "ok":
            # Nothing was removed that would make a second call find it done.
            self._state.log.warning("request was in no place, ended", ref=str(item.ref), id=item.id)
            self._state.doomed.pop(str(item.ref), None)
        progress = self._state.progress_of(item.ref)
        if answer == "ok" and item.kind != "none" and progress.is_open(item.ref.offset):
            self._state.closed.add(str(item.ref))
        if item.place == "log":
            progress.take(item.ref.offset)
            if item.kind == "none":
                progress.excuse(item.ref.offset)
                self._state.forget(str(item.ref))

    def duplicate_item(self, item: CloseItem, owner: str, owner_print: str) -> CloseItem:
        """The ending of a record whose (tenant, id) belongs to the record `owner`."""
        if item.fingerprint == owner_print:
            return CloseItem(place="log", ref=item.ref, kind="none", fingerprint=item.fingerprint)
        first_line = item.payload.split(b"\n")[0]
        tenant = codec.outcomes.decode(first_line).tenant if first_line else ""
        return _reused_id(item.ref, item.id, tenant, item.fingerprint, owner)

    async def refuse_reused(self, ref: Ref, envelope: Envelope, owner: str) -> None:
        """End a record whose (tenant, id) belongs to another request."""
        await self._queue.put(_reused_id(ref, envelope.id, envelope.tenant, envelope.fingerprint, owner))

    async def refuse(
        self,
        ref: Ref,
        *,
        id: str,
        tenant: str,
        fingerprint: str,
        reason: Reason,
        message: str,
        appended_ms: int,
        topic: str,
        record: str | None,
        retry_after_ms: int = 0,
        place: str = "log",
    ) -> None:
        """End a record at intake, or in `pending`. `record` (base64) sends it to the dead letters too."""
        outcome = Outcome(
            id=id,
            ref=str(ref),
            tenant=tenant,
            kind=OutcomeKind.REJECTED,
            reason=reason,
            message=message,
            fingerprint=fingerprint,
            timing=Timing(appended=appended_ms, ended=self._state.clock.now_ms()),
            retry_after_ms=retry_after_ms,
        )
        payload = codec.encode(outcome) if id else b""
        kind = "outcome"
        if record is not None:
            letter = DeadLetter(
                ref=str(ref),
                reason=reason,
                message=message,
                topic=topic,
                id=id,
                tenant=tenant,
                record_base64=record,
                dead_at_ms=self._state.clock.now_ms(),
            )
            kind, payload = "dead", payload + b"\n" + codec.encode(letter)
        owns = id and reason is not Reason.ID_IN_USE
        await self._queue.put(
            CloseItem(
                place=place,
                ref=ref,
                kind=kind,
                id=id,
                payload=payload,
                identity=self._state.names.identity(tenant, id) if owns else "",
                fingerprint=fingerprint,
            )
        )

    async def coalesce(self, ref: Ref, fingerprint: str) -> None:
        """End a record that repeats another: it gets no outcome of its own."""
        await self._queue.put(CloseItem(place="log", ref=ref, kind="none", fingerprint=fingerprint))

    def doom(self, envelope: Envelope, kind: OutcomeKind, reason: Reason, message: str) -> None:
        """Decide the ending of an unfinished request; `carry_out` makes it true wherever it is."""
        doom = Doom(
            envelope=envelope,
            kind=kind,
            reason=reason,
            message=message,
            since_s=self._state.clock.monotonic(),
        )
        self._state.doomed.setdefault(envelope.ref, doom)

    def end_withdrawn(
        self, waiting: Waiting, kind: OutcomeKind, reason: Reason, message: str, *, retry_after_ms: int = 0
    ) -> None:
        """Decide the ending of a request that was withdrawn from where it waited; `carry_out` writes it."""
        payload = self._payload(waiting.envelope, kind, reason, message, retry_after_ms)
        self._withdrawn.append(self._waiting_item(waiting, payload))

    async def carry_out(self) -> None:
        """End what is doomed. Repeated until each is gone: it may be on its way between two places."""
        state = self._state
        while self._withdrawn:
            await self._queue.put(self._withdrawn.popleft())
        for ref, doom in list(state.doomed.items()):
            if not state.is_unfinished(ref):
                state.doomed.pop(ref, None)
                continue
            item = self._ending_of(doom) if ref not in self._asked else None
            if item is not None:
                self._asked.add(ref)
                await self._queue.put(item)

    def _ending_of(self, doom: Doom) -> CloseItem | None:
        state = self._state
        envelope = doom.envelope
        waiting = state.withdraw(envelope.ref)
        bound = state.bound.get(envelope.ref)
        if waiting is None and bound is None:
            return None
        payload = self._payload(envelope, doom.kind, doom.reason, doom.message)
        if waiting is not None:
            return self._waiting_item(waiting, payload)
        job = bound.job if bound is not None else None
        # In no place for so long, nor ended: somebody deleted the job, as RQ's tools can.
        place = "lost" if state.closing_read_s - doom.since_s > LOST_S else "job"
        ref = Ref.parse(envelope.ref)
        return CloseItem(place=place, ref=ref, kind="outcome", id=envelope.id, payload=payload, job=job)

    def _payload(
        self, envelope: Envelope, kind: OutcomeKind, reason: Reason, message: str, retry_after_ms: int = 0
    ) -> bytes:
        now_ms = self._state.clock.now_ms()
        return ended(envelope, kind, reason, message, now_ms=now_ms, retry_after_ms=retry_after_ms)

    def _waiting_item(self, waiting: Waiting, payload: bytes) -> CloseItem:
        envelope = waiting.envelope
        return CloseItem(
            place="pending" if waiting.from_pending else "log",
            ref=waiting.ref,
            kind="outcome",
            id=envelope.id,
            payload=payload,
            identity=self._state.names.identity(envelope.tenant, envelope.id),
            fingerprint=envelope.fingerprint,
        )


def dead_record(value: bytes | None) -> str:
    """The copy of a record in its dead letter, '' when it is too large for one."""
    return base64.b64encode(value or b"").decode() if len(value or b"") <= DEAD_RECORD_BYTES else ""


def reused_id_message(owner: str) -> str:
    """What the sender of a reused id is told."""
    return f"id: already used by record {owner} with another body or reply route; choose a new id"


def prompt_too_long_message(envelope: Envelope, longest: int) -> str:
    """What the sender of a prompt that fits nowhere is told."""
    return (
        f"prompt: expected at most {longest} tokens (the largest node of {envelope.model}), "
        f"seen {envelope.prompt_tokens}"
    )


def _reused_id(ref: Ref, id: str, tenant: str, fingerprint: str, owner: str) -> CloseItem:
    outcome = Outcome(
        id=id,
        ref=str(ref),
        tenant=tenant,
        kind=OutcomeKind.REJECTED,
        reason=Reason.ID_IN_USE,
        message=reused_id_message(owner),
        fingerprint=fingerprint,
    )
    return CloseItem(
        place="log", ref=ref, kind="outcome", id=id, payload=codec.encode(outcome), fingerprint=fingerprint
    )
