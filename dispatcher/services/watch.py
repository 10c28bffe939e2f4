"""Watch: follow the nodes' registrations and reports, and act when one is gone.

The mirror is followed by leaders and standbys alike, so that a new leader knows its fleet at once.
The guard acts for the leader only: it admits nodes, fences the silent ones and takes their work back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from dispatcher.backends.clock import Clock
from dispatcher.backends.leader_store import LeaderStore
from dispatcher.backends.store_view import Placed, StoredNode, StoreView, StreamEntry, stream_order
from dispatcher.errors import StoreUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.names import Ref
from dispatcher.protocol.node import Wish
from dispatcher.protocol.outcome import FailureCause
from dispatcher.scheduling.breaker import BreakerState
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.silence import HealthyClock, silent_nodes
from dispatcher.scheduling.window import Waiting
from dispatcher.services.mend import waiting_from
from dispatcher.services.persist import until_answered
from dispatcher.services.state import LeaderState
from dispatcher.telemetry.metrics import DispatcherMetrics

READ_BLOCK_MS = 100
STANDBY_BLOCK_MS = 400
"""A standby decides nothing by time; healthy time wants answers that are at most `LONGEST_STEP_S` apart."""
READ_COUNT = 1000
RESYNC_S = 5.0
REAP_S = 2.0
GENERATION_CHECK_S = 1.0
RECONCILE_S = 2.0
FORGET_S = 60.0


class FleetMirror:
    """A fleet that follows the reports stream."""

    def __init__(self, view: StoreView, clock: Clock, metrics: DispatcherMetrics) -> None:
        self.fleet = Fleet()
        self.healthy = HealthyClock()
        self.changed: set[str] = set()
        self.left: set[str] = set()
        self.lost_cordons: dict[str, Wish] = {}
        self.before: Callable[[Sequence[StreamEntry]], Awaitable[None]] | None = None
        """What wants to know of entries before they count."""
        self._generation = ""
        self._cordons_changed = False
        self._unknown: set[str] = set()
        self._view = view
        self._clock = clock
        self._metrics = metrics
        self._cursor: bytes | None = None
        self._synced_at: float | None = None

    async def run(self) -> None:
        """Follow until cancelled (a standby's whole work)."""
        while True:
            await self.step(block_ms=STANDBY_BLOCK_MS)

    async def step(self, *, block_ms: int | None = READ_BLOCK_MS) -> None:
        """Take in what was reported; waits a little for news (not at all for None)."""
        try:
            await self._sync_when_due()
            assert self._cursor is not None
            entries = await self._view.read_stream(
                self._view.names.reports, self._cursor, block_ms=block_ms, count=READ_COUNT
            )
            if self.before is not None:
                await self.before(entries)
            for entry in entries:
                self._cursor = entry.id
                self._apply(entry.text("kind"), entry.fields.get(b"body", b""))
            if self._cordons_changed:
                await self._read_cordons()
            self.healthy.answered(self._clock.monotonic())
        except StoreUnavailable:
            self.healthy.failed()
            self._metrics.store_errors.inc()
            await asyncio.sleep(READ_BLOCK_MS / 1000)

    async def _sync_when_due(self) -> None:
        if self._unknown:
            unknown, self._unknown = self._unknown, set()
            self.merge(await self._view.nodes(sorted(unknown)))
        now = self._clock.monotonic()
        synced_at = self._synced_at
        if self._cursor is not None and synced_at is not None and now - synced_at < RESYNC_S:
            return
        newest = await self._view.last_id(self._view.names.reports)
        names = set(await self._view.node_names()) | set(self.fleet.nodes)
        self.merge(await self._view.nodes(sorted(names)))
        if self._cursor is None or stream_order(self._cursor) > stream_order(newest):
            self._cursor = newest
        await self._read_cordons()
        self._synced_at = now

    async def _read_cordons(self) -> None:
        """Take over what operators wish. What went with Redis's data can only be told, not kept."""
        found = await self._view.cordons()
        if found.generation != self._generation:
            gone = {node: wish for node, wish in self.fleet.cordons.items() if node not in found.wishes}
            self.lost_cordons |= gone
            self._metrics.cordons_lost.inc(len(gone))
        self._generation, self._cordons_changed = found.generation, False
        self.fleet.cordon(found.wishes)

    def merge(self, stored: Iterable[StoredNode]) -> None:
        """Take over identities that the stream did not show."""
        for node in stored:
            known = self.fleet.nodes.get(node.node)
            if known is None or known.identity.incarnation != node.incarnation:
                if node.identity and node.fenced != node.incarnation:
                    self._apply("register", node.identity)
                    if node.report:
                        self._apply("report", node.report)
            elif node.fenced == node.incarnation:
                known.available = False
            else:
                # Also a silent one, whose fence a session did not bring to its end: it is to be fenced again.
                known.available = True

    def _apply(self, kind: str, body: bytes) -> None:
        try:
            if kind == "register":
                identity = codec.identities.decode(body)
                known = self.fleet.nodes.get(identity.node)
                if known is None or known.identity != identity or not known.available:
                    self.fleet.admit(identity, self.healthy.now_s)
                self.changed.add(identity.node)
                self.left.discard(identity.node)
            elif kind == "cordon":
                self._cordons_changed = True
            elif kind == "report":
                report = codec.reports.decode(body)
                node = self.fleet.nodes.get(report.node)
                if node is None or node.identity.incarnation != report.incarnation:
                    self._unknown.add(report.node)
                else:
                    node.hear(report, self.healthy.now_s, self._clock.monotonic())
                    if report.left:
                        self.left.add(report.node)
        except codec.MalformedRecord:
            self._metrics.foreign.inc()

    def resync(self) -> None:
        """Compare with Redis at the next step, whenever the last time was."""
        self._synced_at = None

    def rewind(self) -> None:
        """Read the reports stream from its start: after a loss of data every node registers anew."""
        self._cursor = b"0-0"

    def forgive(self) -> None:
        """Restart every node's window of silence: a new leader has heard nobody yet."""
        for node in self.fleet.nodes.values():
            node.last_heard_s = self.healthy.now_s


class Guard:
    """Acts on what the mirror shows."""

    def __init__(
        self,
        state: LeaderState,
        store: LeaderStore,
        view: StoreView,
        mirror: FleetMirror,
        *,
        heartbeat_ttl_s: float,
        claim_lease_s: float,
    ) -> None:
        self._state = state
        self._store = store
        self._view = view
        self._mirror = mirror
        self._window_s = heartbeat_ttl_s
        self._lease_s = claim_lease_s
        self._warned: set[str] = set()
        self._reaped_at = 0.0
        self._checked_at = 0.0
        self._reconciled_at = 0.0
        self._forgot_at = 0.0
        self._astray: dict[str, str] = {}
        self._drained: set[str] = set()
        nodes, cordoned = state.metrics.nodes, state.metrics.cordoned
        self._available, self._unavailable = nodes.labels("available"), nodes.labels("unavailable")
        self._on_probation = nodes.labels("on_probation")
        self._cordoned = {wish: cordoned.labels(wish.value) for wish in Wish}

    async def run(self) -> None:
        """Follow and act until cancelled."""
        while True:
            await self._mirror.step()
            await self.act()
            self._state.work.set()

    async def act(self) -> None:
        """One round of decisions."""
        mirror, state = self._mirror, self._state
        changed, mirror.changed = mirror.changed, set()
        for name in sorted(changed):
            await self._welcome(name)
        await self._fence_strange()
        left, mirror.left = mirror.left, set()
        for name in sorted(left):
            await self.fence(name, FailureCause.DRAINING)
        await self._obey()
        heard = {node.name: node.last_heard_s for node in mirror.fleet.nodes.values() if node.available}
        now_s = mirror.healthy.now_s
        for name in silent_nodes(heard, now_s, window_s=self._window_s, already_warned=self._warned):
            state.log.warning("node silent", node=name, silent_s=round(now_s - heard[name], 2))
            state.metrics.fenced.inc()
            await self.fence(name, FailureCause.NODE_LOST)
        self._end_probations()
        await self._reap()
        await self._check_generation()
        await self._reconcile()
        await self._forget_gone()
        self._available.set(len(heard))
        self._unavailable.set(len(mirror.fleet.nodes) - len(heard))
        state.metrics.stale_load_s.set(max((now_s - last for last in heard.values()), default=0))

    def _end_probations(self) -> None:
        state = self._state
        now_s = state.clock.monotonic()
        on_probation = 0
        for node in self._mirror.fleet.nodes.values():
            if node.breaker.tick(now_s):
                state.log.info("node is tried again with one request at a time", node=node.name)
            on_probation += node.available and node.breaker.state is not BreakerState.CLOSED
        self._on_probation.set(on_probation)

    async def _obey(self) -> None:
        """Give back what is queued at nodes that shall drain; nothing new is bound to them meanwhile."""
        mirror, state = self._mirror, self._state
        lost, mirror.lost_cordons = mirror.lost_cordons, {}
        for name, wish in lost.items():
            state.log.error("cordon_lost", node=name, wish=wish.value, fix=f"flexlb {wish.value} {name}")
        cordons = mirror.fleet.cordons
        draining = {
            name for name, wish in cordons.items() if wish is Wish.DRAIN and name in mirror.fleet.nodes
        }
        for name in sorted(draining - self._drained):
            moved = await self._requeue(name, "queued", "", FailureCause.DRAINING)
            state.log.warning("node drains", node=name, moved=moved)
        self._drained = draining
        for wish, gauge in self._cordoned.items():
            gauge.set(sum(one is wish for one in cordons.values()))

    async def _welcome(self, name: str) -> None:
        node = self._mirror.fleet.nodes[name]
        incarnation = node.identity.incarnation
        await until_answered(lambda: self._store.admit(name), self._state.metrics)
        await self._requeue(name, "others", incarnation, FailureCause.NODE_LOST)
        node.admitted = True
        self._state.log.info("node admitted", node=name, incarnation=incarnation)

    async def fence(self, name: str, cause: FailureCause) -> None:
        """Fence a node's incarnation and take back everything it held."""
        node = self._mirror.fleet.nodes.get(name)
        if node is None or not node.available:
            return
        node.available = False
        incarnation = node.identity.incarnation
        moved = await self._requeue(name, "fence", incarnation, cause)
        self._state.log.warning(
            "node fenced", node=name, incarnation=incarnation, cause=cause.value, moved=moved
        )

    async def _fence_strange(self) -> None:
        """Fence nodes with keys of another type than ours, which only their agents can have made so."""
        self._store.strange |= self._view.strange
        self._view.strange.clear()
        for name in sorted(self._tell_strange()):
            node = self._mirror.fleet.nodes.get(name)
            self._state.metrics.fenced.inc()
            if node is not None and node.available:
                await self.fence(name, FailureCause.NODE_LOST)
            else:
                incarnation = node.identity.incarnation if node is not None else "forgotten"
                await self._requeue(name, "fence", incarnation, FailureCause.NODE_LOST)

    def _tell_strange(self) -> set[str]:
        """Tell of the keys of another type that were found since; the nodes they belong to."""
        keys, self._store.strange = self._store.strange, set()
        by_node: dict[str, list[str]] = {}
        for key in sorted(keys):
            by_node.setdefault(self._view.names.node_of(key), []).append(key)
        for name, strange in by_node.items():
            self._state.metrics.foreign.inc(len(strange))
            self._state.log.error("keys of another type dropped", node=name, keys=strange[:10])
        return by_node.keys() - {""}

    async def _check_generation(self) -> None:
        now_s = self._state.clock.monotonic()
        if now_s - self._checked_at < GENERATION_CHECK_S:
            return
        self._checked_at = now_s
        known = self._store.counter
        found = await until_answered(self._view.generation, self._state.metrics)
        self._store.note_generation(found, expected=self._state.generation, at_least=known)

    async def _reconcile(self) -> None:
        """Find pending requests that this leader takes for bound: a repeated call's answer told of none.

        What is seen so twice in a row is no request on its way.
        """
        now_s = self._state.clock.monotonic()
        if now_s - self._reconciled_at < RECONCILE_S:
            return
        self._reconciled_at = now_s
        state = self._state
        pending = await until_answered(self._view.pending_refs, state.metrics)
        astray = {
            ref: str(bound.job)
            for ref in pending
            if (bound := state.bound.get(ref)) is not None and state.waiting(ref) is None
        }
        for ref, job in astray.items():
            if self._astray.get(ref) == job:
                state.log.warning("pending request was taken for bound", ref=ref, job=job)
                state.unbind(ref)
                await self._load_pending([Ref.parse(ref)])
        self._astray = astray

    async def _forget_gone(self) -> None:
        """Forget nodes that Redis keeps nothing of: gone for an hour, as where each start has a new name."""
        now_s = self._state.clock.monotonic()
        if now_s - self._forgot_at < FORGET_S:
            return
        self._forgot_at = now_s
        fleet, metrics = self._mirror.fleet, self._state.metrics
        names = set(await until_answered(self._view.node_names, metrics)) | set(fleet.nodes)
        stored = await until_answered(lambda: self._view.nodes(sorted(names)), metrics)
        for name in sorted(names - {node.node for node in stored}):
            known = fleet.nodes.get(name)
            if known is not None and (known.available or known.held):
                continue
            if await until_answered(lambda node=name: self._store.forget(node), metrics):  # type: ignore[misc]
                fleet.forget(name)
                self._state.log.info("node forgotten", node=name)

    async def _reap(self) -> None:
        now_s = self._mirror.healthy.now_s
        if now_s - self._reaped_at < REAP_S or self._mirror.healthy.since_trouble_s < self._lease_s:
            return
        self._reaped_at = now_s
        for node in list(self._mirror.fleet.nodes.values()):
            if node.held:
                await self._requeue(node.name, "expired", "", FailureCause.LEASE_EXPIRED)

    async def _requeue(self, name: str, mode: str, incarnation: str, cause: FailureCause) -> int:
        refs = await until_answered(
            lambda: self._store.requeue(name, mode, incarnation, cause.value), self._state.metrics
        )
        if mode == "fence":
            self._tell_strange()  # of a life that is over now
        if refs is None:
            return 0
        unknown = []
        for ref in refs:
            bound = self._state.unbind(str(ref))
            if bound is None or bound.handoff is not None:
                # What was handed over to it is still of use when it had not begun, which Redis knows.
                unknown.append(ref)
                continue
            excluded = bound.excluded if name in bound.excluded else (*bound.excluded, name)
            self._state.enter(
                Waiting(
                    ref=ref,
                    envelope=bound.envelope,
                    from_pending=True,
                    failures=bound.failures,
                    excluded=excluded,
                    crashed=bound.crashed,
                    entered_ms=self._state.clock.now_ms(),
                )
            )
        await self._load_pending(unknown)
        self._state.metrics.requeued.labels(cause.value).inc(len(refs))
        return len(refs)

    async def _load_pending(self, refs: list[Ref]) -> None:
        state = self._state
        ours = [ref for ref in refs if ref.source in state.progress]
        missing = [str(ref) for ref in ours if state.waiting(str(ref)) is None]
        if not missing:
            return
        stored = await until_answered(lambda: self._view.pending_jobs(missing), self._state.metrics)
        unread = set(missing)
        for job in stored:
            try:
                self._state.enter(waiting_from(job))
            except codec.MalformedRecord:
                continue
            unread.discard(job.ref)
        for ref in sorted(unread):
            self._state.log.error("pending job can't be read, to be written anew", ref=ref)
            self._state.note_misread(Placed(ref=Ref.parse(ref), job=None))
