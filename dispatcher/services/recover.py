"""Recover: what a new leader does before it acts, so that nothing is lost and nothing said twice.

While Redis is intact its places are the truth, and reading goes on from the *assigned* marks. When
Redis lost data or went back in time, Kafka is the truth: reading goes on from the *finished* marks,
`outcomes` tells what above them is finished, and what agents still run is adopted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.leader_store import AdoptItem, CloseItem, LeaderStore
from dispatcher.backends.outcome_log import CommitNote, Finished, OutcomeLog, PublishedOutcomes, read_outcomes
from dispatcher.backends.request_log import RequestLog
from dispatcher.backends.store_view import Placed, StoredJob, StoreView
from dispatcher.protocol import codec
from dispatcher.protocol.handoff import stage_of
from dispatcher.protocol.names import JobId, Ref
from dispatcher.protocol.outcome import FailureCause, OutcomeHead, Reason
from dispatcher.scheduling.progress import SourceProgress
from dispatcher.scheduling.retry import is_given_back
from dispatcher.services.mend import waiting_from
from dispatcher.services.persist import until_answered
from dispatcher.services.publication import own_job
from dispatcher.services.state import Bound, LeaderState
from dispatcher.services.watch import FleetMirror

IDENTITY_WINDOW_MS = 600_000
MOST_CLOSING = 100_000
"""Entries of `closing` looked through for endings that were published before."""


@dataclass(frozen=True, kw_only=True)
class LastSeen:
    """The Redis generation as this process saw it last, which a commit may not tell yet."""

    generation: str = ""
    counter: int = 0


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Where publishing goes on: the end of `outcomes`, where older answers begin, what is committed."""

    positions: Mapping[int, int]
    floor: Mapping[str, int]
    committed: Mapping[str, int]
    data_lost: bool


class Recovery:
    """Brings a new leader's state up to date."""

    def __init__(
        self,
        state: LeaderState,
        store: LeaderStore,
        view: StoreView,
        mirror: FleetMirror,
        outcomes: OutcomeLog,
        requests: RequestLog,
        kafka: KafkaClients,
        *,
        new_id: Callable[[], str],
        inventory_wait_s: float,
        claim_lease_s: float,
    ) -> None:
        self._state = state
        self._store = store
        self._view = view
        self._mirror = mirror
        self._outcomes = outcomes
        self._requests = requests
        self._kafka = kafka
        self._new_id = new_id
        self._inventory_wait_s = inventory_wait_s
        self._claim_lease_s = claim_lease_s

    async def recover(self, last_seen: LastSeen) -> Recovered:
        """Fill the leader's state and position the request log; commits the marks with a fresh note."""
        state = self._state
        finished = await self._outcomes.committed()
        marks = await self._finished_marks(finished)
        floor = _floor(finished.values())
        await self._forget_old_session()
        stored = await until_answered(self._view.generation, state.metrics)
        intact = stored is not None and _is_intact(stored, finished.values(), last_seen)
        if stored is not None and intact:
            state.generation = stored[0]
            self._store.note_counter(stored[1])
            positions = await self._load(marks, floor, finished)
        else:
            positions = await self._rebuild(marks, floor, fresh=not finished)
        self._requests.seek({source: progress.next_read for source, progress in state.progress.items()})
        committed = {source: progress.finished for source, progress in state.progress.items()}
        note = CommitNote(
            positions=floor,
            epoch=self._store.lease.epoch,
            generation=state.generation,
            counter=self._store.counter,
        )
        self._store.lease.check()
        await self._outcomes.publish([], committed, note)
        state.log.info(
            "recovered",
            intact=intact,
            generation=state.generation,
            bound=len(state.bound),
            pending=len(state.window) + len(state.delayed()),
            read_from={source: progress.next_read for source, progress in state.progress.items()},
        )
        return Recovered(positions=positions, floor=floor, committed=committed, data_lost=not intact)

    async def _finished_marks(self, finished: Mapping[str, Finished]) -> dict[str, int]:
        marks = {}
        for source, start in (await self._requests.log_starts()).items():
            mark = finished[source].offset if source in finished else start
            if mark < start:
                self._alarm_lost(source, mark, start)
            marks[source] = max(mark, start)
        return marks

    def _alarm_lost(self, source: str, mark: int, start: int) -> None:
        self._state.metrics.lost_to_retention.labels(source).set(start - mark)
        self._state.log.error(
            "lost_to_retention",
            source=source,
            unfinished_from=mark,
            log_starts_at=start,
            records=start - mark,
        )

    async def _forget_old_session(self) -> None:
        """Drop what an earlier session of this process left in the mirror, which outlives sessions."""
        mirror = self._mirror
        for node in mirror.fleet.nodes.values():
            node.empty()
        self._state.index.forget_assignments()
        mirror.resync()
        await mirror.step(block_ms=None)
        mirror.changed = {node.name for node in mirror.fleet.nodes.values() if node.available}
        mirror.left = set()
        mirror.forgive()

    async def _load(
        self, marks: Mapping[str, int], floor: Mapping[str, int], finished: Mapping[str, Finished]
    ) -> dict[int, int]:
        """Take over from an intact Redis."""
        await self._fence_forgotten_nodes()
        state = self._state
        ledger = await until_answered(self._view.ledger, state.metrics)
        since = {int(partition): offset for partition, offset in floor.items()} | ledger.settled
        told = await self._read_outcomes(since)
        published = {head.ref for head in told.heads}

        def is_open(ref: Ref) -> bool:
            below = ref.source in finished and ref.offset < finished[ref.source].offset
            return ref.source in marks and not below and str(ref) not in published

        jobs = [job for job in ledger.jobs if is_open(Ref.parse(job.ref))]
        placed = [*map(_place_of, ledger.jobs), *ledger.unreadable]
        answered = [
            text
            for text in ledger.closing_refs
            if (ref := _parsed(text)) is not None and ref.source in marks and not is_open(ref)
        ]
        done = [one for one in placed if one.ref.source in marks and not is_open(one.ref)]
        await self._drop_answered(done, answered)
        elsewhere = {*(job.ref for job in jobs), *ledger.closing_refs}
        misread = [
            found for found in ledger.unreadable if is_open(found.ref) and str(found.ref) not in elsewhere
        ]
        unended = elsewhere | {str(found.ref) for found in misread}
        open_refs = [ref for ref in map(_parsed, unended) if ref is not None and is_open(ref)]
        starts = await self._requests.log_starts()
        for source, mark in marks.items():
            at = max(ledger.marks.get(source, mark), mark)
            if at < starts[source]:
                self._alarm_lost(source, at, starts[source])
                at = starts[source]
            taken_above = [offset for offset in ledger.above.get(source, []) if offset >= at]
            offsets = [ref.offset for ref in open_refs if ref.source == source]
            state.progress[source] = SourceProgress(
                next_read=at,
                open_below=[offset for offset in offsets if offset < at],
                taken_above=taken_above,
                open_above=[offset for offset in offsets if offset >= at],
            )
        for job in jobs:
            self._restore(job)
        for found in misread:
            state.note_misread(found)
        if state.misread:
            state.log.error(
                "jobs can't be read, to be written anew", count=len(state.misread), refs=[*state.misread][:10]
            )
        return told.ends

    async def _read_outcomes(
        self, since: Mapping[int, int], *, since_ms: int | None = None
    ) -> PublishedOutcomes:
        """Read what is published; what no leader has written is told of once, and skipped."""
        state = self._state
        found = await read_outcomes(self._kafka, state.names, since, since_ms=since_ms)
        if found.foreign:
            state.metrics.foreign.inc(found.foreign)
            state.log.error(
                "records on outcomes can't be read, skipped", count=found.foreign, first=found.foreign_at
            )
        return found

    async def _drop_answered(self, jobs: Sequence[Placed], closing: Iterable[str]) -> None:
        """Take away what would be run or decided again although its outcome is published.

        A Redis that went back in time no further than to the last assignment passes for intact: what ended
        since then is back in its place. And the last leader may have published what it had no time to drop:
        a failure could be decided otherwise this time. The next leader could not tell of either, once newer
        outcomes are settled.

        Args:
            closing: refs of the endings that wait in `closing`.
        """
        ended = set(closing)
        if jobs:
            items = [
                CloseItem(
                    place="job" if job.job else "pending",
                    ref=job.ref,
                    kind="none",
                    job=job.job,
                )
                for job in jobs
            ]
            answers = await until_answered(lambda: self._store.close(items), self._state.metrics)
            ended |= {str(item.ref) for item, answer in zip(items, answers, strict=True) if answer != "ok"}
            self._state.log.warning(
                "answered requests taken out of Redis, which went back in time", count=len(jobs)
            )
        if ended:
            entries, _ = await until_answered(
                lambda: self._view.read_closing(b"0-0", block_ms=1, count=MOST_CLOSING), self._state.metrics
            )
            again = [(entry.id, own_job(entry)) for entry in entries if entry.text("ref") in ended]
            await until_answered(lambda: self._store.settle({}, again), self._state.metrics)

    async def _fence_forgotten_nodes(self) -> None:
        """Take back the work of nodes of which Redis keeps nothing else any more."""
        for name in await until_answered(self._view.node_names, self._state.metrics):
            if name not in self._mirror.fleet.nodes:
                await until_answered(
                    lambda node=name: self._store.requeue(  # type: ignore[misc]
                        node, "fence", "forgotten", FailureCause.NODE_LOST.value
                    ),
                    self._state.metrics,
                )

    def _restore(self, job: StoredJob) -> None:
        state = self._state
        try:
            envelope = codec.envelopes.decode(job.envelope)
        except codec.MalformedRecord:
            state.note_misread(_place_of(job))
            return
        if job.job:
            bound = Bound(
                envelope=envelope,
                job=JobId.parse(job.job),
                failures=job.failures,
                excluded=job.excluded,
                crashed=job.crashed,
                hit_tokens=job.hit_tokens,
                stage=stage_of(job.stage),
                handoff=codec.decode_handoff(job.handoff),
            )
            uncached = 0 if job.claimed else max(1, envelope.prompt_tokens - job.hit_tokens)
            node = state.fleet.nodes.get(bound.job.node)
            cost = node.predictor.cost if node is not None and uncached else None
            state.bind(
                job.ref,
                bound,
                uncached_tokens=uncached,
                prefill_s=cost.seconds(uncached, job.hit_tokens) if cost is not None else 0.0,
                number=job.number,
            )
            return
        state.delay(waiting_from(job), job.not_before_ms, is_paid=_is_paid(job.cause))

    async def _rebuild(
        self, marks: Mapping[str, int], floor: Mapping[str, int], *, fresh: bool
    ) -> dict[int, int]:
        """Begin a new generation from Kafka."""
        state = self._state
        since = {int(partition): offset for partition, offset in floor.items()}
        since_ms = state.clock.now_ms() - IDENTITY_WINDOW_MS
        told = await self._read_outcomes(since, since_ms=since_ms)
        finished_above = _finished_above(told.heads, marks)
        state.generation = self._new_id()
        await until_answered(
            lambda: self._store.begin_generation(
                state.generation, marks, {source: sorted(taken) for source, taken in finished_above.items()}
            ),
            state.metrics,
        )
        state.metrics.generations.inc()
        await self._remember(told.heads)
        adopted = {} if fresh else await self._adopt(marks, finished_above)
        for source, mark in marks.items():
            mine = [ref.offset for ref in adopted if ref.source == source]
            state.progress[source] = SourceProgress(
                next_read=mark, taken_above=[*finished_above[source], *mine], open_above=mine
            )
        for ref, bound in adopted.items():
            state.bind(str(ref), bound)
        return told.ends

    async def _remember(self, heads: list[OutcomeHead]) -> None:
        names = self._state.names
        owners = {
            names.identity(head.tenant, head.id): f"{head.ref}|{head.fingerprint}"
            for head in heads
            if head.fingerprint and head.reason != Reason.ID_IN_USE
        }
        pairs = list(owners.items())
        for start in range(0, len(pairs), 500):
            part = dict(pairs[start : start + 500])
            await until_answered(lambda part=part: self._store.remember(part), self._state.metrics)  # type: ignore[misc]

    async def _adopt(
        self, marks: Mapping[str, int], finished_above: Mapping[str, set[int]]
    ) -> dict[Ref, Bound]:
        """Wait one heartbeat for the inventories of agents, and keep what they still run."""
        state, mirror = self._state, self._mirror
        mirror.rewind()
        until = state.clock.monotonic() + self._inventory_wait_s
        while state.clock.monotonic() < until:
            await mirror.step()
            self._store.lease.check()
        adopted: dict[Ref, Bound] = {}
        for stored in await until_answered(lambda: self._view.nodes(mirror.fleet.nodes), state.metrics):
            if not stored.alive or stored.fenced == stored.incarnation:
                continue
            await until_answered(lambda node=stored.node: self._store.admit(node), state.metrics)  # type: ignore[misc]
            held = await until_answered(
                lambda node=stored.node: self._store.held_inventory(node),  # type: ignore[misc]
                state.metrics,
            )
            claims = []
            for text, (encoded, data) in held.items():
                try:
                    job, envelope = JobId.parse(text), codec.envelopes.decode(encoded)
                except ValueError as error:
                    state.metrics.foreign.inc()
                    state.log.error("held job can't be read", node=stored.node, error=str(error))
                    continue
                known = job.ref.source in marks and job.ref.offset >= marks[job.ref.source]
                if known and job.ref.offset not in finished_above[job.ref.source] and job.ref not in adopted:
                    claims.append((job, envelope, encoded, data))
            items = [
                AdoptItem(
                    job=job,
                    cost_tokens=envelope.cost_tokens,
                    identity=state.names.identity(envelope.tenant, envelope.id),
                    fingerprint=envelope.fingerprint,
                    envelope=encoded,
                    data=data,
                )
                for job, envelope, encoded, data in claims
            ]
            if not items:
                continue
            answers = await until_answered(
                lambda stored=stored, items=items: self._store.adopt(  # type: ignore[misc]
                    stored.node,
                    stored.incarnation,
                    items,
                    lease_s=self._claim_lease_s,
                    now_iso=state.clock.now_iso(),
                ),
                state.metrics,
            )
            for (job, envelope, _, _), answer in zip(claims, answers, strict=True):
                if answer == "ok":
                    adopted[job.ref] = Bound(envelope=envelope, job=job, failures=0, excluded=())
        state.metrics.adopted.inc(len(adopted))
        return adopted


def _is_paid(cause: str) -> bool:
    """Whether a pending request waits for a token: it failed, and was not merely given back."""
    return cause in FailureCause.__members__.values() and not is_given_back(FailureCause(cause))


def _place_of(job: StoredJob) -> Placed:
    return Placed(ref=Ref.parse(job.ref), job=JobId.parse(job.job) if job.job else None)


def _parsed(ref: str) -> Ref | None:
    """A ref, None for what is none."""
    try:
        return Ref.parse(ref)
    except ValueError:
        return None


def _floor(finished: Iterable[Finished]) -> dict[str, int]:
    """Where in `outcomes` the answers of all requests above their marks begin."""
    floor: dict[str, int] = {}
    for mark in finished:
        for partition, offset in mark.note.positions.items():
            floor[partition] = min(offset, floor.get(partition, offset))
    return floor


def _is_intact(stored: tuple[str, int], finished: Iterable[Finished], last_seen: LastSeen) -> bool:
    """Whether Redis is the data set of the newest commit and has not gone back in time."""
    generation, counter = stored
    newest = max((mark.note for mark in finished), key=lambda note: (note.epoch, note.counter), default=None)
    if newest is None or newest.generation != generation or counter < newest.counter:
        return False
    return last_seen.generation != generation or counter >= last_seen.counter


def _finished_above(heads: list[OutcomeHead], marks: Mapping[str, int]) -> dict[str, set[int]]:
    finished: dict[str, set[int]] = {source: set() for source in marks}
    for head in heads:
        ref = Ref.parse(head.ref)
        if ref.source in marks and ref.offset >= marks[ref.source]:
            finished[ref.source].add(ref.offset)
    return finished
