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
import asyncio
import math
import os
import sys
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
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from dispatcher.errors import LogUnavailable, SettingsError
from dispatcher.protocol import codec
from dispatcher.protocol.names import Attempt, Lane, Names, Ref
from dispatcher.protocol.outcome import Reason
from dispatcher.protocol.request import InferenceRequest

IDENTITY_WINDOW_MS = 600_000
SETTLE_S = 10.0
SHOWN = 20
PROGRESS_TIMEOUT_S = 60.0
"""Without a record or a movement for this long, a read is given up."""


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
        return sum(
            map(len, (self.lost, self.unanswered, self.duplicated, self.orphans, self.unreadable))
        )

    @property
    def exit_code(self) -> int:
        """0 when clean, 1 with findings."""
        return 1 if self.findings else 0


class _Source:
    """The records of one partition of a lane, in columns, by offset."""

    def __init__(self) -> None:
        self.offsets = array("q")
        self.timestamps = array("q")
        self.fingerprints = array("Q")
        self.identities: list[str | None] = []
        self.is_poison = bytearray()
        self.answers = bytearray()
        self.refusals = bytearray()
        self.letters = bytearray()
        self.answered_ms = array("q")
        self.begun = array("Q")
        self.first: int | None = None
        self.end: int | None = None

    def find(self, offset: int) -> int | None:
        """The row of an offset."""
        row = bisect_left(self.offsets, offset)
        return row if row < len(self.offsets) and self.offsets[row] == offset else None


Place = tuple[_Source, int]
ATTEMPT_BITS = 20


class Ledger:
    """What was read so far. Request records are added first, in order of their offsets."""

    def __init__(self, from_ms: int, to_ms: int) -> None:
        self.from_ms = from_ms
        self.to_ms = to_ms
        self.outcomes: Counter[str] = Counter()
        self.dead_letters = 0
        self.orphans: list[Finding] = []
        self.unreadable: list[Finding] = []
        self.notes: list[str] = []
        self.attempts: dict[str, set[int]] = {}
        self._sources: dict[tuple[Lane, int], _Source] = {}
        self._unread_chunks = 0

    def bound(self, lane: Lane, partition: int, first: int, end: int) -> None:
        """Say which offsets of a partition are read: a ref inside them must name a record."""
        source = self._source(lane, partition)
        source.first, source.end = first, end

    def add(self, kind: Kind, record: RawRecord) -> None:
        """Note one record of a stream."""
        match kind:
            case Kind.INTERACTIVE | Kind.BATCH:
                self._add_request(LANES[kind], record)
            case Kind.OUTCOMES:
                self._add_outcome(record)
            case Kind.DEAD:
                self._add_dead_letter(record)
            case Kind.REPLIES:
                self._add_chunk(record)

    def _source(self, lane: Lane, partition: int) -> _Source:
        return self._sources.setdefault((lane, partition), _Source())

    def _add_request(self, lane: Lane, record: RawRecord) -> None:
        source = self._source(lane, record.partition)
        try:
            request = codec.requests.decode(record.value or b"")
            identity: tuple[str, str] | None = (request.tenant, request.id)
            print_ = fingerprint(request)
        except codec.MalformedRecord:
            identity, print_ = _salvaged(record), 0
        source.offsets.append(record.offset)
        source.timestamps.append(record.timestamp)
        source.fingerprints.append(print_)
        source.identities.append("\0".join(identity) if identity else None)
        source.is_poison.append(not print_)
        source.answers.append(0)
        source.refusals.append(0)
        source.letters.append(0)
        source.answered_ms.append(0)
        source.begun.append(0)

    def _place(self, ref: str) -> tuple[Ref, _Source, int | None] | None:
        """Where a ref points: the row is None where a record should be and is not; None is elsewhere."""
        parsed = Ref.parse(ref)
        source = self._sources.get((parsed.lane, parsed.partition))
        if source is None:
            raise ValueError(f"ref: the pool has no partition {parsed.source}")
        row = source.find(parsed.offset)
        if row is None and source.first is not None and source.end is not None:
            if not source.first <= parsed.offset < source.end:
                return None
        return parsed, source, row
