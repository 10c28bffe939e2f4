"""`flexlb simulate --from-topic` on a real Kafka: what is read, what is left as it was, what is told."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import TopicPartition

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.traffic_log import TrafficLog
from dispatcher.cli import main
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.outcome import Choice, Outcome, OutcomeKind, Reason, Usage
from dispatcher.replay.traces import read_trace
from dispatcher.settings import DispatcherSettings
from dispatcher.simulation.command import configure_simulate
from dispatcher.simulation.fleet_report import Report
from dispatcher.simulation.from_topic import read_traffic
from tests.support.pool import Pool, request
from tests.support.servers import KafkaAddress

pytestmark = pytest.mark.kafka
SECRET = "the prompt nobody may see"
FUTURE = "2099-01-01T00:00:00Z"


@pytest.fixture
async def one(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> AsyncIterator[Pool]:
    """A pool without a dispatcher: topics, and what the test writes to them."""
    async with Pool(kafka_clients, valkey.url, pool) as made:
        yield made


def asked(number: int, **fields: Any) -> dict[str, Any]:
    """A request of which two in a row begin alike."""
    hashes = [f"{number // 2:016x}", f"{1_000 + number:016x}"]
    return request(
        f"r{number}",
        body={"prompt": f"{SECRET} {number}", "max_tokens": 64},
        tokens={"count": 600 + number, "block_size": 256, "block_hashes": hashes},
        **fields,
    )


async def answer(one: Pool, refs: dict[str, str], **tokens: int) -> None:
    """Publish outcomes of these requests with answers so long."""
    producer = one.clients.producer(acks="all")
    await producer.start()
    try:
        for id, count in tokens.items():
            outcome = Outcome(
                id=id,
                ref=refs[id],
                kind=OutcomeKind.COMPLETED,
                reason=Reason.FINISHED,
                choices=(Choice(text=SECRET),),
                usage=Usage(completion_tokens=count),
            )
            await producer.send_and_wait(one.names.outcomes, codec.encode(outcome), key=id.encode())
        await producer.send_and_wait(one.names.outcomes, b"{")
    finally:
        await producer.stop()


async def refs_of(one: Pool) -> dict[str, str]:
    """Where each readable request lies, by its id."""
    found = {}
    async for record in TrafficLog(one.clients, one.names).requests():
        try:
            found[codec.requests.decode(record.value or b"").id] = str(record.ref)
        except codec.MalformedRecord:
            continue
    return found


def flags(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    configure_simulate(parser)
    return parser.parse_args(["--from-topic", *arguments])


async def test_what_a_pool_was_sent_is_simulated_and_saved_without_its_prompts(
    one: Pool, kafka: KafkaAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        await one.append(asked(number, priority=90 if number % 3 else 20, tenant="acme"))
    for bad in (b"{", b"\xff\xfe", b"[]"):
        await one.append(bad)
    await answer(one, await refs_of(one), r0=5, r1=9, r2=31)
    saved, report = tmp_path / "saved.jsonl.gz", tmp_path / "report.json"
    policies = ["--policy", "flexlb", "--policy", "round_robin", "--nodes", "2"]
    arguments = ["--from-topic", kafka.bootstrap, "--pool", one.names.pool, "--save", str(saved)]
    assert await asyncio.to_thread(main, ["simulate", *arguments, *policies, "--json", str(report)]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "12 requests, 3 with the lengths of their answers, 9 without: taken for 9 tokens, or what they allow",
        "left out: 3 that can't be read or are refused",
        "1 outcomes can't be read",
    ]
    assert SECRET not in told.out + told.err
    trace = read_trace(saved)
    assert [one.prompt_tokens for one in trace] == [600 + number for number in range(12)]
    assert [one.output_tokens for one in trace[:4]] == [5, 9, 31, 9]
    assert [one.priority for one in trace[:3]] == [20, 90, 90]
    assert trace[0].block_ids[0] == trace[1].block_ids[0] != trace[2].block_ids[0]
    assert {one.tenant for one in trace} == {"t0"}
    runs = msgspec.json.decode(report.read_bytes(), type=Report).runs
    assert [(run.policy, run.trace, run.requests) for run in runs] == [
        ("flexlb", one.names.requests(Lane.INTERACTIVE), 12),
        ("round_robin", one.names.requests(Lane.INTERACTIVE), 12),
    ]
    again = tmp_path / "again.json"
    assert await asyncio.to_thread(main, ["simulate", str(saved), *policies, "--json", str(again)]) == 0
    for run, same in zip(runs, msgspec.json.decode(again.read_bytes(), type=Report).runs, strict=True):
        assert (run.ttft_ms, run.tpot_ms, run.hit_ratio) == (same.ttft_ms, same.tpot_ms, same.hit_ratio)


async def test_what_no_engine_could_hold_is_counted(
    one: Pool, kafka: KafkaAddress, capsys: pytest.CaptureFixture[str]
) -> None:
    await one.append(asked(0))
    await one.append(request("long", tokens={"count": 90_000}))
    arguments = [
        "simulate",
        "--from-topic",
        kafka.bootstrap,
        "--pool",
        one.names.pool,
        "--policy",
        "round_robin",
    ]
    assert await asyncio.to_thread(main, [*arguments, "--profile", "l4-llama-8b"]) == 0
    assert "left out: 1 longer than the KV cache of l4-llama-8b (34560 tokens)" in capsys.readouterr().err
    assert await asyncio.to_thread(main, [*arguments, "--profile", "h100-llama-8b"]) == 0
    assert "longer than" not in capsys.readouterr().err


async def test_reading_leaves_no_group_and_no_record_behind(one: Pool) -> None:
    for number in range(3):
        await one.append(asked(number))
    admin, consumer = one.clients.admin(), one.clients.consumer(group_id=None)
    await admin.start()
    await consumer.start()
    try:
        topics = [one.names.requests(Lane.INTERACTIVE), one.names.outcomes]
        partitions = [TopicPartition(topic, number) for topic in topics for number in (0, 1)]
        dispatcher = f"flexlb.{one.names.pool}.dispatcher"

        async def groups() -> set[str]:
            # Other tests share the broker; the pool's dispatcher may join its group at any time.
            names = {name for name, *_ in await admin.list_consumer_groups()}
            return {name for name in names if one.names.pool in name} - {dispatcher}

        before, ends = await groups(), await consumer.end_offsets(partitions)
        settings = DispatcherSettings(pool=one.names.pool)
        assert len(await read_traffic(flags(), settings, clients=one.clients, stream=io.StringIO())) == 3
        assert await groups() == before
        assert await consumer.end_offsets(partitions) == ends
    finally:
        await consumer.stop()
        await admin.close()


async def test_only_the_last_or_those_since_are_read(one: Pool) -> None:
    for number in range(10):
        await one.append(asked(number))
    settings = DispatcherSettings(pool=one.names.pool)

    async def read(*arguments: str) -> list[int]:
        stream = io.StringIO()
        trace = await read_traffic(flags(*arguments), settings, clients=one.clients, stream=stream)
        return [one.prompt_tokens - 600 for one in trace]

    assert await read("--last", "3") == [7, 8, 9]
    assert await read("--since", "1h", "--last", "100") == list(range(10))
    assert await read() == list(range(10)), "an hour by default"
    assert await read("--model", "m", "--last", "2") == [8, 9]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_a_terminal_is_told_how_far_it_is(one: Pool) -> None:
    for number in range(4):
        await one.append(asked(number))
    stream = Terminal()
    await read_traffic(flags(), DispatcherSettings(pool=one.names.pool), clients=one.clients, stream=stream)
    shown = stream.getvalue().split("\r\x1b[K")
    topic = one.names.requests(Lane.INTERACTIVE)
    assert f"reading {topic}: 4 of 4 records" in shown
    assert f"reading {one.names.outcomes}: 0 of 0 records" in shown
    assert shown[-1].startswith("4 requests, 0 with the lengths of their answers, 4 without: "), "cleared"


async def test_an_aborted_transaction_was_never_sent(one: Pool) -> None:
    await one.append(asked(0))
    producer = one.clients.producer(transactional_id=f"{one.names.pool}-test")
    await producer.start()
    try:
        await producer.begin_transaction()
        await producer.send_and_wait(one.names.requests(Lane.INTERACTIVE), json.dumps(asked(1)).encode())
        await producer.abort_transaction()
    finally:
        await producer.stop()
    await one.append(asked(2))
    settings = DispatcherSettings(pool=one.names.pool)
    trace = await read_traffic(flags(), settings, clients=one.clients, stream=io.StringIO())
    assert [one.prompt_tokens for one in trace] == [600, 602]


async def test_nothing_to_read_is_told(one: Pool, kafka: KafkaAddress) -> None:
    log = TrafficLog(one.clients, one.names)
    with pytest.raises(LogRefused, match="expected requests, seen none; check --pool, or whether retention"):
        _ = [record async for record in log.requests(since_ms=0)]
    await one.append(asked(0))
    with pytest.raises(
        LogRefused, match=r"expected requests since 2099-01-01T00:00:00\+00:00, seen only older"
    ):
        _ = [record async for record in log.requests(since_ms=4_070_908_800_000)]
    nobody = TrafficLog(one.clients, Names(f"{one.names.pool}x"))
    with pytest.raises(
        LogUnavailable, match=r"expected it to exist, seen nothing; create it with 'flexlb init'"
    ):
        _ = [record async for record in nobody.requests()]


async def test_errors_end_the_command_in_words(
    one: Pool, kafka: KafkaAddress, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{unused.getsockname()[1]}"
        assert await asyncio.to_thread(main, ["simulate", "--from-topic", nowhere]) == 2
    assert f"Kafka at {nowhere} did not answer: start it, or set kafka" in capsys.readouterr().err
    await one.append(b"{")
    arguments = ["simulate", "--from-topic", kafka.bootstrap, "--pool", one.names.pool]
    assert await asyncio.to_thread(main, arguments) == 2
    assert "seen none that can be used (1 can't be read or are refused" in capsys.readouterr().err
    assert await asyncio.to_thread(main, [*arguments, "--since", FUTURE]) == 2
    assert "seen only older ones (1); go further back" in capsys.readouterr().err
