"""`flexlb audit`: read the raw topics and name every request that was not answered exactly once.

It trusts nothing that the system says of itself and shares with it only the protocol (names, codec) and
the error types: consumers, identity and fingerprint are its own. `Ledger` and `judge` are pure; `audit`
feeds them from Kafka. Kept per record are a few integers and its identity, never the record.

The rules, by the broker's timestamps:
- A record needs one outcome that names its ref. A record that can't be read, and gives no id in its JSON
  or its key, needs a dead letter instead.
- (tenant, id) is an identity for ten minutes, from the first record that uses it to the repeat. Within
  them a record with the same fingerprint (endpoint, model, body, reply route) is coalesced: it needs no
  outcome. One with another fingerprint needs its own `Rejected(id_in_use)`. A repeat after that is a new
  request, but may still have been coalesced if the first was answered less than ten minutes before it.
- More than one `begin` among a request's chunks is a re-execution: reported, no finding.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Protocol

import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from dispatcher.backends.access import KAFKA_ACCESS
from dispatcher.backends.addresses import KAFKA_SERVERS, is_kafka_servers
from dispatcher.backends.connect import connect_kafka
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.backends.topic_ranges import Ranges, ranges_of, read_ranges
from dispatcher.errors import LogUnavailable, SettingsError
from dispatcher.protocol import codec
from dispatcher.protocol.names import Attempt, Lane, Names, Ref
from dispatcher.protocol.outcome import Reason
from dispatcher.protocol.request import InferenceRequest
from dispatcher.settings import DispatcherSettings

IDENTITY_WINDOW_MS = 600_000
SETTLE_S = 10.0
SHOWN = 20
FETCH_BYTES = 4 << 20
POLL_MS = 1000
JUDGE_EVERY_S = 1.0
STALL_S = 60.0
"""A read that does not advance for this long is given up."""


class Kind(StrEnum):
    """The streams that an audit reads, in this order."""

    INTERACTIVE = "requests"
    BATCH = "requests.batch"
    OUTCOMES = "outcomes"
    DEAD = "requests.dead"
    REPLIES = "replies"


LANES = {Kind.INTERACTIVE: Lane.INTERACTIVE, Kind.BATCH: Lane.BATCH}


class RawRecord(Protocol):
    """What a Kafka client gives; times in epoch milliseconds."""

    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One request, and what is wrong with it. `ref` or `id` is '' where there is none."""

    ref: str
    tenant: str = ""
    id: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found. `requests` are the records appended in the range; `outcomes` count theirs by
    kind; `coalesced` needed none. The lists from `lost` to `unreadable` are findings."""

    from_ms: int
    to_ms: int
    requests: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    coalesced: int = 0
    refused_ids: int = 0
    dead_letters: int = 0
    lost: list[Finding] = field(default_factory=list)
    unanswered: list[Finding] = field(default_factory=list)
    duplicated: list[Finding] = field(default_factory=list)
    orphans: list[Finding] = field(default_factory=list)
    unreadable: list[Finding] = field(default_factory=list)
    reexecuted: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    identity_window_s: int = IDENTITY_WINDOW_MS // 1000

    @property
    def findings(self) -> int:
        """How many findings there are; a lost record's id may also be among the unanswered."""
        return sum(map(len, (self.lost, self.unanswered, self.duplicated, self.orphans, self.unreadable)))

    @property
    def exit_code(self) -> int:
        """0 when clean, 1 with findings."""
        return 1 if self.findings else 0


class _Source:
    """The request records of one partition of a lane, in columns, by offset."""

    def __init__(self, lane: Lane, partition: int) -> None:
        self.lane = lane
        self.partition = partition
        self.first = 0
        self.end: int | None = None
        self.log_end: int | None = None
        self.offsets = array("q")
        self.timestamps = array("q")
        self.fingerprints = array("Q")
        self.identities: list[str] = []
        self.answers = bytearray()
        self.refusals = bytearray()
        self.exact_refusals = bytearray()
        self.letters = bytearray()
        self.answered_ms = array("q")
        self.begun = array("Q")
        self.beyond: list[tuple[int, str]] = []

    def add(self, offset: int, timestamp_ms: int, print_: int, identity: str) -> None:
        """Note a record."""
        self.offsets.append(offset)
        self.timestamps.append(timestamp_ms)
        self.fingerprints.append(print_)
        self.identities.append(identity)
        self.answered_ms.append(0)
        self.begun.append(0)
        for column in (self.answers, self.refusals, self.exact_refusals, self.letters):
            column.append(0)

    def find(self, offset: int) -> int | None:
        """The row of an offset."""
        row = bisect_left(self.offsets, offset)
        return row if row < len(self.offsets) and self.offsets[row] == offset else None

    def ref(self, offset: int) -> str:
        """The ref of a record of this partition."""
        return str(Ref(self.lane, self.partition, offset))


def _count(column: bytearray, row: int) -> None:
    column[row] = min(column[row] + 1, 255)


def _identity(tenant: str, id: str) -> str:
    return f"{tenant}\0{id}"


class _ChunkHead(msgspec.Struct):
    ref: str
    attempt: str
    kind: str


_chunk_head = msgspec.json.Decoder(_ChunkHead)


def fingerprint(request: InferenceRequest) -> int:
    """What tells a repeat from a reused id; never 0."""
    digest = blake2b(digest_size=8)
    for part in (request.endpoint.value, request.model):
        digest.update(part.encode() + b"\0")
    if request.body_ref is not None:
        digest.update(b"ref" + request.body_ref.sha256.encode())
    else:
        digest.update(b"raw" + bytes(request.body))
    if request.reply_to is not None:
        digest.update(f"\0{request.reply_to.topic}\0{request.reply_to.partition}".encode())
    return int.from_bytes(digest.digest()) or 1


def _salvaged(record: RawRecord) -> str:
    """The identity of a record that its codec refuses: from its JSON, else its key, else ''."""
    found = codec.salvage_identity(record.value or b"")
    if found is not None:
        return _identity(*found)
    try:
        key = (record.key or b"").decode()
    except UnicodeDecodeError:
        return ""
    return _identity("", key) if 0 < len(record.key or b"") <= 256 else ""


class Ledger:
    """What was read so far. Request records come first, those of a partition in order of offsets."""

    def __init__(self, from_ms: int, to_ms: int) -> None:
        self.from_ms = from_ms
        self.to_ms = to_ms
        self.outcomes: Counter[str] = Counter()
        self.dead_letters = 0
        self.orphans: list[Finding] = []
        self.unreadable: list[Finding] = []
        self.notes: list[str] = []
        self.sources: dict[tuple[Lane, int], _Source] = {}
        self.repeated: set[str] = set()
        self.attempts: dict[str, set[int]] = {}
        self._seen: set[str] = set()

    def source(self, lane: Lane, partition: int) -> _Source:
        """The records of a partition."""
        key = (lane, partition)
        if key not in self.sources:
            self.sources[key] = _Source(lane, partition)
        return self.sources[key]

    def add(self, kind: Kind, record: RawRecord) -> None:
        """Note one record of a stream."""
        match kind:
            case Kind.INTERACTIVE | Kind.BATCH:
                self._add_request(LANES[kind], record)
            case Kind.OUTCOMES:
                self._add_outcome(record)
            case Kind.DEAD:
                self._add_letter(record)
            case Kind.REPLIES:
                self._add_chunk(record)

    def _add_request(self, lane: Lane, record: RawRecord) -> None:
        try:
            request = codec.requests.decode(record.value or b"")
            identity, print_ = _identity(request.tenant, request.id), fingerprint(request)
        except codec.MalformedRecord:
            identity, print_ = _salvaged(record), 0
        if identity in self._seen:
            self.repeated.add(identity)
        elif identity:
            self._seen.add(identity)
        self.source(lane, record.partition).add(record.offset, record.timestamp, print_, identity)

    def _add_outcome(self, record: RawRecord) -> None:
        try:
            head = codec.outcome_heads.decode(record.value or b"")
        except codec.MalformedRecord as error:
            self._refuse(Kind.OUTCOMES, record, error)
            return
        identity = _identity(head.tenant, head.id)
        row = self._row(head.ref, identity)
        if row is None:
            return
        source, at = row
        if source.fingerprints[at] and source.identities[at] != identity:
            known = Finding(ref=head.ref, tenant=head.tenant, id=head.id)
            self.orphans.append(_because(known, f"its ref names a record of {_shown(source.identities[at])}"))
            return
        if self.is_audited(source, at):
            self.outcomes[head.kind] += 1
        if head.reason == Reason.ID_IN_USE:
            _count(source.refusals, at)
            if head.fingerprint:
                _count(source.exact_refusals, at)
        else:
            _count(source.answers, at)
            source.answered_ms[at] = source.answered_ms[at] or record.timestamp

    def _add_letter(self, record: RawRecord) -> None:
        try:
            letter = codec.dead_letters.decode(record.value or b"")
        except codec.MalformedRecord as error:
            self._refuse(Kind.DEAD, record, error)
            return
        row = self._row(letter.ref, _identity(letter.tenant, letter.id))
        if row is not None:
            _count(row[0].letters, row[1])
            self.dead_letters += self.is_audited(*row)

    def _add_chunk(self, record: RawRecord) -> None:
        if b"begin" not in (record.value or b""):
            return
        try:
            head = _chunk_head.decode(record.value or b"")
            ref, attempt = Ref.parse(head.ref), Attempt.parse(head.attempt)
        except (ValueError, msgspec.DecodeError, RecursionError):
            return  # whoever waits for chunks drops it as well: the outcome counts
        source = self.sources.get((ref.lane, ref.partition))
        row = source.find(ref.offset) if source else None
        packed = attempt.epoch << 20 | attempt.n
        if head.kind != "begin" or source is None or row is None or packed >> 63 or attempt.n >> 20:
            return
        first = source.begun[row]
        if not first:
            source.begun[row] = packed
        elif first != packed and self.is_audited(source, row):
            self.attempts.setdefault(head.ref, {first}).add(packed)

    def _row(self, text: str, identity: str) -> tuple[_Source, int] | None:
        """The record that a ref names; None, with a finding where there should be one, if there is none."""
        tenant, _, id = identity.partition("\0")
        orphan = Finding(ref=text, tenant=tenant, id=id)
        try:
            ref = Ref.parse(text)
        except ValueError as error:
            self.orphans.append(_because(orphan, str(error)))
            return None
        source = self.sources.get((ref.lane, ref.partition))
        if source is None:
            self.orphans.append(_because(orphan, "its ref names a partition that does not exist"))
            return None
        row = source.find(ref.offset)
        if row is not None:
            return source, row
        if source.end is not None and ref.offset >= source.end:
            source.beyond.append((ref.offset, identity))
        elif ref.offset >= source.first:
            self.orphans.append(_because(orphan, "its ref names no request record"))
        return None

    def _refuse(self, kind: Kind, record: RawRecord, error: Exception) -> None:
        where = f"{kind.value}[{record.partition}] {record.offset}"
        self.unreadable.append(Finding(ref="", detail=f"{where}: {error}"))

    def is_audited(self, source: _Source, row: int) -> bool:
        """Whether a record was appended in the range; others only tell whose an id is."""
        return self.from_ms <= source.timestamps[row] <= self.to_ms


@dataclass(frozen=True, slots=True, order=True)
class _Use:
    """One use of an identity: a row, ordered by time."""

    timestamp_ms: int
    lane: Lane
    partition: int
    row: int
    source: _Source = field(compare=False)

    @property
    def ref(self) -> str:
        return self.source.ref(self.source.offsets[self.row])

    @property
    def print_(self) -> int:
        return self.source.fingerprints[self.row]

    @property
    def has_answer(self) -> bool:
        return self.source.answers[self.row] > 0

    @property
    def has_refusal(self) -> bool:
        return self.source.refusals[self.row] > 0

    @property
    def has_outcome(self) -> bool:
        return self.has_answer or self.has_refusal


class _Verdict:
    """Collects what `judge` finds."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.lost: list[Finding] = []
        self.unanswered: list[Finding] = []
        self.duplicated: list[Finding] = []
        self.requests = 0
        self.coalesced = 0
        self.refused_ids = 0

    def row(self, source: _Source, row: int) -> None:
        """Judge what needs to know nothing of other records."""
        self.requests += 1
        self.refused_ids += source.refusals[row] > 0
        outcomes = source.answers[row] + source.refusals[row]
        if outcomes > 1:
            self.duplicated.append(_finding(source, row, f"{outcomes} outcomes for one record"))
        identity = source.identities[row]
        if not identity:
            if not outcomes and not source.letters[row]:
                detail = "it can't be read and gives no id, and has no dead letter"
                self.lost.append(_finding(source, row, detail))
        elif not outcomes and identity not in self.ledger.repeated:
            self.lost.append(_finding(source, row, f"no outcome; appended {_iso(source.timestamps[row])}"))
            self.unanswered.append(_finding(source, row, "no record of this id has an outcome"))

    def identity(self, uses: list[_Use]) -> None:
        """Judge the records that share a (tenant, id)."""
        cluster: list[_Use] = []
        for use in sorted(uses):
            if cluster and use.timestamp_ms - cluster[0].timestamp_ms > IDENTITY_WINDOW_MS:
                if _is_coalesced_late(use, cluster):
                    self.coalesced += self._counts(use)
                    continue
                self._cluster(cluster)
                cluster = []
            cluster.append(use)
        self._cluster(cluster)

    def _counts(self, use: _Use) -> bool:
        return self.ledger.is_audited(use.source, use.row)

    def _cluster(self, uses: Sequence[_Use]) -> None:
        """Judge the records that use an identity within its window."""
        answered = [use for use in uses if use.has_answer]
        if not answered:
            self._unanswered(uses)
            return
        owner = answered[0]
        for use in answered[1:]:
            same = "it repeats" if use.print_ == owner.print_ else "it has another body or reply route than"
            self._add(self.duplicated, use, f"answered, though {same} {owner.ref}, which was answered too")
        for use in uses:
            if use.has_outcome:
                if use > owner and use.print_ == owner.print_ and use.source.exact_refusals[use.row]:
                    detail = f"refused as id_in_use, though it repeats {owner.ref}, which was answered"
                    self._add(self.duplicated, use, detail)
            elif use.print_ == owner.print_:
                self.coalesced += self._counts(use)
            else:
                detail = f"another body or reply route than {owner.ref}, and no Rejected(id_in_use)"
                self._add(self.lost, use, detail)

    def _unanswered(self, uses: Sequence[_Use]) -> None:
        awaited: set[int] = set()
        refused = {use.print_ for use in uses if use.has_refusal}
        for use in uses:
            if use.has_outcome:
                continue
            if use.print_ in awaited and use.print_ not in refused:
                self.coalesced += self._counts(use)
                continue
            awaited.add(use.print_)
            self._add(self.lost, use, f"no outcome; appended {_iso(use.timestamp_ms)}")
        first = next((use for use in uses if self._counts(use)), None)
        if first is not None and not any(use.has_outcome for use in uses):
            self._add(self.unanswered, first, "no record of this id has an outcome")

    def _add(self, findings: list[Finding], use: _Use, detail: str) -> None:
        if self._counts(use):
            findings.append(_finding(use.source, use.row, detail))


def _is_coalesced_late(use: _Use, cluster: Sequence[_Use]) -> bool:
    """Whether an identity that outlived its first record's window explains the missing outcome."""
    return not use.has_outcome and any(
        one.has_answer
        and one.print_ == use.print_
        and use.timestamp_ms <= one.source.answered_ms[one.row] + IDENTITY_WINDOW_MS
        for one in cluster
    )


def judge(ledger: Ledger) -> AuditResult:
    """Apply the rules to what was read."""
    verdict = _Verdict(ledger)
    uses: dict[str, list[_Use]] = {}
    for source in ledger.sources.values():
        for row, timestamp_ms in enumerate(source.timestamps):
            if ledger.is_audited(source, row):
                verdict.row(source, row)
            identity = source.identities[row]
            if identity in ledger.repeated:
                use = _Use(timestamp_ms, source.lane, source.partition, row, source)
                uses.setdefault(identity, []).append(use)
    for group in uses.values():
        verdict.identity(group)
    return AuditResult(
        from_ms=ledger.from_ms,
        to_ms=ledger.to_ms,
        requests=verdict.requests,
        outcomes=dict(ledger.outcomes.most_common()),
        coalesced=verdict.coalesced,
        refused_ids=verdict.refused_ids,
        dead_letters=ledger.dead_letters,
        lost=verdict.lost,
        unanswered=verdict.unanswered,
        duplicated=verdict.duplicated,
        orphans=[*ledger.orphans, *_beyond_the_log(ledger)],
        unreadable=ledger.unreadable,
        reexecuted=_reexecuted(ledger),
        notes=ledger.notes,
    )


def _beyond_the_log(ledger: Ledger) -> Iterator[Finding]:
    for source in ledger.sources.values():
        for offset, identity in source.beyond:
            if source.log_end is not None and offset >= source.log_end:
                tenant, _, id = identity.partition("\0")
                detail = f"its ref names no request record: the log ends at {source.log_end}"
                yield Finding(ref=source.ref(offset), tenant=tenant, id=id, detail=detail)


def _reexecuted(ledger: Ledger) -> list[Finding]:
    found = []
    for ref, attempts in ledger.attempts.items():
        at = Ref.parse(ref)
        source = ledger.sources[at.lane, at.partition]
        row = bisect_left(source.offsets, at.offset)
        found.append(_finding(source, row, f"{len(attempts)} attempts began"))
    return found


def _finding(source: _Source, row: int, detail: str) -> Finding:
    tenant, _, id = source.identities[row].partition("\0")
    return Finding(ref=source.ref(source.offsets[row]), tenant=tenant, id=id, detail=detail)


def _because(finding: Finding, detail: str) -> Finding:
    return Finding(ref=finding.ref, tenant=finding.tenant, id=finding.id, detail=detail)


def _shown(identity: str) -> str:
    tenant, _, id = identity.partition("\0")
    return f"{tenant}/{id}" if tenant else id


def _iso(timestamp_ms: int) -> str:
    return datetime.fromtimestamp(timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")


def examine(streams: Iterable[tuple[Kind, Iterable[RawRecord]]], *, from_ms: int, to_ms: int) -> AuditResult:
    """Audit records that are at hand, the lanes' before the others'."""
    ledger = Ledger(from_ms, to_ms)
    for kind, records in streams:
        for record in records:
            ledger.add(kind, record)
    return judge(ledger)


# Reading


Consumers = Callable[..., Any]


async def audit(
    bootstrap: str,
    pool: str = "default",
    from_ms: int = 0,
    to_ms: int | None = None,
    settle_s: float = SETTLE_S,
    *,
    consumers: Consumers | None = None,
) -> AuditResult:
    """Audit the requests that were appended to a pool from `from_ms` to `to_ms` (None: until now).

    Args:
        settle_s: how long to wait for outcomes that are missing.
        consumers: makes consumers shaped like aiokafka's; those of `bootstrap` when absent.
    Raises:
        SettingsError: `bootstrap` is no list of brokers.
        LogUnavailable: the broker did not answer, or the pool's topics do not exist.
    """
    if consumers is None and not is_kafka_servers(bootstrap):
        raise SettingsError(f"--kafka: expected {KAFKA_SERVERS.expected}, seen {bootstrap!r}")

    def connect(*topics: str, **options: Any) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(*topics, bootstrap_servers=bootstrap, enable_auto_commit=False, **options)

    ledger = Ledger(from_ms, int(time.time() * 1000) if to_ms is None else to_ms)
    try:
        return await _Reading(ledger, Names(pool), consumers or connect).run(settle_s)
    except (KafkaError, OSError) as error:
        raise LogUnavailable(f"audit of {bootstrap}: {error!r}") from error


class _Reading:
    """Reads a pool's topics into a ledger."""

    def __init__(self, ledger: Ledger, names: Names, consumers: Consumers) -> None:
        self._ledger = ledger
        self._names = names
        self._consumers = consumers
        self._kinds = {
            **{names.requests(lane): kind for kind, lane in LANES.items()},
            names.outcomes: Kind.OUTCOMES,
            names.dead: Kind.DEAD,
            names.replies: Kind.REPLIES,
        }

    async def run(self, settle_s: float) -> AuditResult:
        ledger = self._ledger
        # Records of the ten minutes before the range tell whose an id is.
        since_ms = max(0, ledger.from_ms - IDENTITY_WINDOW_MS)
        await self._check_topics()
        lanes = [self._names.requests(lane) for lane in LANES.values()]
        async with self._consumer("read_committed", *lanes) as requests:
            await self._read_requests(requests, since_ms)
            endings = (self._names.outcomes, self._names.dead)
            async with self._consumer("read_committed", *endings) as outcomes:
                await self._read(outcomes, await ranges_of(outcomes, since_ms=since_ms))
                await self._settle(outcomes, settle_s)
            for tp, end in (await requests.end_offsets(list(requests.assignment()))).items():
                ledger.source(LANES[self._kinds[tp.topic]], tp.partition).log_end = end
        async with self._consumer("read_uncommitted", self._names.replies) as replies:
            await self._read(replies, await ranges_of(replies, since_ms=ledger.from_ms))
        return judge(ledger)

    async def _check_topics(self) -> None:
        async with self._consumer("read_committed") as consumer:
            existing = await consumer.topics()
        for topic in self._kinds:
            if topic not in existing:
                raise LogUnavailable(
                    f"topic {topic}: expected it to exist, seen nothing; check --pool, or create it with "
                    "'flexlb init'"
                )

    @contextlib.asynccontextmanager
    async def _consumer(self, isolation: str, *topics: str) -> AsyncIterator[Any]:
        consumer = self._consumers(
            *topics,
            group_id=None,
            isolation_level=isolation,
            auto_offset_reset="earliest",
            fetch_max_bytes=FETCH_BYTES * 4,
            max_partition_fetch_bytes=FETCH_BYTES,
        )
        try:
            await consumer.start()
            yield consumer
        finally:
            await consumer.stop()

    async def _read_requests(self, consumer: Any, since_ms: int) -> None:
        ledger = self._ledger
        ranges = await ranges_of(consumer, since_ms=since_ms, to_ms=ledger.to_ms)
        starts = await consumer.beginning_offsets(list(ranges))
        for tp, (first, end) in ranges.items():
            source = ledger.source(LANES[self._kinds[tp.topic]], tp.partition)
            source.first, source.end = first, end
            if first == starts[tp] > 0:
                ledger.notes.append(
                    f"{tp.topic}[{tp.partition}] begins at offset {first}: retention may have taken "
                    "records of the range"
                )
        await self._read(consumer, ranges)

    async def _read(self, consumer: Any, ranges: Ranges) -> None:
        async for record in read_ranges(consumer, ranges, poll_ms=POLL_MS, stall_s=STALL_S):
            self._ledger.add(self._kinds[record.topic], record)

    async def _settle(self, consumer: Any, settle_s: float) -> None:
        """Follow outcomes and dead letters while some are missing and time is left."""
        until_s = time.monotonic() + settle_s
        while (left_s := until_s - time.monotonic()) > 0 and judge(self._ledger).lost:
            seen_s, is_new = time.monotonic(), False
            # Judging a million records takes a second: only after news, and not after each record.
            while (waited_s := time.monotonic() - seen_s) < left_s and not (
                is_new and waited_s > JUDGE_EVERY_S
            ):
                batches = await consumer.getmany(timeout_ms=int(min(left_s, JUDGE_EVERY_S) * 1000))
                for tp, records in batches.items():
                    for record in records:
                        self._ledger.add(self._kinds[tp.topic], record)
                        is_new = True


# The command


def configure_audit(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb audit`."""
    add = parser.add_argument
    add_flags(parser, DispatcherSettings, only={"kafka", "pool", *KAFKA_ACCESS})
    times = "ISO 8601 (UTC unless it says otherwise) or epoch seconds, by the broker's clock"
    add(
        "--from", dest="from_ms", type=parse_time, metavar="T", help=f"{times} (default: an hour before --to)"
    )
    add("--to", dest="to_ms", type=parse_time, metavar="T", help="the same (default: now)")
    add(
        "--settle",
        type=float,
        default=SETTLE_S,
        metavar="S",
        help=f"wait so many seconds for missing outcomes, which may come after --to (default {SETTLE_S:g})",
    )
    add("--show", type=int, default=SHOWN, metavar="N", help=f"findings of a kind to print (default {SHOWN})")
    add("--json", action="store_true", help="print everything as JSON")


add_arguments = configure_audit


def parse_time(text: str) -> int:
    """Read a time; returns epoch milliseconds.

    Raises:
        argparse.ArgumentTypeError: it is neither ISO 8601 nor a number of seconds.
    """
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected ISO 8601 like 2026-01-31T12:00:00Z or epoch seconds, seen {text[:60]!r}"
            ) from None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not (math.isfinite(seconds) and 0 <= seconds < 1e11):
        raise argparse.ArgumentTypeError(f"expected seconds since 1970, seen {text[:60]!r}")
    return int(seconds * 1000)


async def run_audit(options: argparse.Namespace) -> int:
    """Audit a pool and print what was found; returns the exit code."""
    to_ms = int(time.time() * 1000) if options.to_ms is None else options.to_ms
    from_ms = max(0, to_ms - 3_600_000) if options.from_ms is None else options.from_ms
    if from_ms > to_ms:
        raise SettingsError(f"--from: expected a time before --to ({_iso(to_ms)}), seen {_iso(from_ms)}")
    settings = read_settings(DispatcherSettings, vars(options))
    kafka = connect_kafka(settings.kafka, settings.kafka_access)
    result = await audit(
        settings.kafka, settings.pool, from_ms, to_ms, options.settle, consumers=kafka.consumer
    )
    print(as_json(result) if options.json else as_text(result, show=options.show))
    return result.exit_code


def as_json(result: AuditResult) -> str:
    """Everything, as a JSON object."""
    whole = {**asdict(result), "findings": result.findings, "clean": not result.findings}
    return msgspec.json.format(msgspec.json.encode(whole)).decode()


def as_text(result: AuditResult, *, show: int = SHOWN) -> str:
    """What people read: counts, then the first findings of each kind."""
    outcomes = ", ".join(f"{count} {kind}" for kind, count in result.outcomes.items()) or "none"
    lines = [
        f"audited    {_iso(result.from_ms)} to {_iso(result.to_ms)}, by the broker's clock",
        f"requests   {result.requests} records, {result.coalesced} coalesced, {result.refused_ids} id_in_use "
        f"(an id is one request's for {result.identity_window_s // 60} minutes)",
        f"outcomes   {outcomes}; {result.dead_letters} dead letters",
        f"findings   {len(result.lost)} lost, {len(result.unanswered)} ids unanswered, "
        f"{len(result.duplicated)} duplicated, {len(result.orphans)} orphans, "
        f"{len(result.unreadable)} unreadable",
        f"re-executed {len(result.reexecuted)} (answered once all the same)",
    ]
    lines += [f"note       {note}" for note in result.notes]
    for name in ("lost", "unanswered", "duplicated", "orphans", "unreadable", "reexecuted"):
        found: list[Finding] = getattr(result, name)
        for one in found[:show]:
            who = f"{one.tenant}/{one.id}" if one.tenant else one.id
            lines.append(" ".join(part for part in (f"{name:<11}", one.ref, who, one.detail) if part))
        if len(found) > show:
            lines.append(f"{name:<11} ... {len(found) - show} more; --show or --json prints them")
    lines.append("clean" if not result.findings else "NOT CLEAN")
    return "\n".join(lines)
