"""Entries of `closing` that end open requests and that this leader can't read: a later release's, or damaged.

Their requests have no other place any more. Each is held until its deadline or cancel decides its ending: by
then a leader that can read the entry may have published the true one. What a new leader knows nothing of, as
its job went when its attempt ended, is read again from its lane's log.
"""

from __future__ import annotations

from dispatcher.backends.outcome_log import Publication
from dispatcher.backends.store_view import StreamEntry
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Ref
from dispatcher.scheduling.admission import Admitted
from dispatcher.services.publication import ReadyEnding, dropped, ended, own_job
from dispatcher.services.recall import Recall
from dispatcher.services.state import LeaderState


class Unreadable:
    """Holds one leader's unreadable entries until their requests may be ended."""

    def __init__(self, state: LeaderState, recall: Recall) -> None:
        self._state = state
        self._recall = recall
        self._entries: dict[str, StreamEntry] = {}

    async def hold(self, ref: Ref, entry: StreamEntry) -> ReadyEnding | None:
        """Take an entry in place of an ending, unless its request is elsewhere.

        Returns:
            What is left to drop when nobody can be answered, because the request's record is gone.
        Raises:
            LogUnavailable: the record can't be read now.
        """
        state, name = self._state, str(ref)
        bound = state.bound.get(name)
        if bound is not None and own_job(entry) == str(bound.job):
            state.unbind(name)
            state.hold(bound.envelope)
        elif name not in self._entries and not state.is_unfinished(name):
            envelope = await self._envelope(ref)
            if envelope is None:
                state.progress_of(ref).excuse(ref.offset)
                state.log.error(
                    "request ended without an answer: its ending and its record are lost", ref=name
                )
                return dropped(entry, ref)
            state.hold(envelope)
        else:
            return None
        self._entries[name] = entry
        return None

    async def _envelope(self, ref: Ref) -> Envelope | None:
        """A request as its record tells it; None when that is gone, or names nobody."""
        recalled = await self._recall.read(ref)
        if recalled is None:
            return None
        decision, appended_ms = recalled.decision, recalled.record.timestamp_ms
        if isinstance(decision, Admitted):
            return decision.envelope
        if not decision.id:
            return None
        return Envelope(
            ref=str(ref),
            id=decision.id,
            tenant=decision.tenant,
            model="",
            fingerprint=decision.fingerprint,
            appended_ms=appended_ms,
            deadline_at_ms=appended_ms,
        )

    def due(self) -> list[ReadyEnding]:
        """What was decided since about the requests held here, to be published in place of their entries.

        Entries of what ended otherwise are only dropped.
        """
        state = self._state
        endings = []
        for name, entry in list(self._entries.items()):
            if not state.is_unfinished(name):
                del self._entries[name]
                endings.append(dropped(entry, Ref.parse(name)))
                continue
            doom = state.doomed.get(name)
            if doom is None or state.waiting(name) is not None or name in state.bound:
                continue
            del self._entries[name]
            envelope, now_ms = doom.envelope, state.clock.now_ms()
            outcome = ended(envelope, doom.kind, doom.reason, doom.message, now_ms=now_ms)
            endings.append(
                ReadyEnding(
                    entry=entry.id,
                    ref=Ref.parse(name),
                    id=envelope.id,
                    publication=Publication(key=envelope.id.encode(), outcome=outcome),
                    job_to_delete=own_job(entry),
                )
            )
        return endings
