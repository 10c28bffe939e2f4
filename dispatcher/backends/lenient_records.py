"""Read records whose header names are not UTF-8, which aiokafka's own readers refuse.

Kafka gives header names as bytes and takes any. aiokafka decodes them strictly, in C, while a batch is read:
one such record would raise in every reader of its partition, for ever, and stop a pool. Here the names are
decoded with replacement characters instead. The C reader stays the reader: only what is left of a fetched
piece after such a record is read by the slower one below. Reaches into aiokafka's privates, see ADR 11;
`tests/unit/test_lenient_records.py` tells when they change.
"""

from __future__ import annotations

import struct
from typing import Any, Self

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record import default_records, memory_records
from aiokafka.record.util import decode_varint

STRICT_RECORDS: Any = memory_records.MemoryRecords
STRICT_PARTITION: Any = fetcher.PartitionRecords
MAGIC_AT, LAST_DELTA_AT = 16, 23
"""Where a batch's header has its format and, from format 2, its last record's offset less its first's."""


class KeptRecords(STRICT_RECORDS):  # type: ignore[misc]
    """aiokafka's reader of a fetched piece of a partition, which also keeps the piece."""

    def __init__(self, piece: bytes) -> None:
        super().__init__(piece)
        self.piece = piece


class PartitionRecords(STRICT_PARTITION):  # type: ignore[misc]
    """The records of one partition in one fetch, aborted transactions left out."""

    _records: Any
    _records_iterator: Any

    def __next__(self) -> Any:
        try:
            return next(self._records_iterator)
        except StopIteration:
            self._records_iterator = None
            raise
        except (UnicodeDecodeError, CorruptRecordException) as error:
            kept = self._records
            if not isinstance(kept, KeptRecords) or not _is_about_text(error):
                raise
            # Again from the batch that raised; which producers' transactions are aborted is known up to it.
            self._records = _LenientRecords(kept.piece, self.next_fetch_offset)
            self._records_iterator = self._unpack_records()
            return next(self)


def _is_about_text(error: Exception) -> bool:
    return isinstance(error if isinstance(error, UnicodeDecodeError) else error.__cause__, UnicodeDecodeError)


class _LenientRecords:
    """Batches of a piece from the one with offset `since`, those of the format with headers in our reader."""

    def __init__(self, piece: bytes, since: int) -> None:
        self._batches = memory_records._MemoryRecordsPy(piece)
        while (batch := self._batches._next_slice) is not None and _next_offset(batch) <= since:
            self._batches._cache_next()

    def has_next(self) -> bool:
        return bool(self._batches.has_next())

    def next_batch(self) -> Any:
        batch = self._batches._next_slice
        if batch is None or batch[MAGIC_AT] < 2:
            return self._batches.next_batch()
        self._batches._cache_next()
        return LenientBatch(batch)


def _next_offset(batch: memoryview) -> int:
    """The offset after a batch's last record; before format 2 its own offset is that of its last record."""
    (offset,) = struct.unpack_from(">q", batch)
    last_delta = struct.unpack_from(">i", batch, LAST_DELTA_AT)[0] if batch[MAGIC_AT] >= 2 else 0
    return int(offset) + int(last_delta) + 1


class LenientBatch(default_records._DefaultRecordBatchPy):  # type: ignore[misc]
    """A batch of format 2 whose header names are decoded with replacement characters."""

    _pos: int

    def __iter__(self) -> Self:
        self._maybe_uncompress()
        return self

    def _read_msg(self, *_varint: object) -> Any:
        """One record: varint length, attributes, timestamp and offset deltas, key, value, headers.

        Raises:
            ValueError, IndexError: the record is cut or its lengths are wrong.
        """
        buffer = self._buffer
        length, pos = decode_varint(buffer, self._pos)
        end = pos + length
        _, pos = decode_varint(buffer, pos)
        timestamp_delta, pos = decode_varint(buffer, pos)
        offset_delta, pos = decode_varint(buffer, pos)
        key, pos = _nullable(buffer, pos)
        value, pos = _nullable(buffer, pos)
        count, pos = decode_varint(buffer, pos)
        headers = []
        for _ in range(count):
            name, pos = _nullable(buffer, pos)
            content, pos = _nullable(buffer, pos)
            if name is None:
                raise ValueError("a header without a name")
            headers.append((name.decode(errors="replace"), content))
        if count < 0 or pos != end:
            raise ValueError(f"expected a record of {length} bytes with headers, seen {count} headers")
        self._pos = pos
        appended_by_broker = self.timestamp_type == self.LOG_APPEND_TIME
        return default_records._DefaultRecordPy(
            self.base_offset + offset_delta,
            self.max_timestamp if appended_by_broker else self.first_timestamp + timestamp_delta,
            self.timestamp_type,
            key,
            value,
            headers,
        )


def _nullable(buffer: bytearray, pos: int) -> tuple[bytes | None, int]:
    length, pos = decode_varint(buffer, pos)
    if length < 0:
        return None, pos
    if pos + length > len(buffer):
        raise IndexError("a field ends after its batch")
    return bytes(buffer[pos : pos + length]), pos + length


def read_leniently() -> None:
    """Have every consumer of this process read so; doing it again changes nothing."""
    fetcher.MemoryRecords = KeptRecords
    fetcher.PartitionRecords = PartitionRecords
