"""An in-memory log with Kafka's semantics, behind clients shaped like aiokafka's.

The broker: partitions with a log start, control records that take an offset each, a last stable offset,
idempotent and transactional producers with epochs, transaction markers that reach each partition (and
the group's offsets) some time after the commit was answered, transaction timeouts, long polls.
The clients do in the background what aiokafka does: a producer has one sender that retries for ever,
a consumer fetches ahead and gives nothing rather than an error while the broker is away. The states
of a transactional producer are aiokafka's own `TransactionManager`.

`tests/contract/test_kafka_semantics.py` holds this and Apache Kafka to the same behaviour. Not here:
consumer groups that move partitions, compaction, compression, several brokers.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import (
    ConcurrentTransactions,
    ConsumerStoppedError,
    IllegalOperation,
    IllegalStateError,
    InvalidProducerEpoch,
    InvalidTxnState,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    RequestTimedOutError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
)
from aiokafka.partitioner import murmur2
from aiokafka.producer.transaction_manager import TransactionManager, TransactionResult
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.structs import OffsetAndMetadata, OffsetAndTimestamp, RecordMetadata
from aiokafka.util import commit_structure_validate

from dispatcher.backends.connect import KafkaClients
from tests.support.sim.loop import OUTSIDE
from tests.support.sim.network import Network, Process, Server

EARLIEST = -2
LATEST = -1
RECORD_OVERHEAD_BYTES = 70
PREFETCH_BACKOFF_S = 0.1
RETRY_AFTER_COMMIT_S = 0.02
Headers = Sequence[tuple[str, bytes]]


# The broker's data


@dataclass(slots=True, eq=False)
class Transaction:
    """One transaction of one producer."""

    is_aborted: bool = False
    partitions: dict[TopicPartition, None] = field(default_factory=dict)
    offsets: dict[str, dict[TopicPartition, OffsetAndMetadata]] = field(default_factory=dict)
    markers_to_write: int = 0


@dataclass(slots=True)
class Entry:
    """One offset of a partition. `is_control` for the marker of a transaction's end."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    transaction: Transaction | None
    is_control: bool = False

    @property
    def size_bytes(self) -> int:
        """About what it takes on the wire."""
        return RECORD_OVERHEAD_BYTES + len(self.key or b"") + len(self.value or b"")


@dataclass(slots=True)
class _Sequence:
    epoch: int
    next: int = 0
    written: dict[int, tuple[int, int]] = field(default_factory=dict)


class Partition:
    """One partition's log."""

    def __init__(self) -> None:
        self.start = 0
        self.entries: list[Entry] = []
        self.first_open: dict[Transaction, int] = {}
        self.sequences: dict[int, _Sequence] = {}

    @property
    def end(self) -> int:
        """The offset of the next entry."""
        return self.start + len(self.entries)

    @property
    def stable_end(self) -> int:
        """The last stable offset: everything below is decided."""
        open_from = self.first_open
        return min(open_from.values()) if open_from else self.start + len(self.entries)

    def limit(self, read_committed: bool) -> int:
        """How far a reader may see."""
        return self.stable_end if read_committed else self.end

    def append(self, entry: Entry) -> None:
        """Write at the end; the first entry of a transaction holds the stable end back."""
        entry.offset = self.end
        if entry.transaction is not None and not entry.is_control:
            self.first_open.setdefault(entry.transaction, entry.offset)
        self.entries.append(entry)

    def slice(self, begin: int, end: int) -> list[Entry]:
        """Entries from `begin` to before `end`."""
        return self.entries[max(begin - self.start, 0) : max(end - self.start, 0)]

    def delete_before(self, offset: int) -> None:
        """Move the log start."""
        kept = self.slice(offset, self.end)
        self.start = max(self.start, min(offset, self.end))
        self.entries = kept


@dataclass(kw_only=True)
class Topic:
    """A topic's partitions; `append_time` stamps records with the broker's clock."""

    partitions: list[Partition]
    append_time: bool


@dataclass(kw_only=True)
class _Producer:
    """What the coordinator knows of a transactional id."""

    id: int
    epoch: int
    timeout_s: float
    ongoing: Transaction | None = None
    is_ending: bool = False
    last_result: TransactionResult | None = None


@dataclass(kw_only=True)
class _Record:
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int
    future: asyncio.Future[RecordMetadata]


@dataclass(kw_only=True)
class _Batch:
    sequence: int
    records: list[_Record]
    created_s: float


@dataclass(kw_only=True, slots=True)
class _Fetched:
    """A partition's part of a fetch answer."""

    error: Exception | None = None
    entries: list[Entry] = field(default_factory=list)
    end: int = 0
    stable_end: int = 0


def _has_news(answer: Mapping[TopicPartition, _Fetched]) -> bool:
    return any(part.entries or part.error for part in answer.values())


def visible(entry: Entry, read_committed: bool) -> bool:
    """Whether a reader gets to see an entry below its limit."""
    if entry.is_control:
        return False
    return not (read_committed and entry.transaction is not None and entry.transaction.is_aborted)


def consumer_record(
    tp: TopicPartition, entry: Entry, append_time: bool
) -> ConsumerRecord[bytes | None, bytes | None]:
    """An entry as aiokafka gives it."""
    return ConsumerRecord(
        topic=tp.topic,
        partition=tp.partition,
        offset=entry.offset,
        timestamp=entry.timestamp_ms,
        timestamp_type=int(append_time),
        key=entry.key,
        value=entry.value,
        checksum=None,
        serialized_key_size=-1 if entry.key is None else len(entry.key),
        serialized_value_size=-1 if entry.value is None else len(entry.value),
        headers=tuple(entry.headers),
    )


def choose_partition(key: bytes | None, count: int, rng: Random) -> int:
    """aiokafka's default partitioner, with its chance from the simulation."""
    if key is None:
        return rng.randrange(count)
    return _hash_of(key) % count


@functools.lru_cache(maxsize=4096)
def _hash_of(key: bytes) -> int:
    return int(murmur2(key) & 0x7FFFFFFF)


class Broker:
    """The requests of Kafka's protocol, each atomic. Their errors are aiokafka's."""

    def __init__(self, network: Network, server: Server) -> None:
        self.topics: dict[str, Topic] = {}
        self.offsets: dict[str, dict[TopicPartition, OffsetAndMetadata]] = {}
        self.network = network
        self._server = server
        self._producers: dict[str, _Producer] = {}
        self._next_producer_id = 0
        self._polls: dict[asyncio.Future[Any], tuple[Callable[[], Any], Iterable[TopicPartition]]] = {}
        self.observer: Callable[[Collection[TopicPartition]], None] | None = None
        """Told of partitions of which records were written or decided, and with none when a group's offsets
        were; it must change nothing."""

    def now_ms(self) -> int:
        """The broker's clock."""
        return int(self.network.loop.epoch_s() * 1000)

    def partition(self, tp: TopicPartition) -> Partition:
        """A partition that exists."""
        topic = self.topics.get(tp.topic)
        if topic is None or not 0 <= tp.partition < len(topic.partitions):
            raise UnknownTopicOrPartitionError(str(tp))
        partition: Partition = topic.partitions[tp.partition]
        return partition

    def metadata(self) -> dict[str, set[int]]:
        """Every topic's partitions."""
        return {name: set(range(len(topic.partitions))) for name, topic in self.topics.items()}

    def create_topic(self, name: str, partitions: int, *, append_time: bool) -> None:
        """Make a topic."""
        if name in self.topics:
            raise TopicAlreadyExistsError(f"Topic '{name}' already exists.")
        self.topics[name] = Topic(
            partitions=[Partition() for _ in range(partitions)], append_time=append_time
        )

    def delete_records(self, before: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        """Move log starts; -1 stands for the end."""
        for tp, offset in before.items():
            partition = self.partition(tp)
            if offset > partition.end:
                raise OffsetOutOfRangeError(str(tp))
            partition.delete_before(partition.end if offset < 0 else offset)
        return {tp: self.partition(tp).start for tp in before}

    # Reading

    def list_offsets(
        self, wanted: Mapping[TopicPartition, int], read_committed: bool
    ) -> dict[TopicPartition, tuple[int, int]]:
        """(offset, timestamp) of EARLIEST, LATEST or the first entry not before a time; -1 for none."""
        found = {}
        for tp, timestamp in wanted.items():
            partition = self.partition(tp)
            limit = partition.limit(read_committed)
            if timestamp == EARLIEST:
                found[tp] = (partition.start, -1)
            elif timestamp == LATEST:
                found[tp] = (limit, -1)
            else:
                later = (
                    (entry.offset, entry.timestamp_ms)
                    for entry in partition.slice(partition.start, limit)
                    if entry.timestamp_ms >= timestamp
                )
                found[tp] = next(later, (-1, -1))
        return found

    def fetch(
        self,
        positions: Mapping[TopicPartition, int],
        read_committed: bool,
        max_wait_s: float,
        max_partition_bytes: int,
        max_bytes: int,
    ) -> Any:
        """What lies at `positions`, at once or as soon as there is something."""

        def look() -> dict[TopicPartition, _Fetched]:
            left = max_bytes
            answer = {}
            for tp, position in positions.items():
                part = self._read(tp, position, read_committed, min(max_partition_bytes, left))
                if part.entries:
                    left -= sum(entry.size_bytes for entry in part.entries)
                answer[tp] = part
            return answer

        answer = look()
        if _has_news(answer):
            return answer
        future = self.network.loop.create_future()
        self._polls[future] = look, positions
        future.add_done_callback(lambda _: self._polls.pop(future, None), context=OUTSIDE)
        self.network.loop.call_later(max_wait_s, self._give_up, future, context=OUTSIDE)
        return future

    def _read(self, tp: TopicPartition, position: int, read_committed: bool, max_bytes: int) -> _Fetched:
        try:
            partition = self.partition(tp)
        except UnknownTopicOrPartitionError as error:
            return _Fetched(error=error)
        if not partition.start <= position <= partition.end:
            return _Fetched(error=OffsetOutOfRangeError({tp: position}))
        stable_end = partition.stable_end
        entries: list[Entry] = []
        for entry in partition.slice(position, stable_end if read_committed else partition.end):
            max_bytes -= entry.size_bytes
            if entries and max_bytes < 0:
                break
            entries.append(entry)
        return _Fetched(entries=entries, end=partition.end, stable_end=stable_end)

    def _give_up(self, future: asyncio.Future[Any]) -> None:
        def answer() -> None:
            poll = self._polls.pop(future, None)
            if poll is not None and not future.done():
                future.set_result(poll[0]())

        self._server.when_running(answer)

    def wake_polls(self, changed: Collection[TopicPartition]) -> None:
        """Answer the long polls that have something now that these partitions changed."""
        if self.observer is not None:
            self.observer(changed)
        for future, (look, positions) in list(self._polls.items()):
            if not future.done() and any(tp in positions for tp in changed):
                answer = look()
                if _has_news(answer):
                    del self._polls[future]
                    future.set_result(answer)

    # Writing

    def append(
        self, tp: TopicPartition, records: Iterable[_Record], transaction: Transaction | None
    ) -> tuple[int, int]:
        """Write records; (first offset, append time or -1)."""
        partition = self.partition(tp)
        append_time = self.topics[tp.topic].append_time
        now_ms = self.now_ms()
        first = partition.end
        for record in records:
            partition.append(
                Entry(
                    offset=0,
                    timestamp_ms=now_ms if append_time else record.timestamp_ms,
                    key=record.key,
                    value=record.value,
                    headers=record.headers,
                    transaction=transaction,
                )
            )
        return first, now_ms if append_time else -1

    def produce(
        self,
        batches: Mapping[TopicPartition, _Batch],
        transactional_id: str | None,
        producer_id: int,
        epoch: int,
    ) -> dict[TopicPartition, tuple[int, int] | KafkaError]:
        """Write one batch per partition: (first offset, append time) or an error for each."""
        answer: dict[TopicPartition, tuple[int, int] | KafkaError] = {}
        for tp, batch in batches.items():
            try:
                answer[tp] = self._produce(tp, batch, transactional_id, producer_id, epoch)
            except KafkaError as error:
                answer[tp] = error
        self.wake_polls(batches)
        return answer

    def _produce(
        self, tp: TopicPartition, batch: _Batch, transactional_id: str | None, producer_id: int, epoch: int
    ) -> tuple[int, int]:
        partition = self.partition(tp)
        transaction = None
        if transactional_id is not None:
            producer = self._check(transactional_id, producer_id, epoch)
            transaction = producer.ongoing
        if producer_id < 0:
            return self.append(tp, batch.records, None)
        sequence = partition.sequences.get(producer_id)
        if sequence is None or sequence.epoch < epoch:
            sequence = partition.sequences[producer_id] = _Sequence(epoch=epoch)
        if batch.sequence in sequence.written:
            return sequence.written[batch.sequence]
        if batch.sequence != sequence.next:
            raise OutOfOrderSequenceNumber(f"{tp}: expected {sequence.next}, seen {batch.sequence}")
        if transactional_id is not None and (transaction is None or tp not in transaction.partitions):
            raise InvalidTxnState(f"{tp} is not part of a transaction")
        written = self.append(tp, batch.records, transaction)
        sequence.written[batch.sequence] = written
        sequence.next += len(batch.records)
        return written

    # Transactions

    def init_producer(self, transactional_id: str | None, timeout_s: float) -> tuple[int, int]:
        """(producer id, epoch); fences whoever had the transactional id and aborts what it left open."""
        if transactional_id is None:
            self._next_producer_id += 1
            return self._next_producer_id, 0
        producer = self._producers.get(transactional_id)
        if producer is None:
            self._next_producer_id += 1
            producer = _Producer(id=self._next_producer_id, epoch=-1, timeout_s=timeout_s)
            self._producers[transactional_id] = producer
        if producer.is_ending:
            raise ConcurrentTransactions
        producer.epoch += 1
        producer.timeout_s = timeout_s
        producer.last_result = None
        if producer.ongoing is not None:
            self._begin_end(producer, TransactionResult.ABORT)
            raise ConcurrentTransactions
        return producer.id, producer.epoch

    def _check(self, transactional_id: str, producer_id: int, epoch: int) -> _Producer:
        producer = self._producers[transactional_id]
        if producer.id != producer_id or producer.epoch != epoch:
            raise InvalidProducerEpoch(f"{transactional_id}: expected epoch {producer.epoch}, seen {epoch}")
        if producer.is_ending:
            raise ConcurrentTransactions
        return producer

    def _ongoing(self, transactional_id: str, producer_id: int, epoch: int) -> Transaction:
        producer = self._check(transactional_id, producer_id, epoch)
        if producer.ongoing is None:
            producer.ongoing = Transaction()
            producer.last_result = None
            self.network.loop.call_later(
                producer.timeout_s, self._expire, producer, producer.ongoing, context=OUTSIDE
            )
        return producer.ongoing

    def add_partitions(
        self, transactional_id: str, producer_id: int, epoch: int, partitions: Iterable[TopicPartition]
    ) -> None:
        """Enter partitions into the transaction."""
        for tp in partitions:
            self.partition(tp)
        self._ongoing(transactional_id, producer_id, epoch).partitions.update(dict.fromkeys(partitions))

    def add_group(self, transactional_id: str, producer_id: int, epoch: int, group: str) -> None:
        """Enter a group's offsets into the transaction."""
        self._ongoing(transactional_id, producer_id, epoch).offsets.setdefault(group, {})

    def commit_in_transaction(
        self,
        transactional_id: str,
        producer_id: int,
        epoch: int,
        group: str,
        offsets: Mapping[TopicPartition, OffsetAndMetadata],
    ) -> None:
        """Offsets that become the group's when the transaction commits."""
        transaction = self._check(transactional_id, producer_id, epoch).ongoing
        if transaction is None or group not in transaction.offsets:
            raise InvalidTxnState(f"group {group} is not part of a transaction")
        transaction.offsets[group].update(offsets)

    def end_transaction(
        self, transactional_id: str, producer_id: int, epoch: int, result: TransactionResult
    ) -> None:
        """Decide the transaction. The decision holds; the markers follow."""
        producer = self._check(transactional_id, producer_id, epoch)
        if producer.ongoing is None:
            if producer.last_result is not result:
                raise InvalidTxnState(f"{transactional_id}: no transaction to end")
            return
        self._begin_end(producer, result)

    def _begin_end(self, producer: _Producer, result: TransactionResult) -> None:
        transaction = producer.ongoing
        assert transaction is not None
        producer.is_ending = True
        producer.last_result = result
        transaction.is_aborted = result is TransactionResult.ABORT
        steps: list[Callable[[], None]] = [
            lambda tp=tp: self._write_marker(tp, transaction)  # type: ignore[misc]
            for tp in transaction.partitions
        ]
        steps += [lambda group=group: self._apply(group, transaction) for group in transaction.offsets]  # type: ignore[misc]
        transaction.markers_to_write = len(steps)
        for step in steps:
            self.network.later(self._mark, producer, transaction, step)

    def _mark(self, producer: _Producer, transaction: Transaction, step: Callable[[], None]) -> None:
        def done() -> None:
            step()
            transaction.markers_to_write -= 1
            if transaction.markers_to_write == 0:
                producer.ongoing = None
                producer.is_ending = False

        self._when_up(done)

    def _when_up(self, step: Callable[[], None]) -> None:
        if self._server.is_up:
            self._server.when_running(step)
        else:
            self.network.loop.call_later(0.1, self._when_up, step, context=OUTSIDE)

    def _write_marker(self, tp: TopicPartition, transaction: Transaction) -> None:
        partition = self.partition(tp)
        partition.append(
            Entry(
                offset=0,
                timestamp_ms=self.now_ms(),
                key=None,
                value=None,
                headers=(),
                transaction=transaction,
                is_control=True,
            )
        )
        partition.first_open.pop(transaction, None)
        self.wake_polls((tp,))

    def _apply(self, group: str, transaction: Transaction) -> None:
        if not transaction.is_aborted:
            self.offsets.setdefault(group, {}).update(transaction.offsets[group])
            if self.observer is not None:
                self.observer(())

    def _expire(self, producer: _Producer, transaction: Transaction) -> None:
        def abort() -> None:
            if producer.ongoing is transaction and not producer.is_ending:
                producer.epoch += 1
                self._begin_end(producer, TransactionResult.ABORT)

        self._when_up(abort)


class SimKafka:
    """A Kafka cluster of one broker on the simulated network."""

    def __init__(self, network: Network, *, name: str = "kafka") -> None:
        self.server = Server(name, network.loop, refused=KafkaConnectionError, timed_out=RequestTimedOutError)
        self.broker = Broker(network, self.server)
        self._network = network

    def clients(self, process: Process) -> KafkaClients:
        """What `connect_kafka` gives, for a simulated process."""
        link = _Link(self._network, process, self)
        return KafkaClients(
            consumer=lambda *topics, **options: SimConsumer(link, *topics, **options),
            producer=lambda **options: SimProducer(link, **options),
            admin=lambda **options: SimAdmin(link, **options),
        )

    def down(self, seconds: float | None = None) -> None:
        """Refuse everything, data kept; up again after `seconds`."""
        self.server.down(seconds)

    def up(self) -> None:
        """Answer again."""
        self.server.up()

    def freeze(self, seconds: float | None = None) -> None:
        """SIGSTOP; SIGCONT after `seconds`."""
        self.server.freeze(seconds)

    # Past the network: for tests and invariants

    def create_topic(self, topic: str, partitions: int = 1, *, append_time: bool = True) -> None:
        """Make a topic."""
        self.broker.create_topic(topic, partitions, append_time=append_time)

    def append(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        *,
        partition: int | None = None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> TopicPartition:
        """Write one record now; where it went. Its offset is the partition's end minus one."""
        count = len(self.broker.topics[topic].partitions)
        if partition is None:
            partition = choose_partition(key, count, self._network.rng)
        tp = TopicPartition(topic, partition)
        record = _Record(
            key=key,
            value=value,
            headers=headers,
            timestamp_ms=self.broker.now_ms() if timestamp_ms is None else timestamp_ms,
            future=self._network.loop.create_future(),
        )
        self.broker.append(tp, [record], None)
        self.broker.wake_polls((tp,))
        return tp

    def committed(self, topic: str) -> list[ConsumerRecord[bytes | None, bytes | None]]:
        """Every record that a read_committed reader can see, by partition and offset."""
        found = []
        stored = self.broker.topics[topic]
        for number, partition in enumerate(stored.partitions):
            tp = TopicPartition(topic, number)
            for entry in partition.slice(partition.start, partition.stable_end):
                if visible(entry, True):
                    found.append(consumer_record(tp, entry, stored.append_time))
        return found

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Let retention take everything below `before`."""
        self.broker.delete_records({TopicPartition(topic, partition): before})

    def ends(self, topic: str) -> list[int]:
        """The end offset of each partition, control records and open transactions counted."""
        return [partition.end for partition in self.broker.topics[topic].partitions]

    def group_offsets(self, group: str) -> dict[TopicPartition, OffsetAndMetadata]:
        """What a group has committed."""
        return dict(self.broker.offsets.get(group, {}))


class _Link:
    """One process's way to the broker."""

    def __init__(self, network: Network, process: Process, kafka: SimKafka) -> None:
        self.loop = network.loop
        self.rng = network.rng
        self.process = process
        self.broker = kafka.broker
        self._network = network
        self._server = kafka.server

    async def ask(self, label: str, effect: Callable[[], Any], *, timeout_ms: int = 40_000) -> Any:
        """One request."""
        return await self._network.call(
            self.process, self._server, effect, label=label, timeout_s=timeout_ms / 1000
        )

    async def bootstrap(self) -> None:
        """The first contact, or KafkaConnectionError."""
        try:
            await self.ask("bootstrap", lambda: None)
        except KafkaError as error:
            raise KafkaConnectionError(f"Unable to bootstrap from {self._server.name}: {error!r}") from error

    async def partitions(self, topic: str, *, timeout_ms: int, backoff_s: float) -> set[int]:
        """The partitions of a topic; waits for it to exist.

        Raises:
            UnknownTopicOrPartitionError: it did not within `timeout_ms`.
        """
        since_s = self.loop.time()
        while True:
            try:
                metadata = await self.ask("metadata", self.broker.metadata)
            except KafkaError:
                metadata = {}
            if topic in metadata:
                return set(metadata[topic])
            if self.loop.time() - since_s > timeout_ms / 1000:
                raise UnknownTopicOrPartitionError
            await asyncio.sleep(backoff_s)


# The producer


class SimProducer:
    """aiokafka's producer."""

    def __init__(
        self,
        link: _Link,
        *,
        transactional_id: str | None = None,
        transaction_timeout_ms: int = 60_000,
        enable_idempotence: bool = False,
        acks: int | str | None = None,
        request_timeout_ms: int = 40_000,
        retry_backoff_ms: int = 100,
        max_request_size: int = 1_048_576,
        **_: Any,
    ) -> None:
        idempotent = enable_idempotence or transactional_id is not None
        if idempotent and acks not in {None, "all", -1}:
            raise ValueError(f"acks={acks} not supported if enable_idempotence=True")
        self._link = link
        self._manager = TransactionManager(transactional_id, transaction_timeout_ms) if idempotent else None
        self._transactional_id = transactional_id
        self._timeout_s = transaction_timeout_ms / 1000
        self._request_timeout_ms = request_timeout_ms
        self._backoff_s = retry_backoff_ms / 1000
        self._max_bytes = max_request_size
        self._topics: dict[str, set[int]] = {}
        self._pending: dict[TopicPartition, _Batch] = {}
        self._unanswered: dict[asyncio.Future[RecordMetadata], None] = {}
        self._work = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._closed = False

    async def start(self) -> None:
        """Connect; a transactional producer fences its predecessor."""
        await self._link.bootstrap()
        while self._manager is not None and not self._manager.has_pid():
            try:
                identity = await self._link.ask(
                    "init producer",
                    lambda: self._link.broker.init_producer(self._transactional_id, self._timeout_s),
                    timeout_ms=self._request_timeout_ms,
                )
            except KafkaError as error:
                if not _worth_retrying(error):
                    raise
                await asyncio.sleep(self._backoff_s)
            else:
                self._manager.set_pid_and_epoch(*identity)
        self._sender = asyncio.create_task(self._send_until_stopped(), name="kafka sender")
        self._sender.add_done_callback(self._sender_ended)

    async def stop(self) -> None:
        """Send what is pending, then disconnect."""
        if self._closed:
            return
        self._closed = True
        if self._sender is None:
            return
        flushed = asyncio.create_task(self.flush(), name="kafka flush")
        await asyncio.wait([flushed, self._sender], return_when=asyncio.FIRST_COMPLETED)
        flushed.cancel()
        self._sender.cancel()
        await asyncio.wait([self._sender])

    async def __aenter__(self) -> SimProducer:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def flush(self) -> None:
        """Wait until every record sent so far is answered."""
        if self._unanswered:
            await asyncio.wait(list(self._unanswered))

    async def partitions_for(self, topic: str) -> set[int]:
        """The partitions of a topic."""
        if topic not in self._topics:
            self._topics[topic] = await self._link.partitions(
                topic, timeout_ms=self._request_timeout_ms, backoff_s=self._backoff_s
            )
        return self._topics[topic]

    async def send(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers | None = None,
    ) -> asyncio.Future[RecordMetadata]:
        """Hand a record to the sender; the future is its metadata."""
        assert not (value is None and key is None), "Need at least one: key or value"
        partitions = await self.partitions_for(topic)
        if self._transactional_id is not None and not self._in_transaction():
            raise IllegalOperation("Can't send messages while not in transaction")
        size = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, headers or [])
        if size > self._max_bytes:
            raise MessageSizeTooLargeError(
                f"The message is {size} bytes when serialized which is larger than the maximum request size"
            )
        if partition is None:
            partition = choose_partition(key, len(partitions), self._link.rng)
        assert partition in partitions, "Unrecognized partition"
        if self._closed:
            raise ProducerClosed
        if self._failure is not None:
            raise copy.copy(self._failure)
        tp = TopicPartition(topic, partition)
        future: asyncio.Future[RecordMetadata] = self._link.loop.create_future()
        record = _Record(
            key=key,
            value=value,
            headers=tuple(headers or ()),
            timestamp_ms=timestamp_ms or self._link.process.clock.now_ms(),
            future=future,
        )
        batch = self._pending.get(tp)
        if batch is None:
            batch = self._pending[tp] = _Batch(sequence=-1, records=[], created_s=self._link.loop.time())
        batch.records.append(record)
        self._unanswered[future] = None
        future.add_done_callback(self._answered)
        if self._manager is not None:
            self._manager.maybe_add_partition_to_txn(tp)
        self._work.set()
        return future

    async def send_and_wait(self, *arguments: Any, **options: Any) -> RecordMetadata:
        """Send and wait for the metadata."""
        return await (await self.send(*arguments, **options))

    def _answered(self, future: asyncio.Future[RecordMetadata]) -> None:
        self._unanswered.pop(future, None)
        _read_failure(future)

    # Transactions, as aiokafka's producer has them

    def _in_transaction(self) -> bool:
        return self._manager is not None and self._manager.is_in_transaction()

    def _transactional(self) -> Any:
        if self._manager is None or self._transactional_id is None:
            raise IllegalOperation("You need to configure transaction_id to use transactions")
        return self._manager

    async def begin_transaction(self) -> None:
        """Begin; nothing is sent yet."""
        manager = self._transactional()
        await asyncio.shield(manager.wait_for_pid())
        manager.begin_transaction()

    async def commit_transaction(self) -> None:
        """Commit and wait for the decision."""
        manager = self._transactional()
        manager.committing_transaction()
        self._work.set()
        await asyncio.shield(manager.wait_for_transaction_end())

    async def abort_transaction(self) -> None:
        """Abort and wait for the decision."""
        manager = self._transactional()
        manager.aborting_transaction()
        self._work.set()
        await asyncio.shield(manager.wait_for_transaction_end())

    def transaction(self) -> _TransactionContext:
        """`async with`: commit at the end, abort on an error."""
        return _TransactionContext(self)

    async def send_offsets_to_transaction(self, offsets: Mapping[Any, Any], group_id: str) -> None:
        """Commit a group's offsets with the transaction."""
        manager = self._transactional()
        if not manager.is_in_transaction():
            raise IllegalOperation("Not in the middle of a transaction")
        if not group_id or not isinstance(group_id, str):
            raise ValueError(group_id)
        future = manager.add_offsets_to_txn(commit_structure_validate(offsets), group_id)
        future.add_done_callback(_read_failure)
        self._work.set()
        await asyncio.shield(future)

    # The sender

    def _sender_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        assert isinstance(error, Exception)
        self._failure = error
        for future in list(self._unanswered):
            if not future.done():
                future.set_exception(copy.copy(error))
        if self._manager is not None:
            self._manager.fatal_error(error)
            waiter = self._manager.wait_for_transaction_end()
            waiter.exception()

    async def _send_until_stopped(self) -> None:
        while True:
            if not await self._step():
                self._work.clear()
                await self._work.wait()

    async def _step(self) -> bool:
        """Do the next thing that is to be done; False when there is nothing."""
        manager = self._manager
        if (
            manager is not None
            and self._transactional_id is not None
            and (added := manager.partitions_to_add())
        ):
            await self._add_partitions(sorted(added))
        elif self._pending:
            await self._produce()
        elif manager is None or self._transactional_id is None:
            return False
        elif (group := manager.consumer_group_to_add()) is not None:
            if await self._coordinate("add group", "add_group", group):
                manager.consumer_group_added(group)
        elif (commit := manager.offsets_to_commit()) is not None:
            offsets, group = commit
            if await self._coordinate("commit offsets", "commit_in_transaction", group, dict(offsets)):
                for tp, offset in list(offsets.items()):
                    manager.offset_committed(tp, offset.offset, group)
        elif (result := manager.needs_transaction_commit()) is not None:
            if manager.is_empty_transaction() or await self._coordinate(
                "end transaction", "end_transaction", result
            ):
                manager.complete_transaction()
        else:
            return False
        return True

    async def _add_partitions(self, partitions: list[TopicPartition]) -> None:
        assert self._manager is not None
        if await self._coordinate("add partitions", "add_partitions", partitions):
            for tp in partitions:
                if tp in self._manager.partitions_to_add():
                    self._manager.partition_added(tp)

    async def _coordinate(self, label: str, request: str, *arguments: Any) -> bool:
        """One request to the transaction coordinator: False when it is to be repeated."""
        manager = self._manager
        assert manager is not None
        effect = getattr(self._link.broker, request)
        identity = (self._transactional_id, manager.producer_id, manager.producer_epoch)
        try:
            await self._link.ask(
                label, lambda: effect(*identity, *arguments), timeout_ms=self._request_timeout_ms
            )
        except InvalidProducerEpoch as error:
            raise ProducerFenced from error
        except KafkaError as error:
            if not _worth_retrying(error):
                raise
            fresh = isinstance(error, ConcurrentTransactions) and not manager.txn_partitions
            await asyncio.sleep(RETRY_AFTER_COMMIT_S if fresh else self._backoff_s)
            return False
        return True

    async def _produce(self) -> None:
        batches, self._pending = self._pending, {}
        manager = self._manager
        producer_id, epoch = (manager.producer_id, manager.producer_epoch) if manager else (-1, -1)
        if manager is not None:
            for tp, batch in batches.items():
                batch.sequence = manager.sequence_number(tp)
                manager.increment_sequence_number(tp, len(batch.records))
        while batches:
            sent = batches
            try:
                answers = await self._link.ask(
                    f"produce {sum(len(batch.records) for batch in sent.values())}",
                    lambda: self._link.broker.produce(sent, self._transactional_id, producer_id, epoch),  # noqa: B023
                    timeout_ms=self._request_timeout_ms,
                )
            except KafkaError as error:
                answers = dict.fromkeys(sent, error)
            batches = {}
            for tp, answer in answers.items():
                if not isinstance(answer, KafkaError):
                    self._written(tp, sent[tp], *answer)
                elif self._may_retry(answer, sent[tp]):
                    batches[tp] = sent[tp]
                else:
                    self._refused(sent[tp], answer)
            if batches:
                await asyncio.sleep(self._backoff_s)

    def _may_retry(self, error: KafkaError, batch: _Batch) -> bool:
        expired = self._link.loop.time() - batch.created_s > self._request_timeout_ms / 1000
        return _worth_retrying(error) and (self._manager is not None or not expired)

    def _written(self, tp: TopicPartition, batch: _Batch, first: int, append_ms: int) -> None:
        for index, record in enumerate(batch.records):
            if not record.future.done():
                record.future.set_result(
                    RecordMetadata(
                        topic=tp.topic,
                        partition=tp.partition,
                        topic_partition=tp,
                        offset=first + index,
                        timestamp=record.timestamp_ms if append_ms < 0 else append_ms,
                        timestamp_type=int(append_ms >= 0),
                        log_start_offset=0,
                    )
                )

    def _refused(self, batch: _Batch, error: KafkaError) -> None:
        for record in batch.records:
            if not record.future.done():
                fenced = isinstance(error, InvalidProducerEpoch)
                record.future.set_exception(ProducerFenced() if fenced else copy.copy(error))


class _TransactionContext:
    def __init__(self, producer: SimProducer) -> None:
        self._producer = producer

    async def __aenter__(self) -> _TransactionContext:
        await self._producer.begin_transaction()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            await self._producer.commit_transaction()
        elif not self._producer._transactional().is_fatal_error():
            await self._producer.abort_transaction()


def _read_failure(future: asyncio.Future[Any]) -> None:
    """Whoever gave up waiting is not told again when the future is collected."""
    if not future.cancelled():
        future.exception()


def _worth_retrying(error: KafkaError) -> bool:
    return bool(error.retriable) or isinstance(error, ConcurrentTransactions)


# The consumer


@dataclass(kw_only=True)
class _Buffer:
    """Records fetched and not yet given out."""

    records: list[ConsumerRecord[bytes | None, bytes | None]]
    end: int
    fetched_s: float
    begin: int


@dataclass(kw_only=True)
class _Position:
    """Where a consumer stands in a partition."""

    offset: int | None = None
    reset_to: int | None = None
    is_paused: bool = False
    highwater: int | None = None
    stable_end: int | None = None


class SimConsumer:
    """aiokafka's consumer, with partitions assigned by hand."""

    def __init__(
        self,
        link: _Link,
        *topics: str,
        group_id: str | None = None,
        auto_offset_reset: str = "latest",
        isolation_level: str = "read_uncommitted",
        fetch_max_wait_ms: int = 500,
        fetch_max_bytes: int = 52_428_800,
        max_partition_fetch_bytes: int = 1_048_576,
        max_poll_records: int | None = None,
        request_timeout_ms: int = 40_000,
        retry_backoff_ms: int = 100,
        **_: Any,
    ) -> None:
        if topics and group_id is not None:
            raise NotImplementedError(
                "the simulated consumer takes no part in groups: expected assign(), seen a group_id"
            )
        self._link = link
        self._subscribed = topics
        self._group = group_id
        self._reset = {"earliest": EARLIEST, "latest": LATEST}.get(auto_offset_reset)
        self._read_committed = isolation_level == "read_committed"
        self._max_wait_s = fetch_max_wait_ms / 1000
        self._max_bytes = fetch_max_bytes
        self._max_partition_bytes = max_partition_fetch_bytes
        self._max_poll_records = max_poll_records
        self._request_timeout_ms = request_timeout_ms
        self._backoff_s = retry_backoff_ms / 1000
        self._topics: dict[str, set[int]] = {}
        self._positions: dict[TopicPartition, _Position] = {}
        self._buffers: dict[TopicPartition, _Buffer | Exception] = {}
        self._changed = asyncio.Event()
        self._arrived: dict[asyncio.Future[None], None] = {}
        self._fetcher: asyncio.Task[None] | None = None
        self._is_metadata_stale = False
        self._closed = False

    async def start(self) -> None:
        """Connect."""
        await self._link.bootstrap()
        chosen = []
        for topic in self._subscribed:
            self._topics[topic] = await self._link.partitions(
                topic, timeout_ms=self._request_timeout_ms, backoff_s=self._backoff_s
            )
            chosen += [TopicPartition(topic, p) for p in sorted(self._topics[topic])]
        if chosen:
            self.assign(chosen)
        self._fetcher = asyncio.create_task(self._fetch_until_stopped(), name="kafka fetcher")

    async def stop(self) -> None:
        """Disconnect; whoever waits for records gets none."""
        self._closed = True
        if self._fetcher is not None:
            self._fetcher.cancel()
            await asyncio.wait([self._fetcher])
        self._notify()

    async def __aenter__(self) -> SimConsumer:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    # Metadata

    async def topics(self) -> set[str]:
        """All topics. Teaches `partitions_for_topic` nothing, like aiokafka's."""
        try:
            return set(await self._link.ask("metadata", self._link.broker.metadata))
        except KafkaError as error:
            raise KafkaError("Unable to get cluster metadata over all known brokers") from error

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        """The partitions of an assigned topic, some time after `assign`; None of any other."""
        return self._topics.get(topic)

    # Assignment and positions

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Read these partitions, from wherever `seek` or the reset policy says."""
        self._positions = {tp: _Position() for tp in partitions}
        self._buffers.clear()
        self._is_metadata_stale = True
        self._changed.set()

    def assignment(self) -> frozenset[TopicPartition]:
        """The assigned partitions."""
        return frozenset(self._positions)

    def _position(self, tp: TopicPartition) -> _Position:
        if tp not in self._positions:
            raise IllegalStateError(f"Partition {tp} is not assigned")
        return self._positions[tp]

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read on from `offset`."""
        if not isinstance(offset, int) or offset < 0:
            raise ValueError("Offset must be a positive integer")
        position = self._position(partition)
        position.offset, position.reset_to = offset, None
        self._buffers.pop(partition, None)
        self._changed.set()

    async def seek_to_beginning(self, *partitions: TopicPartition) -> bool:
        """Read on from the log start."""
        return await self._seek_to(EARLIEST, partitions)

    async def seek_to_end(self, *partitions: TopicPartition) -> bool:
        """Read on from the end."""
        return await self._seek_to(LATEST, partitions)

    async def _seek_to(self, where: int, partitions: Sequence[TopicPartition]) -> bool:
        chosen = list(partitions or self._positions)
        for tp in chosen:
            position = self._position(tp)
            position.offset, position.reset_to = None, where
            self._buffers.pop(tp, None)
        self._changed.set()
        for tp in chosen:
            await self.position(tp)
        return True

    async def position(self, partition: TopicPartition) -> int:
        """The offset of the next record to give out."""
        while True:
            position = self._position(partition)
            if position.offset is not None:
                return position.offset
            await self._wait(None)

    def pause(self, *partitions: TopicPartition) -> None:
        """Give out nothing of these."""
        for tp in partitions:
            self._position(tp).is_paused = True

    def resume(self, *partitions: TopicPartition) -> None:
        """Give them out again."""
        for tp in partitions:
            self._position(tp).is_paused = False
        self._changed.set()

    def paused(self) -> set[TopicPartition]:
        """The paused partitions."""
        return {tp for tp, position in self._positions.items() if position.is_paused}

    def highwater(self, partition: TopicPartition) -> int | None:
        """The partition's end as of the last fetch."""
        return self._position(partition).highwater

    def last_stable_offset(self, partition: TopicPartition) -> int | None:
        """The last stable offset as of the last fetch; -1 when not reading committed."""
        return self._position(partition).stable_end if self._read_committed else -1

    # Offsets

    async def _list(self, wanted: Mapping[TopicPartition, int]) -> dict[TopicPartition, tuple[int, int]]:
        if not wanted:
            return {}
        try:
            async with asyncio.timeout(self._request_timeout_ms / 1000):
                while True:
                    try:
                        found: dict[TopicPartition, tuple[int, int]] = await self._link.ask(
                            "list offsets",
                            lambda: self._link.broker.list_offsets(wanted, self._read_committed),
                        )
                    except KafkaError as error:
                        if not error.retriable:
                            raise
                        await asyncio.sleep(self._backoff_s)
                    else:
                        return found
        except TimeoutError as error:
            raise KafkaTimeoutError(f"Failed to get offsets in {self._request_timeout_ms} ms") from error

    async def beginning_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Log starts."""
        found = await self._list(dict.fromkeys(partitions, EARLIEST))
        return {tp: offset for tp, (offset, _) in found.items()}

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Ends; the last stable offsets when reading committed."""
        found = await self._list(dict.fromkeys(partitions, LATEST))
        return {tp: offset for tp, (offset, _) in found.items()}

    async def offsets_for_times(
        self, timestamps: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, OffsetAndTimestamp | None]:
        """The first record not before each time, None when there is none."""
        for tp, timestamp in timestamps.items():
            if timestamp < 0:
                raise ValueError(f"The target time for partition {tp} is {timestamp}.")
        found = await self._list({tp: int(timestamp) for tp, timestamp in timestamps.items()})
        return {
            tp: OffsetAndTimestamp(offset, timestamp) if offset >= 0 else None
            for tp, (offset, timestamp) in found.items()
        }

    async def commit(self, offsets: Mapping[Any, Any] | None = None) -> None:
        """Commit offsets of the group, outside every transaction."""
        if self._group is None:
            raise IllegalOperation("Requires group_id")
        if offsets is None:
            offsets = {tp: p.offset for tp, p in self._positions.items() if p.offset is not None}
        stored, group = commit_structure_validate(dict(offsets)), self._group
        await self._link.ask("commit", lambda: self._link.broker.offsets.setdefault(group, {}).update(stored))

    async def committed(self, partition: TopicPartition) -> int | None:
        """The group's committed offset."""
        if self._group is None:
            raise IllegalOperation("Requires group_id")
        group = self._group
        found = await self._link.ask(
            "fetch offsets", lambda: self._link.broker.offsets.get(group, {}).get(partition)
        )
        return None if found is None else int(found.offset)

    # Records

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[ConsumerRecord[bytes | None, bytes | None]]]:
        """What has been fetched, by partition; waits up to `timeout_ms` for something.

        Raises:
            OffsetOutOfRangeError: a position is outside the log and there is no reset policy.
            NoOffsetForPartitionError: there is no position, and no reset policy.
        """
        if self._closed:
            raise ConsumerStoppedError
        if max_records is not None and (not isinstance(max_records, int) or max_records < 1):
            raise ValueError("`max_records` must be a positive Integer")
        limit = max_records or self._max_poll_records
        until_s = self._link.loop.time() + timeout_ms / 1000
        while True:
            drained = self._drain(partitions, limit)
            left_s = until_s - self._link.loop.time()
            if drained or left_s <= 0:
                return drained
            if not await self._wait(left_s) or self._closed:
                return {}

    async def getone(self, *partitions: TopicPartition) -> ConsumerRecord[bytes | None, bytes | None]:
        """The next record."""
        while True:
            if self._closed:
                raise ConsumerStoppedError
            for records in self._drain(partitions, 1).values():
                return records[0]
            await self._wait(None)

    def __aiter__(self) -> SimConsumer:
        return self

    async def __anext__(self) -> ConsumerRecord[bytes | None, bytes | None]:
        try:
            return await self.getone()
        except ConsumerStoppedError:
            raise StopAsyncIteration from None

    def _drain(
        self, partitions: Sequence[TopicPartition], limit: int | None
    ) -> dict[TopicPartition, list[ConsumerRecord[bytes | None, bytes | None]]]:
        drained: dict[TopicPartition, list[ConsumerRecord[bytes | None, bytes | None]]] = {}
        for tp, buffer in list(self._buffers.items()):
            if partitions and tp not in partitions:
                continue
            if isinstance(buffer, Exception):
                if drained:
                    return drained
                del self._buffers[tp]
                self._changed.set()
                raise buffer
            position = self._positions[tp]
            if position.is_paused or position.offset != buffer.begin:
                del self._buffers[tp]
                self._changed.set()
                continue
            taken = buffer.records if limit is None else buffer.records[:limit]
            buffer.records = buffer.records[len(taken) :]
            if buffer.records or (limit is not None and len(taken) == limit):
                position.offset = buffer.begin = taken[-1].offset + 1
            else:
                position.offset = buffer.end
                del self._buffers[tp]
                self._changed.set()
            if taken:
                drained[tp] = taken
                if limit is not None:
                    limit -= len(taken)
                    if limit == 0:
                        break
        return drained

    async def _wait(self, timeout_s: float | None) -> bool:
        """Wait for the fetcher to have something; False when the time is up."""
        waiter: asyncio.Future[None] = self._link.loop.create_future()
        self._arrived[waiter] = None
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        finally:
            self._arrived.pop(waiter, None)
        return True

    def _notify(self) -> None:
        for waiter in list(self._arrived):
            if not waiter.done():
                waiter.set_result(None)

    # The fetcher

    async def _fetch_until_stopped(self) -> None:
        while True:
            self._changed.clear()
            lost = [tp for tp, p in self._positions.items() if p.offset is None and tp not in self._buffers]
            wanted = {
                tp: p.offset
                for tp, p in self._positions.items()
                if p.offset is not None and not p.is_paused and tp not in self._buffers
            }
            if self._is_metadata_stale:
                await self._refresh_metadata()
            elif lost:
                await self._find_positions(lost)
            elif (pause_s := self._backoff_left_s()) > 1e-6 or not wanted:
                await self._wait_for_change(pause_s if wanted else None)
            else:
                await self._fetch(wanted)

    async def _refresh_metadata(self) -> None:
        topics = {tp.topic for tp in self._positions}
        try:
            metadata = await self._link.ask("metadata", self._link.broker.metadata)
        except KafkaError:
            await asyncio.sleep(self._backoff_s)
            return
        self._topics = {topic: set(metadata[topic]) for topic in topics if topic in metadata}
        self._is_metadata_stale = False

    def _backoff_left_s(self) -> float:
        """While something fetched is not given out, nothing new is fetched for a moment."""
        now_s = self._link.loop.time()
        ages = (now_s - buffer.fetched_s for buffer in self._buffers.values() if isinstance(buffer, _Buffer))
        return max((PREFETCH_BACKOFF_S - age for age in ages), default=0.0)

    async def _wait_for_change(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _find_positions(self, partitions: list[TopicPartition]) -> None:
        wanted = {}
        try:
            for tp in partitions:
                position = self._positions[tp]
                committed = None
                if position.reset_to is None and self._group is not None:
                    committed = await self.committed(tp)
                if committed is not None:
                    position.offset = committed
                elif (where := position.reset_to or self._reset) is not None:
                    wanted[tp] = where
                else:
                    self._buffers[tp] = NoOffsetForPartitionError(tp)
            broker = self._link.broker
            found = (
                await self._link.ask(
                    "list offsets", lambda: broker.list_offsets(wanted, self._read_committed)
                )
                if wanted
                else {}
            )
        except KafkaError:
            await asyncio.sleep(self._backoff_s)
            return
        for tp, (offset, _) in found.items():
            position = self._positions.get(tp, _Position())
            if position.offset is None:
                position.offset, position.reset_to = offset, None
        self._notify()

    async def _fetch(self, wanted: dict[TopicPartition, int]) -> None:
        shuffled = list(wanted.items())
        self._link.rng.shuffle(shuffled)
        try:
            answer = await self._link.ask(
                "fetch",
                lambda: self._link.broker.fetch(
                    dict(shuffled),
                    self._read_committed,
                    self._max_wait_s,
                    self._max_partition_bytes,
                    self._max_bytes,
                ),
                timeout_ms=self._request_timeout_ms,
            )
        except KafkaError:
            await asyncio.sleep(self._backoff_s)
            return
        for tp, part in answer.items():
            position = self._positions.get(tp)
            if position is not None and position.offset == wanted[tp]:
                self._take(tp, position, wanted[tp], part)
        if any(tp in self._buffers for tp in answer):
            self._notify()

    def _take(self, tp: TopicPartition, position: _Position, begin: int, part: _Fetched) -> None:
        if isinstance(part.error, OffsetOutOfRangeError):
            if self._reset is None:
                self._buffers[tp] = part.error
            else:
                position.offset, position.reset_to = None, self._reset
        elif part.error is None:
            position.highwater, position.stable_end = part.end, part.stable_end
            if part.entries:
                append_time = self._link.broker.topics[tp.topic].append_time
                self._buffers[tp] = _Buffer(
                    records=[
                        consumer_record(tp, entry, append_time)
                        for entry in part.entries
                        if visible(entry, self._read_committed)
                    ],
                    begin=begin,
                    end=part.entries[-1].offset + 1,
                    fetched_s=self._link.loop.time(),
                )


# The admin client


class SimAdmin:
    """aiokafka's admin client."""

    def __init__(self, link: _Link, **_: Any) -> None:
        self._link = link

    async def start(self) -> None:
        """Connect."""
        await self._link.bootstrap()

    async def close(self) -> None:
        """Disconnect."""

    async def create_topics(
        self, new_topics: Iterable[Any], timeout_ms: int | None = None, validate_only: bool = False
    ) -> Any:
        """Make topics; `topic_errors` of the answer has (topic, error code, message) for each."""
        wanted = list(new_topics)

        def create() -> list[tuple[str, int, str | None]]:
            return [self._create(new) for new in wanted]

        return SimpleNamespace(topic_errors=await self._link.ask("create topics", create))

    def _create(self, new: Any) -> tuple[str, int, str | None]:
        append_time = new.topic_configs.get("message.timestamp.type") == "LogAppendTime"
        try:
            self._link.broker.create_topic(new.name, max(new.num_partitions, 1), append_time=append_time)
        except TopicAlreadyExistsError as error:
            return new.name, error.errno, str(error.args[0])
        return new.name, 0, None

    async def list_topics(self) -> list[str]:
        """Names of all topics."""
        return list(await self._link.ask("metadata", self._link.broker.metadata))

    async def describe_topics(self, topics: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Topics and partitions; error code 3 for a topic that does not exist."""
        metadata = await self._link.ask("metadata", self._link.broker.metadata)
        return [
            {
                "error_code": 0 if name in metadata else UnknownTopicOrPartitionError.errno,
                "topic": name,
                "is_internal": False,
                "partitions": [
                    {"error_code": 0, "partition": p, "leader": 1, "replicas": [1], "isr": [1]}
                    for p in sorted(metadata.get(name, ()))
                ],
            }
            for name in (metadata if topics is None else topics)
        ]

    async def describe_configs(self, config_resources: Sequence[Any], *_: Any) -> list[Any]:
        """Nothing: this log keeps everything."""
        await self._link.ask("describe configs", lambda: None)
        return []

    async def list_consumer_group_offsets(
        self,
        group_id: str,
        group_coordinator_id: int | None = None,
        partitions: Iterable[TopicPartition] | None = None,
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """A group's committed offsets; -1 for a partition asked for that has none."""
        stored = await self._link.ask(
            "fetch offsets", lambda: dict(self._link.broker.offsets.get(group_id, {}))
        )
        if partitions is None:
            return dict(stored)
        return {tp: stored.get(tp, OffsetAndMetadata(-1, "")) for tp in partitions}

    async def delete_records(
        self, records_to_delete: Mapping[TopicPartition, Any], timeout_ms: int | None = None
    ) -> dict[TopicPartition, int]:
        """Move log starts; the new ones."""
        before = {tp: int(wanted.before_offset) for tp, wanted in records_to_delete.items()}
        moved: dict[TopicPartition, int] = await self._link.ask(
            "delete records", lambda: self._link.broker.delete_records(before)
        )
        return moved
