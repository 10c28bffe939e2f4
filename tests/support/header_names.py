"""Batches whose header names are bytes that are no text, as producers of other languages can write them."""

from __future__ import annotations

from typing import Any

from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

NOT_UTF8 = b"trace\xff\xfe"


class Name(str):
    """A header name that goes out as `NOT_UTF8`."""

    def encode(self, *_: object) -> bytes:
        """The bytes on the wire."""
        return NOT_UTF8


def batch_builder(*, producer_id: int = -1, is_transactional: bool = False, compression: int = 0) -> Any:
    """aiokafka's builder in Python, which lets a name choose its bytes."""
    return _DefaultRecordBatchBuilderPy(
        magic=2,
        compression_type=compression,
        is_transactional=is_transactional,
        producer_id=producer_id,
        producer_epoch=0,
        base_sequence=0,
        batch_size=1 << 20,
    )


async def append_batch(
    producer: Any, topic: str, records: list[tuple[bytes, list[tuple[str, bytes | None]]]]
) -> None:
    """Append values with headers as one batch to partition 0, by a producer that is not idempotent."""
    batch = producer.create_batch()
    batch._builder = batch_builder()
    for value, headers in records:
        assert batch.append(key=None, value=value, timestamp=None, headers=headers) is not None
    batch.close()
    await (await producer.send_batch(batch, topic, partition=0))
