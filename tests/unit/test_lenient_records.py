"""Header names that are not UTF-8: read by the slow reader, and nothing else is."""

from __future__ import annotations

import inspect
import struct
from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record import default_records, memory_records
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import TopicPartition

from dispatcher.backends import lenient_records
from dispatcher.backends.lenient_records import KeptRecords, PartitionRecords
from tests.support.header_names import Name, batch_builder

TP = TopicPartition("t", 0)
GZIP = 1
READ_COMMITTED = 1
CONTROL = 0x20
ABORT = struct.pack(">hh", 0, 0)
BAD = [(Name("bad"), b"1"), ("good", None)]
Headers = list[tuple[str, bytes | None]]


def batch(
    base: int, *headers: Headers, producer: int = -1, compression: int = 0, key: bytes | None = None
) -> bytes:
    """One batch that begins at offset `base`: a record per list of headers, valued by its offset."""
    builder = batch_builder(producer_id=producer, is_transactional=producer >= 0, compression=compression)
    for number, one in enumerate(headers):
        builder.append(number, 1000 + number, key, str(base + number).encode(), one)
    built = bytearray(builder.build())
    struct.pack_into(">q", built, 0, base)
    return bytes(built)


def abort_marker(base: int, producer: int) -> bytes:
    """The broker's record that ends an aborted transaction."""
    built = bytearray(batch(base, [], producer=producer, key=ABORT))
    attributes = struct.unpack_from(">h", built, 21)[0]
    struct.pack_into(">h", built, 21, attributes | CONTROL)
    struct.pack_into(">I", built, 17, calc_crc32c(bytes(built[21:])))
    return bytes(built)


def read(piece: bytes, *, aborted: list[tuple[int, int]] | None = None, offset: int = 0) -> list[Any]:
    """Every record of a fetched piece, through aiokafka's own loop."""
    return list(PartitionRecords(TP, KeptRecords(piece), aborted, offset, None, None, True, READ_COMMITTED))


def offsets(records: list[Any]) -> list[int]:
    assert [str(record.offset).encode() for record in records] == [record.value for record in records]
    return [record.offset for record in records]


@pytest.mark.parametrize("compression", [0, GZIP])
def test_name_that_is_no_text_is_read_with_replacements(compression: int) -> None:
    records = read(batch(0, [("a", b"b")], BAD, [], compression=compression) + batch(3, [], BAD))
    assert offsets(records) == [0, 1, 2, 3, 4]
    assert records[1].headers == records[4].headers == (("trace\ufffd\ufffd", b"1"), ("good", None))
    assert (records[0].headers, records[0].timestamp, records[1].timestamp) == ((("a", b"b"),), 1000, 1001)


def test_reading_begins_in_the_middle_of_a_batch() -> None:
    assert offsets(read(batch(0, BAD, BAD, BAD), offset=2)) == [2]


def test_aborted_transactions_stay_left_out_after_such_a_name() -> None:
    piece = b"".join(
        [
            batch(0, [], [], producer=7),
            abort_marker(2, 7),
            batch(3, [], producer=7),
            batch(4, [], BAD, [], producer=8),
            batch(7, [], producer=7),
            abort_marker(8, 7),
            batch(9, [], producer=7),
        ]
    )
    assert offsets(read(piece, aborted=[(7, 0), (7, 3)])) == [4, 5, 6, 9]


def test_ordinary_batches_are_read_by_the_fast_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lenient_records, "_LenientRecords", None)
    assert offsets(read(batch(0, [("a", None)], []))) == [0, 1]
    with pytest.raises(TypeError):
        read(batch(0, BAD))


def test_a_record_that_is_broken_otherwise_is_still_refused() -> None:
    built = bytearray(batch(0, BAD, BAD))
    built[-1] ^= 3
    with pytest.raises(CorruptRecordException):
        read(bytes(built))
    struct.pack_into(">I", built, 17, calc_crc32c(bytes(built[21:])))
    with pytest.raises(CorruptRecordException):
        read(bytes(built))


def test_aiokafka_is_as_its_lenient_reader_expects() -> None:
    """A new aiokafka that fails here: read ADR 11, then its fetcher and its record readers."""
    strict = lenient_records.STRICT_PARTITION
    assert list(inspect.signature(strict.__init__).parameters)[1:] == [
        "tp",
        "records",
        "aborted_transactions",
        "fetch_offset",
        "key_deserializer",
        "value_deserializer",
        "check_crcs",
        "isolation_level",
    ]
    source = inspect.getsource(fetcher.Fetcher)
    assert "MemoryRecords(part_data[-1])" in source
    assert "PartitionRecords(" in source
    own = vars(memory_records._MemoryRecordsPy(b""))
    assert {"_next_slice", "_buffer"} <= set(own)
    assert "_read_msg" in vars(default_records._DefaultRecordBatchPy)
    assert list(default_records._DefaultRecordPy.__dataclass_fields__) == [
        "offset",
        "timestamp",
        "timestamp_type",
        "key",
        "value",
        "headers",
    ]
    strictly = strict(
        TP, lenient_records.STRICT_RECORDS(batch(0, BAD)), None, 0, None, None, True, READ_COMMITTED
    )
    with pytest.raises((UnicodeDecodeError, CorruptRecordException)):
        next(strictly)
