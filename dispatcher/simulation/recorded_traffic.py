"""Recorded traffic as a workload: what a pool's requests asked of it, without what they said.

A record is read as the leader's intake reads it, so that the simulation knows of its prompt what the
dispatcher did: its length, and which blocks it begins with. Text, ids and names of tenants are dropped on the
spot; blocks and tenants are numbered in the order in which they first came, which keeps what is alike alike
and leaves no hash to test a guess against. How long an answer was tells its outcome, where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from dispatcher.backends.request_log import LogRecord
from dispatcher.errors import SettingsError
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.outcome import OutcomeKind, Reason, Usage
from dispatcher.replay.traces import TraceRequest
from dispatcher.scheduling.admission import DEFAULT_MAX_TOKENS, AdmissionLimits, Admitted, admit

REPEAT_MS = 600_000
"""An id is one request's for so long (the dispatcher's rule): until then the same again is a repeat."""


class _Ending(Struct):
    """What is read of an outcome: its text is passed over."""

    ref: Annotated[str, Meta(max_length=64)]
    kind: str
    reason: str = ""
    usage: Usage = Usage()


_endings = msgspec.json.Decoder(_Ending)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    ref: str
    identity: tuple[str, str]
    at_ms: int
    prompt_tokens: int
    is_exact: bool
    max_tokens: int
    model: str
    tenant: str
    priority: int
    deadline_ms: int
    block_tokens: int
    hashes: tuple[str, ...]
    of_text: bool


@dataclass(kw_only=True)
class Counts:
    """What became of the records."""

    requests: int = 0
    answered: int = 0
    refused: int = 0
    repeated: int = 0
    other_models: int = 0
    unreadable_outcomes: int = 0
    assumed_tokens: int = 0


class RecordedTraffic:
    """Takes request records and outcomes in any order, then makes a trace of them.

    Args:
        limits: what the pool accepts; a record that it refuses is left out.
        model: only requests for this one.
        last: only so many, the latest.
    """

    def __init__(self, limits: AdmissionLimits, *, model: str | None = None, last: int | None = None) -> None:
        self._limits = limits
        self._model = model
        self._last = last
        self._asked: list[_Asked] = []
        self._endings: dict[str, _Ending] = {}
        self._refs: set[str] = set()
        self.models: set[str] = set()
        self.counts = Counts()

    def take(self, record: LogRecord) -> None:
        """Take a request record."""
        decision = admit(
            record.ref,
            record.key,
            record.value,
            appended_ms=record.timestamp_ms,
            # Deadlines had not passed when it came.
            now_ms=record.timestamp_ms,
            traceparent="",
            limits=self._limits,
            carry_bodies=False,
        )
        if not isinstance(decision, Admitted):
            self.counts.refused += 1
            return
        envelope = decision.envelope
        self.models.add(envelope.model)
        if self._model is not None and envelope.model != self._model:
            self.counts.other_models += 1
            return
        self._asked.append(_asked(envelope))
        self._refs.add(envelope.ref)

    @property
    def first_ms(self) -> int | None:
        """When the first of the requests taken so far was appended."""
        return min((one.at_ms for one in self._asked), default=None)

    def answer(self, value: bytes) -> None:
        """Take an outcome; one of a request that was not taken, or that can't be read, tells nothing."""
        try:
            ending = _endings.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.counts.unreadable_outcomes += 1
            return
        if ending.ref in self._refs:
            self._endings.setdefault(ending.ref, ending)

    def trace(self) -> list[TraceRequest]:
        """The requests in the order of their times, the first at 0.

        Where no answer is known it is taken to be as long as the middle one of those that are, within what
        the request allows.

        Raises:
            SettingsError: there is none.
        """
        asked = self._without_repeats()
        if self._last is not None:
            asked = asked[-self._last :]
        counts = self.counts
        if not asked:
            raise SettingsError(
                f"requests: expected some to simulate, seen none that can be used ({counts.refused} can't be "
                f"read or are refused, {counts.repeated} repeats, {counts.other_models} of other models"
                + (f" than {self._model!r}: {', '.join(sorted(self.models))[:200]}" if self._model else "")
                + ")"
            )
        answers = {one.ref: tokens for one in asked if (tokens := self._answer_tokens(one.ref))}
        counts.requests, counts.answered = len(asked), len(answers)
        counts.assumed_tokens = round(median(answers.values())) if answers else DEFAULT_MAX_TOKENS
        blocks, tenants = _Numbers(), _Numbers()
        return [
            TraceRequest(
                arrival_s=(one.at_ms - asked[0].at_ms) / 1000,
                prompt_tokens=self._prompt_tokens(one),
                output_tokens=answers.get(one.ref, min(counts.assumed_tokens, one.max_tokens)),
                block_ids=tuple([blocks[one.of_text, hash] for hash in one.hashes]),
                block_tokens=one.block_tokens if one.hashes else 0,
                priority=one.priority,
                deadline_s=one.deadline_ms / 1000,
                tenant=f"t{tenants[one.tenant]}" if one.tenant else "",
            )
            for one in asked
        ]

    def _without_repeats(self) -> list[_Asked]:
        """In order of time; a record that repeats another had no work of its own."""
        seen: dict[tuple[str, str], int] = {}
        kept = []
        for one in sorted(self._asked, key=lambda one: (one.at_ms, one.ref)):
            ending = self._endings.get(one.ref)
            since_ms = seen.get(one.identity)
            is_again = since_ms is not None and one.at_ms - since_ms < REPEAT_MS
            if (is_again and ending is None) or (ending and ending.reason == Reason.ID_IN_USE):
                self.counts.repeated += 1
                continue
            seen[one.identity] = one.at_ms
            kept.append(one)
        return kept

    def _answer_tokens(self, ref: str) -> int:
        ending = self._endings.get(ref)
        if ending is None or ending.kind != OutcomeKind.COMPLETED:
            return 0
        return ending.usage.completion_tokens

    def _prompt_tokens(self, one: _Asked) -> int:
        """As the producer counted them, else as the engine did, else as the leader estimated."""
        ending = self._endings.get(one.ref)
        counted = ending.usage.prompt_tokens if ending is not None else 0
        return one.prompt_tokens if one.is_exact or not counted else counted


class _Numbers(dict[object, int]):
    """Numbers what it is asked for in the order in which it is asked."""

    def __missing__(self, key: object) -> int:
        return self.setdefault(key, len(self))


def _asked(envelope: Envelope) -> _Asked:
    return _Asked(
        ref=envelope.ref,
        identity=(envelope.tenant, envelope.id),
        at_ms=envelope.appended_ms,
        prompt_tokens=envelope.prompt_tokens,
        is_exact=envelope.tokens_exact,
        max_tokens=envelope.max_tokens,
        model=envelope.model,
        tenant=envelope.tenant,
        priority=envelope.priority,
        deadline_ms=envelope.deadline_at_ms - envelope.appended_ms,
        block_tokens=envelope.block_size,
        hashes=envelope.block_hashes,
        of_text=envelope.text_hashed,
    )


def told_counts(counts: Counts, models: set[str], model: str | None) -> list[str]:
    """What was read, in lines for people."""
    unknown = counts.requests - counts.answered
    told = f"{counts.requests} requests, {counts.answered} with the lengths of their answers"
    if unknown:
        told += f", {unknown} without: taken for {counts.assumed_tokens} tokens, or what they allow"
    lines = [told]
    left_out = [
        f"{number} {what}"
        for number, what in (
            (counts.refused, "that can't be read or are refused"),
            (counts.repeated, "repeats"),
            (counts.other_models, "of other models"),
        )
        if number
    ]
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    if counts.unreadable_outcomes:
        lines.append(f"{counts.unreadable_outcomes} outcomes can't be read")
    if model is None and len(models) > 1:
        named = ", ".join(sorted(models))[:200]
        lines.append(f"{len(models)} models ({named}) are taken for one; --model NAME takes one of them")
    return lines
