"""Stretches of topics: where they begin and end in each partition, and the records in them.

Whoever reads a stretch may read on: the consumer is left at its end, whatever it fetched beyond.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aiokafka import TopicPartition

from dispatcher.errors import LogUnavailable

Ranges = Mapping[TopicPartition, tuple[int, int]]
"""First offset and the one after the last, by partition."""
Told = Callable[[int, int], None]
"""Is told how many of how many offsets were read."""


async def ranges_of(
    consumer: Any, *, since_ms: int | None = None, to_ms: int | None = None, last: int | None = None
) -> Ranges:
    """What a consumer's partitions hold, or what was appended from `since_ms` to `to_ms`, or until now.

    Args:
        last: of each partition no more than so many.
    """
    partitions = sorted(consumer.assignment())
    ends: Mapping[TopicPartition, int] = await consumer.end_offsets(partitions)
    if to_ms is not None:
        after = await consumer.offsets_for_times(dict.fromkeys(partitions, to_ms + 1))
        ends = {tp: min(after[tp].offset, ends[tp]) if after.get(tp) else ends[tp] for tp in partitions}
    if since_ms is None:
        firsts: Mapping[TopicPartition, int] = await consumer.beginning_offsets(partitions)
    else:
        found = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
        firsts = {tp: found[tp].offset if found.get(tp) else ends[tp] for tp in partitions}
    if last is not None:
        firsts = {tp: max(firsts[tp], ends[tp] - last) for tp in partitions}
    return {tp: (min(firsts[tp], ends[tp]), ends[tp]) for tp in partitions}


async def read_ranges(
    consumer: Any,
    ranges: Ranges,
    *,
    poll_ms: int,
    stall_s: float,
    told: Told = lambda read, of: None,
) -> AsyncIterator[Any]:
    """The records of these stretches, in the order of their offsets in each partition.

    Args:
        stall_s: without a record for so long before an end the read is given up.
        told: is told how far it is, after each answer of the brokers.
    Raises:
        LogUnavailable: it was given up.
    """
    for tp, (first, _) in ranges.items():
        consumer.seek(tp, first)
    total = sum(end - first for first, end in ranges.values())
    moved_s, positions = time.monotonic(), dict[TopicPartition, int]()
    while True:
        before, positions = positions, {tp: await consumer.position(tp) for tp in ranges}
        told(total - sum(max(0, end - positions[tp]) for tp, (_, end) in ranges.items()), total)
        behind = [tp for tp, (_, end) in ranges.items() if positions[tp] < end]
        if not behind:
            break
        if positions != before:
            moved_s = time.monotonic()
        elif time.monotonic() - moved_s > stall_s:
            at = behind[0]
            raise LogUnavailable(
                f"{at.topic}[{at.partition}]: expected to reach offset {ranges[at][1]}, seen no record for "
                f"{stall_s:.0f} s at {positions[at]}; is the broker well?"
            )
        for tp, records in (await consumer.getmany(*behind, timeout_ms=poll_ms)).items():
            for record in records:
                if record.offset < ranges[tp][1]:
                    yield record
    for tp, (_, end) in ranges.items():
        # A fetch may hold what was appended since the end was asked for: it is for whoever reads on.
        if positions[tp] > end:
            consumer.seek(tp, end)
