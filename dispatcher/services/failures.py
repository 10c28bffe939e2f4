"""Failures: what becomes of attempts that ended without an outcome.

All of a batch are held against their nodes first and decided then, so that what takes down many nodes at once
is seen as that. What is tried again goes back to `pending` by one script; the rest is an ending to publish.
A request whose job was gone or could not be read goes there too, to be mended before it is bound again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dispatcher.backends.leader_store import LeaderStore, RetryItem
from dispatcher.backends.store_view import Placed, StoreView, StreamEntry
from dispatcher.protocol import codec
from dispatcher.protocol.handoff import stage_of
from dispatcher.protocol.names import JobId, Ref
from dispatcher.protocol.outcome import FailedAttempt, FailureCause, Reason
from dispatcher.scheduling.breaker import ENGINE_FAILURES
from dispatcher.scheduling.outage import Outage, outage_of
from dispatcher.scheduling.retry import GiveUp, Nodes, Past, RetryAfter, decide, is_given_back
from dispatcher.scheduling.window import Waiting
from dispatcher.services.persist import until_answered
from dispatcher.services.publication import ReadyEnding, cut_attempt, error_text, given_up
from dispatcher.services.state import Bound, LeaderState
from dispatcher.services.unreadable import Unreadable


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """A failed attempt of the request that it belongs to."""

    entry: StreamEntry
    job: JobId
    failed: FailedAttempt
    bound: Bound


@dataclass(frozen=True, kw_only=True)
class _Retry:
    """A failed attempt that shall be bound again; `waiting` None where its request is to be mended first."""

    item: RetryItem
    waiting: Waiting | None
    is_paid: bool


class Failures:
    """Decides about the failed attempts of one pool."""

    def __init__(
        self, state: LeaderState, store: LeaderStore, view: StoreView, unreadable: Unreadable
    ) -> None:
        self._state = state
        self._store = store
        self._view = view
        self._unreadable = unreadable

    async def refused(self, entry: StreamEntry, error: ValueError) -> ReadyEnding | None:
        """Tell of an entry that can't be carried out; its ending once that is due."""
        self._state.metrics.foreign.inc()
        self._state.log.error("closing entry refused", entry=entry.id.decode(), error=str(error))
        return await self._unreadable.hold(Ref.parse(entry.text("ref")), entry)

    async def carry_out(self, entries: Sequence[StreamEntry]) -> list[ReadyEnding]:
        """Decide one batch of failed or released attempts; returns what is left to publish or to drop."""
        endings: list[ReadyEnding] = []
        failures = []
        retries: list[_Retry] = []
        for entry in entries:
            try:
                found = await self._read(entry)
            except ValueError as error:
                if (gone := await self.refused(entry, error)) is not None:
                    endings.append(gone)
                continue
            match found:
                case ReadyEnding():
                    endings.append(found)
                case _Retry():
                    retries.append(found)
                case _Failure():
                    self._judge(found)
                    failures.append(found)
        outages: dict[str, Outage] = {}
        for failure in failures:
            model = failure.bound.envelope.model
            if model not in outages:
                outages[model] = outage_of(self._state.fleet.serving(model))
            verdict = self._decide(failure, outages[model])
            if isinstance(verdict, GiveUp):
                attempts = [*await self._earlier_attempts(failure.job), failure.failed]
                endings.append(self._given_up(failure, attempts, verdict.reason))
            else:
                retries.append(self._again(failure, verdict))
        if retries:
            await self._retry(retries)
        return endings

    async def _read(self, entry: StreamEntry) -> _Failure | _Retry | ReadyEnding:
        """Take a failed attempt off its node; one that was superseded is only dropped.

        Raises:
            ValueError: it is not ours.
        """
        failed = codec.failed_attempts.decode(entry.fields.get(b"payload", b""))
        taken = await self.take(entry)
        if isinstance(taken, ReadyEnding):
            return taken
        job, bound = taken
        if bound is not None:
            return _Failure(entry=entry, job=job, failed=failed, bound=bound)
        # What it has behind it was in its job, but for this.
        item = RetryItem(
            entry=entry.id,
            job=job,
            not_before_ms=self._state.clock.now_ms(),
            failures=int(not is_given_back(failed.cause)),
            excluded=(job.node,),
            cause=failed.cause.value,
            attempt=codec.encode(cut_attempt(failed)),
        )
        return _Retry(item=item, waiting=None, is_paid=False)

    async def take(self, entry: StreamEntry) -> tuple[JobId, Bound | None] | ReadyEnding:
        """Take an attempt that has no outcome off its node; one that was superseded is only dropped.

        Returns:
            The attempt and its request; None for one to be mended, which this leader does not know, and whose
            job is gone or can't be read.
        Raises:
            ValueError: it is not ours, or of a record that is yet to be appended.
        """
        state = self._state
        ref, job = Ref.parse(entry.text("ref")), JobId.parse(entry.text("job"))
        known = state.bound.get(str(ref))
        if known is not None and known.job != job:
            state.log.warning(
                "superseded attempt ended", kind=entry.text("kind"), job=str(job), bound=str(known.job)
            )
            return ReadyEnding(entry=entry.id, ref=ref, id="", publication=None, job_to_delete=str(job))
        bound = state.unbind(str(ref)) or await self._stored(job)
        if bound is None and state.is_unfinished(str(ref)):
            # It waits or runs elsewhere, whoever put this attempt's id back.
            return ReadyEnding(entry=entry.id, ref=ref, id="", publication=None, job_to_delete=str(job))
        if bound is None and not state.progress_of(ref).is_known(ref.offset):
            raise codec.MalformedRecord(f"closing: job {job} is of a record that nobody has read")
        return job, bound

    def to_mend(self, ref: Ref) -> None:
        """Note a request that is pending, without a job that could be bound."""
        self._state.log.error("job is gone or can't be read, to be written anew", ref=str(ref))
        self._state.note_misread(Placed(ref=ref, job=None))

    async def _stored(self, job: JobId) -> Bound | None:
        stored = await until_answered(lambda: self._view.stored_job(str(job)), self._state.metrics)
        if stored is None or not stored.envelope:
            return None
        try:
            envelope = codec.envelopes.decode(stored.envelope)
        except codec.MalformedRecord:
            return None
        return Bound(
            envelope=envelope,
            job=job,
            failures=stored.failures,
            excluded=stored.excluded,
            crashed=stored.crashed,
            stage=stage_of(stored.stage),
            handoff=codec.decode_handoff(stored.handoff),
        )

    def _judge(self, failure: _Failure) -> None:
        """Hold a failure against the node whose engine it was."""
        state, failed = self._state, failure.failed
        node = state.fleet.nodes.get(failed.node)
        if node is None or not self._is_its_engines(failure):
            return
        ref = failure.bound.envelope.ref
        if node.breaker.failed(ref, state.clock.monotonic(), state.rng):
            state.metrics.probations.inc()
            state.log.warning(
                "node on probation",
                node=node.name,
                failures=node.breaker.failures,
                cause=failed.cause.value,
                for_s=round(node.breaker.probation_s, 1),
            )

    def _is_its_engines(self, failure: _Failure) -> bool:
        """Whether the node's engine is to blame: for a transfer only while the other side is well."""
        if failure.failed.cause is not FailureCause.TRANSFER:
            return failure.failed.cause in ENGINE_FAILURES
        handoff = failure.bound.handoff
        other = self._state.fleet.nodes.get(handoff.node) if handoff is not None else None
        return other is not None and other.is_eligible

    def _decide(self, failure: _Failure, outage: Outage) -> RetryAfter | GiveUp:
        state, failed, bound = self._state, failure.failed, failure.bound
        past = Past(failures=bound.failures, crashed=bound.crashed)
        verdict = decide(failed, past, state.rng, outage=outage, nodes=self._nodes_of(failure))
        state.metrics.crashes.inc(failed.crash)
        if isinstance(verdict, RetryAfter) and verdict.is_paid:
            state.metrics.failures_excused.inc(verdict.past.failures == past.failures)
        state.log.info(
            "attempt failed",
            ref=bound.envelope.ref,
            id=bound.envelope.id,
            node=failed.node,
            cause=failed.cause.value,
            crash=failed.crash,
            http_status=failed.http_status,
            failures=past.failures,
            nodes_ailing=f"{outage.ailing} of {outage.nodes}",
            verdict=verdict.reason.value if isinstance(verdict, GiveUp) else "retry",
        )
        return verdict

    def _nodes_of(self, failure: _Failure) -> Nodes:
        """Those that failed a request, and are still there."""
        names = {*failure.bound.excluded, failure.failed.node}
        known = [node for name in names if (node := self._state.fleet.nodes.get(name)) is not None]
        return Nodes(tried=len(known), well=sum(not node.breaker.fails_others for node in known))

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

    def _given_up(self, failure: _Failure, attempts: Sequence[FailedAttempt], reason: Reason) -> ReadyEnding:
        ref = failure.job.ref
        return given_up(
            failure.entry,
            ref,
            failure.bound.envelope,
            attempts,
            reason,
            topic=self._state.names.requests(ref.lane),
            now_ms=self._state.clock.now_ms(),
        )

    def _again(self, failure: _Failure, verdict: RetryAfter) -> _Retry:
        state, job, failed = self._state, failure.job, failure.failed
        excluded = failure.bound.excluded
        if verdict.exclude and job.node not in excluded:
            excluded = (*excluded, job.node)
        handoff = failure.bound.handoff
        if failed.cause is FailureCause.TRANSFER and handoff is not None and handoff.node not in excluded:
            excluded = (*excluded, handoff.node)
        state.metrics.retries.labels(failed.cause.value).inc()
        item = RetryItem(
            entry=failure.entry.id,
            job=job,
            not_before_ms=state.clock.now_ms() + int(verdict.delay_s * 1000),
            failures=verdict.past.failures,
            excluded=excluded,
            crashed=verdict.past.crashed,
            cause=failed.cause.value,
            attempt=codec.encode(cut_attempt(failed)),
            error="" if is_given_back(failed.cause) else error_text(failed),
        )
        waiting = Waiting(
            ref=job.ref,
            envelope=failure.bound.envelope,
            from_pending=True,
            failures=item.failures,
            excluded=excluded,
            crashed=item.crashed,
            entered_ms=state.clock.now_ms(),
        )
        is_read = bool(failure.entry.text("id"))  # an agent that can't read a job knows no id
        return _Retry(item=item, waiting=waiting if is_read else None, is_paid=verdict.is_paid)

    async def _retry(self, retries: Sequence[_Retry]) -> None:
        """Put attempts back to pending."""
        state = self._state
        items = [retry.item for retry in retries]
        now_iso = state.clock.now_iso()
        answers = await until_answered(lambda: self._store.retry(items, now_iso=now_iso), state.metrics)
        for retry, answer in zip(retries, answers, strict=True):
            if retry.waiting is None or answer == "missing":
                self.to_mend(retry.item.job.ref)
            else:
                state.delay(retry.waiting, retry.item.not_before_ms, is_paid=retry.is_paid)
