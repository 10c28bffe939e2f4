"""Pull: claim jobs while there is room, and start an attempt for each.

A blocking pop is the doorbell: it proves nothing, the claim script does. The claim's number rises by
one each time; a claim that was not answered is repeated under the same number.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.node_store import Claimed, NodeStore
from dispatcher.errors import StoreUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import decode_job_data
from dispatcher.protocol.names import JobId
from dispatcher.protocol.outcome import FailedAttempt, FailureCause
from workers_agent.services.execute import Executor, failed_ending
from workers_agent.services.registration import Registration
from workers_agent.state import AgentState

BELL_S = 1.0
PAUSE_S = 0.1


class Pull:
    """Claims for one incarnation."""

    def __init__(
        self,
        state: AgentState,
        store: NodeStore,
        registration: Registration,
        executor: Executor,
        group: asyncio.TaskGroup,
    ) -> None:
        self._state = state
        self._store = store
        self._registration = registration
        self._executor = executor
        self._group = group
        self._number = 0

    async def run(self) -> None:
        """Claim until cancelled."""
        state = self._state
        while True:
            if not state.free:
                state.room.clear()
                await state.room.wait()
                continue
            if state.backlog or await self._bell():
                await self._claim()

    async def _bell(self) -> bool:
        try:
            return await self._store.wait_for_work(BELL_S)
        except StoreUnavailable:
            self._state.metrics.store_errors.inc()
            await asyncio.sleep(PAUSE_S)
            return False

    async def _claim(self) -> None:
        state = self._state
        limit = state.free
        if not limit:
            return
        self._number += 1
        state.backlog = False
        claim = await self._registration.say(
            lambda: self._store.claim(
                state.identity.incarnation, self._number, limit, now_iso=state.clock.now_iso()
            )
        )
        if claim.foreign:
            state.metrics.foreign.inc(len(claim.foreign))
            self._name_foreign(claim.foreign)
        for job in claim.jobs:
            self._start(job)
        if len(claim.jobs) == limit:
            state.backlog = True

    def _name_foreign(self, ids: tuple[str, ...]) -> None:
        """Tell which jobs were not run, and what to do instead of RQ's `requeue`."""
        log, ours = self._state.log, [id for id in ids if _ref_of(id)]
        if theirs := [id for id in ids if not _ref_of(id)]:
            log.error("foreign jobs in the queue were not run", jobs=theirs[:10])
        if ours:
            log.error(
                "requeued records of failed attempts were not run: the leader alone tries again; "
                "for a request that ended use 'flexlb dead requeue REF'",
                jobs=ours[:10],
                refs=[_ref_of(id) for id in ours[:10]],
            )

    def _start(self, claimed: Claimed) -> None:
        state = self._state
        if claimed.job in state.held:
            return
        try:
            job = JobId.parse(claimed.job)
        except ValueError as error:
            # Somebody put it there: nobody holds it, so that its lease ends it.
            state.metrics.foreign.inc()
            state.log.error("foreign job in the queue was not run", error=str(error))
            return
        state.metrics.claimed.inc()
        try:
            envelope = codec.envelopes.decode(claimed.envelope)
            work = decode_job_data(claimed.data)
        except ValueError as error:
            failed = FailedAttempt(
                attempt=str(job.attempt),
                node=state.identity.node,
                cause=FailureCause.PROTOCOL,
                message=str(error),
            )
            state.log.error("claimed job can't be read", job=claimed.job, error=str(error))
            unreadable = codec.envelopes.decode(b'{"ref":"","id":"","model":""}')
            state.take(claimed, unreadable)
            state.end(claimed.job, failed_ending(claimed.job, str(job.ref), "", failed))
            return
        held = state.take(claimed, envelope)
        held.task = self._group.create_task(
            self._executor.run(claimed.job, job.attempt, work),
            name=f"attempt {claimed.job}",
        )


def _ref_of(id: str) -> str:
    """The ref in a job id of ours, '' in any other."""
    try:
        return str(JobId.parse(id).ref)
    except ValueError:
        return ""
