"""Tokens of simulated engines: deterministic, the same on every engine, so that answers can be checked."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

CHARS_PER_TOKEN = 4
FIRST_TOKEN = 1_000
"""Ids below are left alone: vocabularies keep their special tokens there."""
TOKEN_MASK = 0x3FFF
_PRIME = (1 << 63) - 25
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


def tokenise(text: str) -> array[int]:
    """A token for each four characters begun; equal beginnings give equal tokens. '' is one token."""
    ids = array("I")
    for start in range(0, max(1, len(text)), CHARS_PER_TOKEN):
        digest = blake2b(text[start : start + CHARS_PER_TOKEN].encode(), digest_size=2).digest()
        ids.append(FIRST_TOKEN + (int.from_bytes(digest, "big") & TOKEN_MASK))
    return ids


def word(token_id: int) -> str:
    """The text of a generated token."""
    return " " + _SYLLABLES[token_id & 15] + _SYLLABLES[token_id >> 4 & 15]


class Answer:
    """The tokens of an answer: the same for the same prompt and choice, on every engine.

    Each token follows from all tokens before it, those of the prompt included, so that a prompt followed
    by the first tokens of its answer is answered by the rest of them.
    """

    def __init__(self, prompt: Sequence[int], choice: int = 0) -> None:
        packed = prompt if isinstance(prompt, array) else array("I", prompt)
        # A polynomial in the token ids modulo a prime: one multiplication appends a token.
        self._hash = int.from_bytes(packed.tobytes(), "little") % _PRIME
        self._weight = pow(2, 32 * len(packed), _PRIME)
        self._salt = choice * 0x9E3779B97F4A7C15
        self._ids: list[int] = []

    def token_id(self, place: int) -> int:
        """The id of one token."""
        ids = self._ids
        while len(ids) <= place:
            ids.append(self._next())
        return ids[place]

    def _next(self) -> int:
        # One round of splitmix64 (Steele et al. 2014).
        mixed = (self._hash + self._salt) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        token = FIRST_TOKEN + ((mixed ^ mixed >> 27) >> 20 & TOKEN_MASK)
        self._hash = (self._hash + token * self._weight) % _PRIME
        self._weight = (self._weight << 32) % _PRIME
        return token

    def text(self, tokens: int) -> str:
        """The text of the first `tokens`."""
        return "".join(word(self.token_id(place)) for place in range(tokens))
