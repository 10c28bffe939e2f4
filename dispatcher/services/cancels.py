"""Cancels: end the requests that their own tenant cancels, wherever they are.

A cancel for a request that intake has not read yet waits until it does, bounded by time and count.
A new leader reads the last minute of cancels again; one for a finished request means nothing.
"""

from __future__ import annotations

from dispatcher.backends.request_log import CancelLog
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.outcome import OutcomeKind, Reason
from dispatcher.services.close import Endings
from dispatcher.services.state import LeaderState

READ_TIMEOUT_MS = 500
HOLD_S = 60.0
HELD_LIMIT = 10_000


def doom_cancelled(endings: Endings, envelope: Envelope) -> None:
    """Decide that its client cancelled a request."""
    message = "cancelled by its client"
    endings.doom(envelope, OutcomeKind.CANCELLED, Reason.CLIENT_CANCELLED, message)


class Cancels:
    """Follows one pool's cancels."""

    def __init__(self, state: LeaderState, log: CancelLog, endings: Endings) -> None:
        self._state = state
        self._log = log
        self._endings = endings

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            await self._log.start(self._state.clock.now_ms() - int(HOLD_S * 1000))
            while True:
                for value in await self._log.read(timeout_ms=READ_TIMEOUT_MS):
                    self._take(value)
                self._try_held()
                self._drop_stale()
                await self._endings.carry_out()
        finally:
            await self._log.stop()

    def _take(self, value: bytes) -> None:
        state = self._state
        try:
            cancel = codec.cancels.decode(value)
        except codec.MalformedRecord as error:
            state.metrics.foreign.inc()
            state.log.warning("cancel refused", error=str(error))
            return
        known = state.identities.get((cancel.tenant, cancel.id))
        envelope = state.envelope_of(known[0]) if known is not None else None
        state.early_cancels.pop((cancel.tenant, cancel.id), None)  # the newest is dropped last
        if envelope is not None:
            doom_cancelled(self._endings, envelope)
        elif len(state.early_cancels) < HELD_LIMIT:
            state.early_cancels[(cancel.tenant, cancel.id)] = state.clock.monotonic() + HOLD_S
        else:
            state.log.warning("cancel dropped", id=cancel.id, held=HELD_LIMIT)

    def _try_held(self) -> None:
        """A request may have been on its way between two places when its cancel came."""
        state = self._state
        for identity in list(state.early_cancels):
            known = state.identities.get(identity)
            envelope = state.envelope_of(known[0]) if known is not None else None
            if envelope is not None:
                del state.early_cancels[identity]
                doom_cancelled(self._endings, envelope)

    def _drop_stale(self) -> None:
        held = self._state.early_cancels
        now_s = self._state.clock.monotonic()
        while held:
            oldest = next(iter(held))
            if held[oldest] > now_s:
                return
            del held[oldest]
