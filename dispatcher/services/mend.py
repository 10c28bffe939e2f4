"""Mend: requests whose jobs in Redis this leader can't read: damaged, deleted, or of another release.

A job holds no answer, only what the request's record tells too. So the record is read again by its ref, and
the request runs again from `pending` as after any lost attempt: its client gets an answer, which an ending
would not give. An agent that runs the old attempt is told to abort rather than waited for: one script moves
the request to where this leader alone moves it from, so that it is never taken for being in two places. A
record that this release refuses is refused here as at intake, and always among the dead letters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import islice

from dispatcher.backends.leader_store import LeaderStore, MendItem
from dispatcher.backends.store_view import Placed, StoredJob, StoreView
from dispatcher.errors import LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.names import Ref
from dispatcher.protocol.outcome import Reason
from dispatcher.scheduling.admission import Admitted, Refused
from dispatcher.scheduling.window import Waiting
from dispatcher.services.cancels import doom_cancelled, take_early
from dispatcher.services.close import Endings, dead_record
from dispatcher.services.persist import until_answered
from dispatcher.services.recall import Recall, Recalled
from dispatcher.services.state import LeaderState

BATCH = 16
"""Records read at once: each by a connection of its own."""
PAUSE_S = 0.5


def waiting_from(job: StoredJob) -> Waiting:
    """A pending request as it waits in memory.

    Raises:
        MalformedRecord: its envelope can't be read.
    """
    return Waiting(
        ref=Ref.parse(job.ref),
        envelope=codec.envelopes.decode(job.envelope),
        from_pending=True,
        failures=job.failures,
        excluded=job.excluded,
        crashed=job.crashed,
        handoff=codec.decode_handoff(job.handoff),
    )


class Mend:
    """Mends what recovery, the guard, failed attempts and assignments showed to be unreadable."""

    def __init__(
        self, state: LeaderState, store: LeaderStore, view: StoreView, recall: Recall, endings: Endings
    ) -> None:
        self._state = state
        self._store = store
        self._view = view
        self._recall = recall
        self._endings = endings

    async def run(self) -> None:
        """Mend until cancelled."""
        state = self._state
        while True:
            state.misread_found.clear()
            while state.misread:
                await self._mend(list(islice(state.misread.values(), BATCH)))
            await state.misread_found.wait()

    async def _mend(self, batch: Sequence[Placed]) -> None:
        state = self._state
        wanted = [one for one in batch if self._is_astray(one.ref)]
        recalled = await self._read([one.ref for one in wanted])
        if recalled is None:
            await asyncio.sleep(PAUSE_S)
            return
        items = [_item(one, recalled[one.ref]) for one in wanted]
        now_iso = state.clock.now_iso()
        answers = await until_answered(lambda: self._store.mend(items, now_iso=now_iso), state.metrics)
        moved = [one.ref for one, answer in zip(wanted, answers, strict=True) if answer == "ok"]
        stored = await until_answered(lambda: self._view.pending_jobs(map(str, moved)), state.metrics)
        jobs = {job.ref: job for job in stored}
        for one in batch:
            if state.misread.get(str(one.ref)) is one:  # not what the guard has found since
                del state.misread[str(one.ref)]
        for ref in moved:
            if self._is_astray(ref):
                await self._go_on(ref, recalled[ref], jobs.get(str(ref)))

    def _is_astray(self, ref: Ref) -> bool:
        """Whether it is still to be mended: nobody has got hold of it meanwhile, or ended it."""
        state = self._state
        progress = state.progress.get(ref.source)
        if progress is None or not progress.is_known(ref.offset):
            # Who may write a node's keys can name any ref: none of ours, or one that is yet to be appended.
            return False
        is_open = progress.is_open(ref.offset)
        return is_open and state.envelope_of(str(ref)) is None and str(ref) not in state.closed

    async def _read(self, refs: Sequence[Ref]) -> Mapping[Ref, Recalled | None] | None:
        """What the records tell; None when Kafka does not answer: the work in hand goes on meanwhile."""
        state = self._state
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {ref: group.create_task(self._recall.read(ref)) for ref in refs}
        except* LogUnavailable as errors:
            state.metrics.log_errors.inc()
            state.log.warning(
                "records of unreadable jobs not read, trying again", error=str(errors.exceptions[0])
            )
            tasks = None
        return {ref: task.result() for ref, task in tasks.items()} if tasks is not None else None

    async def _go_on(self, ref: Ref, recalled: Recalled | None, job: StoredJob | None) -> None:
        """Run a request again that is pending by now, or end it."""
        state = self._state
        if recalled is None:
            await self._end_lost(ref)
            return
        if not isinstance(recalled.decision, Admitted):
            await self._refuse(ref, recalled)
            return
        if job is None:
            return  # deleted under our hands: the next leader finds it, as this one did
        waiting = waiting_from(job)
        is_cancelled = take_early(state, waiting.envelope)
        state.enter(waiting)
        if is_cancelled:
            doom_cancelled(self._endings, waiting.envelope)
        state.metrics.mended.labels("run_again").inc()
        state.log.warning("job can't be read, its request runs again", ref=str(ref), id=waiting.envelope.id)

    async def _refuse(self, ref: Ref, recalled: Recalled) -> None:
        """End a request whose record this release refuses: a later one's, most likely."""
        state, record, refused = self._state, recalled.record, recalled.decision
        assert isinstance(refused, Refused)
        state.metrics.mended.labels("refused").inc()
        state.log.error(
            "job can't be read, and its record is refused",
            ref=str(ref),
            id=refused.id,
            reason=refused.reason.value,
        )
        await self._endings.refuse(
            ref,
            id=refused.id,
            tenant=refused.tenant,
            fingerprint=refused.fingerprint,
            reason=refused.reason,
            message=refused.message,
            appended_ms=record.timestamp_ms,
            topic=state.names.requests(ref.lane),
            record=dead_record(record.value),  # accepted once: an operator is to see it
            place="pending",
        )

    async def _end_lost(self, ref: Ref) -> None:
        """End a request of which nothing is left to answer: not even whose it was."""
        state = self._state
        state.metrics.mended.labels("lost").inc()
        state.log.error("request ended without an answer: its job and its record are lost", ref=str(ref))
        await self._endings.refuse(
            ref,
            id="",
            tenant="",
            fingerprint="",
            reason=Reason.MALFORMED,
            message="job: expected one of this release, seen none, and its record is gone from the log",
            appended_ms=0,
            topic=state.names.requests(ref.lane),
            record="",
            place="pending",
        )


def _item(found: Placed, recalled: Recalled | None) -> MendItem:
    """What replaces an unreadable job; nothing to run where its request is only to be ended."""
    decision = recalled.decision if recalled is not None else None
    if not isinstance(decision, Admitted):
        return MendItem(ref=found.ref, job=found.job, envelope=b"", data=b"")
    return MendItem(
        ref=found.ref, job=found.job, envelope=codec.encode(decision.envelope), data=decision.data
    )
