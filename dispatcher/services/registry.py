"""Registry: mirror the nodes' cache views, as agents publish them in Redis, into the prefix index.

Leaders and standbys follow alike, so that a new leader routes by prefix from its first decision. Events of
a node are numbered within its incarnation; a gap, another incarnation or a stream that went back means that
something was missed, and the node's sets are read whole.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from dispatcher.backends.clock import Clock
from dispatcher.backends.store_view import StoreView, stream_order
from dispatcher.errors import StoreRefused, StoreUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.node import BlockEvent, BlockEventKind, Medium
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

READ_BLOCK_MS = 500
READ_COUNT = 1000
COMPARE_S = 5.0
PAUSE_S = 0.2


@dataclass(kw_only=True)
class _Followed:
    incarnation: str
    sequence: int


class Registry:
    """Follows one pool's cache views.

    Args:
        fleet: the nodes that the fleet's mirror knows; views of others are not kept.
    """

    def __init__(
        self,
        view: StoreView,
        fleet: Fleet,
        index: PrefixIndex,
        *,
        block_size: int,
        clock: Clock,
        metrics: DispatcherMetrics,
        log: Log,
    ) -> None:
        self._view = view
        self._fleet = fleet
        self._index = index
        self._block_size = block_size
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._cursor: bytes | None = None
        self._followed: dict[str, _Followed] = {}
        self._mismatched: set[str] = set()
        self._compared_at_s = float("-inf")

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self.step()
            except StoreUnavailable:
                self._metrics.store_errors.inc()
                await asyncio.sleep(PAUSE_S)
            except StoreRefused as error:
                self._metrics.store_errors.inc()
                self._log.error("cache views can't be read, trying again", error=str(error))
                await asyncio.sleep(COMPARE_S)

    async def step(self, *, block_ms: int | None = READ_BLOCK_MS) -> None:
        """Take in what was published; waits a little for news (not at all for None)."""
        names = self._view.names
        if self._cursor is None:
            self._cursor = await self._view.last_id(names.blocks)
        await self._compare()
        entries = await self._view.read_stream(
            names.blocks, self._cursor, block_ms=block_ms, count=READ_COUNT
        )
        missed: dict[str, str] = {}
        for entry in entries:
            self._cursor = entry.id
            try:
                event = codec.block_events.decode(entry.fields.get(b"body", b""))
                reason = self._apply(event)
            except (codec.MalformedRecord, ValueError):
                self._metrics.foreign.inc()
                continue
            if reason:
                missed[event.node] = reason
        for node, reason in missed.items():
            await self._rebuild(node, reason)
        self._metrics.index_blocks.set(self._index.blocks)

    async def _compare(self) -> None:
        """Find nodes whose view was never read, or is of another life; and a stream that began anew."""
        now_s = self._clock.monotonic()
        if now_s - self._compared_at_s < COMPARE_S and not self._has_news():
            return
        self._compared_at_s = now_s
        newest = await self._view.last_id(self._view.names.blocks)
        assert self._cursor is not None
        if stream_order(newest) < stream_order(self._cursor):
            self._cursor = b"0-0"
            self._followed.clear()
        partial = 0
        for node in list(self._fleet.nodes.values()):
            identity = node.identity
            partial += bool(node.report is not None and node.report.cache_partial)
            if not self._can_follow(node.name, identity.routing_block_size):
                continue
            known = self._followed.get(node.name)
            if known is None or known.incarnation != identity.incarnation:
                await self._rebuild(node.name, "new" if known is None else "incarnation")
        self._metrics.view_partial_nodes.set(partial)
        here = (node.name for node in self._fleet.nodes.values() if node.available)
        self._metrics.index_mismatched_nodes.set(len(self._mismatched.intersection(here)))
        for name in [name for name in self._followed if name not in self._fleet.nodes]:
            del self._followed[name]
            self._index.forget(name)

    def _has_news(self) -> bool:
        return any(
            (known := self._followed.get(node.name)) is None or known.incarnation != node.identity.incarnation
            for node in self._fleet.nodes.values()
            if node.identity.routing_block_size == self._block_size
        )

    def _can_follow(self, name: str, routing_block_size: int) -> bool:
        if routing_block_size in {0, self._block_size}:
            self._mismatched.discard(name)
            return routing_block_size > 0
        if name not in self._mismatched:
            self._mismatched.add(name)
            self._index.clear(name)
            self._log.error(
                "cache view ignored: routing blocks differ",
                node=name,
                expected_tokens=self._block_size,
                seen_tokens=routing_block_size,
                fix="give dispatchers and agents of a pool the same --block-size",
            )
        return False

    def _apply(self, event: BlockEvent) -> str:
        """Apply one event; the reason why the node must be read whole instead, '' when it need not."""
        known = self._followed.get(event.node)
        if known is None or known.incarnation != event.incarnation:
            # Not admitted to the fleet's mirror yet, or of a life that is over: `_compare` decides.
            return ""
        if event.sequence <= known.sequence:
            return ""
        if event.kind is BlockEventKind.RESET:
            self._index.clear(event.node)
        elif event.sequence != known.sequence + 1:
            return "gap"
        else:
            blocks = map(bytes.fromhex, event.hashes)
            medium = Medium(event.medium)
            if event.kind is BlockEventKind.STORED:
                self._index.store(event.node, medium, blocks)
            else:
                self._index.remove(event.node, medium, blocks)
        known.sequence = event.sequence
        return ""

    async def _rebuild(self, node: str, reason: str) -> None:
        stored = await self._view.cached_blocks(node)
        if stored is None:
            self._index.clear(node)
            self._followed.pop(node, None)
            return
        self._index.replace(node, stored.tiers)
        self._followed[node] = _Followed(incarnation=stored.incarnation, sequence=stored.sequence)
        self._metrics.index_rebuilds.labels(reason).inc()
