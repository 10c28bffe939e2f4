"""The way of answers: chunks written by an agent's own streams, and read by a client's own reader.

Real Apache Kafka, acks=all; microseconds of CPU of this process for each chunk and for each token. Writing is
`ReplyStream` with many streams at once, whose tokens are coalesced by its pacer; reading is a consumer, the
decoder and one `ReplyReader` a request, and every text must be whole. Yardstick: the same bytes by a bare
producer and a bare consumer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry

from dispatcher.backends.reply_log import ReplyLog
from dispatcher.client.reader import ReplyReader
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.names import Attempt
from dispatcher.protocol.request import Endpoint
from tests.bench.machine import load_average
from tests.bench.pool import PARTITIONS, Pool
from workers_agent.engines.engine import Piece
from workers_agent.metrics import AgentMetrics
from workers_agent.services.reply_stream import Pacer, ReplyStream

STREAMS = 256
TOKENS = 100
TOKENS_A_TURN = 2
"""What an engine at 50 tokens/s brings within the pacer's 20 ms and a little."""
INTERVAL_S = 0.02
WORD = " word"
PIECE = Piece(choices=(ChoiceDelta(text=WORD),), tokens=1)
READ_S = 120.0


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    async with Pool() as pool:
        written = await _write(pool)
        read = await _read(pool)
        bare = await _bare(pool, read["values"])
    chunks = written["chunks"]
    result = {
        "load_average": load,
        "streams": STREAMS,
        "tokens": STREAMS * TOKENS,
        "chunks": chunks,
        "chunks_written_per_s": round(chunks / written["seconds"], 1),
        "write_us_per_chunk": round(written["cpu_s"] / chunks * 1e6, 2),
        "write_us_per_token": round(written["cpu_s"] / (STREAMS * TOKENS) * 1e6, 2),
        "chunks_read_per_s": round(chunks / read["seconds"], 1),
        "read_us_per_chunk": round(read["cpu_s"] / chunks * 1e6, 2),
        "yardsticks": bare,
    }
    for name, value in (result | bare).items():
        if name != "yardsticks":
            print(f"{name:28} {value}")
    return result


async def _write(pool: Pool) -> dict[str, Any]:
    log = ReplyLog(pool.kafka, pool.names)
    await log.start()
    metrics = AgentMetrics(CollectorRegistry())
    pacer = Pacer(INTERVAL_S)
    pacing = asyncio.create_task(pacer.run())

    async def one(number: int) -> None:
        work = Work(ref=f"i0_{number}", id=f"r{number}", model="m", endpoint=Endpoint.COMPLETIONS)
        stream = ReplyStream(log, work, Attempt(1, 1), "n1", pacer, metrics)
        await stream.begin()
        for token in range(TOKENS):
            await stream.add(PIECE)
            if token % TOKENS_A_TURN == 0:
                await asyncio.sleep(INTERVAL_S)
        await stream.end("length")
        stream.close()

    try:
        began, began_s = time.process_time(), time.monotonic()
        await asyncio.gather(*map(one, range(STREAMS)))
        took, took_s = time.process_time() - began, time.monotonic() - began_s
    finally:
        pacing.cancel()
        await asyncio.wait([pacing])
        await log.stop()
    (family,) = metrics.chunks.collect()
    chunks = int(next(one.value for one in family.samples if one.name.endswith("_total")))
    return {"cpu_s": took, "seconds": took_s, "chunks": chunks}


async def _read(pool: Pool) -> dict[str, Any]:
    readers = {f"r{number}".encode(): ReplyReader() for number in range(STREAMS)}
    left = STREAMS * TOKENS
    values: list[tuple[bytes, bytes]] = []
    consumer = await _consumer(pool)
    try:
        began, began_s = time.process_time(), time.monotonic()
        async with asyncio.timeout(READ_S):
            while left:
                for records in (await consumer.getmany(timeout_ms=100, max_records=1000)).values():
                    for record in records:
                        chunk = codec.chunks.decode(record.value)
                        readers[record.key].read(chunk)
                        left -= chunk.tokens
                        values.append((record.key, record.value))
        took, took_s = time.process_time() - began, time.monotonic() - began_s
    finally:
        await consumer.stop()
    assert all(reader.text == WORD * TOKENS for reader in readers.values()), "a text is not whole"
    return {"cpu_s": took, "seconds": took_s, "values": values}


async def _bare(pool: Pool, values: list[tuple[bytes, bytes]]) -> dict[str, float]:
    topic = pool.names.outcomes
    async with pool.producer() as producer:
        began = time.process_time()
        await asyncio.gather(*[await producer.send(topic, value, key=key) for key, value in values])
        wrote = time.process_time() - began
    consumer = await _consumer(pool, topic)
    try:
        seen, began = 0, time.process_time()
        async with asyncio.timeout(READ_S):
            while seen < len(values):
                seen += sum(map(len, (await consumer.getmany(timeout_ms=100, max_records=1000)).values()))
        took = time.process_time() - began
    finally:
        await consumer.stop()
    return {
        "bare_write_us": round(wrote / len(values) * 1e6, 2),
        "bare_read_us": round(took / len(values) * 1e6, 2),
    }


async def _consumer(pool: Pool, topic: str = "") -> Any:
    consumer = pool.kafka.consumer(group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    partitions = [TopicPartition(topic or pool.names.replies, number) for number in range(PARTITIONS)]
    consumer.assign(partitions)
    await consumer.seek_to_beginning(*partitions)
    return consumer
