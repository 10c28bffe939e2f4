"""The engine model: continuous batching in steps, without a clock, and the answers it gives.

A step prefills up to a budget of prompt tokens and gives one token to each sequence whose prompt is
done; it lasts as long as its prefill plus one decode step of that batch. Not modelled: the size of
the KV cache as a bound on what runs, preemption, and speculation. Who calls it owns the time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

BLOCK_TOKENS = 16
CHARS_PER_TOKEN = 4
_SYLLABLES = (
    "ba",
    "ke",
    "lu",
    "mo",
    "ni",
    "ra",
    "se",
    "ti",
    "vo",
    "wu",
    "da",
    "fe",
    "gi",
    "ñu",
    "pé",
    "日本",
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How fast an engine is, and how much it holds at once.

    A decode step of b sequences lasts `decode_step_s + (b - 1) * decode_step_s_per_sequence`.
    """

    prefill_tokens_per_s: float = 40_000.0
    decode_step_s: float = 0.008
    decode_step_s_per_sequence: float = 0.0
    max_running: int = 32
    max_prefill_tokens: int = 8_192
    cache_blocks: int = 4_096

    def step_s(self, prefill_tokens: int, decoding: int) -> float:
        """Seconds that a step takes."""
        decode_s = self.decode_step_s + (decoding - 1) * self.decode_step_s_per_sequence if decoding else 0.0
        return prefill_tokens / self.prefill_tokens_per_s + decode_s


class Token(NamedTuple):
    """One token of sequence `key`; `cached_tokens` of its prompt were not computed."""

    key: int
    is_last: bool
    cached_tokens: int


class _Sequence:
    def __init__(self, prompt_tokens: int, output_tokens: int, blocks: tuple[bytes, ...]) -> None:
        self.prefill_left = prompt_tokens
        self.output_left = output_tokens
        self.blocks = blocks
        self.cached_tokens = 0


class EngineModel:
    """One engine's batch, queue and prefix cache; `due` is when `step` is to be called next."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._waiting: dict[int, _Sequence] = {}
        self._running: dict[int, _Sequence] = {}
        self._made: tuple[int, ...] = ()
        self._cache: OrderedDict[bytes, None] = OrderedDict()
        self.due: float | None = None

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    def submit(
        self, key: int, *, prompt_tokens: int, output_tokens: int, blocks: tuple[bytes, ...] = ()
    ) -> None:
        """Queue a sequence under a key not in use; `blocks` are the chained hashes of its full blocks."""
        if key in self._waiting or key in self._running:
            raise ValueError(f"sequence {key} is already known")
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(f"expected 1 or more tokens, seen {prompt_tokens} in and {output_tokens} out")
        self._waiting[key] = _Sequence(prompt_tokens, output_tokens, blocks)

    def abort(self, key: int) -> None:
        """Forget a sequence; unknown and finished ones are ignored."""
        self._waiting.pop(key, None)
        self._running.pop(key, None)

    def step(self, now: float) -> list[Token]:
        """End every step that is due by `now` and begin the next; an idle engine begins at `now`."""
        made: list[Token] = []
        if self.due is None:
            self._begin(now)
        while self.due is not None and self.due <= now:
            ended_at = self.due
            made += self._end()
            self._begin(ended_at)
        return made

    def _begin(self, at: float) -> None:
        while self._waiting and len(self._running) < self._profile.max_running:
            key = next(iter(self._waiting))
            self._running[key] = self._admit(self._waiting.pop(key))
        if not self._running:
            self.due = None
            return
        budget = self._profile.max_prefill_tokens
        prefilled = decoding = 0
        made: list[int] = []
        for key, sequence in self._running.items():
            if sequence.prefill_left == 0:
                decoding += 1
                made.append(key)
                continue
            taken = min(sequence.prefill_left, budget - prefilled)
            sequence.prefill_left -= taken
            prefilled += taken
            if sequence.prefill_left == 0:
                made.append(key)
        self._made = tuple(made)
        self.due = at + self._profile.step_s(prefilled, decoding)

    def _admit(self, sequence: _Sequence) -> _Sequence:
        """Take what the cache holds of the prompt; its last token is always computed."""
        for block in sequence.blocks:
            if block not in self._cache:
                break
            self._cache.move_to_end(block)
            sequence.cached_tokens += BLOCK_TOKENS
        sequence.cached_tokens = min(sequence.cached_tokens, sequence.prefill_left - 1)
        sequence.prefill_left -= sequence.cached_tokens
        return sequence

    def _end(self) -> list[Token]:
        made: list[Token] = []
        for key in self._made:
            sequence = self._running.get(key)
            if sequence is None:
                continue
            self._keep(sequence.blocks)
            sequence.blocks = ()
            sequence.output_left -= 1
            if sequence.output_left == 0:
                del self._running[key]
            made.append(Token(key, sequence.output_left == 0, sequence.cached_tokens))
        return made

    def _keep(self, blocks: tuple[bytes, ...]) -> None:
        # Tails first, so that of an old prefix the end is evicted before the beginning.
        for block in reversed(blocks):
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self._profile.cache_blocks:
            self._cache.popitem(last=False)


Prompt = str | Sequence[int]


def count_tokens(prompt: Prompt) -> int:
    """Length of a prompt: its token ids, or a token for each four characters begun; at least 1."""
    return max(1, math.ceil(len(prompt) / CHARS_PER_TOKEN) if isinstance(prompt, str) else len(prompt))


def block_hashes(prompt: Prompt, salt: str = "") -> tuple[bytes, ...]:
    """Hash the prompt's full blocks, each chained to those before it."""
    size = BLOCK_TOKENS * CHARS_PER_TOKEN if isinstance(prompt, str) else BLOCK_TOKENS
    hashes: list[bytes] = []
    parent = sha256(f"{isinstance(prompt, str)}:{salt}".encode()).digest()
    for start in range(0, len(prompt) - size + 1, size):
        parent = sha256(parent + _bytes_of(prompt[start : start + size])).digest()
        hashes.append(parent)
    return tuple(hashes)


class Answer:
    """The tokens of an answer: the same for the same prompt and choice, on every engine."""

    def __init__(self, prompt: Prompt, choice: int = 0) -> None:
        self._digest = sha256(_bytes_of(prompt)).digest() + choice.to_bytes(4, "big")

    def token_id(self, place: int) -> int:
        """The id of one token."""
        return int.from_bytes(sha256(self._digest + place.to_bytes(4, "big")).digest()[:2], "big")

    def text(self, tokens: int) -> str:
        """The text of the first `tokens`, for whoever checks an answer end to end."""
        return "".join(word(self.token_id(place)) for place in range(tokens))


def word(token_id: int) -> str:
    """The text of a token."""
    return " " + _SYLLABLES[token_id & 15] + _SYLLABLES[token_id >> 4 & 15]


def _bytes_of(prompt: Prompt) -> bytes:
    return prompt.encode() if isinstance(prompt, str) else ",".join(map(str, prompt)).encode()
