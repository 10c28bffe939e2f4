"""What an engine's KV cache means in routing blocks: a pure tree of the engine's blocks.

An engine tells of its own blocks, with its own hashes; requests carry ours, of larger routing blocks. A
routing block is complete when every engine block of it and all before it are cached: the view is
prefix-closed, so that removing a block hides what follows it, and storing it again shows it again. A block
whose beginning was never told is dropped, and the view says that it is partial.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from dispatcher.protocol.node import BlockEventKind, Medium
from dispatcher.protocol.prefix_hash import HASH_BYTES, seed

TIERS = tuple(Medium)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Consecutive blocks that became cached; `tokens` are theirs, 4 bytes each, little endian.

    `is_opaque` says that something besides tokens, LoRA and salt went into them (images): no prompt of
    ours can be compared with them.
    """

    hashes: tuple[int | bytes, ...]
    parent: int | bytes | None
    tokens: bytes
    block_tokens: int
    medium: Medium = Medium.GPU
    lora: str = ""
    salt: str = ""
    is_opaque: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Removed:
    """Blocks that are no longer in a tier."""

    hashes: tuple[int | bytes, ...]
    medium: Medium = Medium.GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleared:
    """Every block is gone."""


EngineEvent = Stored | Removed | Cleared
Change = tuple[BlockEventKind, Medium, tuple[str, ...]]


class _Block:
    """One engine block. `tiers` are bits, nearest lowest; it stays while absent if others follow it."""

    __slots__ = (
        "children",
        "depth",
        "is_visible",
        "key",
        "link",
        "parent",
        "published",
        "seed",
        "tiers",
        "tokens",
    )

    def __init__(self, key: int | bytes, parent: _Block | None, tokens: bytes, chain_seed: bytes) -> None:
        self.key = key
        self.parent = parent
        self.tokens = tokens
        self.seed = chain_seed
        """What the first routing hash of its chain is chained to."""
        self.depth: int = parent.depth + 1 if parent is not None else 0
        self.children: set[_Block] = set()
        self.tiers = 0
        self.is_visible = False
        self.link: bytes = b""
        """The routing hash, where this block completes one."""
        self.published: Medium | None = None


class CacheView:
    """The view of one engine.

    Args:
        model: the served model, which the hashes are salted with.
        routing_tokens: tokens of a routing block.
        most_blocks: engine blocks kept; beyond, new ones are dropped and the view is partial.
    """

    def __init__(self, model: str, routing_tokens: int, *, most_blocks: int = 2_000_000) -> None:
        self.model = model
        self.routing_tokens = routing_tokens
        self._most_blocks = most_blocks
        self._blocks: dict[int | bytes, _Block] = {}
        self._touched: dict[_Block, tuple[bytes, Medium | None]] = {}
        self.is_partial = False
        self.orphans = 0
        self.mismatched_tokens = 0
        """The engine's block size when the routing block is no multiple of it, else 0."""
        self.blocks = 0
        """Routing blocks in the view."""

    @property
    def engine_blocks(self) -> int:
        """Engine blocks known."""
        return len(self._blocks)

    def apply(self, event: EngineEvent) -> None:
        """Take one event."""
        match event:
            case Stored():
                self._store(event)
            case Removed():
                bit = 1 << TIERS.index(event.medium)
                for key in event.hashes:
                    block = self._blocks.get(key)
                    if block is not None and block.tiers & bit:
                        block.tiers &= ~bit
                        self._refresh(block)
                        self._prune(block)
            case Cleared():
                self.reset(partial=False)

    def reset(self, *, partial: bool) -> None:
        """Forget everything; `partial` when the engine may still hold what is forgotten."""
        for block in self._blocks.values():
            if block.published is not None:
                self._touch(block)
                block.published = None
        self._blocks = {}
        self.blocks = 0
        self.is_partial = partial

    def _store(self, event: Stored) -> None:
        size = event.block_tokens
        if size < 1 or self.routing_tokens % size:
            self.mismatched_tokens = size
            self.is_partial = True
            return
        parent: _Block | None = None
        if event.parent is not None:
            parent = self._blocks.get(event.parent)
            if parent is None:
                self.orphans += len(event.hashes)
                self.is_partial = True
                return
        if event.is_opaque:
            self.is_partial = True
            return
        if len(self._blocks) + len(event.hashes) > self._most_blocks:
            self.is_partial = True
            return
        per_routing = self.routing_tokens // size
        bit = 1 << TIERS.index(event.medium)
        width = 4 * size
        for number, key in enumerate(event.hashes):
            block = self._blocks.get(key)
            if block is None:
                tokens = event.tokens[number * width : (number + 1) * width]
                # A chain's salt is told with its first block only.
                chain_seed = parent.seed if parent is not None else self._seed(event)
                block = self._blocks[key] = _Block(key, parent, tokens, chain_seed)
                if parent is not None:
                    parent.children.add(block)
                if (block.depth + 1) % per_routing == 0:
                    block.link = self._link(block, per_routing)
            if not block.tiers & bit:
                block.tiers |= bit
                self._refresh(block)
            parent = block

    def _seed(self, event: Stored) -> bytes:
        return seed(model=self.model, block_size=self.routing_tokens, lora=event.lora, cache_salt=event.salt)

    @staticmethod
    def _link(block: _Block, per_routing: int) -> bytes:
        """The routing hash of the block that `block` completes; `protocol/prefix_hash.py` defines it."""
        parts = []
        at: _Block | None = block
        for _ in range(per_routing):
            assert at is not None
            parts.append(at.tokens)
            at = at.parent
        parts.append(at.link if at is not None else block.seed)
        return sha256(b"".join(reversed(parts))).digest()[:HASH_BYTES]

    def _refresh(self, start: _Block) -> None:
        """Recompute what is visible from `start` on."""
        stack = [start]
        while stack:
            block = stack.pop()
            parent = block.parent
            is_visible = bool(block.tiers) and (parent is None or parent.is_visible)
            changed = is_visible != block.is_visible
            block.is_visible = is_visible
            if block.link:
                tier = self._tier_of(block) if is_visible else None
                if tier is not block.published:
                    self._touch(block)
                    self.blocks += (tier is not None) - (block.published is not None)
                    block.published = tier
                if changed:
                    stack += block.children
            else:
                stack += block.children

    def _tier_of(self, block: _Block) -> Medium:
        """The farthest tier that the routing block needs: each of its blocks counts where it is nearest."""
        farthest = 0
        at: _Block | None = block
        while at is not None:
            farthest = max(farthest, (at.tiers & -at.tiers).bit_length() - 1)
            at = at.parent
            if at is None or at.link:
                break
        return TIERS[farthest]

    def _touch(self, block: _Block) -> None:
        if block not in self._touched:
            self._touched[block] = (block.link, block.published)

    def _prune(self, block: _Block) -> None:
        at: _Block | None = block
        while at is not None and not at.tiers and not at.children:
            del self._blocks[at.key]
            parent = at.parent
            if parent is not None:
                parent.children.discard(at)
            at = parent

    def take_changes(self) -> list[Change]:
        """What changed since the last call, removals first."""
        gone: dict[Medium, list[str]] = {}
        come: dict[Medium, list[str]] = {}
        net: dict[bytes, tuple[Medium | None, Medium | None]] = {}
        for block, (link, before) in self._touched.items():
            now = block.published if self._blocks.get(block.key) is block else None
            known = net.get(link, (None, None))
            # A block that was forgotten and told again is another object with the same hash.
            net[link] = (known[0] or before, known[1] or now)
        self._touched = {}
        for link, (before, now) in net.items():
            if before is now:
                continue
            if before is not None:
                gone.setdefault(before, []).append(link.hex())
            if now is not None:
                come.setdefault(now, []).append(link.hex())
        return [
            *((BlockEventKind.REMOVED, medium, tuple(hashes)) for medium, hashes in gone.items()),
            *((BlockEventKind.STORED, medium, tuple(hashes)) for medium, hashes in come.items()),
        ]

    def snapshot(self) -> list[Change]:
        """The whole view; what changed before is in it and forgotten."""
        self._touched = {}
        whole: dict[Medium, list[str]] = {}
        for block in self._visible():
            assert block.published is not None
            whole.setdefault(block.published, []).append(block.link.hex())
        return [(BlockEventKind.STORED, medium, tuple(hashes)) for medium, hashes in whole.items()]

    def _visible(self) -> Iterable[_Block]:
        return (block for block in self._blocks.values() if block.published is not None)
