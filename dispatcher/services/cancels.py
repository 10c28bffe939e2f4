"""Cancels: end the requests that their own tenant cancels, wherever they are, and those whose client is gone.

A cancel ends what was appended before it, or within `HOLD_S` after it. One for a request that intake has not
read yet waits until it has provably read that far, bounded by count. A new leader reads the last minutes of
cancels again; one for a finished request means nothing.

A lease (`scheduling/leases`) runs out only by time in which this leader read the topic to ends that the
broker told after it: while the broker is away, or a leader is new or held up, nobody's does.
"""

from __future__ import annotations

from typing import Protocol

from dispatcher.backends.request_log import CancelLog, CancelRecord, Ends, RequestLog
from dispatcher.errors import LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.outcome import OutcomeKind, Reason
from dispatcher.protocol.request import CancelRequest, LeaseRecord
from dispatcher.scheduling.silence import HealthyClock
from dispatcher.services.close import Endings
from dispatcher.services.state import EarlyCancel, LeaderState

READ_TIMEOUT_MS = 500
HOLD_S = 60.0
LOOK_BACK_S = 600.0
"""How much of the topic a new leader reads again: nobody may have led for as long."""
HELD_LIMIT = 10_000
PROOF_EVERY_S = 0.5
LONGEST_PROOF_STEP_S = 1.5
"""Half of the shortest time to live: whoever gives a sign of life each third of it outlives one such step."""


class _Log(Protocol):
    async def ends(self) -> Ends: ...


def doom_cancelled(endings: Endings, envelope: Envelope) -> None:
    """Decide that its client cancelled a request."""
    message = "cancelled by its client"
    endings.doom(envelope, OutcomeKind.CANCELLED, Reason.CLIENT_CANCELLED, message)


def covers(appended_ms: int, envelope: Envelope) -> bool:
    """Whether a cancel of that time means this request, and not one that got the same id long after."""
    return envelope.appended_ms <= appended_ms + HOLD_S * 1000


def take_early(state: LeaderState, envelope: Envelope) -> bool:
    """Whether a request that was just read is cancelled already."""
    identity = (envelope.tenant, envelope.id)
    early = state.early_cancels.get(identity)
    if early is None or not covers(early.appended_ms, envelope):
        return False
    del state.early_cancels[identity]
    return True


class Cancels:
    """Follows one pool's cancels and leases."""

    def __init__(self, state: LeaderState, log: CancelLog, requests: RequestLog, endings: Endings) -> None:
        self._state = state
        self._log = log
        self._requests = requests
        self._endings = endings
        self._healthy = HealthyClock(LONGEST_PROOF_STEP_S)
        self._proof: tuple[float, Ends] | None = None
        self._next_proof_s = float("-inf")
        self._passing: tuple[float, Ends] | None = None
        self._passed_at_read: int | None = None

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            await self._log.start(self._state.clock.now_ms() - int(LOOK_BACK_S * 1000))
            while True:
                for record in await self._log.read(timeout_ms=READ_TIMEOUT_MS):
                    self._take(record)
                self._try_held()
                await self._drop_stale()
                await self._prove_leases()
                self._doom_orphans()
                await self._endings.carry_out()
        finally:
            await self._log.stop()

    def _take(self, record: CancelRecord) -> None:
        state = self._state
        try:
            told = codec.decode_cancel(record.value)
        except codec.MalformedRecord as error:
            state.metrics.foreign.inc()
            state.log.warning("cancel refused", error=str(error))
            return
        match told:
            case CancelRequest():
                self._cancel(told, record.appended_ms)
            case LeaseRecord():
                state.leases.hear((told.tenant, told.lease), told.ttl_ms)

    def _cancel(self, cancel: CancelRequest, appended_ms: int) -> None:
        held, identity = self._state.early_cancels, (cancel.tenant, cancel.id)
        held.pop(identity, None)  # the newest is dropped last
        if self._is_taken(identity, appended_ms):
            return
        held[identity] = EarlyCancel(appended_ms=appended_ms, since_s=self._state.clock.monotonic())
        if len(held) > HELD_LIMIT:
            _, id = oldest = next(iter(held))
            del held[oldest]
            self._state.log.warning("cancel dropped", id=id, held=HELD_LIMIT)

    def _is_taken(self, identity: tuple[str, str], appended_ms: int) -> bool:
        """Doom the request that a cancel means, if it is known and somewhere."""
        state = self._state
        known = state.identities.get(identity)
        envelope = state.envelope_of(known[0]) if known is not None else None
        if envelope is None or not covers(appended_ms, envelope):
            return False
        doom_cancelled(self._endings, envelope)
        return True

    def _try_held(self) -> None:
        """A request may have been on its way between two places when its cancel came."""
        held = self._state.early_cancels
        for identity, early in list(held.items()):
            if self._is_taken(identity, early.appended_ms):
                del held[identity]

    async def _drop_stale(self) -> None:
        """Drop cancels of which intake has passed all that they can mean: it may be far behind."""
        held, now_s = self._state.early_cancels, self._state.clock.monotonic()
        if self._passing is None:
            oldest = next(iter(held.values()), None)
            if oldest is not None and now_s - oldest.since_s >= HOLD_S:
                ends = await _ends_of(self._requests)
                self._passing = (now_s, ends) if ends is not None else None
                self._passed_at_read = None
            return
        before_s, ends = self._passing
        if self._passed_at_read is None:
            if await self._requests.has_read(ends):
                self._passed_at_read = self._requests.reads
            return
        if self._requests.reads == self._passed_at_read:
            return  # what it has read last may not be taken yet
        self._passing = None
        for identity, early in list(held.items()):
            if before_s - early.since_s < HOLD_S:
                break
            del held[identity]

    async def _prove_leases(self) -> None:
        """Let leases age by the time up to which the topic was read, and end those that ran out."""
        leases, now_s = self._state.leases, self._state.clock.monotonic()
        if not leases.are_held:
            self._proof = None
            return
        if self._proof is None:
            if now_s < self._next_proof_s:
                return
            self._next_proof_s = now_s + PROOF_EVERY_S
            ends = await _ends_of(self._log)
            if ends is None:
                self._healthy.failed()
                return
            self._proof = now_s, ends
        at_s, ends = self._proof
        if await self._log.has_read(ends):
            self._proof = None
            self._healthy.answered(at_s)
            if not self._healthy.since_trouble_s:
                leases.restart()
            for (tenant, lease), requests in leases.prove(self._healthy.now_s):
                self._state.log.info("lease ran out", tenant=tenant, lease=lease, requests=requests)

    def _doom_orphans(self) -> None:
        for ref in self._state.leases.orphans:
            envelope = self._state.envelope_of(ref)
            if envelope is not None:
                self._endings.doom(
                    envelope,
                    OutcomeKind.CANCELLED,
                    Reason.CLIENT_GONE,
                    f"lease {envelope.lease}: expected its client to prolong or keep it, seen its end or "
                    "silence for its time to live; send requests that go on alone with detached",
                )


async def _ends_of(log: _Log) -> Ends | None:
    """Where a log ends now; None while the broker does not tell."""
    try:
        return await log.ends()
    except LogUnavailable:
        return None
