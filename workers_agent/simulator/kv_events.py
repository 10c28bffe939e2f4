"""KV events on ZeroMQ, as vLLM publishes them: what became cached, what was evicted.

Three frames: topic, sequence (8 bytes, big endian, from 0), and a MessagePack batch `[time, events, rank]`.
Events are maps with `type` (vLLM 0.33) or arrays that begin with it (older). A ROUTER socket replays what is
still buffered: asked `[b"", first sequence]` it answers `[b"", topic, sequence, batch]` for each and ends
with sequence -1. `tcp://*:PORT` and `ipc://` bind, `tcp://HOST:PORT` connects, as vLLM's settings do; the
replay address is always bound.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from dispatcher.simulation.kv_cache import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent

KEPT_BATCHES = 10_000
"""As many batches as vLLM keeps for replay (`buffer_steps`)."""
_ANY_PORT = re.compile(r":0$")
END = (-1).to_bytes(8, "big", signed=True)


class KVEventPublisher:
    """One engine's events.

    Args:
        replay: address of the replay socket, '' for none.
        encoding: 'map' or 'array'.
        drop_share: this share of batches is not published (but can be replayed), chosen by `rng`.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        replay: str = "",
        topic: str = "",
        encoding: str = "map",
        block_tokens: int,
        drop_share: float = 0.0,
        rng: random.Random | None = None,
    ) -> None:
        self._topic = topic.encode()
        self._encoding = encoding
        self._block_tokens = block_tokens
        self._drop_share = drop_share
        self._rng = rng if rng is not None else random.Random(0)
        self._sequence = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_BATCHES)
        self._context = zmq.asyncio.Context()
        self._socket = zmq.Socket(zmq.Context(self._context), zmq.PUB)
        self._socket.set_hwm(100_000)
        self._socket.linger = 0
        self._replay: Any = None
        self.replay = ""
        self.dropped = 0
        try:
            self.endpoint = _open(self._socket, endpoint, binds=_binds(endpoint))
            if replay:
                self._replay = self._context.socket(zmq.ROUTER)
                self._replay.linger = 0
                # A ROUTER drops what is above its mark: a whole replay and its end must fit.
                self._replay.sndhwm = KEPT_BATCHES + 1
                self.replay = _open(self._replay, replay, binds=True)
        except OSError:
            self.close()
            raise

    def publish(self, events: Iterable[CacheEvent]) -> None:
        """Publish one batch; never blocks."""
        batch = msgspec.msgpack.encode([time.time(), [self._encoded(event) for event in events], 0])
        sequence, self._sequence = self._sequence, self._sequence + 1
        self._kept.append((sequence, batch))
        if self._drop_share and self._rng.random() < self._drop_share:
            self.dropped += 1
            return
        self._socket.send_multipart([self._topic, sequence.to_bytes(8, "big"), batch], zmq.NOBLOCK)

    def _encoded(self, event: CacheEvent) -> object:
        match event:
            case BlocksStored():
                kind = "BlockStored"
                keys = [[event.salt] if event.salt and event.parent is None else None] + [None] * (
                    len(event.hashes) - 1
                )
                fields: dict[str, object] = {
                    "block_hashes": event.hashes,
                    "parent_block_hash": event.parent,
                    "token_ids": event.token_ids,
                    "block_size": self._block_tokens,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": event.lora or None,
                    "extra_keys": keys if event.salt and event.parent is None else None,
                }
            case BlocksRemoved():
                kind = "BlockRemoved"
                fields = {"block_hashes": event.hashes, "medium": "GPU"}
            case CacheCleared():
                kind, fields = "AllBlocksCleared", {}
        if self._encoding == "map":
            return {"type": kind, **fields}
        return [kind, *fields.values()]

    async def run(self) -> None:
        """Answer replays until cancelled."""
        while self._replay is not None:
            frames = await self._replay.recv_multipart()
            if len(frames) < 3 or len(frames[-1]) != 8:
                continue
            peer, first = frames[0], int.from_bytes(frames[-1], "big")
            for sequence, batch in list(self._kept):
                if sequence >= first:
                    await self._replay.send_multipart(
                        [peer, b"", self._topic, sequence.to_bytes(8, "big"), batch]
                    )
                    await asyncio.sleep(0)
            await self._replay.send_multipart([peer, b"", b"", END, b""])

    def close(self) -> None:
        """Close the sockets."""
        self._socket.close()
        if self._replay is not None:
            self._replay.close()
        self._context.term()


def _binds(endpoint: str) -> bool:
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def _open(socket: Any, endpoint: str, *, binds: bool) -> str:
    """Bind or connect; returns the address at which this engine is reached, or the one it connects to.

    Raises:
        OSError: the address can't be used.
    """
    try:
        if binds:
            socket.bind(_ANY_PORT.sub(":*", endpoint))
            bound: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            return bound.replace("0.0.0.0", "127.0.0.1")
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise OSError(error.errno, f"{endpoint}: {error.strerror}") from None
    return endpoint
