"""Publish: read `closing`, decide failed attempts, put outcomes on Kafka in transactions.

An outcome was decided when its closing entry was written; this loop only makes it known, together
with the *finished* mark. Whatever fails here in an unclear way ends this leader's session: the next
one reads `outcomes` before it publishes, so nothing is said twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from dispatcher.backends.leader_store import LeaderStore
from dispatcher.backends.outcome_log import CommitNote, OutcomeLog
from dispatcher.backends.store_view import StoreView, StreamEntry
from dispatcher.errors import RecordTooLarge
from dispatcher.protocol.names import Ref
from dispatcher.services.failures import Failures
from dispatcher.services.finished import note_finished
from dispatcher.services.handoffs import Handoffs
from dispatcher.services.persist import until_answered
from dispatcher.services.publication import (
    ReadyEnding,
    dropped,
    ready_ending,
    without_long_text,
)
from dispatcher.services.state import LeaderState
from dispatcher.services.unreadable import Unreadable

READ_COUNT = 512
READ_BLOCK_MS = 500
FEWEST_STARTS = 4096
RECOMMIT_S = 60.0
"""An idle pool's marks are committed again this often, so that retention of offsets never ends."""


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
        unreadable: Unreadable,
        *,
        positions: Mapping[int, int],
        floor: Mapping[str, int],
        committed: Mapping[str, int],
    ) -> None:
        self._state = state
        self._store = store
        self._view = view
        self._log = log
        self._unreadable = unreadable
        self._failures = Failures(state, store, view, unreadable)
        self._handoffs = Handoffs(state, store, self._failures)
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
            known, began_s = self._store.counter, self._state.clock.monotonic()
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
            if due := self._unreadable.due():
                await self._publish(due, [])
            if len(entries) < READ_COUNT:
                self._state.closing_read_s = began_s

    async def publish(self, entries: list[StreamEntry]) -> None:
        """Carry out one batch of closing entries."""
        endings: list[ReadyEnding] = []
        failed, handed, foreign = [], [], []
        for entry in entries:
            try:
                ref = self._open_ref(entry)
            except ValueError as error:
                foreign.append(entry.id)
                self._refuse(entry, error)
                continue
            if not self._state.progress_of(ref).is_open(ref.offset):
                # Answered already: a failure must not be decided a second time, and otherwise.
                self._state.unbind(str(ref))
                endings.append(dropped(entry, ref))
                continue
            if entry.text("kind") in {"failed", "released"}:
                failed.append(entry)
                continue
            if entry.text("kind") == "handoff":
                handed.append(entry)
                continue
            try:
                endings.append(ready_ending(entry, ref))
            except ValueError as error:
                self._refuse(entry, error)
                if (gone := await self._unreadable.hold(ref, entry)) is not None:
                    endings.append(gone)
            else:
                self._state.unbind(str(ref), answered=True)
        if handed:
            endings += await self._handoffs.carry_out(handed)
        if failed:
            endings += await self._failures.carry_out(failed)
        await self._publish(endings, foreign)

    def _open_ref(self, entry: StreamEntry) -> Ref:
        """The ref of an entry of ours; ValueError for what no script of ours has written."""
        ref = Ref.parse(entry.text("ref"))
        if ref.source not in self._state.progress:
            raise ValueError(f"ref: expected a partition of this pool, seen {ref}")
        return ref

    def _refuse(self, entry: StreamEntry, error: ValueError) -> None:
        self._state.metrics.foreign.inc()
        self._state.log.error("closing entry refused", entry=entry.id.decode(), error=str(error)[:500])

    async def _publish(self, endings: list[ReadyEnding], foreign: list[bytes]) -> None:
        """Make endings known, and drop what is none of ours."""
        state = self._state
        fresh: dict[str, ReadyEnding] = {}
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
            if not endings and not foreign:
                return
        else:
            await self._commit(fresh, finished)
        now_iso = state.clock.now_iso()
        await until_answered(
            lambda: self._store.settle(
                self._positions,
                [(ending.entry, ending.job_to_delete) for ending in endings]
                + [(entry, "") for entry in foreign],
                errors={ending.job_to_delete: ending.error for ending in endings if ending.error},
                now_iso=now_iso,
            ),
            state.metrics,
        )
        for ending in endings:
            if ending.publication is not None:
                state.forget(str(ending.ref))
        state.room.set()
        self._prune()

    async def _commit(self, fresh: Mapping[str, ReadyEnding], finished: Mapping[str, int]) -> None:
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
            after = await self._log.publish(list(map(without_long_text, publications)), finished, note)
        self._positions.update(after)
        self._committed.update(finished)
        self._committed_at = state.clock.monotonic()
        state.metrics.transaction_s.observe(self._committed_at - began)
        for ref, ending in fresh.items():
            note_finished(state, ref, ending)

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
