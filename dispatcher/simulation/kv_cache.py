"""The block KV cache of an engine: prefix sharing, reference counts, eviction, and what it tells of them.

As vLLM keeps it: only full blocks are shared, by a hash chained over all tokens before them; a block that
nobody holds stays cached until its room is needed; of a freed sequence the tail is evicted before the head.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, kw_only=True, slots=True)
class BlocksStored:
    """Consecutive blocks of a sequence that became full; `parent` is the block before, None at the start."""

    hashes: tuple[int, ...]
    parent: int | None
    token_ids: tuple[int, ...]
    lora: str = ""
    salt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlocksRemoved:
    """Blocks that were evicted."""

    hashes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheCleared:
    """Every block is gone."""


CacheEvent = BlocksStored | BlocksRemoved | CacheCleared


def first_link(lora: str = "", salt: str = "") -> bytes:
    """What the hash of a first block is chained to."""
    return blake2b(f"{len(lora)}:{lora}{salt}".encode(), digest_size=8).digest()


def next_link(link: bytes, tokens: bytes) -> bytes:
    """The hash of a block (8 bytes) from that of the block before it and its tokens (uint32 each)."""
    return blake2b(link + tokens, digest_size=8).digest()


def block_hashes(token_ids: Sequence[int], block_tokens: int, *, lora: str = "", salt: str = "") -> list[int]:
    """The hashes of a prompt's full blocks."""
    packed = (token_ids if isinstance(token_ids, array) else array("I", token_ids)).tobytes()
    width = 4 * block_tokens
    link = first_link(lora, salt)
    hashes = []
    for start in range(0, len(packed) - width + 1, width):
        link = next_link(link, packed[start : start + width])
        hashes.append(int.from_bytes(link, "big"))
    return hashes


class KVCache:
    """Blocks by hash, and how many more are in use without one."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private = 0
        self.events: list[CacheEvent] = []

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return len(self._references) + self._private

    @property
    def cached(self) -> set[int]:
        """Every block with a hash, held or idle."""
        return self._references.keys() | self._idle.keys()

    def hit(self, hashes: Sequence[int]) -> int:
        """How many of these blocks, from the first on, are cached."""
        references, idle = self._references, self._idle
        count = 0
        for block in hashes:
            if block not in references and block not in idle:
                break
            count += 1
        return count

    def fits(self, hashes: Sequence[int], more: int) -> bool:
        """Whether these cached blocks could be held and `more` taken besides."""
        room = self.blocks - self.used - more
        return room >= 0 and (room >= len(hashes) or room >= sum(block in self._idle for block in hashes))

    def hold(self, hashes: Sequence[int]) -> None:
        """Hold blocks that are cached."""
        for block in hashes:
            count = self._references.get(block)
            if count is None:
                del self._idle[block]
                count = 0
            self._references[block] = count + 1

    def take(self, count: int) -> bool:
        """Take `count` blocks for tokens to come, evicting idle ones; False when there is no room."""
        if self.used + count > self.blocks:
            return False
        self._private += count
        excess = self.used + len(self._idle) - self.blocks
        if excess > 0:
            evicted = tuple(self._idle.popitem(last=False)[0] for _ in range(excess))
            self.events.append(BlocksRemoved(hashes=evicted))
        return True

    def fill(self, block: int) -> bool:
        """Give one of the taken blocks its hash, now that it is full; False when another has it already."""
        if block in self._references or block in self._idle:
            return False
        self._private -= 1
        self._references[block] = 1
        return True

    def free(self, hashes: Sequence[int], private: int) -> None:
        """Give back what a sequence holds; its last block is the first to be evicted."""
        self._private -= private
        for block in reversed(hashes):
            count = self._references[block] - 1
            if count:
                self._references[block] = count
            else:
                del self._references[block]
                self._idle[block] = None

    def clear(self) -> bool:
        """Forget every cached block; False while sequences hold some."""
        if self.used:
            return False
        self._idle.clear()
        self.events.append(CacheCleared())
        return True
