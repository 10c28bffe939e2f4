"""The pure reader of one request's reply chunks: what its client may believe, whatever order they come in.

Several attempts may write at once, a frozen one long after it was superseded, and anything may come
twice. Used by the SDK and by whatever serves streams to people. It keeps one promise: what it has
shown since the last `Restarted` is the beginning of an answer that one line of attempts published,
and after `Ended` it is the outcome's text.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from io import StringIO

from msgspec import Raw

from dispatcher.protocol.chunk import ChoiceDelta, Chunk, ChunkKind
from dispatcher.protocol.names import Attempt
from dispatcher.protocol.outcome import Outcome

REMEMBERED_SEAMS = 32
"""Chunk boundaries kept to join an attempt that resumes a little before the end of what is shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAdded:
    """The answer grew."""

    choices: tuple[ChoiceDelta, ...]

    @property
    def text(self) -> str:
        """What choice 0, the only one of most requests, gained."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarted:
    """Everything shown so far is void."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The outcome: nothing follows."""

    outcome: Outcome


ReplyEvent = TextAdded | Restarted | Ended


@dataclass(slots=True)
class ShownChoice:
    """What one choice shows: its text, and the raw engine deltas that are not text."""

    text: StringIO = field(default_factory=StringIO)
    deltas: list[bytes] = field(default_factory=list)

    @property
    def length(self) -> tuple[int, int]:
        """Characters and deltas shown."""
        return self.text.tell(), len(self.deltas)

    def since(self, length: tuple[int, int]) -> tuple[str, list[bytes]]:
        """What was added since `length` was the length."""
        end = self.text.tell()
        self.text.seek(length[0])
        added = self.text.read()
        self.text.seek(end)
        return added, self.deltas[length[1] :]

    def cut(self, length: tuple[int, int]) -> None:
        """Forget what lies beyond `length`."""
        self.text.seek(length[0])
        self.text.truncate()
        del self.deltas[length[1] :]

    def add(self, delta: ChoiceDelta) -> None:
        """Show more."""
        self.text.write(delta.text)
        self.deltas += [bytes(raw) for raw in delta.deltas]


Lengths = dict[int, tuple[int, int]]
NOTHING = (0, 0)


class ReplyReader:
    """Reads one request's chunks and outcome; each call returns what became known.

    `restarts` counts `Restarted` events and `attempts` the attempts that began, for whoever looks at
    the state instead of at the events.
    """

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.restarts = 0
        self.attempts = 0
        self.choices: dict[int, ShownChoice] = {}
        self._attempt = Attempt(-1, 0)
        self._has_begun = False
        self._is_lost = False
        # How far what is shown is known to be this attempt's: None before its first tokens.
        self._cursor: tuple[int, Lengths] | None = None
        self._tokenless: list[tuple[ChoiceDelta, ...]] = []
        self._shown_tokens = 0
        self._seams: deque[tuple[int, Lengths]] = deque(maxlen=REMEMBERED_SEAMS)

    @property
    def text(self) -> str:
        """The text that choice 0 shows now."""
        return self.choices[0].text.getvalue() if 0 in self.choices else ""

    def lengths(self) -> Lengths:
        """How much each choice shows."""
        return {index: shown.length for index, shown in self.choices.items()}

    def added_since(self, lengths: Lengths) -> tuple[ChoiceDelta, ...]:
        """What choices gained since they had `lengths`, if nothing restarted meanwhile."""
        gained = []
        for index, shown in sorted(self.choices.items()):
            text, deltas = shown.since(lengths.get(index, NOTHING))
            if text or deltas:
                gained.append(_delta(index, text, deltas))
        return tuple(gained)

    def read(self, chunk: Chunk) -> list[ReplyEvent]:
        """Take one chunk. One that can't be placed is dropped: the outcome has the whole answer."""
        if self.outcome is not None:
            return []
        try:
            attempt = Attempt.parse(chunk.attempt)
        except ValueError:
            return []
        if attempt < self._attempt:
            return []
        if attempt > self._attempt:
            self._attempt = attempt
            self._has_begun = self._is_lost = False
            self._cursor = None
        if chunk.kind is ChunkKind.BEGIN:
            return self._begin(chunk)
        if chunk.kind is ChunkKind.TOKENS and self._has_begun and not self._is_lost:
            return self._place(chunk)
        return []

    def end(self, outcome: Outcome) -> list[ReplyEvent]:
        """Take the outcome. The first one counts; text that differs from what is shown replaces it."""
        if self.outcome is not None:
            return []
        self.outcome = outcome
        events: list[ReplyEvent] = []
        # Without choices it is a refusal, or an answer too large to repeat: what was streamed stands.
        if outcome.choices:
            final = tuple(
                ChoiceDelta(index=one.index, text=one.text, deltas=one.deltas) for one in outcome.choices
            )
            rest = _continues(final, self.added_since({}))
            events = self._show(rest) if rest is not None else self._void() + self._show(final)
        return [*events, Ended(outcome=outcome)]

    def _begin(self, chunk: Chunk) -> list[ReplyEvent]:
        is_first = not self._has_begun
        if is_first:
            self._has_begun = True
            self.attempts += 1
        # An attempt that meant to go on and found that it can't says so by a second begin, before any tokens.
        return self._void() if chunk.restarted and (is_first or self._cursor is None) else []

    def _void(self) -> list[ReplyEvent]:
        had_text = any(shown.length != NOTHING for shown in self.choices.values())
        self.choices.clear()
        self._seams.clear()
        self._shown_tokens = 0
        if not had_text:
            return []
        self.restarts += 1
        return [Restarted()]

    def _place(self, chunk: Chunk) -> list[ReplyEvent]:
        if self._cursor is None:
            self._cursor = self._where(chunk.first_token)
        # A gap may still be filled, since an agent writes again what Kafka refused; if it is not, the
        # outcome has the whole answer.
        if self._cursor is None or chunk.first_token != self._cursor[0]:
            return []
        if not chunk.tokens:
            if chunk.choices in self._tokenless:
                return []
            self._tokenless.append(chunk.choices)
        else:
            self._tokenless.clear()
        return self._add(chunk, *self._cursor)

    def _where(self, token: int) -> tuple[int, Lengths] | None:
        """Where an attempt that continues at `token` takes over from what is shown."""
        self._tokenless.clear()
        if token == self._shown_tokens:
            return token, self.lengths()
        found = next((seam for seam in self._seams if seam[0] == token), None)
        self._is_lost = found is None and token < self._shown_tokens
        return found

    def _add(self, chunk: Chunk, token: int, lengths: Lengths) -> list[ReplyEvent]:
        """Place a chunk at the cursor. What an older attempt shows beyond it stands while it agrees."""
        after = chunk.first_token + chunk.tokens
        older = self.added_since(lengths)
        if older and _continues(older, chunk.choices) is not None:
            self._cursor = (after, _longer(lengths, chunk.choices))
            return []
        events: list[ReplyEvent] = []
        rest = _continues(chunk.choices, older) if older else chunk.choices
        if rest is None:
            events, rest = self._cut_back(token, lengths), chunk.choices
        elif chunk.tokens and not older:
            self._seams.append((token, lengths))
        events += self._show(rest)
        self._shown_tokens = after
        self._cursor = (after, self.lengths())
        return events

    def _cut_back(self, token: int, lengths: Lengths) -> list[ReplyEvent]:
        for index, shown in self.choices.items():
            shown.cut(lengths.get(index, NOTHING))
        while self._seams and self._seams[-1][0] >= token:
            self._seams.pop()
        self._seams.append((token, lengths))
        self.restarts += 1
        kept = self.added_since({})
        return [Restarted(), TextAdded(choices=kept)] if kept else [Restarted()]

    def _show(self, choices: tuple[ChoiceDelta, ...]) -> list[ReplyEvent]:
        gained = tuple(choice for choice in choices if choice.text or choice.deltas)
        for choice in gained:
            self.choices.setdefault(choice.index, ShownChoice()).add(choice)
        return [TextAdded(choices=gained)] if gained else []


def _delta(index: int, text: str, deltas: list[bytes]) -> ChoiceDelta:
    return ChoiceDelta(index=index, text=text, deltas=tuple(Raw(delta) for delta in deltas))


def _longer(lengths: Lengths, choices: tuple[ChoiceDelta, ...]) -> Lengths:
    grown = dict(lengths)
    for choice in choices:
        text, deltas = grown.get(choice.index, NOTHING)
        grown[choice.index] = (text + len(choice.text), deltas + len(choice.deltas))
    return grown


def _continues(
    longer: tuple[ChoiceDelta, ...], shorter: tuple[ChoiceDelta, ...]
) -> tuple[ChoiceDelta, ...] | None:
    """What `longer` has beyond `shorter`; None when it does not begin with it."""
    whole, begun = _by_index(longer), _by_index(shorter)
    rest = []
    for index, (text, deltas) in begun.items():
        full_text, full_deltas = whole.get(index, ("", []))
        if not full_text.startswith(text) or full_deltas[: len(deltas)] != deltas:
            return None
    for index, (text, deltas) in whole.items():
        known_text, known_deltas = begun.get(index, ("", []))
        more = _delta(index, text[len(known_text) :], deltas[len(known_deltas) :])
        if more.text or more.deltas:
            rest.append(more)
    return tuple(rest)


def _by_index(choices: tuple[ChoiceDelta, ...]) -> dict[int, tuple[str, list[bytes]]]:
    found: dict[int, tuple[str, list[bytes]]] = {}
    for choice in choices:
        text, deltas = found.get(choice.index, ("", []))
        found[choice.index] = (text + choice.text, deltas + [bytes(raw) for raw in choice.deltas])
    return found
