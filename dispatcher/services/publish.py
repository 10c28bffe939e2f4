"""Publish: read `closing`, decide failed attempts, put outcomes on Kafka in transactions.

An outcome was decided when its closing entry was written; this loop only makes it known, together
with the *finished* mark. Whatever fails here in an unclear way ends this leader's session: the next
one reads `outcomes` before it publishes, so nothing is said twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from dispatcher.backends.leader_store import LeaderStore, RetryItem
from dispatcher.backends.outcome_log import CommitNote, OutcomeLog, Publication
from dispatcher.backends.store_view import StoreView, StreamEntry
from dispatcher.errors import RecordTooLarge
from dispatcher.protocol import codec
from dispatcher.protocol.names import JobId, Ref
from dispatcher.protocol.outcome import (
    DeadLetter,
    FailedAttempt,
    Outcome,
    OutcomeKind,
    Reason,
    Timing,
    Usage,
)
from dispatcher.scheduling.breaker import ENGINE_FAILURES
from dispatcher.scheduling.retry import GiveUp, decide
from dispatcher.scheduling.window import Waiting
from dispatcher.services.persist import until_answered
from dispatcher.services.state import Bound, LeaderState

READ_COUNT = 512
READ_BLOCK_MS = 500
LARGEST_OUTCOME_BYTES = 8 << 20
SMALL_OUTCOME_BYTES = 512 << 10
"""Taken by every topic: Kafka's own limit for records is 1 MiB."""
FEWEST_STARTS = 4096
ATTEMPTS_KEPT = 8
"""Failed attempts in a dead letter, the newest; the scripts keep as many in a job."""
ATTEMPT_MESSAGE_CHARS = 500
RECOMMIT_S = 60.0
"""An idle pool's marks are committed again this often, so that retention of offsets never ends."""


class _Line(msgspec.Struct):
    """What the canonical log line takes from an outcome."""

    kind: str
    reason: str
    tenant: str = ""
    node: str = ""
    attempt: str = ""
    usage: Usage = Usage()
    timing: Timing = Timing()
    predicted_cached_tokens: int = 0


_line = msgspec.json.Decoder(_Line)


@dataclass(frozen=True, kw_only=True)
class _Ending:
    """A closing entry ready to be published; one without a publication is only dropped."""

    entry: bytes
    ref: Ref
    id: str
    publication: Publication | None
    job_to_delete: str = ""


@dataclass(frozen=True, kw_only=True)
class _Retry:
    """A failed attempt that shall be bound again, and what its giving up would need."""

    item: RetryItem
    bound: Bound
    entry: StreamEntry
    failed: FailedAttempt


class Publish:
    """Publishes one pool's outcomes.

    Args:
        positions: the end of `outcomes` by partition, as read when this leader took over.
        floor: where the answers of requests above the *finished* marks began before that.
    """

    def __init__(
        self,
        state: LeaderState,
        store: LeaderStore,
        view: StoreView,
        log: OutcomeLog,
        *,
        positions: Mapping[int, int],
        floor: Mapping[str, int],
        committed: Mapping[str, int],
    ) -> None:
        self._state = state
        self._store = store
        self._view = view
        self._log = log
        self._positions = dict(positions)
        self._starts: dict[int, dict[str, int]] = {0: dict(floor)}
        self._sweep_at = FEWEST_STARTS
        self._transaction = 0
        self._committed = dict(committed)
        self._committed_at = state.clock.monotonic()

    async def run(self) -> None:
        """Publish until cancelled."""
        cursor = b"0-0"
        while True:
            known = self._store.counter
            entries, generation = await until_answered(
                lambda after=cursor: self._view.read_closing(  # type: ignore[misc]
                    after, block_ms=READ_BLOCK_MS, count=READ_COUNT
                ),
                self._state.metrics,
            )
            if entries:
                cursor = entries[-1].id
                self._store.note_generation(generation, expected=self._state.generation, at_least=known)
            await self.publish(entries)

    async def publish(self, entries: list[StreamEntry]) -> None:
        """Carry out one batch of closing entries."""
        endings: list[_Ending] = []
        retries: list[_Retry] = []
        for entry in entries:
            try:
                ref = Ref.parse(entry.text("ref"))
                if entry.text("kind") in {"failed", "released"}:
                    await self._sort_failure(entry, ref, endings, retries)
                else:
                    self._state.unbind(str(ref), answered=True)
                    endings.append(_published_ending(entry, ref))
            except ValueError as error:
                self._state.metrics.foreign.inc()
                self._state.log.error("closing entry refused", entry=entry.id.decode(), error=str(error))
        if retries:
            endings += await self._retry(retries)
        await self._publish(endings)

    async def _sort_failure(
        self,
        entry: StreamEntry,
        ref: Ref,
        endings: list[_Ending],
        retries: list[_Retry],
    ) -> None:
        state = self._state
        failed = codec.failed_attempts.decode(entry.fields.get(b"payload", b""))
        job = JobId.parse(entry.text("job"))
        known = state.bound.get(str(ref))
        if known is not None and known.job != job:
            state.log.warning("superseded attempt failed", job=str(job), bound=str(known.job))
            endings.append(_Ending(entry=entry.id, ref=ref, id="", publication=None, job_to_delete=str(job)))
            return
        bound = state.unbind(str(ref)) or await self._stored(job)
        if bound is None:
            raise codec.MalformedRecord(f"closing: job {job} has no record")
        self._judge(failed)
        verdict = decide(failed.cause, bound.failures, state.rng)
        state.log.info(
            "attempt failed",
            ref=str(ref),
            id=bound.envelope.id,
            node=failed.node,
            cause=failed.cause.value,
            message=failed.message,
            verdict=type(verdict).__name__,
        )
        if isinstance(verdict, GiveUp):
            attempts = [*await self._earlier_attempts(job), failed]
            endings.append(_given_up(entry, ref, bound, attempts, verdict, state))
            return
        excluded = bound.excluded
        if verdict.exclude and job.node not in excluded:
            excluded = (*excluded, job.node)
        state.metrics.retries.labels(failed.cause.value).inc()
        item = RetryItem(
            entry=entry.id,
            job=job,
            not_before_ms=state.clock.now_ms() + int(verdict.delay_s * 1000),
            failures=verdict.failures,
            excluded=excluded,
            cause=failed.cause.value,
            attempt=codec.encode(_cut(failed)),
        )
        retries.append(_Retry(item=item, bound=bound, entry=entry, failed=failed))

    async def _earlier_attempts(self, job: JobId) -> list[FailedAttempt]:
        """The failed attempts before this one, as its job tells; fewer after a loss of Redis data."""
        found = await until_answered(lambda: self._view.failed_attempts(str(job)), self._state.metrics)
        attempts = []
        for line in found:
            try:
                attempts.append(codec.failed_attempts.decode(line))
            except codec.MalformedRecord as error:
                # Of another release, perhaps: what the others tell is worth more than none.
                self._state.log.warning("failed attempt can't be read", job=str(job), error=str(error))
        return attempts

    def _judge(self, failed: FailedAttempt) -> None:
        """Hold a failure against the node whose engine it was."""
        state = self._state
        node = state.fleet.nodes.get(failed.node)
        if node is None or failed.cause not in ENGINE_FAILURES:
            return
        if node.breaker.failed(state.clock.monotonic(), state.rng):
            state.metrics.probations.inc()
            state.log.warning(
                "node on probation",
                node=node.name,
                failures=node.breaker.failures,
                cause=failed.cause.value,
                for_s=round(node.breaker.probation_s, 1),
            )

    async def _stored(self, job: JobId) -> Bound | None:
        stored = await until_answered(lambda: self._view.stored_job(str(job)), self._state.metrics)
        if stored is None or not stored.envelope:
            return None
        return Bound(
            envelope=codec.envelopes.decode(stored.envelope),
            job=job,
            failures=stored.failures,
            excluded=stored.excluded,
        )

    async def _retry(self, retries: list[_Retry]) -> list[_Ending]:
        """Put attempts back to pending; returns the endings of those whose job was deleted by other hands."""
        state = self._state
        items = [retry.item for retry in retries]
        answers = await until_answered(lambda: self._store.retry(items), state.metrics)
        endings = []
        for retry, answer in zip(retries, answers, strict=True):
            item, bound = retry.item, retry.bound
            if answer == "missing":
                verdict = GiveUp(reason=Reason.ATTEMPTS_EXHAUSTED)
                endings.append(_given_up(retry.entry, item.job.ref, bound, [retry.failed], verdict, state))
                continue
            waiting = Waiting(
                ref=item.job.ref,
                envelope=bound.envelope,
                from_pending=True,
                failures=item.failures,
                excluded=item.excluded,
            )
            state.delay(waiting, item.not_before_ms)
        return endings

    async def _publish(self, endings: list[_Ending]) -> None:
        state = self._state
        fresh: dict[str, _Ending] = {}
        for ending in endings:
            if ending.publication is not None and state.progress_of(ending.ref).is_open(ending.ref.offset):
                fresh.setdefault(str(ending.ref), ending)
        self._transaction += 1
        self._starts[self._transaction] = {str(p): offset for p, offset in self._positions.items()}
        for ending in fresh.values():
            state.progress_of(ending.ref).finish(ending.ref.offset, self._transaction)
        # Every publication carries a note, also when no mark moves: it tells a later leader which
        # counter Redis had reached, so that a Redis gone back in time can't pass for intact.
        noted = {ending.ref.source for ending in fresh.values()}
        finished = {
            source: progress.finished
            for source, progress in state.progress.items()
            if source in noted or progress.finished != self._committed.get(source)
        }
        idle = state.clock.monotonic() - self._committed_at > RECOMMIT_S
        if idle:
            finished = {source: progress.finished for source, progress in state.progress.items()}
        if not fresh and not finished:
            self._starts.pop(self._transaction)
            self._transaction -= 1
            if not endings:
                return
        else:
            await self._commit(fresh, finished)
        await until_answered(
            lambda: self._store.settle(
                self._positions, [(ending.entry, ending.job_to_delete) for ending in endings]
            ),
            state.metrics,
        )
        for ending in endings:
            if ending.publication is not None:
                state.forget(str(ending.ref))
        self._prune()

    async def _commit(self, fresh: Mapping[str, _Ending], finished: Mapping[str, int]) -> None:
        state = self._state
        self._store.lease.check()
        note = CommitNote(
            positions=self._earliest_positions(),
            epoch=self._store.lease.epoch,
            generation=state.generation,
            counter=self._store.counter,
        )
        began = state.clock.monotonic()
        publications = [ending.publication for ending in fresh.values() if ending.publication]
        try:
            after = await self._log.publish(publications, finished, note)
        except RecordTooLarge as error:
            state.log.error("outcomes published without their text", error=str(error))
            after = await self._log.publish(list(map(_small, publications)), finished, note)
        self._positions.update(after)
        self._committed.update(finished)
        self._committed_at = state.clock.monotonic()
        state.metrics.transaction_s.observe(self._committed_at - began)
        for ref, ending in fresh.items():
            self._report(ref, ending)

    def _report(self, ref: str, ending: _Ending) -> None:
        state = self._state
        if ending.publication is None or not ending.publication.outcome:
            return
        line = _line.decode(ending.publication.outcome)
        state.metrics.outcomes.labels(_known(line.kind, OutcomeKind), _known(line.reason, Reason)).inc()
        timing = line.timing
        if line.kind == OutcomeKind.COMPLETED:
            self._learn(line)
        state.log.info(
            "request finished",
            ref=ref,
            id=ending.id,
            tenant=line.tenant,
            kind=line.kind,
            reason=line.reason,
            node=line.node,
            attempt=line.attempt,
            prompt_tokens=line.usage.prompt_tokens,
            completion_tokens=line.usage.completion_tokens,
            cached_tokens=line.usage.cached_tokens,
            predicted_cached_tokens=line.predicted_cached_tokens,
            queue_ms=timing.claimed - timing.appended if timing.claimed else None,
            ttft_ms=timing.first_token - timing.appended if timing.first_token else None,
            total_ms=timing.ended - timing.appended,
        )

    def _learn(self, line: _Line) -> None:
        state, usage = self._state, line.usage
        state.metrics.hit_tokens.labels("prompt").inc(usage.prompt_tokens)
        state.metrics.hit_tokens.labels("reported").inc(usage.cached_tokens)
        state.metrics.hit_tokens.labels("predicted").inc(line.predicted_cached_tokens)
        node = state.fleet.nodes.get(line.node)
        if node is not None and node.breaker.succeeded():
            state.log.info("node trusted again", node=node.name)
        if node is not None and line.timing.prefill_us:
            uncached = usage.prompt_tokens - usage.cached_tokens
            node.predictor.observe(uncached, usage.cached_tokens, line.timing.prefill_us / 1e6)

    def _earliest_positions(self) -> dict[str, int]:
        earliest = [
            first
            for first in (progress.earliest_answer() for progress in self._state.progress.values())
            if first is not None
        ]
        return self._starts[min(earliest, default=self._transaction)]

    def _prune(self) -> None:
        firsts = [progress.earliest_answer() for progress in self._state.progress.values()]
        needed = min((first for first in firsts if first is not None), default=self._transaction + 1)
        for transaction in list(itertools.takewhile(lambda t: t < needed, self._starts)):
            if transaction != self._transaction:
                del self._starts[transaction]
        if len(self._starts) > self._sweep_at:
            # One long generation keeps the first of them: most after it are not asked for.
            kept = {t for progress in self._state.progress.values() for t in progress.answering()}
            kept.add(self._transaction)
            self._starts = {t: positions for t, positions in self._starts.items() if t in kept}
            self._sweep_at = max(FEWEST_STARTS, 2 * len(self._starts))
        for source, progress in self._state.progress.items():
            self._state.metrics.finished_lag.labels(source).set(progress.open_count)


def _known(text: str, kind: type[StrEnum]) -> str:
    """A label from a closed list: an agent of a later release may send what we do not know."""
    return text if text in kind.__members__.values() else "other"


def _published_ending(entry: StreamEntry, ref: Ref) -> _Ending:
    payload = entry.fields.get(b"payload", b"")
    outcome, dead = payload, b""
    if entry.text("kind") == "dead":
        outcome, _, dead = payload.partition(b"\n")
    id = entry.text("id")
    if len(outcome) > LARGEST_OUTCOME_BYTES:
        outcome = _without_text(outcome)
    publication = Publication(key=id.encode(), outcome=outcome, dead=dead)
    return _Ending(entry=entry.id, ref=ref, id=id, publication=publication)


def _small(publication: Publication) -> Publication:
    """What also a topic with Kafka's default limit takes."""
    if len(publication.outcome) <= SMALL_OUTCOME_BYTES:
        return publication
    return replace(publication, outcome=_without_text(publication.outcome))


def _without_text(payload: bytes) -> bytes:
    """An outcome that Kafka would refuse, without what makes it so large."""
    outcome = codec.outcomes.decode(payload)
    message = f"the answer of {len(payload)} bytes is on the reply topic only; {outcome.message}"
    return codec.encode(msgspec.structs.replace(outcome, choices=(), message=message[:2000]))


def _cut(failed: FailedAttempt) -> FailedAttempt:
    """An attempt as it is kept: engines may answer pages."""
    return msgspec.structs.replace(failed, message=failed.message[:ATTEMPT_MESSAGE_CHARS])


def _given_up(
    entry: StreamEntry,
    ref: Ref,
    bound: Bound,
    attempts: Sequence[FailedAttempt],
    verdict: GiveUp,
    state: LeaderState,
) -> _Ending:
    """The ending of a request that failed for good, by its attempts in their order."""
    envelope, failed = bound.envelope, attempts[-1]
    now_ms = state.clock.now_ms()
    outcome = Outcome(
        id=envelope.id,
        ref=envelope.ref,
        tenant=envelope.tenant,
        kind=OutcomeKind.FAILED,
        reason=verdict.reason,
        message=failed.message,
        fingerprint=envelope.fingerprint,
        attempt=failed.attempt,
        node=failed.node,
        model=envelope.model,
        http_status=failed.http_status,
        timing=Timing(appended=envelope.appended_ms, ended=now_ms),
    )
    letter = DeadLetter(
        ref=envelope.ref,
        reason=verdict.reason,
        message=failed.message,
        topic=state.names.requests(ref.lane),
        id=envelope.id,
        tenant=envelope.tenant,
        attempts=tuple(map(_cut, attempts[-ATTEMPTS_KEPT:])),
        dead_at_ms=now_ms,
    )
    publication = Publication(
        key=envelope.id.encode(), outcome=codec.encode(outcome), dead=codec.encode(letter)
    )
    return _Ending(
        entry=entry.id, ref=ref, id=envelope.id, publication=publication, job_to_delete=entry.text("job")
    )
