"""The SDK's client and trace replay, against the simulation's log, Apache Kafka and a real dispatcher.

In most tests the other side of the topics (leader and agents) is the test itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiokafka import TopicPartition

from dispatcher.audit import audit
from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.topics import create_topics
from dispatcher.client import Client, Ended, ReplyEvent, Restarted, TextAdded
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.chunk import ChoiceDelta, Chunk, ChunkKind
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.outcome import Choice, Outcome, OutcomeKind, Reason, Usage
from dispatcher.protocol.request import Endpoint, InferenceRequest, LeaseRecord, Tokens
from dispatcher.protocol.text_hash import text_hashes
from dispatcher.replay.replay import ReplayResult, ReplaySettings, replay
from dispatcher.replay.report import summarise
from dispatcher.replay.traces import TraceRequest
from dispatcher.scheduling.admission import fingerprint
from tests.support.pool import Pool, ScriptedNode
from tests.support.servers import KafkaAddress
from tests.support.sim import loop
from tests.support.sim.kafka import SimKafka
from tests.support.sim.network import CALM, Network
from tests.support.wait import wait_until

BODY = {"prompt": "hello", "max_tokens": 3}
ATTEMPT = "1700000000000_1"
ANOTHER = "1700000000000_2"
EVENTS_S = 30.0


class OtherSide:
    """The leader and the agents, as far as a client can see them."""

    def __init__(self, kafka: KafkaClients, pool: str) -> None:
        self.kafka = kafka
        self.names = Names(pool)
        self._plain: Any = None
        self._leader: Any = None
        self._consumer: Any = None
        self.lives: list[tuple[int, LeaseRecord]] = []
        """Signs of life that `record` has passed, and their partitions."""

    async def start(self) -> None:
        await create_topics(self.kafka, self.names, partitions=2, replication_factor=1)
        self._plain = self.kafka.producer(acks="all", enable_idempotence=True, linger_ms=0)
        self._leader = self.kafka.producer(
            transactional_id=self.names.transactional_id, enable_idempotence=True, acks="all", linger_ms=0
        )
        self._consumer = self.kafka.consumer(group_id=None, auto_offset_reset="earliest")
        for client in (self._plain, self._leader, self._consumer):
            await client.start()
        topics = (self.names.requests(Lane.INTERACTIVE), self.names.requests(Lane.BATCH), self.names.cancels)
        self._consumer.assign([TopicPartition(topic, number) for topic in topics for number in (0, 1)])

    async def stop(self) -> None:
        for client in (self._plain, self._leader, self._consumer):
            await client.stop()

    def client(self, **options: Any) -> Client:
        return Client(self.kafka, self.names.pool, **options)

    async def record(self) -> tuple[Any, str]:
        """The next record that clients wrote, and its ref."""
        async with asyncio.timeout(EVENTS_S):
            record = await self._consumer.getone()
            while record.topic == self.names.cancels and b'"lease"' in record.value:
                self.lives.append((record.partition, codec.leases.decode(record.value)))
                record = await self._consumer.getone()
        lane = "b" if record.topic.endswith("batch") else "i"
        return record, f"{lane}{record.partition}_{record.offset}"

    async def has_lived(self, signs: int) -> bool:
        """Read the next record, a sign of life; whether there were so many."""
        async with asyncio.timeout(EVENTS_S):
            record = await self._consumer.getone()
        self.lives.append((record.partition, codec.leases.decode(record.value)))
        return len(self.lives) >= signs

    async def request(self) -> tuple[InferenceRequest, str]:
        record, ref = await self.record()
        return codec.requests.decode(record.value), ref

    async def body(self, request: InferenceRequest) -> bytes:
        """The body that a request refers to."""
        ref = request.body_ref
        assert ref is not None
        consumer = self.kafka.consumer(group_id=None, auto_offset_reset="none")
        await consumer.start()
        try:
            tp = TopicPartition(ref.topic, ref.partition)
            consumer.assign([tp])
            consumer.seek(tp, ref.offset)
            value: bytes = (await consumer.getone(tp)).value
            return value
        finally:
            await consumer.stop()

    async def chunk(
        self, id: str, ref: str, attempt: str, kind: ChunkKind, text: str = "", **fields: Any
    ) -> None:
        choices = (ChoiceDelta(text=text),) if text else ()
        chunk = Chunk(id=id, ref=ref, attempt=attempt, kind=kind, choices=choices, tokens=len(text), **fields)
        await self._plain.send_and_wait(self.names.replies, codec.encode(chunk), key=id.encode())

    async def junk(self, id: str) -> None:
        await self._plain.send_and_wait(self.names.replies, b"junk", key=id.encode())

    async def publish(self, *outcomes: Outcome) -> None:
        async with self._leader.transaction():
            for outcome in outcomes:
                await self._leader.send(
                    self.names.outcomes, codec.encode(outcome), key=outcome.id.encode(), partition=0
                )

    async def abort(self, outcome: Outcome) -> None:
        await self._leader.begin_transaction()
        await self._leader.send(
            self.names.outcomes, codec.encode(outcome), key=outcome.id.encode(), partition=0
        )
        await self._leader.flush()
        await self._leader.abort_transaction()


def completed(id: str, ref: str, text: str = "abc", **fields: Any) -> Outcome:
    return Outcome(
        id=id,
        ref=ref,
        **{
            "kind": OutcomeKind.COMPLETED,
            "reason": Reason.FINISHED,
            "choices": (Choice(text=text, finish_reason="stop"),),
            **fields,
        },
    )


async def next_of(events: AsyncIterator[ReplyEvent]) -> ReplyEvent:
    async with asyncio.timeout(EVENTS_S):
        return await anext(events)


async def of(client: Client, id: str) -> Outcome:
    async with asyncio.timeout(EVENTS_S):
        return await client.outcome(id)


def added(text: str) -> TextAdded:
    return TextAdded(choices=(ChoiceDelta(text=text),))


async def a_request_is_sent_as_given(side: OtherSide) -> None:
    async with side.client(tenant="acme") as client:
        tokens = Tokens(count=300, block_hashes=("0" * 16,))
        id = await client.submit(
            "m",
            Endpoint.COMPLETIONS,
            BODY,
            priority=90,
            deadline_ms=5000,
            ttft_slo_ms=100,
            tokens=tokens,
            session="s",
            lora="l",
            cache_salt="c",
            detached=True,
            traceparent="00-1",
        )
        record, ref = await side.record()
        assert (record.key, tuple(record.headers)) == (id.encode(), (("traceparent", b"00-1"),))
        assert codec.requests.decode(record.value) == InferenceRequest(
            id=id,
            model="m",
            endpoint=Endpoint.COMPLETIONS,
            body=msgspec.Raw(msgspec.json.encode(BODY)),
            tenant="acme",
            priority=90,
            deadline_ms=5000,
            ttft_slo_ms=100,
            tokens=tokens,
            session="s",
            lora="l",
            cache_salt="c",
            detached=True,
        )
        assert client.progress(id).ref == ref
        assert client.progress(id).appended_ms == record.timestamp
        raw = b'{"prompt": "as it is",  "x": 1.0}'
        assert await client.submit("m", "/v1/completions", raw, id="mine", lane=Lane.BATCH) == "mine"
        request, ref = await side.request()
        assert (bytes(request.body), ref[0]) == (raw, "b")


async def a_client_with_a_lease_gives_signs_of_life_until_it_says_goodbye(side: OtherSide) -> None:
    async with side.client(tenant="acme", lease_ttl_s=3.0) as client:
        await client.submit("m", Endpoint.COMPLETIONS, BODY)
        request, _ = await side.request()
        await client.submit("m", Endpoint.COMPLETIONS, BODY, detached=True)
        detached, _ = await side.request()
        assert (detached.detached, detached.lease) == (True, None)
        await wait_until(lambda: side.has_lived(3), "more signs of life")
    while side.lives[-1][1].ttl_ms:
        await side.has_lived(0)
    assert {life.lease for _, life in side.lives} == {request.lease}
    assert {life.tenant for _, life in side.lives} == {"acme"}
    assert [life.ttl_ms for _, life in side.lives[:-1]] == [3000] * (len(side.lives) - 1)
    assert len({partition for partition, _ in side.lives}) == 1


def test_a_lease_has_bounds() -> None:
    for ttl_s in (0.0, 2.9, 60.1):
        with pytest.raises(ValueError, match="lease_ttl_s: expected 3 to 60 s"):
            Client("nowhere:1", lease_ttl_s=ttl_s)


async def a_large_body_travels_by_reference(side: OtherSide) -> None:
    async with side.client() as client:
        body = {"prompt": "x" * 20_000}
        await client.submit("m", Endpoint.COMPLETIONS, body, id="big")
        request, ref = await side.request()
        stored = await side.body(request)
        assert json.loads(stored) == body
        assert request.body_ref is not None
        assert request.body_ref.sha256 == hashlib.sha256(stored).hexdigest()
        assert (bytes(request.body), request.body_ref.bytes) == (b"", len(stored))
        # What the dispatcher can't see, the client tells: how the prompt begins.
        assert request.text_hashes == text_hashes(stored, model="m")
        assert len(request.text_hashes) == 19
        await side.publish(completed("big", ref))
        assert (await of(client, "big")).ref == ref


async def the_one_committed_outcome_is_awaited(side: OtherSide) -> None:
    async with side.client() as client:
        await client.submit("m", Endpoint.COMPLETIONS, BODY, id="r")
        _, ref = await side.request()
        await side.abort(completed("r", ref, "aborted"))
        await side.publish(completed("r", ref), completed("r", ref, "copy"))
        assert (await of(client, "r")).choices[0].text == "abc"
        await wait_until(lambda: client.progress("r").outcomes == 2, "the copy")
        assert (await of(client, "r")).choices[0].text == "abc"


async def only_its_own_outcome_is_taken(side: OtherSide) -> None:
    async with side.client(tenant="acme") as client:
        await client.submit("m", Endpoint.COMPLETIONS, BODY, id="r")
        request, ref = await side.request()
        other = "i0_77" if ref != "i0_77" else "i0_78"
        await side.publish(
            completed("r", ref, "of another tenant"),
            completed("r", other, "of another request", tenant="acme", fingerprint="0" * 16),
            completed("r", other, "the same request's", tenant="acme", fingerprint=fingerprint(request)),
        )
        assert (await of(client, "r")).choices[0].text == "the same request's"
        assert client.progress("r").outcomes == 1


async def a_stream_shows_text_restart_and_end(side: OtherSide) -> None:
    async with side.client() as client:
        await client.submit("m", Endpoint.COMPLETIONS, BODY, id="r")
        _, ref = await side.request()
        events = client.stream("r")
        await side.chunk("r", ref, ATTEMPT, ChunkKind.BEGIN)
        await side.chunk("r", ref, ATTEMPT, ChunkKind.TOKENS, "ab")
        assert await next_of(events) == added("ab")
        await side.junk("r")
        await side.chunk("r", "i0_999", ATTEMPT, ChunkKind.TOKENS, "no", first_token=2)
        await side.chunk("r", ref, ANOTHER, ChunkKind.BEGIN, restarted=True)
        assert await next_of(events) == Restarted()
        await side.chunk("r", ref, ATTEMPT, ChunkKind.TOKENS, "late", first_token=2)
        await side.chunk("r", ref, ANOTHER, ChunkKind.TOKENS, "AB")
        assert await next_of(events) == added("AB")
        late = client.stream("r")
        assert await next_of(late) == added("AB")
        outcome = completed("r", ref, "ABC")
        await side.publish(outcome)
        for each in (events, late):
            assert await next_of(each) == added("C")
            assert await next_of(each) == Ended(outcome=outcome)
            assert [event async for event in each] == []
        assert [event async for event in client.stream("r")] == [added("ABC"), Ended(outcome=outcome)]
        progress = client.progress("r")
        assert (progress.attempts, progress.outcomes, client.unreadable) == (2, 1, 1)
        assert progress.appended_ms is not None
        assert progress.first_token_ms is not None
        assert progress.ended_ms is not None
        assert progress.appended_ms <= progress.first_token_ms <= progress.ended_ms
        assert progress.first_token_s is not None
        assert progress.ended_s is not None
        assert progress.submitted_s <= progress.first_token_s <= progress.ended_s


async def a_slow_reader_gets_more_per_event(side: OtherSide) -> None:
    async with side.client() as client:
        await client.submit("m", Endpoint.COMPLETIONS, BODY, id="r")
        _, ref = await side.request()
        await side.chunk("r", ref, ATTEMPT, ChunkKind.BEGIN)
        for number in range(50):
            await side.chunk("r", ref, ATTEMPT, ChunkKind.TOKENS, "x", first_token=number)
        await side.publish(completed("r", ref, "x" * 50))
        # The outcome has the whole text, whatever was read of the chunks by then.
        await of(client, "r")
        events = [event async for event in client.stream("r")]
        assert events[0] == added("x" * 50)
        assert len(events) == 2


async def a_cancel_is_sent(side: OtherSide) -> None:
    async with side.client(tenant="acme") as client:
        await client.cancel("r")
        record, _ = await side.record()
        assert record.topic == side.names.cancels
        assert json.loads(record.value) == {"id": "r", "tenant": "acme"}


async def memory_is_bounded(side: OtherSide) -> None:
    async with side.client(most_unfinished=2, most_finished=1) as client:
        refs = {}
        for id in ("r1", "r2"):
            await client.submit("m", Endpoint.COMPLETIONS, BODY, id=id)
            refs[id] = (await side.request())[1]
        with pytest.raises(ValueError, match="still unanswered"):
            await client.submit("m", Endpoint.COMPLETIONS, BODY, id="r1")
        third = asyncio.create_task(client.submit("m", Endpoint.COMPLETIONS, BODY, id="r3"))
        await asyncio.wait([third], timeout=0.2)
        assert not third.done()
        await side.publish(completed("r1", refs["r1"]))
        assert await third == "r3"
        await side.publish(completed("r2", refs["r2"]))
        await of(client, "r2")
        with pytest.raises(ValueError, match="last 1 ended"):
            await client.outcome("r1")
        client.forget("r3")
        with pytest.raises(ValueError, match="expected one that this client submitted"):
            client.progress("r3")


async def bad_requests_are_refused_before_they_are_sent(side: OtherSide) -> None:
    async with side.client() as client:
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"body": b"[1]"}, "expected a JSON object"),
            ({"endpoint": "/admin"}, "endpoint.*/v1/completions"),
            ({"id": ""}, r"\$.id"),
            ({"priority": 101}, r"\$.priority"),
            ({"tokens": Tokens(count=1, block_hashes=("zz",))}, r"\$.tokens.block_hashes"),
        ]
        for fields, message in wrong:
            arguments = {"model": "m", "endpoint": Endpoint.COMPLETIONS, "body": BODY, **fields}
            with pytest.raises(ValueError, match=message):
                await client.submit(**arguments)
        with pytest.raises(LogRefused, match="shorten the body"):
            await client.submit("m", Endpoint.COMPLETIONS, b"{" + b" " * (17 << 20) + b"}")
        await client.submit("m", Endpoint.COMPLETIONS, BODY, id="good")
        assert (await side.request())[0].id == "good"


async def closing_ends_whoever_waits(side: OtherSide) -> None:
    async with side.client() as client:
        await client.submit("m", Endpoint.COMPLETIONS, BODY, id="r")
        waiting = asyncio.create_task(client.outcome("r"))
        await asyncio.sleep(0)
    with pytest.raises(LogUnavailable, match="closed"):
        await waiting


def workload(count: int) -> list[TraceRequest]:
    return [
        TraceRequest(
            arrival_s=number / 10,
            prompt_tokens=5000 if number % 2 else 100,
            output_tokens=4,
            block_ids=(1, number),
            block_tokens=512,
        )
        for number in range(count)
    ]


async def a_replay_does_not_wait_for_answers(side: OtherSide) -> None:
    """All requests are there before the first is answered; one is never answered."""
    changes: list[tuple[int, int, int]] = []
    async with side.client() as client:
        settings = ReplaySettings(model="m", speed=100, run_id="run", timeout_s=2.0)
        running = asyncio.create_task(
            replay(
                client,
                workload(12),
                settings,
                lambda now: changes.append((now.sent, now.answered, now.planned)),
            )
        )
        requests = [await side.request() for _ in range(12)]
        for request, ref in requests:
            if request.id == "run-3":
                continue
            await side.chunk(request.id, ref, ATTEMPT, ChunkKind.BEGIN)
            await side.chunk(request.id, ref, ATTEMPT, ChunkKind.TOKENS, "ab")
            copies = 2 if request.id == "run-5" else 1
            usage = Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=50)
            outcome = completed(request.id, ref, "ab", usage=usage, node="n1")
            await side.publish(*[outcome] * copies)
        result: ReplayResult = await running
    assert {request.id for request, _ in requests} == {f"run-{number}" for number in range(12)}
    assert {bool(request.body_ref) for request, _ in requests} == {True, False}
    assert changes[-1] == (12, 12, 12)
    report = summarise(result)
    assert (report["requests"], report["outcomes"]) == (12, {"Completed": 11})
    assert (report["lost_ids"], report["duplicated"]) == (["run-3"], 1)
    assert report["ttft_ms"]["count"] == report["total_local_ms"]["count"] == 11
    assert report["ttft_ms"]["p50"] is not None
    assert report["ttft_ms"]["p50"] >= 0
    assert report["cached_tokens"] == 550


Body = Callable[[OtherSide], Awaitable[None]]
BODIES: list[Body] = [
    a_request_is_sent_as_given,
    a_large_body_travels_by_reference,
    the_one_committed_outcome_is_awaited,
    only_its_own_outcome_is_taken,
    a_stream_shows_text_restart_and_end,
    a_slow_reader_gets_more_per_event,
    a_cancel_is_sent,
    a_client_with_a_lease_gives_signs_of_life_until_it_says_goodbye,
    memory_is_bounded,
    bad_requests_are_refused_before_they_are_sent,
    closing_ends_whoever_waits,
    a_replay_does_not_wait_for_answers,
]
every_body = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)


@asynccontextmanager
async def other_side(kafka: KafkaClients, pool: str) -> AsyncIterator[OtherSide]:
    side = OtherSide(kafka, pool)
    await side.start()
    try:
        yield side
    finally:
        await side.stop()


@every_body
def test_in_the_simulated_log(body: Body) -> None:
    async def main() -> None:
        network = Network(random.Random(1), loop.current(), CALM)
        async with other_side(SimKafka(network).clients(network.process("client")), "p") as side:
            await body(side)

    loop.run(main())


@every_body
@pytest.mark.kafka
async def test_in_apache_kafka(body: Body, kafka: KafkaAddress, pool: str) -> None:
    async with other_side(kafka.clients, pool) as side:
        await body(side)


@pytest.mark.kafka
async def test_a_pool_without_topics_is_an_error_that_says_so(kafka: KafkaAddress, pool: str) -> None:
    with pytest.raises(LogUnavailable, match="flexlb init"):
        async with Client(kafka.bootstrap, pool):
            pass


@pytest.mark.kafka
async def test_with_a_real_dispatcher_every_request_is_answered_once_and_the_audit_is_clean(
    kafka: KafkaAddress, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka.clients, valkey.url, pool) as served:
        node = ScriptedNode(served, "n1")
        async with served.running(served.dispatcher()), served.running(node):
            async with Client(kafka.bootstrap, pool) as client, Client(kafka.bootstrap, pool) as other:
                ids = [await client.submit("m", Endpoint.COMPLETIONS, BODY) for _ in range(20)]
                for id in ids:
                    assert (await of(client, id)).kind is OutcomeKind.COMPLETED
                node.holds = True
                await client.submit("m", Endpoint.COMPLETIONS, BODY, id="twice")
                await other.submit("m", Endpoint.COMPLETIONS, BODY, id="twice")
                await wait_until(lambda: len(node.claimed) == 1, "the claim")
                await node.finish()
                node.holds = False
                assert await of(client, "twice") == await of(other, "twice")
                await other.submit("m", Endpoint.COMPLETIONS, {"prompt": "else"}, id="twice")
                assert (await of(other, "twice")).reason is Reason.ID_IN_USE
                await other.submit("nobody serves it", Endpoint.COMPLETIONS, BODY, id="odd")
                assert (await of(other, "odd")).reason is Reason.UNKNOWN_MODEL
        await served.append(b"poison")
        found = await audit(kafka.bootstrap, pool, settle_s=0.2)
        assert [one.detail for one in found.lost] == [
            "it can't be read and gives no id, and has no dead letter"
        ]
        async with served.running(served.dispatcher()):
            found = await audit(kafka.bootstrap, pool, settle_s=20.0)
    assert (found.exit_code, found.requests, found.coalesced, found.refused_ids) == (0, 25, 1, 1)
    assert (found.outcomes, found.dead_letters) == ({"Completed": 21, "Rejected": 2}, 1)
