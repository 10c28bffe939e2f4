"""What a leader reads from Redis: the streams it follows, and the whole ledger when it takes over.

Reading needs no fence: every act that follows from it carries the epoch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from dispatcher.backends.scripts import Redis, is_wrong_type, translate
from dispatcher.errors import StoreUnavailable
from dispatcher.protocol.names import JobId, Names, Ref
from dispatcher.protocol.node import Medium, Wish


@dataclass(frozen=True, kw_only=True)
class StreamEntry:
    """One entry of a stream."""

    id: bytes
    fields: dict[bytes, bytes]

    def text(self, name: str) -> str:
        """A field as text, '' when absent. Bytes that are no text are replaced: its reader will refuse it."""
        return self.fields.get(name.encode(), b"").decode(errors="replace")


def xread(client: Redis, stream: str, after: bytes, block_ms: int | None, count: int) -> Awaitable[Any]:
    """Ask for entries of one stream.

    As a plain command: redis-py's own method measures each answer for telemetry of its own, and whoever
    follows a stream comes through here for every entry.
    """
    block = () if block_ms is None else (b"BLOCK", block_ms)
    answer: Awaitable[Any] = client.execute_command(
        "XREAD", *block, b"COUNT", count, b"STREAMS", stream, after
    )
    return answer


@dataclass(frozen=True, kw_only=True)
class StoredJob:
    """A request in one of Redis's places. `node` is '' for pending ones.

    `number` is its assignment number at the node; `hit_tokens` what was expected cached there; `crashed` the
    nodes whose engines died under it; `cause` why its last attempt ended, '' when it had none;
    `stage` what its attempt does of it, `handoff` what a prefill stage left for the next.
    """

    job: str
    node: str
    ref: str
    claimed: bool
    envelope: bytes
    failures: int
    excluded: tuple[str, ...]
    not_before_ms: int = 0
    number: int = 0
    hit_tokens: int = 0
    crashed: tuple[str, ...] = ()
    cause: str = ""
    stage: str = ""
    handoff: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where in Redis a request is, whatever its job holds: at a node as `job`, or pending (None)."""

    ref: Ref
    job: JobId | None


@dataclass(kw_only=True)
class StoredNode:
    """A node as Redis knows it."""

    node: str
    incarnation: str
    fenced: str
    identity: bytes
    report: bytes
    alive: bool


@dataclass(frozen=True, kw_only=True)
class Cordons:
    """What operators wish, by node, in the Redis data set `generation` ('' while it has none)."""

    generation: str
    wishes: dict[str, Wish]


@dataclass(frozen=True, kw_only=True)
class NodeWork:
    """How many jobs wait in a node's queue, and how many its agent holds."""

    queued: int
    claimed: int


@dataclass(frozen=True, kw_only=True)
class CachedBlocks:
    """A node's cache view as of block event `sequence`: raw 8-byte hashes by tier."""

    node: str
    incarnation: str
    sequence: int
    tiers: dict[Medium, frozenset[bytes]]


@dataclass(kw_only=True)
class StoredLedger:
    """Everything a new leader needs of an intact Redis.

    `unreadable` are jobs whose fields no script of ours has written, or a later release, and ids of ours
    without a job: a record of a failed attempt, which RQ's `requeue` puts into a queue, looks like one.
    """

    marks: dict[str, int] = field(default_factory=dict)
    above: dict[str, list[int]] = field(default_factory=dict)
    settled: dict[int, int] = field(default_factory=dict)
    jobs: list[StoredJob] = field(default_factory=list)
    closing_refs: list[str] = field(default_factory=list)
    unreadable: list[Placed] = field(default_factory=list)


_Call = tuple[str, str, list[str] | None]
_FIELDS, _LIST, _ZSET, _SET = "hmget", "lrange", "zrange", "smembers"
_JOB_FIELDS = [
    "ref",
    "envelope",
    "failures",
    "excluded",
    "seq",
    "hit",
    "crashed",
    "cause",
    "stage",
    "transfer",
]


def stream_order(id: bytes) -> tuple[int, int]:
    """What stream ids are ordered by."""
    milliseconds, _, sequence = id.partition(b"-")
    return int(milliseconds), int(sequence or 0)


class StoreView:
    """Reads of one pool over one client."""

    def __init__(self, client: Redis, names: Names) -> None:
        self._client = client
        self.names = names
        self.strange: set[str] = set()
        """Keys of nodes that were read as nothing, because they are of another type than ours."""

    async def close(self) -> None:
        """Close the client's connections."""
        await self._client.aclose()

    async def _ask(self, call: Awaitable[Any], doing: str) -> Any:
        try:
            return await call
        except RedisError as error:
            raise translate(error, doing) from error
        except (OSError, EOFError) as error:
            raise StoreUnavailable(f"{doing}: {error}") from error

    async def _ask_each(self, calls: Sequence[_Call], doing: str, *, at_once: bool = False) -> list[Any]:
        """Read keys that agents may write: (command, key, argument) each; None for one of another type.

        Args:
            at_once: all in one step of the server's.
        """
        if not calls:
            return []
        pipe = self._client.pipeline(transaction=at_once)
        for command, key, argument in calls:
            if argument is not None:
                pipe.hmget(key, argument)
            elif command == _SET:
                pipe.smembers(key)
            else:
                getattr(pipe, command)(key, 0, -1)
        answers = await self._ask(pipe.execute(raise_on_error=False), doing)
        for index, ((_, key, _), answer) in enumerate(zip(calls, answers, strict=True)):
            if is_wrong_type(answer):
                self.strange.add(key)
                answers[index] = None
            elif isinstance(answer, RedisError):
                raise translate(answer, doing) from answer
        return list(answers)

    async def ping(self) -> None:
        """Ask for a sign of life."""
        await self._ask(self._client.ping(), "ping")

    async def read_stream(
        self, stream: str, after: bytes, *, block_ms: int | None, count: int
    ) -> list[StreamEntry]:
        """Entries after `after`, oldest first; waits up to `block_ms` for the first (None: not at all)."""
        answer = await self._ask(xread(self._client, stream, after, block_ms, count), f"read {stream}")
        if not answer:
            return []
        return [StreamEntry(id=entry, fields=fields) for entry, fields in answer[0][1] if fields is not None]

    async def read_closing(
        self, after: bytes, *, block_ms: int, count: int
    ) -> tuple[list[StreamEntry], tuple[str, int] | None]:
        """Entries of `closing` after `after`, and the generation as it was when they were read.

        Both are read in one step: whatever ended in these entries was bound at or below that counter.
        """
        names = self.names
        if not await self.read_stream(names.closing, after, block_ms=block_ms, count=1):
            return [], None
        pipe = self._client.pipeline(transaction=True)
        pipe.xrange(names.closing, min=b"(" + after, count=count)
        pipe.hmget(names.generation, ["id", "counter"])
        found, (generation, counter) = await self._ask(pipe.execute(), "closing")
        entries = [StreamEntry(id=entry, fields=fields) for entry, fields in found]
        return entries, (generation.decode(), int(counter or 0)) if generation else None

    async def last_id(self, stream: str) -> bytes:
        """The id of the newest entry, `0-0` when there is none."""
        newest = await self._ask(self._client.xrevrange(stream, count=1), f"read {stream}")
        return newest[0][0] if newest else b"0-0"

    async def generation(self) -> tuple[str, int] | None:
        """(id, counter) of the Redis generation, None when there is none."""
        found = await self._ask(self._client.hmget(self.names.generation, ["id", "counter"]), "generation")
        return (found[0].decode(), int(found[1] or 0)) if found[0] else None

    async def node_names(self) -> list[str]:
        """Admitted nodes, sorted."""
        members = await self._ask(self._client.smembers(self.names.nodes), "nodes")
        return sorted(member.decode() for member in members)

    async def nodes(self, names: Iterable[str]) -> list[StoredNode]:
        """What is known of each node; those that Redis forgot are left out."""
        wanted = list(names)
        calls: list[_Call] = []
        for node in wanted:
            calls.append((_FIELDS, self.names.node(node), ["incarnation", "fenced", "identity"]))
            calls.append((_FIELDS, self.names.load(node), ["incarnation", "report"]))
        answers = await self._ask_each(calls, "nodes")
        found = []
        for index, node in enumerate(wanted):
            incarnation, fenced, identity = answers[2 * index] or (None, None, None)
            loaded, report = answers[2 * index + 1] or (None, None)
            if incarnation is not None:
                found.append(
                    StoredNode(
                        node=node,
                        incarnation=incarnation.decode(errors="replace"),
                        fenced=(fenced or b"").decode(errors="replace"),
                        identity=identity or b"",
                        report=report or b"",
                        alive=loaded == incarnation,
                    )
                )
        return found

    async def cordons(self) -> Cordons:
        """What operators wish, read in one step with the generation."""
        pipe = self._client.pipeline(transaction=True)
        pipe.hget(self.names.generation, "id")
        pipe.hgetall(self.names.cordons)
        generation, wishes = await self._ask(pipe.execute(), "cordons")
        return Cordons(
            generation=(generation or b"").decode(),
            wishes={node.decode(): _wish(wish.decode()) for node, wish in wishes.items()},
        )

    async def node_work(self, nodes: Iterable[str]) -> dict[str, NodeWork]:
        """The work at each node: few jobs, late binding sees to that."""
        wanted = list(nodes)
        calls = [call for node in wanted for call in self._places(node)]
        found = [members or [] for members in await self._ask_each(calls, "work of nodes")]
        return {
            node: NodeWork(queued=len(found[3 * at]) + len(found[3 * at + 1]), claimed=len(found[3 * at + 2]))
            for at, node in enumerate(wanted)
        }

    async def explanations(self, tenant: str, id: str) -> list[bytes]:
        """Why a request went where it went, oldest first, encoded; [] when none is kept."""
        names = self.names
        found = await self._ask(
            self._client.hget(names.explanations, names.digest(tenant, id)), "explanations"
        )
        return found.split(b"\n") if found else []

    async def owner(self, tenant: str, id: str) -> str:
        """The ref that a (tenant, id) belongs to, '' when nobody used that id in the last minutes."""
        found = await self._ask(self._client.get(self.names.identity(tenant, id)), "identity")
        return found.decode().partition("|")[0] if found else ""

    async def cached_blocks(self, node: str) -> CachedBlocks | None:
        """What a node's cache view holds, read in one step; None when Redis does not know the node."""
        tiers = list(Medium)
        calls: list[_Call] = [(_FIELDS, self.names.node(node), ["incarnation", "blocks_seq"])]
        calls += [(_SET, self.names.cached_blocks(node, medium), None) for medium in tiers]
        told, *members = await self._ask_each(calls, "cached blocks", at_once=True)
        incarnation, sequence = told or (None, None)
        if incarnation is None:
            return None
        return CachedBlocks(
            node=node,
            incarnation=incarnation.decode(errors="replace"),
            sequence=int(sequence) if sequence and sequence.isdigit() else 0,
            tiers={medium: frozenset(found or ()) for medium, found in zip(tiers, members, strict=True)},
        )

    async def ledger(self) -> StoredLedger:
        """Read every place of the pool: marks, jobs by node, pending, closing."""
        names = self.names
        client = self._client
        ledger = StoredLedger()
        marks: dict[bytes, bytes] = await self._ask(client.hgetall(names.marks), "marks")
        ledger.marks = {source.decode(): int(low) for source, low in marks.items()}
        settled: dict[bytes, bytes] = await self._ask(client.hgetall(names.settled), "settled")
        ledger.settled = {int(partition): int(offset) for partition, offset in settled.items()}
        for source in ledger.marks:
            members = await self._ask(client.zrange(names.above(source), 0, -1), "marks")
            ledger.above[source] = [int(member) for member in members]
        await self._read_jobs(ledger, await self.node_names())
        await self._read_pending(ledger)
        entries = await self._ask(client.xrange(names.closing), "closing")
        ledger.closing_refs = [StreamEntry(id=id, fields=fields).text("ref") for id, fields in entries]
        return ledger

    async def _read_jobs(self, ledger: StoredLedger, nodes: Iterable[str]) -> None:
        for node in nodes:
            found = await self._ask_each(self._places(node), "jobs")
            queued, delivering, claimed = (members or [] for members in found)
            # Whoever may write a queue can put any id into it: no other node's job, and no text of theirs.
            mine = f"{self.names.queue(node)}--".encode()
            waiting = [job for job in (*queued, *delivering) if job.startswith(mine) and job.isascii()]
            ids = waiting + [job for job in claimed if job.startswith(mine) and job.isascii()]
            fields = await self._job_fields([self.names.job(job.decode()) for job in ids])
            for index, (job, stored) in enumerate(zip(ids, fields, strict=True)):
                in_hand = index >= len(waiting)
                _keep(ledger, job.decode(), _stored_job(job.decode(), node, stored, claimed=in_hand))

    async def _read_pending(self, ledger: StoredLedger) -> None:
        pending = await self._ask(self._client.zrange(self.names.pending, 0, -1, withscores=True), "pending")
        fields = await self._job_fields(
            [self.names.pending_job(ref.decode(errors="replace")) for ref, _ in pending]
        )
        for (ref, not_before), stored in zip(pending, fields, strict=True):
            name = ref.decode(errors="replace")
            job = _stored_job("", "", stored, claimed=False, not_before_ms=int(not_before))
            _keep(ledger, name, job if job is not None and job.ref == name else None)

    async def pending_refs(self) -> list[str]:
        """Refs in `pending`, by not-before."""
        return [
            ref.decode(errors="replace")
            for ref in await self._ask(self._client.zrange(self.names.pending, 0, -1), "pending")
        ]

    async def pending_jobs(self, refs: Iterable[str]) -> list[StoredJob]:
        """The pending entries of `refs`, those that exist and can be read."""
        fields = await self._job_fields([self.names.pending_job(ref) for ref in refs])
        jobs = [_stored_job("", "", stored, claimed=False) for stored in fields]
        return [job for job in jobs if job is not None]

    async def stored_job(self, job: str) -> StoredJob | None:
        """One job, None when its hash does not exist or can't be read."""
        (fields,) = await self._job_fields([self.names.job(job)])
        return _stored_job(job, "", fields, claimed=False)

    async def job_ids(self, nodes: Sequence[str]) -> dict[str, list[str]]:
        """The jobs at each node, read in the order in which they move on: none is missed."""
        found = await self._ask_each([call for node in nodes for call in self._places(node)], "jobs")
        ids = {}
        for at, node in enumerate(nodes):
            mine = f"{self.names.queue(node)}--".encode()
            jobs = (job for place in found[3 * at : 3 * at + 3] for job in place or ())
            ids[node] = [
                job.decode() for job in dict.fromkeys(jobs) if job.startswith(mine) and job.isascii()
            ]
        return ids

    async def stored_jobs(self, jobs: Sequence[str]) -> list[StoredJob]:
        """These jobs, without those that are gone or can't be read."""
        fields = await self._job_fields([self.names.job(job) for job in jobs])
        found = []
        for job, stored in zip(jobs, fields, strict=True):
            node = job.removeprefix(f"{self.names.pool}--").partition("--")[0]
            read = _stored_job(job, node, stored, claimed=False)
            if read is not None:
                found.append(read)
        return found

    async def failed_attempts(self, job: str) -> list[bytes]:
        """A job's earlier failed attempts, oldest first, encoded; [] when its hash does not exist."""
        (found,) = await self._ask_each([(_FIELDS, self.names.job(job), ["attempts"])], "failed attempts")
        return found[0].split(b"\n") if found and found[0] else []

    def _places(self, node: str) -> list[_Call]:
        names = self.names
        return [
            (_LIST, names.queue_key(node), None),
            (_LIST, names.intermediate(node), None),
            (_ZSET, names.claimed(node), None),
        ]

    async def _job_fields(self, keys: list[str]) -> list[list[bytes | None]]:
        answers = await self._ask_each([(_FIELDS, key, _JOB_FIELDS) for key in keys], "jobs")
        return [fields or [None] * len(_JOB_FIELDS) for fields in answers]


def _wish(text: str) -> Wish:
    """A wish; one that we do not know, of a later release, at least binds nothing."""
    return Wish(text) if text in Wish.__members__.values() else Wish.CORDON


def _keep(ledger: StoredLedger, name: str, job: StoredJob | None) -> None:
    if job is not None:
        ledger.jobs.append(job)
        return
    try:
        id = JobId.parse(name) if "--" in name else None
        ledger.unreadable.append(Placed(ref=id.ref if id is not None else Ref.parse(name), job=id))
    except ValueError:
        pass  # whoever put it there: it names no request


def _stored_job(
    job: str, node: str, fields: list[Any], *, claimed: bool, not_before_ms: int = 0
) -> StoredJob | None:
    """A job as its hash tells, which its node's agent may write; None when that can't be read."""
    ref, envelope, failures, excluded, number, hit, crashed, cause, stage, handoff = fields
    if ref is None:
        return None
    try:
        read = Ref.parse(ref.decode())
        if job and JobId.parse(job).ref != read:
            return None
        return StoredJob(
            job=job,
            node=node,
            ref=str(read),
            claimed=claimed,
            envelope=envelope or b"",
            failures=int(failures or 0),
            excluded=_names(excluded),
            not_before_ms=not_before_ms,
            number=int(number or 0),
            hit_tokens=int(hit or 0),
            crashed=_names(crashed),
            cause=(cause or b"").decode(),
            stage=(stage or b"").decode(),
            handoff=handoff or b"",
        )
    except ValueError:
        return None


def _names(text: bytes | None) -> tuple[str, ...]:
    return tuple(name for name in (text or b"").decode().split(",") if name)
