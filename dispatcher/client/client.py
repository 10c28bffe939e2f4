"""The SDK's client: sends requests, follows their replies, awaits their outcomes.

Used by programs, by trace replay and by the demo. Its readers are placed before the first request is
sent, so that no answer can be missed. What it remembers is bounded: unfinished requests by
`most_unfinished` (`submit` waits for room), finished ones by `most_finished` (the oldest are forgotten).
"""

from __future__ import annotations

import asyncio
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Any

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from dispatcher.backends.connect import KafkaClients, close_kafka_client, connect_kafka
from dispatcher.backends.topics import MAX_RECORD_BYTES, partition_counts
from dispatcher.client.lease import LeaseKeeper
from dispatcher.client.reader import Ended, Lengths, ReplyEvent, ReplyReader, Restarted, TextAdded
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.chunk import Chunk, ChunkKind
from dispatcher.protocol.names import Lane, Names, Ref
from dispatcher.protocol.outcome import Outcome
from dispatcher.protocol.request import (
    DEFAULT_PRIORITY,
    INLINE_BODY_BYTES,
    NO_BODY,
    BodyRef,
    CancelRequest,
    Endpoint,
    InferenceRequest,
    Tokens,
)
from dispatcher.protocol.text_hash import text_hashes
from dispatcher.scheduling.admission import fingerprint

POLL_MS = 500
PAUSE_S = 0.5
MOST_EARLY = 256
"""Records kept for a request whose own append is not acknowledged yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What the client has seen of one request. `_ms` is the broker's clock, `_s` this process's
    monotonic one; None is not seen (yet)."""

    ref: str | None
    submitted_s: float
    appended_ms: int | None
    first_token_ms: int | None
    first_token_s: float | None
    ended_ms: int | None
    ended_s: float | None
    attempts: int
    outcomes: int


class _Tracked:
    """One request of this client, from before its append on."""

    def __init__(self, request: InferenceRequest, submitted_s: float) -> None:
        self.id = request.id
        self.fingerprint = fingerprint(request)
        self.submitted_s = submitted_s
        self.ref: str | None = None
        self.appended_ms: int | None = None
        self.first_token: tuple[int, float] | None = None
        self.ended: tuple[int, float] | None = None
        self.outcomes = 0
        self.reader = ReplyReader()
        self.changed = asyncio.Event()
        self.early: list[tuple[Chunk | Outcome, int, float]] = []

    def take(self, record: Chunk | Outcome, timestamp_ms: int, now_s: float) -> None:
        """Read a chunk or an outcome that carries this request's id."""
        if isinstance(record, Outcome):
            # A repeat of a request is answered by the outcome of the first, under the first's ref.
            if self.ref == record.ref or self.fingerprint == record.fingerprint:
                self._end(record, timestamp_ms, now_s)
                return
        elif self.ref == record.ref:
            self._read(record, timestamp_ms, now_s)
            return
        if self.ref is None and len(self.early) < MOST_EARLY:
            self.early.append((record, timestamp_ms, now_s))

    def acknowledge(self, ref: str, appended_ms: int | None) -> None:
        """Note where the request lies, and read what came before this was known."""
        self.ref, self.appended_ms = ref, appended_ms
        early, self.early = self.early, []
        for record, timestamp_ms, now_s in early:
            self.take(record, timestamp_ms, now_s)

    def _read(self, chunk: Chunk, timestamp_ms: int, now_s: float) -> None:
        if self.first_token is None and chunk.kind is ChunkKind.TOKENS:
            self.first_token = timestamp_ms, now_s
        if self.reader.read(chunk):
            self._wake()

    def _end(self, outcome: Outcome, timestamp_ms: int, now_s: float) -> None:
        self.outcomes += 1
        if self.ended is None:
            self.ended = timestamp_ms, now_s
            self.reader.end(outcome)
            self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def progress(self) -> Progress:
        """What was seen so far."""
        return Progress(
            ref=self.ref,
            submitted_s=self.submitted_s,
            appended_ms=self.appended_ms,
            first_token_ms=self.first_token[0] if self.first_token else None,
            first_token_s=self.first_token[1] if self.first_token else None,
            ended_ms=self.ended[0] if self.ended else None,
            ended_s=self.ended[1] if self.ended else None,
            attempts=self.reader.attempts,
            outcomes=self.outcomes,
        )


class Client:
    """Requests of one tenant in one pool. Use it as `async with Client("host:9092") as client`.

    Args:
        kafka: bootstrap servers (`host:port[,host:port]`), or constructors of Kafka clients.
        most_unfinished: requests without an outcome after which `submit` waits.
        most_finished: ended requests whose answers stay available.
        lease_ttl_s: when given, requests are cancelled once this client left or was silent for as long
            (3 to 60 s), unless they are `detached`. Without it they go on alone.
    """

    def __init__(
        self,
        kafka: str | KafkaClients,
        pool: str = "default",
        tenant: str = "",
        *,
        most_unfinished: int = 100_000,
        most_finished: int = 10_000,
        lease_ttl_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._kafka = connect_kafka(kafka) if isinstance(kafka, str) else kafka
        self._names = Names(pool)
        self._tenant = tenant
        self._monotonic = monotonic
        self._new_id = new_id
        self._room = asyncio.Semaphore(most_unfinished)
        self._most_finished = most_finished
        self._unfinished: dict[bytes, _Tracked] = {}
        self._finished: dict[bytes, _Tracked] = {}
        self._stack = AsyncExitStack()
        self._producer: Any = None
        self._is_closed = False
        self._lease_partition = 0
        self._lease: LeaseKeeper | None = None
        if lease_ttl_s is not None:
            self._lease = LeaseKeeper(self._append_lease, new_id(), tenant, lease_ttl_s)
        self.unreadable = 0

    async def __aenter__(self) -> Client:
        """Connect.

        Raises:
            LogUnavailable: the broker did not answer, or the pool's topics do not exist.
        """
        try:
            self._producer = self._kafka.producer(
                acks="all", enable_idempotence=True, linger_ms=0, max_request_size=MAX_RECORD_BYTES
            )
            self._stack.push_async_callback(close_kafka_client, self._producer)
            await self._producer.start()
            names = self._names
            ours = [topic for topic in names.topics if topic != names.dead]  # operators', not ours to see
            counts = await partition_counts(self._kafka, ours)
            if self._lease is not None:
                # After the tasks below have ended, and before the producer does.
                self._stack.push_async_callback(self._lease.end)
                self._lease_partition = zlib.crc32(self._lease.lease.encode()) % counts[names.cancels]
                await self._lease.begin()
            outcomes = await self._placed(names.outcomes, counts, "read_committed")
            # Chunks are no part of any transaction.
            replies = await self._placed(names.replies, counts, "read_uncommitted")
        except (KafkaError, OSError) as error:
            await self._stack.aclose()
            raise self._kafka.unanswered("client", error) from error
        except BaseException:
            await self._stack.aclose()
            raise
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        followers = [
            group.create_task(self._follow(outcomes, codec.outcomes)),
            group.create_task(self._follow(replies, codec.chunks)),
        ]
        if self._lease is not None:
            followers.append(group.create_task(self._lease.run()))
        for follower in followers:
            self._stack.callback(follower.cancel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_closed = True
        for tracked in self._unfinished.values():
            tracked.changed.set()
        await self._stack.__aexit__(kind, error, trace)

    async def submit(
        self,
        model: str,
        endpoint: Endpoint | str,
        body: Mapping[str, Any] | bytes,
        *,
        id: str | None = None,
        lane: Lane = Lane.INTERACTIVE,
        priority: int = DEFAULT_PRIORITY,
        deadline_ms: int | None = None,
        ttft_slo_ms: int | None = None,
        tokens: Tokens | None = None,
        session: str | None = None,
        lora: str | None = None,
        cache_salt: str | None = None,
        detached: bool = False,
        traceparent: str = "",
    ) -> str:
        """Send one request; returns its id once Kafka has it on all replicas.

        Args:
            body: the OpenAI body, or its JSON. Above 16 kB it travels by reference.
            id: unique in the tenant; the same request under the same id is run once. Made when absent.
            deadline_ms: a duration from the broker's append time.
            detached: it goes on when this client's lease ends.
        Raises:
            ValueError: a field that no dispatcher would accept, or an id this client waits for already.
            LogRefused: the request is too large for Kafka.
            LogUnavailable: Kafka did not acknowledge it. It may have been taken: send the same id again.
        """
        payload = body if isinstance(body, bytes) else msgspec.json.encode(body)
        if payload.lstrip()[:1] != b"{":
            raise ValueError("body: expected a JSON object; send the endpoint's own OpenAI body")
        if endpoint not in set(Endpoint):
            expected = " or ".join(Endpoint)
            raise ValueError(f"endpoint: expected {expected}, seen {endpoint[:80]!r}")
        id = self._new_id() if id is None else id
        if id.encode() in self._unfinished:
            raise ValueError(f"id: {id[:80]!r} is still unanswered; wait for its outcome or choose another")
        request = InferenceRequest(
            id=id,
            model=model,
            endpoint=Endpoint(endpoint),
            body=msgspec.Raw(payload if len(payload) <= INLINE_BODY_BYTES else b"{}"),
            tenant=self._tenant,
            priority=priority,
            deadline_ms=deadline_ms,
            ttft_slo_ms=ttft_slo_ms,
            tokens=tokens,
            session=session,
            lora=lora,
            cache_salt=cache_salt,
            detached=detached,
            lease=self._lease.lease if self._lease is not None and not detached else None,
        )
        request = codec.requests.decode(codec.encode(request))
        key = id.encode()
        await self._room.acquire()
        try:
            submitted_s = self._monotonic()
            if len(payload) > INLINE_BODY_BYTES:
                body_ref = await self._append_body(key, payload)
                hashes = () if tokens is not None else _text_hashes(payload, request)
                request = msgspec.structs.replace(
                    request, body=NO_BODY, body_ref=body_ref, text_hashes=hashes
                )
        except BaseException:
            self._room.release()
            raise
        tracked = _Tracked(request, submitted_s)
        self._finished.pop(key, None)
        self._unfinished[key] = tracked
        headers = [("traceparent", traceparent.encode())] if traceparent else []
        try:
            lies = await self._append(self._names.requests(lane), codec.encode(request), key, headers)
        except BaseException:
            self.forget(id)
            raise
        tracked.acknowledge(str(Ref(lane, lies.partition, lies.offset)), lies.timestamp)
        self._retire(key, tracked)
        return id

    async def _append_body(self, key: bytes, payload: bytes) -> BodyRef:
        lies = await self._append(self._names.bodies, payload, key)
        return BodyRef(
            topic=self._names.bodies,
            partition=lies.partition,
            offset=lies.offset,
            bytes=len(payload),
            sha256=sha256(payload).hexdigest(),
        )

    async def _append_lease(self, value: bytes) -> None:
        assert self._lease is not None
        key = self._lease.lease.encode()
        await self._append(self._names.cancels, value, key, partition=self._lease_partition)

    async def _append(
        self,
        topic: str,
        value: bytes,
        key: bytes,
        headers: list[tuple[str, bytes]] | None = None,
        partition: int | None = None,
    ) -> Any:
        try:
            return await self._producer.send_and_wait(
                topic, value, key=key, headers=headers, partition=partition
            )
        except MessageSizeTooLargeError as error:
            raise LogRefused(
                f"{topic}: expected at most {MAX_RECORD_BYTES} bytes, seen {len(value)}; shorten the body"
            ) from error
        except (KafkaError, OSError) as error:
            raise LogUnavailable(f"{topic}: {error!r}; send it again under the same id") from error

    async def cancel(self, id: str) -> None:
        """Ask for the end of a request; its outcome tells whether that came in time.

        Raises:
            LogUnavailable: Kafka did not acknowledge it.
        """
        cancel = CancelRequest(id=id, tenant=self._tenant)
        await self._append(self._names.cancels, codec.encode(cancel), id.encode())

    async def outcome(self, id: str) -> Outcome:
        """Wait for the one outcome of a request of this client; ValueError for an unknown id."""
        tracked = self._known(id)
        while tracked.reader.outcome is None:
            await self._change(tracked.changed)
        return tracked.reader.outcome

    async def stream(self, id: str) -> AsyncIterator[ReplyEvent]:
        """Follow a request's answer from its beginning, wherever it stands now; ends after `Ended`.

        A slow reader gets more text per event, never more memory. ValueError for an unknown id.
        """
        tracked = self._known(id)
        reader = tracked.reader
        lengths: Lengths = {}
        restarts = reader.restarts
        while True:
            changed = tracked.changed
            if reader.restarts != restarts:
                restarts = reader.restarts
                if lengths:
                    lengths = {}
                    yield Restarted()
            elif gained := reader.added_since(lengths):
                lengths = reader.lengths()
                yield TextAdded(choices=gained)
            elif reader.outcome is not None:
                yield Ended(outcome=reader.outcome)
                return
            else:
                await self._change(changed)

    def progress(self, id: str) -> Progress:
        """What was seen of a request of this client so far; ValueError for an unknown id."""
        return self._known(id).progress()

    def forget(self, id: str) -> None:
        """Remember nothing of a request any more, whether it ended or not."""
        if self._unfinished.pop(id.encode(), None) is not None:
            self._room.release()
        self._finished.pop(id.encode(), None)

    async def _change(self, changed: asyncio.Event) -> None:
        await changed.wait()
        if self._is_closed:
            raise LogUnavailable("client: closed before the outcome came; ask again under the same id")

    def _known(self, id: str) -> _Tracked:
        key = id.encode()
        tracked = self._unfinished.get(key) or self._finished.get(key)
        if tracked is None:
            raise ValueError(
                f"id: expected one that this client submitted, seen {id[:80]!r}; answers of the last "
                f"{self._most_finished} ended requests are kept"
            )
        return tracked

    def _retire(self, key: bytes, tracked: _Tracked) -> None:
        # Not before its append was acknowledged: `submit` holds it until then.
        if tracked.reader.outcome is None or tracked.ref is None or key not in self._unfinished:
            return
        del self._unfinished[key]
        self._room.release()
        self._finished[key] = tracked
        if len(self._finished) > self._most_finished:
            del self._finished[next(iter(self._finished))]

    async def _placed(self, topic: str, counts: Mapping[str, int], isolation: str) -> Any:
        consumer = self._kafka.consumer(
            group_id=None,
            isolation_level=isolation,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=POLL_MS,
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
        )
        self._stack.push_async_callback(close_kafka_client, consumer)
        await consumer.start()
        partitions = [TopicPartition(topic, number) for number in range(counts[topic])]
        consumer.assign(partitions)
        for tp, offset in (await consumer.end_offsets(partitions)).items():
            consumer.seek(tp, offset)
        return consumer

    async def _follow(self, consumer: Any, decoder: codec.Codec[Chunk] | codec.Codec[Outcome]) -> None:
        while True:
            try:
                batches = await consumer.getmany(timeout_ms=POLL_MS, max_records=1000)
            except (KafkaError, OSError):
                await asyncio.sleep(PAUSE_S)
                continue
            for records in batches.values():
                for record in records:
                    self._take(record, decoder)
            await asyncio.sleep(0)

    def _take(self, record: Any, decoder: codec.Codec[Chunk] | codec.Codec[Outcome]) -> None:
        key = record.key
        tracked = self._unfinished.get(key) or self._finished.get(key)
        if tracked is None:
            return
        try:
            value = decoder.decode(record.value or b"")
        except codec.MalformedRecord:
            self.unreadable += 1
            return
        if (value.tenant, value.id) == (self._tenant, tracked.id):
            tracked.take(value, record.timestamp, self._monotonic())
            self._retire(key, tracked)


def _text_hashes(body: bytes, request: InferenceRequest) -> tuple[str, ...]:
    """What the dispatcher would make of the body if it were inline."""
    return text_hashes(
        body, model=request.model, lora=request.lora or "", cache_salt=request.cache_salt or ""
    )
