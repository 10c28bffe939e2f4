"""The stream of one attempt's chunks: begin, coalesced tokens, end, each acknowledged or written again.

The first tokens go out at once, later ones share a chunk per interval, the last go out at once. At
most a few chunks are unacknowledged; when Kafka refuses one for a while, all of them are written
again in order (readers drop what overlaps). While Kafka takes nothing a bounded number of tokens gathers,
then the engine's stream is read no further: what it generates meanwhile waits in the engine's own buffers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from dispatcher.backends.reply_log import Place, ReplyLog, acknowledged
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.checkpoint import Checkpoint
from dispatcher.protocol.chunk import ChoiceDelta, Chunk, ChunkKind
from dispatcher.protocol.names import Attempt
from workers_agent.engines.engine import Piece
from workers_agent.metrics import AgentMetrics

MOST_UNACKNOWLEDGED = 32
MOST_GATHERED_TOKENS = 512
"""Far above what comes between two flushes, and a chunk of so many is far below what topics take."""
PAUSE_S = 0.2
REST_S = 1.0


class ReplyStream:
    """Writes one attempt's chunks; used by one task, flushed by the pacer too.

    Attributes:
        keeps_checkpoint: whether another attempt could go on from what is published here.
    """

    def __init__(
        self, log: ReplyLog, work: Work, attempt: Attempt, node: str, pacer: Pacer, metrics: AgentMetrics
    ) -> None:
        self._log = log
        self._work = work
        self._attempt = str(attempt)
        self._node = node
        self._pacer = pacer
        self._metrics = metrics
        self._key = work.id.encode()
        self._texts: dict[int, list[ChoiceDelta]] = {}
        self._tokens = 0
        self._first_token = 0
        self._unacknowledged: deque[tuple[bytes, asyncio.Future[Any]]] = deque()
        self._lock = asyncio.Lock()
        self._has_written = False
        self._began: Place | None = None
        self._inherited = b""
        self.keeps_checkpoint = False
        self.failure: Exception | None = None

    async def begin(self) -> None:
        """Say that this attempt answers from now on, and from the first token.

        Unless it goes on from a checkpoint it always says that it starts over: whether an earlier attempt
        has streamed, before a change of leader or a loss of Redis data, can't be known here, and a reader
        that showed nothing voids nothing.
        """
        async with self._lock:
            await self._settle(0)
            self._began, self._inherited, self._first_token = None, b"", 0
            await self._send(codec.encode(self._chunk(ChunkKind.BEGIN, restarted=True)))

    async def take_over(self, checkpoint: bytes) -> Place:
        """Say that this attempt answers from now on and may go on from what is shown; where that lies.

        Args:
            checkpoint: what the next attempt gets, if this one ends before it has decided to start over.
        """
        async with self._lock:
            self._inherited = checkpoint
            await self._send(codec.encode(self._chunk(ChunkKind.BEGIN)))
            await self._settle(0)
        assert self._began is not None
        return self._began

    def go_on_from(self, token: int) -> None:
        """Go on at the token with this index."""
        self._first_token = token

    @property
    def checkpoint(self) -> bytes:
        """What the next attempt needs to go on; empty when it could not, or when nothing is published."""
        began = self._began
        if self._inherited or not self.keeps_checkpoint or not self._has_written or began is None:
            return self._inherited
        return codec.encode(Checkpoint(partition=began.partition, offset=began.offset))

    async def publish_rest(self) -> None:
        """Have what has gathered acknowledged, if Kafka takes it soon: the next attempt goes on after it."""
        with contextlib.suppress(TimeoutError, LogRefused):
            async with asyncio.timeout(REST_S):
                await self.flush()
                async with self._lock:
                    await self._settle(0)

    async def add(self, piece: Piece) -> None:
        """Take what the engine gave; the first tokens go out at once.

        Waits while more has gathered than Kafka takes.
        """
        if self.failure is not None:
            raise self.failure
        for delta in piece.choices:
            self._texts.setdefault(delta.index, []).append(delta)
            if delta.token_ids is None:
                self.keeps_checkpoint = False
        is_first = not self._has_written
        self._tokens += piece.tokens
        if self._texts and (is_first or self._tokens >= MOST_GATHERED_TOKENS):
            await self.flush()
        elif self._texts:
            self._pacer.later(self)

    async def flush(self) -> None:
        """Write what has gathered."""
        async with self._lock:
            if not self._texts:
                return
            choices = tuple(_joined(index, deltas) for index, deltas in sorted(self._texts.items()))
            chunk = self._chunk(ChunkKind.TOKENS, choices=choices)
            self._first_token += self._tokens
            self._tokens = 0
            self._texts = {}
            self._has_written = True
            await self._send(codec.encode(chunk))

    async def end(self, finish_reason: str) -> None:
        """Write the rest and the end, and return once everything is acknowledged."""
        await self.flush()
        await self._write(self._chunk(ChunkKind.END, finish_reason=finish_reason))
        async with self._lock:
            await self._settle(0)

    def _chunk(
        self,
        kind: ChunkKind,
        *,
        choices: tuple[ChoiceDelta, ...] = (),
        restarted: bool = False,
        finish_reason: str = "",
    ) -> Chunk:
        work = self._work
        return Chunk(
            id=work.id,
            ref=work.ref,
            attempt=self._attempt,
            kind=kind,
            tenant=work.tenant,
            node=self._node,
            first_token=self._first_token,
            tokens=self._tokens if kind is ChunkKind.TOKENS else 0,
            choices=choices,
            restarted=restarted,
            finish_reason=finish_reason,
        )

    async def _write(self, chunk: Chunk) -> None:
        async with self._lock:
            await self._send(codec.encode(chunk))

    async def _send(self, chunk: bytes) -> None:
        while True:
            try:
                future = await self._log.send(chunk, self._key, self._work.reply_to)
                break
            except LogUnavailable:
                self._metrics.log_errors.inc()
                await asyncio.sleep(PAUSE_S)
        self._metrics.chunks.inc()
        self._unacknowledged.append((chunk, future))
        await self._settle(MOST_UNACKNOWLEDGED)

    async def _settle(self, most: int) -> None:
        """Wait until at most `most` chunks are unacknowledged; write them again when one was refused."""
        waiting = self._unacknowledged
        while waiting and (len(waiting) > most or waiting[0][1].done()):
            try:
                place = await acknowledged(waiting[0][1])
                waiting.popleft()
                self._began = self._began or place
            except LogUnavailable:
                self._metrics.log_errors.inc()
                await asyncio.sleep(PAUSE_S)
                again = [chunk for chunk, _ in waiting]
                for _, future in waiting:
                    _forget(future)
                waiting.clear()
                for chunk in again:
                    await self._send(chunk)

    def close(self) -> None:
        """Nobody waits for the rest."""
        self._pacer.forget(self)
        for _, future in self._unacknowledged:
            _forget(future)


def _forget(future: asyncio.Future[Any]) -> None:
    future.add_done_callback(lambda done: done.cancelled() or done.exception())


def _joined(index: int, deltas: list[ChoiceDelta]) -> ChoiceDelta:
    if len(deltas) == 1:
        return deltas[0]
    ids = [token for delta in deltas if delta.token_ids for token in delta.token_ids]
    return ChoiceDelta(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(ids) or None,
        deltas=tuple(raw for delta in deltas for raw in delta.deltas),
    )


class Pacer:
    """Flushes all streams of an agent once per interval while any has something."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._due: dict[ReplyStream, None] = {}
        self._wake = asyncio.Event()

    def later(self, stream: ReplyStream) -> None:
        """Flush `stream` within the interval."""
        self._due[stream] = None
        self._wake.set()

    def forget(self, stream: ReplyStream) -> None:
        """Do not."""
        self._due.pop(stream, None)

    async def run(self) -> None:
        """Flush until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                await asyncio.sleep(self._interval_s)
                self._wake.clear()
                due, self._due = self._due, {}
                for stream in due:
                    group.create_task(_flushed(stream))


async def _flushed(stream: ReplyStream) -> None:
    """Flush; a failure is the stream's own, told at its next token."""
    try:
        await stream.flush()
    except Exception as error:
        stream.failure = error
