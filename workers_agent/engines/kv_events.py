"""KV events of vLLM and SGLang over ZeroMQ: decoding, and following them without missing any.

A batch is `[time, events, rank]` in MessagePack; an event is a map with `type` (newer) or an array that
begins with it (older), possibly shorter or longer than what we know. Batches are numbered: a number that
jumps is a gap, filled by replay where the engine offers it; one that goes back is another life of the engine.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from dispatcher.protocol.node import Medium
from workers_agent.cache_view import Cleared, EngineEvent, Removed, Stored

QUIET_S = 2.0
"""After this long without a batch the engine is asked whether one got lost at the end."""
REPLAY_S = 10.0
"""Longest replay."""
MOST_WAITING = 100_000
MOST_BYTES = 64 << 20
"""Of one frame: ZeroMQ drops whoever sends more, and connects anew."""
_FIELDS = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}
_MEDIA = {
    None: Medium.GPU,
    "GPU": Medium.GPU,
    "CPU": Medium.CPU,
    "CPU_PINNED": Medium.CPU,
    "CPU_TIER1": Medium.CPU,
    "CPU_TIER2": Medium.DISK,
    "DISK": Medium.DISK,
    "STORAGE": Medium.DISK,
    "EXTERNAL": Medium.EXTERNAL,
}

UNREADABLE = (
    msgspec.DecodeError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    AttributeError,
    RecursionError,
)
"""What reading something that is no batch may raise."""


class UnreadableBatch(Exception):
    """A batch that is none: its blocks are unknown from here on."""


def decode_batch(payload: bytes) -> list[EngineEvent]:
    """Read one batch; events of unknown kinds, and those of other attention groups, are left out.

    Raises:
        UnreadableBatch: it is no batch of KV events.
    """
    try:
        batch = msgspec.msgpack.decode(payload)
        events = batch[1]
        return [event for raw in events if (event := _event(raw)) is not None]
    except UNREADABLE as error:
        raise UnreadableBatch(
            f"KV events: expected [time, events, rank], seen {payload[:60]!r} ({error!r})"
        ) from None


def _event(raw: Any) -> EngineEvent | None:
    if isinstance(raw, dict):
        kind, fields = raw["type"], raw
    else:
        kind = raw[0]
        fields = dict(zip(_FIELDS.get(kind, ()), raw[1:], strict=False))
    # A hybrid model tells each block once for each of its attention groups.
    if kind not in _FIELDS or fields.get("group_idx") not in {None, 0}:
        return None
    if kind == "AllBlocksCleared":
        return Cleared()
    medium = _MEDIA.get(fields.get("medium"), Medium.EXTERNAL)
    hashes = tuple(fields["block_hashes"])
    if kind == "BlockRemoved":
        return Removed(hashes=hashes, medium=medium)
    lora = fields.get("lora_name") or ""
    salt, is_opaque = _extra(fields.get("extra_keys"), lora, fields["parent_block_hash"] is None)
    size = int(fields["block_size"])
    ids = array("I", fields["token_ids"])
    if len(ids) != size * len(hashes):
        raise ValueError(f"expected {size * len(hashes)} token ids, seen {len(ids)}")
    return Stored(
        hashes=hashes,
        parent=fields["parent_block_hash"],
        tokens=ids.tobytes(),
        block_tokens=size,
        medium=medium,
        lora=lora or (str(fields["lora_id"]) if fields.get("lora_id") else ""),
        salt=salt,
        is_opaque=is_opaque,
    )


def _extra(keys: Any, lora: str, is_first: bool) -> tuple[str, bool]:
    """(cache salt, whether anything else went into the blocks): vLLM puts the salt into the first block."""
    salt, is_opaque = "", False
    for place, of_block in enumerate(keys or ()):
        for one in of_block or ():
            if isinstance(one, list | tuple) and len(one) == 2 and one[0] in {"cache_salt", "lora"}:
                one = one[1] if one[0] == "cache_salt" else lora
            if isinstance(one, str) and one == lora:
                continue
            if isinstance(one, str) and is_first and place == 0 and not salt:
                salt = one
            else:
                is_opaque = True
    return salt, is_opaque


@dataclass(kw_only=True)
class Counts:
    """What happened to the stream of events."""

    batches: int = 0
    gaps: int = 0
    replayed: int = 0
    lost: int = 0
    restarts: int = 0
    unreadable: int = 0


class KVEventSource:
    """Follows one engine's events, in order and without gaps as far as the engine can replay them.

    Args:
        endpoint: `tcp://host:port` and `ipc://path` connect; `tcp://*:port` or `bind:ADDRESS` bind, which
            is what an engine told `tcp://host:port` needs.
        replay: the engine's replay address, '' when it has none.
        take: gets each event, in order.
        forget: called when what was told before no longer holds; True when blocks may be missing now.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        replay: str = "",
        topic: str = "",
        take: Callable[[EngineEvent], None],
        forget: Callable[[bool], None],
        moved: Callable[[], None],
        quiet_s: float = QUIET_S,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._endpoint = endpoint
        self._replay = replay
        self._topic = topic.encode()
        self._take = take
        self._forget = forget
        self._moved = moved
        self._quiet_s = quiet_s
        self._most_bytes = most_bytes
        self._next: int | None = None
        self._live: int | None = None
        self.counts = Counts()

    async def run(self) -> None:
        """Follow until cancelled."""
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.SUB)
        socket.linger = 0
        socket.set_hwm(MOST_WAITING)
        socket.setsockopt(zmq.MAXMSGSIZE, self._most_bytes)
        socket.subscribe(self._topic)
        try:
            address = self._endpoint.removeprefix("bind:")
            if address != self._endpoint or "*" in address:
                socket.bind(address)
            else:
                socket.connect(address)
            if self._replay:
                await self._fill(context, 0)
            while True:
                try:
                    async with asyncio.timeout(self._quiet_s if self._replay else None):
                        frames = await socket.recv_multipart()
                except TimeoutError:
                    await self._fill(context, self._next or 0)
                    continue
                if len(frames) == 3 and len(frames[1]) == 8:
                    await self._receive(context, int.from_bytes(frames[1], "big"), frames[2])
                    self._moved()
        finally:
            socket.close()
            context.term()

    def restart(self) -> None:
        """The engine died: nothing it told holds any more."""
        self._next = self._live = None
        self._forget(False)
        self._moved()

    async def _receive(self, context: Any, sequence: int, payload: bytes) -> None:
        if self._live is not None and sequence <= self._live:
            self.counts.restarts += 1
            self._next = None
            self._forget(False)
        self._live = sequence
        if self._next is not None and sequence < self._next:
            return
        expected = self._next if self._next is not None else 0
        if sequence > expected:
            self.counts.gaps += 1
            if self._replay:
                await self._fill(context, expected)
            if self._next is None or sequence > self._next:
                self.counts.lost += sequence - (self._next or 0)
                self._forget(True)
                self._next = sequence
        if sequence == (self._next or 0):
            self._read(sequence, payload)

    def _read(self, sequence: int, payload: bytes) -> None:
        self._next = sequence + 1
        self.counts.batches += 1
        try:
            for event in decode_batch(payload):
                self._take(event)
        except UnreadableBatch:
            self.counts.unreadable += 1
            self._forget(True)

    async def _fill(self, context: Any, first: int) -> None:
        """Ask for everything from `first` on; what the engine no longer has is lost."""
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.setsockopt(zmq.MAXMSGSIZE, self._most_bytes)
        try:
            socket.connect(self._replay)
            await socket.send_multipart([b"", first.to_bytes(8, "big")])
            until = time.monotonic() + REPLAY_S
            while time.monotonic() < until:
                async with asyncio.timeout(REPLAY_S / 5):
                    frames = await socket.recv_multipart()
                sequence, payload = _replayed(frames)
                if sequence < 0:
                    return
                expected = self._next if self._next is not None else first
                if sequence < expected:
                    continue
                if sequence > expected:
                    self.counts.lost += sequence - expected
                    self._forget(True)
                self.counts.replayed += 1
                self._read(sequence, payload)
                self._moved()
        except TimeoutError:
            pass
        finally:
            socket.close()


def _replayed(frames: list[bytes]) -> tuple[int, bytes]:
    """(sequence, batch) of a replayed message, with or without a topic frame; -1 at the end."""
    if len(frames) < 2 or len(frames[-2]) != 8:
        return -1, b""
    return int.from_bytes(frames[-2], "big", signed=True), frames[-1]


def chunks(hashes: tuple[str, ...], most: int) -> Iterator[tuple[str, ...]]:
    """Split what one event may carry."""
    for start in range(0, len(hashes), most):
        yield hashes[start : start + most]
