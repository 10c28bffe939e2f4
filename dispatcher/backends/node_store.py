"""What an agent says to Redis: one method per script, each fenced by its incarnation.

An agent's scripts touch only keys named by its node and append to shared streams, so that an ACL
can confine it. Like the leader's, each may be repeated after a cut connection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from redis.exceptions import RedisError

from dispatcher.backends.clock import Clock, ServerClock
from dispatcher.backends.scripts import Argument, Redis, ScriptRunner, translate
from dispatcher.backends.store_view import StreamEntry, xread
from dispatcher.errors import StoreUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.names import Names
from dispatcher.protocol.node import BlockEvent, Medium, NodeIdentity, NodeReport

NODE_TTL_MS = 3_600_000
WORKER_TTL_S = 120
CONTROL_COUNT = 100
NO_CHECKPOINTS: Mapping[str, bytes] = MappingProxyType({})
KEPT_BLOCK_EVENTS = 20_000
"""Events of the whole fleet in the stream; whoever falls behind reads the nodes' sets instead."""


@dataclass(frozen=True, kw_only=True)
class Busy:
    """Another incarnation of this node lives; try again after `wait_ms`."""

    incarnation: str
    wait_ms: int


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A job in the agent's hands: what it must run, not yet decoded.

    `hit_tokens` is what the leader expected of this node's cache; `checkpoint` is what the attempt before
    left, empty when it left none. `stage` is a `Stage`'s text, `handoff` what a prefill stage handed over.
    """

    job: str
    seq: int
    envelope: bytes
    data: bytes
    failures: int
    hit_tokens: int = 0
    checkpoint: bytes = b""
    stage: str = ""
    handoff: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The answer to a claim: jobs, and ids in our queue that are not ours."""

    jobs: tuple[Claimed, ...]
    foreign: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """One attempt that ended: kind is outcome, failed, released or handoff; `checkpoint`: for the next."""

    job: str
    kind: str
    ref: str
    id: str
    payload: bytes
    checkpoint: bytes = b""


class NodeStore:
    """The scripts of one node."""

    def __init__(
        self,
        runner: ScriptRunner,
        names: Names,
        node: str,
        *,
        heartbeat_ttl_s: float,
        lease_s: float,
        server_clock: ServerClock | None = None,
    ) -> None:
        self._runner = runner
        self._client: Redis = runner.client
        self.names = names
        self.node = node
        self._clock = server_clock or ServerClock(Clock())
        self._heartbeat_ms = int(heartbeat_ttl_s * 1000)
        self._lease_ms = int(lease_s * 1000)

    async def register(
        self, identity: NodeIdentity, held: Mapping[str, tuple[bytes, bytes]], *, now_iso: str
    ) -> str | Busy | None:
        """Begin an incarnation: the generation id, Busy, or None when this incarnation was fenced."""
        names, node = self.names, self.node
        keys = (
            names.node(node),
            names.load(node),
            names.held(node),
            names.worker(node),
            *(names.cached_blocks(node, medium) for medium in Medium),
        )
        arguments: list[Argument] = [
            identity.incarnation,
            codec.encode(identity),
            self._heartbeat_ms,
            NODE_TTL_MS,
            now_iso,
            names.queue(node),
            WORKER_TTL_S,
            names.reports,
            names.generation,
            len(held),
        ]
        for job, (envelope, data) in held.items():
            arguments += (job, envelope, data)
        asked_s = self._clock.monotonic()
        state, *rest = await self._runner.run("register", keys, arguments)
        if state == b"ok":
            self._clock.heard(int(rest[1]), asked_s)
            return str(rest[0].decode())
        if state == b"busy":
            return Busy(incarnation=rest[0].decode(), wait_ms=int(rest[1]))
        return None

    async def report(self, report: NodeReport) -> str:
        """Publish load; returns the generation id, raises Fenced."""
        names, node = self.names, self.node
        keys = (names.node(node), names.load(node))
        arguments: list[Argument] = [report.incarnation, codec.encode(report), self._heartbeat_ms]
        arguments += (names.reports, names.generation)
        asked_s = self._clock.monotonic()
        generation, now_ms = await self._runner.run("report", keys, arguments)
        self._clock.heard(int(now_ms), asked_s)
        return str(generation.decode())

    async def publish_blocks(self, events: Sequence[BlockEvent]) -> int:
        """Publish changes of the cache view; returns the highest sequence that Redis has applied.

        One below the last event's means a gap: send a reset and the whole view.

        Raises:
            Fenced: the events' incarnation is fenced, replaced or unknown.
            StoreFull: at maxmemory.
        """
        names, node = self.names, self.node
        tiers = list(Medium)
        keys = (
            names.node(node),
            *(names.cached_blocks(node, medium) for medium in tiers),
        )
        arguments: list[Argument] = [events[0].incarnation, NODE_TTL_MS, KEPT_BLOCK_EVENTS]
        arguments += (names.blocks, len(events))
        for event in events:
            arguments += (
                event.sequence,
                event.kind.value,
                tiers.index(Medium(event.medium)) + 1,
                codec.encode(event),
                bytes.fromhex("".join(event.hashes)),
            )
        return int(await self._runner.run("blocks", keys, arguments))

    async def extend(
        self,
        incarnation: str,
        jobs: Sequence[str],
        *,
        now_iso: str,
        checkpoints: Mapping[str, bytes] = NO_CHECKPOINTS,
    ) -> tuple[int, list[str]]:
        """Prolong leases and keep checkpoints: (jobs waiting in the queue, jobs that were taken away)."""
        names, node = self.names, self.node
        keys = (
            names.node(node),
            names.claimed(node),
            names.queue_key(node),
            names.intermediate(node),
            names.worker(node),
        )
        arguments: list[Argument] = [incarnation, self._lease_ms, NODE_TTL_MS, now_iso, WORKER_TTL_S]
        for job in jobs:
            arguments += (job, checkpoints.get(job, b""))
        backlog, *lost = await self._runner.run("extend", keys, arguments)
        return int(backlog), [job.decode() for job in lost]

    async def claim(
        self, incarnation: str, number: int, limit: int, *, now_iso: str, execution: str = "", job: str = ""
    ) -> Claim:
        """Take up to `limit` jobs. `number` rises with each claim; repeat it to repeat the answer.

        A stock RQ worker has taken its `job` already and proves it by RQ's `execution` id.
        """
        names, node = self.names, self.node
        keys = (
            names.node(node),
            names.claimed(node),
            names.queue_key(node),
            names.intermediate(node),
            names.wip(node),
            names.last_claim(node),
        )
        arguments: list[Argument] = [
            incarnation,
            number,
            limit,
            self._lease_ms,
            now_iso,
            names.queue(node),
            execution,
            job,
            names.closing,
        ]
        rows = await self._runner.run("claim", keys, arguments)
        jobs = tuple(
            Claimed(
                job=row[0].decode(),
                seq=_number(row[1]),
                envelope=row[2] or b"",
                data=row[3] or b"",
                failures=_number(row[4]),
                hit_tokens=_number(row[5]),
                checkpoint=row[6] or b"",
                stage=(row[7] or b"").decode(errors="replace"),
                handoff=row[8] or b"",
            )
            for row in rows
            if len(row) > 1
        )
        return Claim(
            jobs=jobs, foreign=tuple(row[0].decode(errors="replace") for row in rows if len(row) == 1)
        )

    async def complete(self, incarnation: str, endings: Sequence[Ending]) -> list[str]:
        """End attempts; 'ok' or 'lost' for each, raises Fenced."""
        names, node = self.names, self.node
        keys = (names.node(node), names.claimed(node), names.wip(node))
        arguments: list[Argument] = [incarnation, names.closing, len(endings)]
        for ending in endings:
            arguments += (ending.job, ending.kind, ending.ref, ending.id, ending.payload, ending.checkpoint)
        return [answer.decode() for answer in await self._runner.run("complete", keys, arguments)]

    async def wait_for_work(self, timeout_s: float) -> bool:
        """Block until the queue has a job (moved to RQ's intermediate list) or the time is up."""
        names, node = self.names, self.node
        try:
            moved = await self._client.blmove(
                names.queue_key(node),
                names.intermediate(node),
                timeout_s,
                "LEFT",
                "RIGHT",
            )
        except RedisError as error:
            raise translate(error, "wait for work") from error
        except (OSError, EOFError) as error:
            raise StoreUnavailable(f"wait for work: {error}") from error
        return moved is not None

    async def read_control(self, after: bytes, *, block_ms: int) -> list[StreamEntry]:
        """What the leader told this node since `after`."""
        try:
            answer = await xread(self._client, self.names.control(self.node), after, block_ms, CONTROL_COUNT)
        except RedisError as error:
            raise translate(error, "control") from error
        except (OSError, EOFError) as error:
            raise StoreUnavailable(f"control: {error}") from error
        if not answer:
            return []
        return [StreamEntry(id=entry, fields=fields) for entry, fields in answer[0][1]]


def _number(field: bytes | None) -> int:
    """A field of a job, 0 where it is damaged: what matters of it the leader knows."""
    return int(field) if field is not None and field.isdigit() else 0
