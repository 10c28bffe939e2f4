"""The leader's writing side of Kafka: outcomes and dead letters, in transactions that commit *finished*.

One transactional id per pool: starting a new leader's producer fences the old one at the broker.
The commit's metadata carries where in `outcomes` the answers of everything above the mark lie, so
that a leader that finds Redis empty knows what not to run again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    MessageSizeTooLargeError,
    NotCoordinatorForGroupError,
    RecordListTooLargeError,
)
from aiokafka.structs import OffsetAndMetadata

from dispatcher.backends.connect import KafkaClients, close_kafka_client
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.backends.request_log import source_of
from dispatcher.backends.topics import partition_counts
from dispatcher.errors import LogUnavailable, RecordTooLarge
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.outcome import OutcomeHead

TRANSACTION_TIMEOUT_MS = 30_000
START_TIMEOUT_S = 30.0
READ_ON_MS = 20
"""The client moves past control records only when it gives nothing: short, so that a takeover is too."""
RETRY_BACKOFF_MS = 20
"""A takeover finds the old leader's transaction open; the broker says 'try again' while it aborts it."""
FOREIGN_NAMED = 10
FOREIGN_CHARS = 120
"""Of records that are none of ours, what one log line tells."""
COORDINATOR_PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6)


class CommitNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The metadata of a *finished* commit.

    `positions`: by partition of `outcomes`, where the answers of all requests above the mark begin.
    """

    positions: dict[str, int] = {}
    epoch: int = 0
    generation: str = ""
    counter: int = 0
    v: int = 1


_note = msgspec.json.Decoder(CommitNote)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The committed *finished* mark of a source, with its note."""

    offset: int
    note: CommitNote


@dataclass(frozen=True, kw_only=True)
class Publication:
    """One record to publish: an outcome, a dead letter or both."""

    key: bytes
    outcome: bytes = b""
    dead: bytes = b""


class OutcomeLog:
    """Publishes a pool's outcomes."""

    def __init__(self, kafka: KafkaClients, names: Names) -> None:
        self._kafka = kafka
        self._names = names
        self._producer = self._new_producer()

    def _new_producer(self) -> Any:
        return self._kafka.producer(
            transactional_id=self._names.transactional_id,
            enable_idempotence=True,
            acks="all",
            linger_ms=0,
            max_request_size=32 << 20,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            retry_backoff_ms=RETRY_BACKOFF_MS,
        )

    async def start(self) -> None:
        """Connect; from here on an older leader's producer is fenced by the broker."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._producer.start()
                # The client asks for its producer epoch, which fences the old one, only when a
                # transaction begins; this one is empty.
                await self._producer.begin_transaction()
                await self._producer.abort_transaction()
        except NO_ANSWER as error:
            raise LogUnavailable(f"outcome log: {error!r}") from error

    async def stop(self) -> None:
        """Close the connection."""
        await close_kafka_client(self._producer)

    async def publish(
        self, records: Sequence[Publication], finished: Mapping[str, int], note: CommitNote
    ) -> dict[int, int]:
        """Publish `records` and commit `finished` in one transaction.

        Returns:
            The position after the last record, by partition of `outcomes` written to.
        Raises:
            RecordTooLarge: a record is above its topic's limit; the transaction was aborted.
            LogUnavailable: it failed or nobody knows: read `outcomes` again before going on.
        """
        names = self._names
        after: dict[int, int] = {}
        try:
            async with asyncio.timeout(TRANSACTION_TIMEOUT_MS / 1000), self._producer.transaction():
                futures = []
                for record in records:
                    if record.outcome:
                        futures.append(
                            await self._producer.send(names.outcomes, record.outcome, key=record.key)
                        )
                    if record.dead:
                        await self._producer.send(names.dead, record.dead, key=record.key or None)
                if finished:
                    metadata = msgspec.json.encode(note).decode()
                    offsets = {
                        TopicPartition(names.requests(Lane(source[0])), int(source[1:])): OffsetAndMetadata(
                            offset, metadata
                        )
                        for source, offset in finished.items()
                    }
                    await self._producer.send_offsets_to_transaction(offsets, names.group)
                for future in futures:
                    written = await future
                    after[written.partition] = max(after.get(written.partition, 0), written.offset + 1)
        except (MessageSizeTooLargeError, RecordListTooLargeError) as error:
            # The client counts the refused record as written: its next one would be out of sequence.
            await close_kafka_client(self._producer)
            self._producer = self._new_producer()
            await self.start()
            raise RecordTooLarge(
                f"outcome log: {error!r}; raise max.message.bytes of {names.outcomes}"
            ) from error
        except NO_ANSWER as error:
            raise LogUnavailable(f"outcome log: {error!r}") from error
        return after

    async def committed(self) -> dict[str, Finished]:
        """The *finished* marks by source, those that were ever committed."""
        admin = self._kafka.admin()
        try:
            await admin.start()
            offsets = await self._group_offsets(admin)
        except NO_ANSWER as error:
            raise LogUnavailable(f"finished marks: {error!r}") from error
        finally:
            await admin.close()
        lanes = {self._names.requests(lane): lane for lane in Lane}
        found = {}
        for tp, stored in offsets.items():
            if tp.topic in lanes and stored.offset >= 0:
                found[source_of(lanes[tp.topic], tp.partition)] = Finished(
                    offset=stored.offset, note=_decode_note(stored.metadata)
                )
        return found

    async def _group_offsets(self, admin: Any) -> dict[TopicPartition, OffsetAndMetadata]:
        """Ask again while the coordinator is being made, as it is in a new cluster."""
        pauses = iter(COORDINATOR_PAUSES_S)
        while True:
            try:
                found: dict[TopicPartition, OffsetAndMetadata] = await admin.list_consumer_group_offsets(
                    self._names.group
                )
                return found
            except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError):
                pause = next(pauses, None)
                if pause is None:
                    raise
                await asyncio.sleep(pause)


def _decode_note(metadata: str | bytes | None) -> CommitNote:
    try:
        return _note.decode(metadata or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return CommitNote()


@dataclass(kw_only=True)
class PublishedOutcomes:
    """What was read of `outcomes`: the heads, the end position by partition, and what is none of ours.

    `foreign` counts records that no leader has written; `foreign_at` names the first few.
    """

    heads: list[OutcomeHead] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)
    foreign: int = 0
    foreign_at: list[str] = field(default_factory=list)

    def add(self, partition: int, offset: int, value: bytes | None) -> None:
        """Take in one record; what can't be read answers nobody, and must stop no leader."""
        try:
            self.heads.append(codec.published_heads.decode(value or b""))
        except codec.MalformedRecord as error:
            self.foreign += 1
            if len(self.foreign_at) < FOREIGN_NAMED:
                self.foreign_at.append(f"{partition}@{offset}: {str(error)[:FOREIGN_CHARS]}")


async def read_outcomes(
    kafka: KafkaClients, names: Names, since: Mapping[int, int], *, since_ms: int | None = None
) -> PublishedOutcomes:
    """Read committed outcomes from `since` (by partition; from the log's start where absent) to the end.

    Args:
        since_ms: begin no later than the first record of this epoch time.
    """
    consumer = kafka.consumer(
        group_id=None,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        fetch_max_wait_ms=READ_ON_MS,
        retry_backoff_ms=RETRY_BACKOFF_MS,
    )
    found = PublishedOutcomes()
    try:
        count = (await partition_counts(kafka, [names.outcomes]))[names.outcomes]
        partitions = [TopicPartition(names.outcomes, number) for number in range(count)]
        await consumer.start()
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        starts = await consumer.beginning_offsets(partitions)
        by_time = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms)) if since_ms else {}
        for tp in partitions:
            begin = since.get(tp.partition, 0)
            if since_ms and by_time.get(tp) is not None:
                begin = min(begin, by_time[tp].offset)
            consumer.seek(tp, max(begin, starts[tp]))
        while True:
            behind = [tp for tp in partitions if await consumer.position(tp) < ends[tp]]
            if not behind:
                found.ends = {tp.partition: ends[tp] for tp in partitions}
                return found
            for batch in (await consumer.getmany(*behind, timeout_ms=READ_ON_MS)).values():
                for record in batch:
                    found.add(record.partition, record.offset, record.value)
    except NO_ANSWER as error:
        raise LogUnavailable(f"read outcomes: {error!r}") from error
    finally:
        await close_kafka_client(consumer)
