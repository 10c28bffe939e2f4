"""Hand-offs: prefill stages that did their part go back to `pending`, to be bound to a decode node.

They take the way of failed attempts, closing entry and script, so that a leader that dies at any point
between the stages leaves the next one everything. The engine lends a computed prompt for a while; when that
is over, or the entry can't be read, it is computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from dispatcher.backends.leader_store import LeaderStore, RetryItem
from dispatcher.backends.store_view import StreamEntry
from dispatcher.protocol import codec
from dispatcher.protocol.handoff import Handoff
from dispatcher.protocol.names import JobId
from dispatcher.scheduling.window import Waiting
from dispatcher.services.failures import Failures
from dispatcher.services.persist import until_answered
from dispatcher.services.publication import ReadyEnding
from dispatcher.services.state import Bound, LeaderState

CAUSE = "handoff"
"""Why a pending request waits: no failure's cause."""


class Handoffs:
    """Carries out the hand-offs of one pool.

    Args:
        failures: takes attempts off their nodes.
    """

    def __init__(self, state: LeaderState, store: LeaderStore, failures: Failures) -> None:
        self._state = state
        self._store = store
        self._failures = failures

    async def carry_out(self, entries: Sequence[StreamEntry]) -> list[ReadyEnding]:
        """Put requests back to wait for a decode node; returns what is to publish or to drop."""
        state = self._state
        endings: list[ReadyEnding] = []
        items: list[RetryItem] = []
        found: list[tuple[JobId, Bound | None, Handoff | None]] = []
        for entry in entries:
            try:
                taken = await self._failures.take(entry)
            except ValueError as error:
                if (gone := await self._failures.refused(entry, error)) is not None:
                    endings.append(gone)
                continue
            if isinstance(taken, ReadyEnding):
                endings.append(taken)
                continue
            job, bound = taken
            payload = entry.fields.get(b"payload", b"")
            handoff = codec.decode_handoff(payload)
            if handoff is None:
                state.metrics.foreign.inc()
                state.log.error("hand-off can't be read, the prompt is computed again", job=str(job))
                payload = b""
            else:
                self._learn(handoff)
            items.append(
                RetryItem(
                    entry=entry.id,
                    job=job,
                    not_before_ms=state.clock.now_ms(),
                    failures=bound.failures if bound is not None else 0,
                    excluded=bound.excluded if bound is not None else (),
                    crashed=bound.crashed if bound is not None else (),
                    cause=CAUSE,
                    handoff=payload,
                )
            )
            found.append((job, bound, handoff))
        if not items:
            return endings
        answers = await until_answered(
            lambda: self._store.retry(items, now_iso=state.clock.now_iso()), state.metrics
        )
        for (job, bound, handoff), answer in zip(found, answers, strict=True):
            state.metrics.handoffs.inc()
            if bound is None or answer == "missing":
                self._failures.to_mend(job.ref)
                continue
            state.enter(
                Waiting(
                    ref=job.ref,
                    envelope=bound.envelope,
                    from_pending=True,
                    failures=bound.failures,
                    excluded=bound.excluded,
                    crashed=bound.crashed,
                    handoff=handoff,
                    entered_ms=state.clock.now_ms(),
                )
            )
        return endings

    def _learn(self, handoff: Handoff) -> None:
        node = self._state.fleet.nodes.get(handoff.node)
        if node is None:
            return
        node.breaker.succeeded(self._state.clock.monotonic() - handoff.prefill_us / 1e6)
        if handoff.prefill_us and handoff.has_blocks:
            uncached = handoff.prompt_tokens - handoff.cached_tokens
            node.predictor.observe(uncached, handoff.cached_tokens, handoff.prefill_us / 1e6)
