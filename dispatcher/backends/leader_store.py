"""What a leader writes to Redis: one method per script, each fenced by the epoch.

Values in, values out; no policy. A method that raises StoreUnavailable may have had its effect:
calling it again with the same arguments is always right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from redis.exceptions import RedisError

from dispatcher.backends.leader_lock import Lease
from dispatcher.backends.scripts import Argument, ScriptRunner, is_wrong_type, translate
from dispatcher.errors import GenerationLost
from dispatcher.protocol.handoff import Stage
from dispatcher.protocol.names import JobId, Names, Ref
from dispatcher.protocol.node import Medium

NO_ERRORS: Mapping[str, str] = MappingProxyType({})
IDENTITY_WINDOW_MS = 600_000
"""How long (tenant, id) is remembered."""
EXPLAINED_REQUESTS = 5_000
"""Requests whose explanations are kept: about 15 MB, whatever the fleet's size."""
EXPLAINED_EACH = 8
"""Explanations kept of one request: the newest."""
EXPLAINED_MS = 3_600_000
"""How long they are kept at most."""


@dataclass(frozen=True, kw_only=True)
class AssignItem:
    """One request to bind; `from_pending` when it was bound before.

    `hit_tokens` is what the node's cache is expected to hold of its prompt.
    """

    job: JobId
    incarnation: str
    cost_tokens: int
    from_pending: bool
    identity: str = ""
    fingerprint: str = ""
    data: bytes = b""
    envelope: bytes = b""
    hit_tokens: int = 0
    stage: Stage = Stage.WHOLE


@dataclass(frozen=True, kw_only=True)
class CloseItem:
    """One ending decided by the leader. `job` when it is in a node's hands; `kind` none, outcome or dead."""

    place: str
    ref: Ref
    kind: str
    id: str = ""
    payload: bytes = b""
    job: JobId | None = None
    identity: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class RetryItem:
    """An attempt without an outcome that goes back to pending.

    `attempt` is it, encoded, for a dead letter; `error` is what RQ's failed registry
    shows of it, '' for nothing. `handoff`, encoded, of a prefill stage that did its part.
    """

    entry: bytes
    job: JobId
    not_before_ms: int
    failures: int
    excluded: tuple[str, ...]
    cause: str
    crashed: tuple[str, ...] = ()
    attempt: bytes = b""
    error: str = ""
    handoff: bytes = b""


@dataclass(frozen=True, kw_only=True)
class AdoptItem:
    """An attempt that an agent still runs after Redis lost its data."""

    job: JobId
    cost_tokens: int
    identity: str
    fingerprint: str
    envelope: bytes
    data: bytes


@dataclass(frozen=True, kw_only=True)
class MendItem:
    """A request whose job can't be read, as its record tells it. `job` None when it is pending."""

    ref: Ref
    job: JobId | None
    envelope: bytes
    data: bytes


class LeaderStore:
    """The leader's scripts for one pool under one lease."""

    def __init__(self, runner: ScriptRunner, names: Names, lease: Lease) -> None:
        self._runner = runner
        self.names = names
        self.lease = lease
        self.counter = 0
        """The generation's counter, as the newest answer gave it (answers may overtake each other)."""
        self.strange: set[str] = set()
        """Keys of nodes that scripts found to be none of ours, and dropped; the guard takes them."""

    def note_counter(self, counter: int) -> None:
        """Note the generation's counter as Redis gave it."""
        self.counter = max(self.counter, counter)

    def note_generation(self, found: tuple[str, int] | None, *, expected: str, at_least: int) -> None:
        """Compare the generation as Redis has it with the one expected, at the counter known before.

        Raises:
            GenerationLost: it is another one, or went back in time.
        """
        if found is None or found[0] != expected or found[1] < at_least:
            raise GenerationLost(
                f"Redis lost data: expected generation {expected} at {at_least} or more, seen {found}"
            )
        self.note_counter(found[1])

    async def _run_counted(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Run a script that moves requests between places: it bumps the generation's counter.

        Raises:
            GenerationLost: Redis has a lower counter than it had: it went back in time.
        """
        names = self.names
        counter, answer, *strange = await self._run(
            name, (names.epoch, names.generation, *keys), [self.counter, *arguments]
        )
        self.note_counter(int(counter))
        self._note_strange(strange[0] if strange else [])
        return answer

    def _note_strange(self, keys: Sequence[bytes]) -> None:
        self.strange.update(key.decode(errors="replace") for key in keys)

    async def _run(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        self.lease.check()
        answer: Any = await self._runner.run(name, keys, [self.lease.token, *arguments])
        return answer

    async def assign(
        self, items: Sequence[AssignItem], marks: Mapping[str, int], *, now_iso: str
    ) -> list[tuple[str, int]]:
        """Bind `items` and advance *assigned* marks; (answer, assignment number) as in assign.lua."""
        names = self.names
        arguments: list[Argument] = [
            names.prefix,
            names.pool,
            now_iso,
            IDENTITY_WINDOW_MS,
            len(marks),
            len(items),
        ]
        for source, low in marks.items():
            arguments += (source, low)
        for item in items:
            job = item.job
            arguments += (
                "pending" if item.from_pending else "log",
                job.node,
                item.incarnation,
                str(job),
                str(job.ref),
                job.ref.source,
                job.ref.offset,
                item.cost_tokens,
                item.identity,
                item.fingerprint,
                item.data,
                item.envelope,
                item.hit_tokens,
                item.stage.value,
            )
        keys = (names.epoch, names.generation, names.marks, names.pending, names.cordons)
        counter, answers, numbers, strange = await self._run("assign", keys, [self.counter, *arguments])
        self.note_counter(int(counter))
        self._note_strange(strange)
        return [(answer.decode(), int(number)) for answer, number in zip(answers, numbers, strict=True)]

    async def close(self, items: Sequence[CloseItem]) -> list[str]:
        """Decide endings; answers as in close.lua."""
        names = self.names
        arguments: list[Argument] = [names.prefix, names.pool, IDENTITY_WINDOW_MS, len(items)]
        for item in items:
            arguments += (
                item.place,
                str(item.ref),
                item.ref.source,
                item.ref.offset,
                item.job.node if item.job else "",
                str(item.job) if item.job else "",
                item.kind,
                item.id,
                item.payload,
                item.identity,
                item.fingerprint,
            )
        keys = (names.marks, names.pending, names.closing)
        return [answer.decode() for answer in await self._run_counted("close", keys, arguments)]

    async def requeue(self, node: str, mode: str, incarnation: str, cause: str) -> list[Ref] | None:
        """Move a node's work to pending; None when the node has another incarnation by now (fence)."""
        names = self.names
        keys = (
            names.pending,
            names.node(node),
            names.claimed(node),
            names.queue_key(node),
            names.intermediate(node),
            names.wip(node),
            names.control(node),
            names.load(node),
            names.held(node),
            names.closing,
            *(names.cached_blocks(node, medium) for medium in Medium),
        )
        state, *refs = await self._run_counted(
            "requeue", keys, [names.prefix, node, mode, incarnation, cause]
        )
        return [Ref.parse(ref.decode()) for ref in refs] if state == b"ok" else None

    async def retry(self, items: Sequence[RetryItem], *, now_iso: str = "") -> list[str]:
        """Put attempts back to pending; answers as in retry.lua."""
        names = self.names
        arguments: list[Argument] = [names.prefix, now_iso, len(items)]
        for item in items:
            arguments += (
                item.entry,
                str(item.job),
                str(item.job.ref),
                item.not_before_ms,
                item.failures,
                ",".join(item.excluded),
                ",".join(item.crashed),
                item.cause,
                item.attempt,
                item.error,
                item.handoff,
            )
        answers = await self._run_counted("retry", (names.pending, names.closing), arguments)
        return [answer.decode() for answer in answers]

    async def mend(self, items: Sequence[MendItem], *, now_iso: str) -> list[str]:
        """Move requests to pending, their jobs written anew; answers as in mend.lua."""
        names = self.names
        arguments: list[Argument] = [names.prefix, names.pool, now_iso, len(items)]
        for item in items:
            arguments += (
                item.job.node if item.job else "",
                str(item.job) if item.job else "",
                str(item.ref),
                item.envelope,
                item.data,
            )
        return [answer.decode() for answer in await self._run_counted("mend", (names.pending,), arguments)]

    async def settle(
        self,
        positions: Mapping[int, int],
        entries: Sequence[tuple[bytes, str]],
        *,
        errors: Mapping[str, str] = NO_ERRORS,
        now_iso: str = "",
    ) -> None:
        """Drop published closing entries (entry id, job id to delete or '').

        Args:
            errors: what RQ's failed registry shall show, by job id.
        """
        names = self.names
        arguments: list[Argument] = [now_iso, len(positions)]
        for partition, offset in positions.items():
            arguments += (partition, offset)
        for entry, job in entries:
            arguments += (entry, job, errors.get(job, ""))
        await self._run_counted("settle", (names.closing, names.settled), arguments)

    async def admit(self, node: str) -> None:
        """Enter a node into the shared sets."""
        await self._enter(node, "admit")

    async def forget(self, node: str) -> bool:
        """Take a node out of the shared sets; False when it lives or holds work."""
        return await self._enter(node, "forget")

    async def _enter(self, node: str, mode: str) -> bool:
        names = self.names
        keys = (
            names.nodes,
            "rq:queues",
            "rq:workers",
            f"rq:workers:{names.queue(node)}",
            names.node(node),
            names.claimed(node),
            names.queue_key(node),
            names.intermediate(node),
        )
        arguments = [node, names.queue_key(node), names.worker(node), mode]
        return bool(await self._run_counted("admit", keys, arguments))

    async def begin_generation(
        self, generation: str, marks: Mapping[str, int], above: Mapping[str, Sequence[int]]
    ) -> None:
        """Start a new generation with these *assigned* marks and taken offsets above them."""
        names = self.names
        arguments: list[Argument] = [names.prefix, names.pool, generation, len(marks)]
        for source, low in marks.items():
            arguments += (source, low)
        for source, offsets in above.items():
            for start in range(0, len(offsets), 1000):
                part = offsets[start : start + 1000]
                arguments += (source, len(part), *part)
        keys = (
            names.epoch,
            names.generation,
            names.marks,
            names.pending,
            names.closing,
            names.nodes,
            names.settled,
        )
        await self._run("begin_generation", keys, arguments)
        self.counter = 0

    async def remember(self, identities: Mapping[str, str]) -> None:
        """Note whose (tenant, id) is whose, by identity key: `<ref>|<fingerprint>`; known ones stay."""
        arguments: list[Argument] = [IDENTITY_WINDOW_MS]
        for key, owner in identities.items():
            arguments += (key, owner)
        await self._run_counted("remember", (), arguments)

    async def explain(self, items: Sequence[tuple[str, str, bytes]]) -> None:
        """Keep explanations: (tenant, id, explanation) each."""
        names = self.names
        arguments: list[Argument] = [EXPLAINED_REQUESTS, EXPLAINED_EACH, EXPLAINED_MS]
        for tenant, id, explanation in items:
            arguments += (names.digest(tenant, id), explanation)
        await self._run("explain", (names.epoch, names.explanations, names.explained), arguments)

    async def adopt(
        self, node: str, incarnation: str, items: Sequence[AdoptItem], *, lease_s: float, now_iso: str
    ) -> list[str]:
        """Accept attempts that an agent still runs; answers as in adopt.lua."""
        names = self.names
        arguments: list[Argument] = [
            names.prefix,
            incarnation,
            int(lease_s * 1000),
            now_iso,
            names.queue(node),
            IDENTITY_WINDOW_MS,
            len(items),
        ]
        for item in items:
            ref = item.job.ref
            arguments += (str(item.job), str(ref), ref.source, ref.offset, item.cost_tokens)
            arguments += (item.identity, item.fingerprint, item.envelope, item.data)
        keys = (names.node(node), names.claimed(node), names.marks, names.wip(node))
        return [answer.decode() for answer in await self._run_counted("adopt", keys, arguments)]

    async def held_inventory(self, node: str) -> dict[str, tuple[bytes, bytes]]:
        """What a node registered as held: job id to (envelope, data)."""
        try:
            held = await self._runner.client.hgetall(self.names.held(node))
        except RedisError as error:
            if is_wrong_type(error):
                self.strange.add(self.names.held(node))
                return {}
            raise translate(error, "held inventory") from error
        pairs = {}
        for job, value in held.items():
            envelope, _, data = value.partition(b"\n")
            pairs[job.decode(errors="replace")] = (envelope, data)
        return pairs
