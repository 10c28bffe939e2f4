"""SGLang's approximate radix tree, block by block: which nodes ("tenants") a prefix was routed to, and when.

After `sgl-router`'s concurrent radix tree (sglang-router 0.3.2, `src/policies/tree.rs`; smg 1.13.0,
`crates/kv_index/src/string_tree.rs`). A match descends as far as any tenant's text goes; of the block where
it ends, the tenants are told. Eviction runs at intervals and takes the least recently inserted leaves
first, until each tenant's (or all tenants' together) size is within its bound again. Between two runs it
may exceed it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class RadixTenants:
    """The tree. Blocks' hashes are chained, so a block names its whole path."""

    def __init__(self, nodes: int, *, limit: int, shared_limit: bool, interval_s: float) -> None:
        """Begin empty.

        Args:
            limit: blocks that a tenant may have after an eviction; with `shared_limit`, all tenants together.
            interval_s: time between evictions.
        """
        self._limit = limit
        self._shared_limit = shared_limit
        self._interval_s = interval_s
        self._evict_at = interval_s
        # Block -> tenants, in the order in which they came to it.
        self._tenants: dict[int, dict[int, None]] = {}
        self._recent: list[OrderedDict[int, float]] = [OrderedDict() for _ in range(nodes)]
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def match(self, blocks: Sequence[int], now_s: float) -> tuple[int, tuple[int, ...]]:
        """Return how many leading blocks any tenant has, and who has the last of them, oldest first."""
        if now_s >= self._evict_at:
            self._evict()
            self._evict_at = now_s + self._interval_s
        tenants = self._tenants
        length = 0
        for block in blocks:
            if block not in tenants:
                break
            length += 1
        return length, tuple(tenants[blocks[length - 1]]) if length else ()

    def insert(self, blocks: Sequence[int], tenant: int, now_s: float) -> None:
        """Remember that the prompt went to a node."""
        recent = self._recent[tenant]
        tenants = self._tenants
        # The tail first: of one path, the leaf is then the least recent.
        for block in reversed(blocks):
            if block in recent:
                recent.move_to_end(block)
                recent[block] = now_s
            else:
                recent[block] = now_s
                self._size += 1
                there = tenants.get(block)
                if there is None:
                    tenants[block] = {tenant: None}
                else:
                    there[tenant] = None

    def _evict(self) -> None:
        if not self._shared_limit:
            for tenant, recent in enumerate(self._recent):
                while len(recent) > self._limit:
                    self._forget(tenant)
            return
        while self._size > self._limit:
            oldest = min(
                (tenant for tenant, recent in enumerate(self._recent) if recent),
                key=lambda tenant: next(iter(self._recent[tenant].values())),
            )
            self._forget(oldest)

    def _forget(self, tenant: int) -> None:
        block, _ = self._recent[tenant].popitem(last=False)
        self._size -= 1
        there = self._tenants[block]
        del there[tenant]
        if not there:
            del self._tenants[block]
