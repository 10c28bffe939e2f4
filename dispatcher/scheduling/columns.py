"""The nodes that serve a model, by columns of numpy: what batches of requests are priced by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from dispatcher.protocol.node import Role
from dispatcher.scheduling.fleet import Load, NodeState
from dispatcher.scheduling.prefix_index import Match, PrefixIndex

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


class Columns:
    """The nodes that serve a model, by columns; a row is renewed once its node's load is measured anew.

    What is read besides the load (scale, eligibility) is of that moment, too: every report brings a new one.
    """

    def __init__(self, nodes: Sequence[NodeState], version: int) -> None:
        count, first = len(nodes), nodes[0]
        self.nodes = nodes
        self.version = version
        self.is_uniform = all(
            node.predictor.shape is first.predictor.shape and node.answers is first.answers for node in nodes
        )
        self.loads: list[Load | None] = [None] * count
        self.numbers: Rows = np.full(count, -1, dtype=np.intp)
        self.row_of: list[int] = []
        self.numbered = -1
        (
            self.room,
            self.slot_s,
            self.prompts_s,
            self.since_s,
            self.most_s,
            self.overdue_s,
            self.unknown,
            self.decoding,
            self.pressure,
            self.squares,
            self.squares_at_s,
            self.scale,
            self.heard_s,
            self.unseen,
            self.feedback_s,
            self.longest,
            self.engine_block,
        ) = np.zeros((17, count))
        self.is_prefill = np.zeros(count, dtype=bool)

    def renew(self) -> None:
        """Take over what changed."""
        loads = self.loads
        for row, node in enumerate(self.nodes):
            if node.known_load is not loads[row] or loads[row] is None:
                self._renew(row, node)

    def _renew(self, row: int, node: NodeState) -> None:
        load = self.loads[row] = node.load
        self.room[row] = load.room_tokens
        self.slot_s[row] = load.slot_wait_s
        self.prompts_s[row] = load.prompts_s
        self.since_s[row] = load.since_s
        self.most_s[row] = load.most_s
        self.overdue_s[row] = load.overdue_s
        self.unknown[row] = load.unknown_tokens
        self.decoding[row] = load.decoding
        self.pressure[row] = load.pressure
        self.squares[row] = load.burst.squares
        self.squares_at_s[row] = load.burst.at_s
        self.scale[row] = node.predictor.scale
        self.heard_s[row] = node.last_heard_s
        self.unseen[row] = node.unseen_tokens
        self.feedback_s[row] = node.feedback_s
        may_take = node.is_eligible and node.identity.role is not Role.VIT
        self.longest[row] = node.longest_prompt() if may_take else -1.0
        self.engine_block[row] = node.identity.engine_block_size or 1
        self.is_prefill[row] = load.is_prefill

    def number(self, index: PrefixIndex) -> None:
        """Take over the index's numbers of the nodes; -1 of one that it never heard of."""
        if self.numbered != index.version:
            self.numbered = index.version
            self.numbers[:] = [index.numbers.get(node.name, -1) for node in self.nodes]
            self.row_of = [-1] * (max(index.numbers.values(), default=-1) + 1)
            for row, number in enumerate(self.numbers.tolist()):
                if number >= 0:
                    self.row_of[number] = row

    def depths(self, matches: Sequence[list[Match]], rows: Rows) -> Rows:
        """How many blocks of each prompt its candidates hold, by their rows."""
        depths = np.zeros(rows.shape, dtype=np.intp)
        levels = max(map(len, matches), default=0)
        if not levels:
            return depths
        size = len(self.row_of) // 8 + 1
        packed = bytearray(len(matches) * levels * size)
        blocks = np.zeros((len(matches), levels), dtype=np.intp)
        for at, found in enumerate(matches):
            for level, match in enumerate(found):
                start = (at * levels + level) * size
                packed[start : start + size] = match.nodes.to_bytes(size, "little")
                blocks[at, level] = match.blocks
        bits = np.frombuffer(packed, dtype=np.uint8).reshape(len(matches), levels, size)
        numbers = self.numbers[rows]
        place, shift = np.maximum(numbers, 0) >> 3, (numbers & 7).astype(np.uint8)
        requests = np.arange(len(matches))[:, None]
        # Each node is named at one depth only.
        for level in range(levels):
            holds = (bits[requests, level, place] >> shift) & 1
            depths += np.where(holds & (numbers >= 0), blocks[:, level, None], 0)
        return depths


class Candidates(Sequence[NodeState]):
    """The nodes that a request was priced for."""

    __slots__ = ("_nodes", "_rows")

    def __init__(self, nodes: Sequence[NodeState], rows: Rows) -> None:
        self._nodes = nodes
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[NodeState]:
        # A node that was drawn twice counts once.
        return iter({row: self._nodes[row] for row in self._rows.tolist()}.values())

    @overload
    def __getitem__(self, at: int) -> NodeState: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[NodeState]: ...
    def __getitem__(self, at: int | slice) -> NodeState | Sequence[NodeState]:
        return list(self)[at]
