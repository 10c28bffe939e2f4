"""Two ways of knowing what the nodes' caches hold: from their KV events, and from one's own routing.

Both keep, for each block, a bit mask of the nodes that hold it, and answer how long a prompt's leading run of
held blocks is on each node. `EventView` is as large as the fleet's caches; `RoutedView` has a bound per node.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


def run_lengths(holders: dict[int, int], blocks: Sequence[int], nodes: int) -> list[int]:
    """Return for each node how many of the first `blocks` it holds without a gap."""
    lengths = [0] * nodes
    alive = (1 << nodes) - 1
    length = 0
    for block in blocks:
        held = alive & holders.get(block, 0)
        if held != alive:
            _set(lengths, alive ^ held, length)
            alive = held
            if not alive:
                return lengths
        length += 1
    _set(lengths, alive, length)
    return lengths


def _set(lengths: list[int], mask: int, length: int) -> None:
    if not length:
        return
    while mask:
        low = mask & -mask
        lengths[low.bit_length() - 1] = length
        mask ^= low


class EventView:
    """What the nodes said that they hold."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._holders: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def stored(self, node: int, blocks: Iterable[int]) -> None:
        """Apply an event."""
        bit = 1 << node
        holders = self._holders
        for block in blocks:
            holders[block] = holders.get(block, 0) | bit

    def removed(self, node: int, blocks: Iterable[int]) -> None:
        """Apply an event; blocks that weren't held are ignored."""
        bit = 1 << node
        holders = self._holders
        for block in blocks:
            left = holders.get(block, 0) & ~bit
            if left:
                holders[block] = left
            else:
                holders.pop(block, None)

    def routed(self, node: int, blocks: Sequence[int]) -> None:
        """Ignore one's own choice: the node's events will tell."""

    def runs(self, blocks: Sequence[int]) -> list[int]:
        """Return the leading run on each node, in blocks."""
        return run_lengths(self._holders, blocks, self._nodes)


class RoutedView:
    """What was routed to each node: of each the `limit` most recently routed blocks."""

    def __init__(self, nodes: int, limit: int) -> None:
        self._nodes = nodes
        self._limit = limit
        self._holders: dict[int, int] = {}
        self._recent: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(nodes)]

    def __len__(self) -> int:
        return sum(len(recent) for recent in self._recent)

    def routed(self, node: int, blocks: Sequence[int]) -> None:
        """Believe that the node will hold these blocks, from now on."""
        bit = 1 << node
        holders = self._holders
        recent = self._recent[node]
        # The tail first, so that of a prompt the tail is the first to be forgotten.
        for block in reversed(blocks):
            if block in recent:
                recent.move_to_end(block)
            else:
                recent[block] = None
                holders[block] = holders.get(block, 0) | bit
        while len(recent) > self._limit:
            block, _ = recent.popitem(last=False)
            left = holders[block] & ~bit
            if left:
                holders[block] = left
            else:
                del holders[block]

    def stored(self, node: int, blocks: Iterable[int]) -> None:
        """Ignore an event: this view doesn't listen."""

    def removed(self, node: int, blocks: Iterable[int]) -> None:
        """Ignore an event: this view doesn't listen."""

    def runs(self, blocks: Sequence[int]) -> list[int]:
        """Return the leading run on each node, in blocks."""
        return run_lengths(self._holders, blocks, self._nodes)
