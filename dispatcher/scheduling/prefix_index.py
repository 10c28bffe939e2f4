"""The prefix index: which nodes hold the beginning of a prompt in their KV cache.

It merges two sources. *Views* are what agents publish of their engines' caches, tier by tier. *Expected*
blocks are those of the leader's own assignments, from the moment of binding: a burst of siblings lands
together before the first event arrives. Both are prefix-closed (a block never stands without those before
it), so that the depth of a match is found by bisection. A set of nodes is an int, one bit per node.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dispatcher.protocol.node import Medium

SLOWER = (Medium.CPU, Medium.DISK, Medium.EXTERNAL)
MOST_LEVELS = 8
"""Different depths that a match tells apart, deepest first; holders of less count as holding nothing."""


@dataclass(frozen=True, slots=True)
class Match:
    """Nodes (as bits) that hold the first `blocks` blocks of a prompt, and no more."""

    blocks: int
    nodes: int


class Named(Protocol):
    """A node, by its name."""

    @property
    def name(self) -> str:
        """The node's name."""


@dataclass(slots=True)
class _Expected:
    node: int
    blocks: tuple[bytes, ...]


class PrefixIndex:
    """The caches of one pool's fleet.

    Args:
        most_lingering: ended assignments still expected; beyond, the one nearest its end is forgotten.
    """

    def __init__(self, *, most_lingering: int = 100_000) -> None:
        self._most_lingering = most_lingering
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._free: list[int] = []
        self._holders: dict[bytes, int] = {}
        self._slower: dict[Medium, dict[bytes, int]] = {medium: {} for medium in SLOWER}
        self._of_node: dict[str, dict[Medium, set[bytes]]] = {}
        self._counts: dict[int, dict[bytes, int]] = {}
        self._assignments: dict[str, _Expected] = {}
        self._lingering: list[tuple[float, int, _Expected]] = []
        self._settled = 0
        self.version = 0

    # Nodes

    @property
    def numbers(self) -> Mapping[str, int]:
        """The bit numbers of nodes, by name; `version` counts their changes."""
        return self._numbers

    def number(self, node: str) -> int:
        """The bit number of a node, made on first use."""
        number = self._numbers.get(node)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._names[number] = node
            else:
                number = len(self._names)
                self._names.append(node)
            self._numbers[node] = number
            self.version += 1
            self._of_node[node] = {medium: set() for medium in Medium}
            self._counts[number] = {}
        return number

    def name(self, number: int) -> str:
        """The node of a bit number."""
        return self._names[number]

    def nodes(self, bits: int) -> list[str]:
        """The nodes of a set."""
        return [self._names[number] for number in _numbers(bits)]

    def forget(self, node: str) -> None:
        """Drop everything about a node."""
        number = self._numbers.get(node)
        if number is None:
            return
        self.clear(node)
        for ref in [ref for ref, one in self._assignments.items() if one.node == number]:
            del self._assignments[ref]
        self._lingering = [entry for entry in self._lingering if entry[2].node != number]
        heapq.heapify(self._lingering)
        bit = 1 << number
        for block in self._counts.pop(number):
            _unset(self._holders, block, bit)
        del self._numbers[node], self._of_node[node]
        self.version += 1
        self._free.append(number)

    # Views

    @property
    def blocks(self) -> int:
        """Different blocks that views hold or assignments have expected."""
        return len(self._holders)

    def held_by(self, node: str) -> Mapping[Medium, Collection[bytes]]:
        """A node's view, by tier."""
        return self._of_node.get(node, {})

    def store(self, node: str, medium: Medium, blocks: Iterable[bytes]) -> None:
        """Add blocks to one tier of a node's view."""
        bit = 1 << self.number(node)
        own = self._of_node[node][medium]
        holders = self._holders
        slower = self._slower.get(medium)
        for block in blocks:
            own.add(block)
            holders[block] = holders.get(block, 0) | bit
            if slower is not None:
                slower[block] = slower.get(block, 0) | bit

    def remove(self, node: str, medium: Medium, blocks: Iterable[bytes]) -> None:
        """Take blocks out of one tier of a node's view; unknown ones are ignored."""
        number = self.number(node)
        bit, expected = 1 << number, self._counts[number]
        tiers = self._of_node[node]
        own = tiers[medium]
        slower = self._slower.get(medium)
        for block in blocks:
            if block not in own:
                continue
            own.discard(block)
            if slower is not None:
                _unset(slower, block, bit)
            if block not in expected and not any(block in others for others in tiers.values()):
                _unset(self._holders, block, bit)

    def clear(self, node: str) -> None:
        """Empty a node's view."""
        for medium, blocks in list(self._of_node.get(node, {}).items()):
            self.remove(node, medium, list(blocks))

    def replace(self, node: str, tiers: Mapping[Medium, Iterable[bytes]]) -> None:
        """Set a node's whole view."""
        self.clear(node)
        for medium, blocks in tiers.items():
            self.store(node, medium, blocks)

    # Own assignments

    def expect(self, node: str, ref: str, blocks: tuple[bytes, ...]) -> None:
        """Count a request's blocks as held by the node that it was bound to."""
        if not blocks or ref in self._assignments:
            return
        number = self.number(node)
        self._assignments[ref] = _Expected(number, blocks)
        bit, counts, holders = 1 << number, self._counts[number], self._holders
        for block in blocks:
            seen = counts.get(block, 0)
            counts[block] = seen + 1
            if not seen:
                holders[block] = holders.get(block, 0) | bit

    def settle(self, ref: str, now_s: float, *, linger_s: float) -> None:
        """Note that an assignment ended; its blocks are expected for `linger_s` more."""
        ended = self._assignments.pop(ref, None)
        if ended is None:
            return
        if linger_s > 0:
            self._settled += 1
            heapq.heappush(self._lingering, (now_s + linger_s, self._settled, ended))
        else:
            self._unexpect(ended)
        self.expire(now_s)

    def expire(self, now_s: float) -> None:
        """Forget what has lingered long enough."""
        lingering = self._lingering
        while lingering and (lingering[0][0] <= now_s or len(lingering) > self._most_lingering):
            self._unexpect(heapq.heappop(lingering)[2])

    def forget_assignments(self) -> None:
        """Drop what an earlier leader's session expected."""
        self._assignments.clear()
        self._lingering.clear()
        for number, counts in self._counts.items():
            for block in counts:
                self._leave(number, block)
            counts.clear()

    def _unexpect(self, ended: _Expected) -> None:
        counts = self._counts.get(ended.node)
        if counts is None:
            return
        for block in ended.blocks:
            left = counts.get(block, 0) - 1
            if left > 0:
                counts[block] = left
            elif left == 0:
                del counts[block]
                self._leave(ended.node, block)

    def _leave(self, number: int, block: bytes) -> None:
        """Note that no assignment has a block expected at a node any more, which its view may hold still."""
        if not any(block in tier for tier in self._of_node[self._names[number]].values()):
            _unset(self._holders, block, 1 << number)

    # Matching

    def match(self, blocks: Sequence[bytes], *, most_levels: int = MOST_LEVELS) -> list[Match]:
        """Who holds how much of a prompt, deepest first; each node is named once.

        O(levels x log(blocks)) lookups.
        """
        if not blocks:
            return []
        holders = self._holders.get
        remaining = holders(blocks[0], 0)
        matches: list[Match] = []
        above = len(blocks)
        while remaining and above > 0 and len(matches) < most_levels:
            low, high = 0, above
            nodes = remaining
            # The deepest block below `above` that any remaining node holds; block 0 is held by all of them.
            while high - low > 1:
                middle = (low + high) // 2
                found = holders(blocks[middle], 0) & remaining
                if found:
                    low, nodes = middle, found
                else:
                    high = middle
            matches.append(Match(low + 1, nodes))
            remaining &= ~nodes
            above = low
        return matches

    def depth(self, matches: Sequence[Match], node: str) -> int:
        """How many blocks a node holds, by the matches of a prompt."""
        number = self._numbers.get(node)
        return _depth(matches, number) if number is not None else 0

    def depths(self, matches: Sequence[Match], nodes: Iterable[Named]) -> dict[str, int]:
        """How many blocks those of `nodes` hold that hold any, by name."""
        if not matches:
            return {}
        found = {}
        held = 0
        for match in matches:
            held |= match.nodes
        numbers = self._numbers
        for node in nodes:
            name = node.name
            number = numbers.get(name)
            if number is not None and held >> number & 1:
                found[name] = _depth(matches, number)
        return found

    def holders(self, matches: Sequence[Match], most: int, rng: random.Random) -> list[str]:
        """Up to `most` nodes that hold the most; of equally deep ones any, since the first would get all."""
        return [self._names[number] for number in self.holding(matches, most, rng)]

    def holding(self, matches: Sequence[Match], most: int, rng: random.Random) -> list[int]:
        """The same as numbers. Of many that hold as much, those that follow a random one."""
        numbers: list[int] = []
        for match in matches:
            wanted = most - len(numbers)
            if wanted <= 0:
                break
            bits = match.nodes
            if bits.bit_count() <= wanted:
                numbers += _numbers(bits)
                continue
            # One digit for each node, the first node's first.
            digits = bin(bits)[:1:-1]
            at = int(rng.random() * len(digits))
            for _ in range(wanted):
                at = digits.find("1", at)
                if at < 0:
                    at = digits.find("1")
                numbers.append(at)
                at += 1
        return numbers

    @property
    def has_slower(self) -> bool:
        """Whether any block is known in a tier slower than the GPU."""
        return any(self._slower.values())

    def slower_blocks(self, node: str, blocks: Sequence[bytes]) -> dict[Medium, int]:
        """How many of `blocks` a node holds in tiers slower than the GPU."""
        number = self._numbers.get(node)
        if number is None:
            return {}
        bit = 1 << number
        found = {}
        for medium, index in self._slower.items():
            if index:
                count = sum(1 for block in blocks if index.get(block, 0) & bit)
                if count:
                    found[medium] = count
        return found


def _unset(index: dict[bytes, int], block: bytes, bit: int) -> None:
    left = index.get(block, 0) & ~bit
    if left:
        index[block] = left
    else:
        index.pop(block, None)


def _numbers(bits: int) -> list[int]:
    numbers = []
    while bits:
        lowest = bits & -bits
        numbers.append(lowest.bit_length() - 1)
        bits ^= lowest
    return numbers


def _depth(matches: Sequence[Match], number: int) -> int:
    for match in matches:
        if match.nodes >> number & 1:
            return match.blocks
    return 0
