"""Prompts as a fleet sees them: conversations that grow by a block a turn, under a few shared system prompts.

A conversation begins at three quarters of the usual length (its history is known from before) and ends at
five quarters, when another takes its place. Everything comes from one `random.Random`: equal seeds make equal
prompts.
"""

from __future__ import annotations

import random

SYSTEMS = 16
"""Different system prompts."""
SYSTEM_SHARE = 8
"""An eighth of the usual length is a system prompt."""

Blocks = tuple[bytes, ...]


class Conversations:
    """So many conversations under way at once.

    Args:
        blocks: the usual length of a prompt, in routing blocks.
        is_shared: whether anything is shared at all; without, each prompt is new from its first block on.
    """

    def __init__(self, count: int, blocks: int, rng: random.Random, *, is_shared: bool = True) -> None:
        self._rng = rng
        self._blocks = blocks
        self._is_shared = is_shared
        length = max(1, blocks // SYSTEM_SHARE)
        self._systems = [self._fresh(length) for _ in range(SYSTEMS)]
        self.replaced: list[tuple[int, Blocks, Blocks]] = []
        """(number, what ended, what begins in its place), until somebody takes notice."""
        self.under_way = [self._begin() for _ in range(count if is_shared else 0)]

    def _fresh(self, length: int) -> Blocks:
        return tuple(self._rng.randbytes(8) for _ in range(length))

    def _begin(self, *, at_start: bool = False) -> Blocks:
        longest, shortest = self._longest, max(1, 3 * self._blocks // 4)
        length = shortest if at_start else self._rng.randint(shortest, longest)
        system = self._systems[self._rng.randrange(SYSTEMS)]
        return system + self._fresh(max(0, length - len(system)))

    @property
    def _longest(self) -> int:
        return max(1, 5 * self._blocks // 4)

    def next(self) -> Blocks:
        """The blocks of the next prompt: another turn of a conversation."""
        if not self._is_shared:
            return self._fresh(self._blocks)
        number = self._rng.randrange(len(self.under_way))
        if len(self.under_way[number]) >= self._longest:
            begun = self._begin(at_start=True)
            self.replaced.append((number, self.under_way[number], begun))
            self.under_way[number] = begun
        self.under_way[number] += self._fresh(1)
        return self.under_way[number]
