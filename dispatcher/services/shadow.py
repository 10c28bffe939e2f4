"""Shadow: see what a leader binds, decide the same beside it, and count how the decisions compare.

It follows what any reader may: node reports, jobs at nodes, request topics, outcomes. A node's report that
covers assignments not seen yet is held back until those were looked for, so that a decision is made on what
the leader knew, and not on a node that already has the request. What begins and ends between two looks is
counted, not compared.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

import msgspec

from dispatcher.backends.request_log import LogRecord
from dispatcher.backends.store_view import StoredJob, StoreView, StreamEntry
from dispatcher.errors import StoreUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.handoff import Stage, stage_of
from dispatcher.protocol.names import JobId
from dispatcher.protocol.outcome import Timing, Usage
from dispatcher.scheduling.admission import AdmissionLimits, Admitted, Refused, admit, lane_limits
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.shadow import Comparison, Tally, Verdict, compare
from dispatcher.services.finished import learn_speed
from dispatcher.services.state import Bound, LeaderState
from dispatcher.services.watch import FleetMirror
from dispatcher.telemetry.metrics import ShadowMetrics

LOOK_S = 0.25
"""All nodes are looked at so far apart at least, when the leader moved anything."""
NODES_PER_S = 400
"""Of a large fleet, no more than so many."""
KEPT_RECORDS = 50_000
KEPT_BLOCKS = 1_000_000
"""What is kept of records that nobody bound yet; older ones are forgotten."""


class _Ended(msgspec.Struct):
    """What is learned from an outcome."""

    ref: str
    node: str = ""
    usage: Usage = Usage()
    timing: Timing = Timing()


_ended = msgspec.json.Decoder(_Ended)


class _Admissions:
    """What the shadow's own admission made of records not bound yet: an envelope or why not, bounded."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Envelope | Refused] = OrderedDict()
        self._blocks = 0

    def put(self, ref: str, made: Envelope | Refused) -> None:
        """Keep one."""
        self.take(ref)
        self._kept[ref] = made
        self._blocks += _blocks(made)
        while len(self._kept) > KEPT_RECORDS or self._blocks > KEPT_BLOCKS:
            self.take(next(iter(self._kept)))

    def take(self, ref: str) -> Envelope | Refused | None:
        """Take one out; None when it is not there."""
        made = self._kept.pop(ref, None)
        if made is not None:
            self._blocks -= _blocks(made)
        return made


def _blocks(made: Envelope | Refused) -> int:
    return len(made.block_hashes) if isinstance(made, Envelope) else 0


class ShadowLedger:
    """The world as a leader's decisions make it, and what another scheduler would have decided in it.

    Args:
        state: a ledger of its own; nothing of it is written anywhere.
        every: a line in the log for so many comparisons.
    """

    def __init__(
        self,
        state: LeaderState,
        view: StoreView,
        mirror: FleetMirror,
        scheduler: Scheduler,
        tally: Tally,
        metrics: ShadowMetrics,
        *,
        every: int,
    ) -> None:
        self._state = state
        self._view = view
        self._mirror = mirror
        self._scheduler = scheduler
        self._tally = tally
        self._metrics = metrics
        self._every = every
        self._admissions = _Admissions()
        self._at: dict[str, dict[str, str]] = {}
        """By node the jobs there, with their refs."""
        self._numbers: dict[tuple[str, str], int] = {}
        """The highest assignment number seen at a node, by its incarnation."""
        self._seen: OrderedDict[str, tuple[float, int] | None] = OrderedDict()
        """What was seen at nodes and has no outcome yet: predicted time to its first token, and since when
        (epoch ms); the newest."""
        self._counter: tuple[str, int] | None = None
        self._looking = asyncio.Lock()
        self.is_primed = False
        """Whether it knows the world as it found it: what is bound from now on is compared."""
        self.refused = 0
        """Records that its own admission refused."""

    @property
    def held(self) -> Mapping[str, int]:
        """How many requests are at each node that has any."""
        return Counter(bound.job.node for bound in self._state.bound.values())

    # What comes in

    async def before_reports(self, entries: Sequence[StreamEntry]) -> None:
        """Look at the nodes whose reports cover assignments that were not seen yet."""
        nodes = set()
        for entry in entries:
            if entry.text("kind") != "report":
                continue
            try:
                report = codec.reports.decode(entry.fields.get(b"body", b""))
            except codec.MalformedRecord:
                continue  # the mirror counts it
            key = (report.node, report.incarnation)
            if report.seen_seq > self._numbers.get(key, 0):
                self._numbers[key] = report.seen_seq
                nodes.add(report.node)
        if nodes and self.is_primed:
            await self._look(sorted(nodes))

    async def run(self) -> None:
        """Look at all nodes, again and again, until cancelled."""
        while True:
            try:
                await self.look_around()
            except StoreUnavailable:
                self._state.metrics.store_errors.inc()
            await asyncio.sleep(max(LOOK_S, len(self._mirror.fleet.nodes) / NODES_PER_S))

    def forget_counter(self) -> None:
        """Look again at the next opportunity, whether or not the leader moved anything."""
        self._counter = None

    async def look_around(self) -> None:
        """Look at every node, if the leader moved anything since."""
        admitted = set(await self._view.node_names())
        nodes = self._mirror.fleet.nodes
        for name, node in nodes.items():
            node.admitted = name in admitted
        counter = await self._view.generation()
        if counter == self._counter and self.is_primed:
            return
        known = admitted | set(self._at)
        await self._look(sorted(known))
        self._counter = counter
        if not self.is_primed and admitted <= set(nodes):
            # What was bound before is the world as it was found.
            self.is_primed = True
            self._state.log.info("shadow follows", nodes=len(nodes), bound=len(self._state.bound))
        for name in [name for name in self._at if name not in admitted]:
            del self._at[name]
        self._numbers = {key: seen for key, seen in self._numbers.items() if key[0] in nodes}

    async def _look(self, nodes: Sequence[str]) -> None:
        """Take in which jobs are at these nodes; one look at a time, or an older answer undoes a newer."""
        async with self._looking:
            await self._look_at(nodes)

    async def _look_at(self, nodes: Sequence[str]) -> None:
        found = await self._view.job_ids(nodes)
        known = {node: self._at.get(node, {}) for node in nodes}
        new = [job for node, jobs in found.items() for job in jobs if job not in known[node]]
        stored = await self._view.stored_jobs(new)
        for node, jobs in found.items():
            before = known[node]
            for job, ref in before.items():
                if job not in jobs:
                    self._leave(job, ref)
            self._at[node] = {job: ref for job, ref in before.items() if job in jobs}
        read = [(one, envelope) for one in stored if (envelope := _envelope_of(one)) is not None]
        for one, envelope in sorted(
            read, key=lambda pair: (pair[1].appended_ms, pair[0].number, pair[0].job)
        ):
            if one.job not in self._at[one.node]:
                self._at[one.node][one.job] = one.ref
                self._take(one, envelope)

    def _leave(self, job: str, ref: str) -> None:
        """A job is not at its node any more: it ended, or waits to be bound again."""
        bound = self._state.bound.get(ref)
        if bound is not None and str(bound.job) == job:
            self._state.unbind(ref, answered=True)
            self._state.forget(ref)

    def _take(self, job: StoredJob, envelope: Envelope) -> None:
        """Decide about a request that the leader has bound, then count it where the leader bound it."""
        state = self._state
        stage = stage_of(job.stage)
        is_decode = stage is Stage.DECODE
        state.unbind(job.ref)
        handoff = codec.decode_handoff(job.handoff)
        own = self._admissions.take(job.ref)
        node = state.fleet.nodes.get(job.node)
        if is_decode and handoff is not None and handoff.prefill_us and handoff.has_blocks:
            usage = Usage(prompt_tokens=handoff.prompt_tokens, cached_tokens=handoff.cached_tokens)
            learn_speed(state.fleet, handoff.node, usage, handoff.prefill_us)
        if node is not None:
            node.admitted = True
        one = (
            Comparison(verdict=Verdict.REFUSED, own="", leader=job.node)
            if isinstance(own, Refused)
            else compare(
                self._scheduler,
                own if own is not None else envelope,
                job.excluded,
                node,
                is_suspect=bool(job.crashed),
                is_decode=is_decode,
            )
        )
        self._seen.setdefault(job.ref, None)
        while len(self._seen) > KEPT_RECORDS:
            self._seen.popitem(last=False)
        if self.is_primed:
            self._note(job.ref, one, is_decode=is_decode)
        state.bind(
            job.ref,
            Bound(
                envelope=envelope,
                job=JobId.parse(job.job),
                failures=job.failures,
                excluded=job.excluded,
                crashed=job.crashed,
                hit_tokens=job.hit_tokens,
                stage=stage,
            ),
            uncached_tokens=1 if is_decode else max(1, envelope.prompt_tokens - job.hit_tokens),
            prefill_s=one.leader_prefill_s,
        )
        state.fleet.note_number(job.node, job.ref, job.number)

    def _note(self, ref: str, one: Comparison, *, is_decode: bool) -> None:
        tally, metrics = self._tally, self._metrics
        tally.add(one, is_decode=is_decode)
        metrics.decisions.labels(one.verdict.value).inc()
        if one.would_wait:
            metrics.would_wait.inc()
        if one.own_ttft_s is not None and one.leader_ttft_s is not None:
            metrics.ttft_s.labels("own").observe(one.own_ttft_s)
            metrics.ttft_s.labels("leader").observe(one.leader_ttft_s)
            self._seen[ref] = (one.leader_ttft_s, self._state.clock.now_ms())
        if one.own != one.leader:
            self._state.log.debug(
                "shadow differs",
                ref=ref,
                own=one.own,
                leader=one.leader,
                verdict=one.verdict.value,
                would_wait=one.would_wait,
            )
        if tally.compared % self._every == 0:
            summary = tally.summary()
            self._state.log.info(
                "shadow",
                compared=summary.compared,
                agreement=summary.agreement,
                unseen=summary.unseen,
                own_ttft_ms=summary.own_ttft.mean_ms,
                leader_ttft_ms=summary.leader_ttft.mean_ms,
                verdicts=summary.verdicts,
            )

    def take_record(self, record: LogRecord, limits: AdmissionLimits) -> None:
        """Judge a record by the shadow's own settings."""
        decision = admit(
            record.ref,
            record.key,
            record.value,
            appended_ms=record.timestamp_ms,
            now_ms=record.timestamp_ms,
            traceparent=record.traceparent,
            limits=lane_limits(limits, record.ref, self._state.names),
            carry_bodies=False,
        )
        made = decision.envelope if isinstance(decision, Admitted) else decision
        self.refused += isinstance(decision, Refused)
        self._metrics.records.labels("admitted" if isinstance(decision, Admitted) else "refused").inc()
        self._admissions.put(str(record.ref), made)

    def take_outcome(self, value: bytes) -> None:
        """Learn from an ending, and free what it held."""
        try:
            ended = _ended.decode(value)
        except msgspec.DecodeError:
            self._state.metrics.foreign.inc()
            return
        state, ref = self._state, ended.ref
        was_seen = ref in self._seen
        predicted = self._seen.pop(ref, None)
        self._admissions.take(ref)
        bound = state.unbind(ref, answered=True)
        if bound is not None:
            self._at.get(bound.job.node, {}).pop(str(bound.job), None)
        elif ended.timing.claimed and not was_seen:
            self._tally.unseen += 1
            self._metrics.unseen.inc()
        state.forget(ref)
        if predicted is not None and ended.timing.first_token:
            predicted_s, since_ms = predicted
            self._tally.measure(predicted_s, max(0, ended.timing.first_token - since_ms) / 1000)
        if ended.usage.completion_tokens:
            node = state.fleet.nodes.get(ended.node)
            if node is not None:
                node.answers.observe(ended.usage.completion_tokens)
            learn_speed(state.fleet, ended.node, ended.usage, ended.timing.prefill_us)


def _envelope_of(job: StoredJob) -> Envelope | None:
    try:
        return codec.envelopes.decode(job.envelope)
    except codec.MalformedRecord:
        return None
