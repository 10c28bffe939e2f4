"""Intake: read the request lanes into the window, refuse what can't be served, note every offset.

Reading a lane stops (its partitions are paused) while its share of the window is full by count or bytes;
reading a partition stops while it is too far ahead of its *assigned* mark, and the request that holds the
mark back is then bound first. All reading stops while too many endings wait to be published: to refuse is
faster than to publish, and a flood of what can't be served is to wait in Kafka, not in Redis.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.request_log import LogRecord, RequestLog
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Lane
from dispatcher.protocol.outcome import Reason
from dispatcher.scheduling.admission import AdmissionLimits, Admitted, Refused, admit, lane_limits
from dispatcher.scheduling.window import LANE_SHARE, Waiting
from dispatcher.services.cancels import doom_cancelled, take_early
from dispatcher.services.close import Endings, dead_record, prompt_too_long_message, reused_id_message
from dispatcher.services.shed import Shedder
from dispatcher.services.state import LeaderState

READ_LIMIT = 1000
READ_TIMEOUT_MS = 200
MOST_UNPUBLISHED = 8192
"""Endings of the leader that may wait to be published; what was read before then comes on top."""


class Intake:
    """Reads one pool's lanes."""

    def __init__(
        self,
        state: LeaderState,
        log: RequestLog,
        endings: Endings,
        shedder: Shedder,
        *,
        limits: AdmissionLimits,
        block_size: int,
        window_requests: int,
        window_bytes: int,
        carried_bytes: int,
        span_limit: int,
    ) -> None:
        self._state = state
        self._log = log
        self._endings = endings
        self._shedder = shedder
        self._limits = limits
        self._block_size = block_size
        self._told_of_blocks = False
        self._window_requests = window_requests
        self._window_bytes = window_bytes
        self._carried_bytes = carried_bytes
        self._span_limit = span_limit

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            if not await self._wait_for_room():
                continue
            records = await self._log.read(timeout_ms=READ_TIMEOUT_MS, limit=READ_LIMIT)
            for index, record in enumerate(records):
                await self._take(record)
                if index % 64 == 63:
                    await asyncio.sleep(0)
            self._note_size()

    async def _wait_for_room(self) -> bool:
        window = self._state.window
        full = {
            lane
            for lane in Lane
            if window.is_full(lane, requests=self._window_requests, bytes=self._window_bytes)
        }
        behind = {
            source for source, progress in self._state.progress.items() if progress.span >= self._span_limit
        }
        for source in behind:
            window.hurry(f"{source}_{self._state.progress[source].assigned}")
        everything = set(self._state.progress)
        paused = behind | {source for source in everything if Lane(source[0]) in full}
        if len(self._state.closed) >= MOST_UNPUBLISHED:
            paused = everything
        self._log.pause(paused)
        if paused != everything:
            return True
        self._state.room.clear()
        self._state.work.set()
        try:
            async with asyncio.timeout(READ_TIMEOUT_MS / 1000):
                await self._state.room.wait()
        except TimeoutError:
            pass
        return False

    def _note_size(self) -> None:
        self._state.metrics.window_requests.set(len(self._state.window))
        self._state.metrics.window_bytes.set(self._state.window.bytes)

    async def _take(self, record: LogRecord) -> None:
        state = self._state
        ref = record.ref
        if not state.progress_of(ref).read(ref.offset):
            return
        state.metrics.records.labels(ref.lane.name.lower()).inc()
        now_ms = state.clock.now_ms()
        decision = admit(
            ref,
            record.key,
            record.value,
            appended_ms=record.timestamp_ms,
            now_ms=now_ms,
            traceparent=record.traceparent,
            limits=lane_limits(self._limits, ref, state.names),
            carry_bodies=state.window.bytes_of(ref.lane) < self._carried_bytes * LANE_SHARE[ref.lane],
        )
        match decision:
            case Refused():
                await self._refuse(record, decision)
            case Admitted(envelope=envelope, data=data):
                if await self._is_repeated(record, envelope) or await self._is_hopeless(record, envelope):
                    return
                is_cancelled = take_early(state, envelope)
                if not is_cancelled and await self._is_shed(record, envelope):
                    return
                self._check_blocks(envelope)
                state.enter(Waiting(ref=ref, envelope=envelope, data=data, entered_ms=now_ms))
                if is_cancelled:
                    doom_cancelled(self._endings, envelope)

    def _check_blocks(self, envelope: Envelope) -> None:
        """Count a request whose hashes can match no node's view; it is served all the same."""
        if envelope.text_hashed or not envelope.block_hashes or envelope.block_size == self._block_size:
            return
        self._state.metrics.block_size_mismatches.inc()
        if not self._told_of_blocks:
            self._told_of_blocks = True
            self._state.log.warning(
                "a request's routing block differs: its prefix is not looked up in any cache view",
                id=envelope.id,
                expected_tokens=self._block_size,
                seen_tokens=envelope.block_size,
                fix="give dispatchers and whoever hashes prompts the same block_size",
            )

    async def _refuse(self, record: LogRecord, refused: Refused) -> None:
        known = self._state.identities.get((refused.tenant, refused.id)) if refused.id else None
        if known is not None and known[1] == refused.fingerprint and refused.fingerprint:
            await self._endings.coalesce(record.ref, refused.fingerprint)
            return
        self._state.metrics.refused.labels(refused.reason.value).inc()
        self._state.log.info(
            "request refused",
            ref=str(record.ref),
            id=refused.id,
            reason=refused.reason.value,
        )
        copy = None
        if refused.dead_letter:
            copy = dead_record(record.value)
        await self._endings.refuse(
            record.ref,
            id=refused.id,
            tenant=refused.tenant,
            fingerprint=refused.fingerprint,
            reason=refused.reason if known is None else Reason.ID_IN_USE,
            message=refused.message,
            appended_ms=record.timestamp_ms,
            topic=self._state.names.requests(record.ref.lane),
            record=copy,
        )

    async def _is_repeated(self, record: LogRecord, envelope: Envelope) -> bool:
        known = self._state.identities.get((envelope.tenant, envelope.id))
        if known is None or known[0] == envelope.ref:
            return False
        if known[1] == envelope.fingerprint:
            lease = (envelope.tenant, envelope.lease) if envelope.lease else None
            self._state.leases.share(known[0], lease)
            await self._endings.coalesce(record.ref, envelope.fingerprint)
            return True
        await self._refuse(
            record,
            Refused(
                reason=Reason.ID_IN_USE,
                message=reused_id_message(known[0]),
                id=envelope.id,
                tenant=envelope.tenant,
                fingerprint=envelope.fingerprint,
            ),
        )
        return True

    async def _is_hopeless(self, record: LogRecord, envelope: Envelope) -> bool:
        longest = self._state.fleet.longest_prompt(envelope.model)
        if not longest or not envelope.tokens_exact or envelope.prompt_tokens <= longest:
            return False
        await self._refuse(
            record,
            Refused(
                reason=Reason.PROMPT_TOO_LONG,
                message=prompt_too_long_message(envelope, longest),
                id=envelope.id,
                tenant=envelope.tenant,
                fingerprint=envelope.fingerprint,
            ),
        )
        return True

    async def _is_shed(self, record: LogRecord, envelope: Envelope) -> bool:
        shed = self._shedder.arrival(envelope) if record.ref.lane is Lane.INTERACTIVE else None
        if shed is None:
            return False
        self._state.metrics.refused.labels(shed.reason.value).inc()
        await self._endings.refuse(
            record.ref,
            id=envelope.id,
            tenant=envelope.tenant,
            fingerprint=envelope.fingerprint,
            reason=shed.reason,
            message=shed.message,
            appended_ms=record.timestamp_ms,
            topic=self._state.names.requests(record.ref.lane),
            record=None,
            retry_after_ms=shed.retry_after_ms,
        )
        return True
