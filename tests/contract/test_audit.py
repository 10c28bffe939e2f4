"""The audit finds what it is there to find: each promise is broken on purpose, in memory and in Kafka."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from dispatcher.audit import (
    IDENTITY_WINDOW_MS,
    AuditResult,
    Kind,
    as_json,
    as_text,
    audit,
    configure_audit,
    examine,
    parse_time,
    run_audit,
)
from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.topics import create_topics
from dispatcher.errors import LogUnavailable, SettingsError
from dispatcher.protocol import codec
from dispatcher.protocol.chunk import Chunk, ChunkKind
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.outcome import DeadLetter, Outcome, OutcomeKind, Reason
from tests.support.servers import KafkaAddress
from tests.support.sim import loop
from tests.support.sim.kafka import SimKafka
from tests.support.sim.network import CALM, Network

START_MS = 1_700_000_000_000
HOUR_MS = 3_600_000


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record as a Kafka client gives it."""

    partition: int
    offset: int
    timestamp: int
    value: bytes | None
    key: bytes | None = None


def body_of(id: str, **fields: Any) -> bytes:
    request = {"id": id, "model": "m", "endpoint": "/v1/completions", "body": {"prompt": "x"}, **fields}
    return json.dumps(request).encode()


def outcome_of(
    id: str,
    ref: str,
    kind: OutcomeKind = OutcomeKind.COMPLETED,
    reason: Reason = Reason.FINISHED,
    **fields: Any,
) -> bytes:
    return codec.encode(Outcome(id=id, ref=ref, kind=kind, reason=reason, **{"fingerprint": "f", **fields}))


def id_in_use(id: str, ref: str, **fields: Any) -> bytes:
    return outcome_of(id, ref, OutcomeKind.REJECTED, Reason.ID_IN_USE, **fields)


def letter_of(ref: str) -> bytes:
    letter = DeadLetter(
        ref=ref,
        reason=Reason.MALFORMED,
        message="no",
        topic="t",
        record_base64=base64.b64encode(b"{").decode(),
    )
    return codec.encode(letter)


def begin_of(id: str, ref: str, attempt: str) -> bytes:
    return codec.encode(Chunk(id=id, ref=ref, attempt=attempt, kind=ChunkKind.BEGIN))


@dataclass
class Log:
    """A pool's topics in memory; time goes on by a second with each record."""

    streams: dict[Kind, list[Record]] = field(default_factory=lambda: {kind: [] for kind in Kind})
    now_ms: int = START_MS

    def append(self, kind: Kind, value: bytes | None, key: bytes | None = None) -> str:
        """Append to partition 0; returns the ref, for requests."""
        stream = self.streams[kind]
        self.now_ms += 1000
        record = Record(partition=0, offset=len(stream), timestamp=self.now_ms, value=value, key=key)
        stream.append(record)
        return f"{'b' if kind is Kind.BATCH else 'i'}0_{record.offset}"

    def request(self, id: str, **fields: Any) -> str:
        return self.append(Kind.INTERACTIVE, body_of(id, **fields), id.encode())

    def outcome(self, value: bytes) -> None:
        self.append(Kind.OUTCOMES, value)

    def answered(self, id: str, **fields: Any) -> str:
        """A request and its outcome."""
        ref = self.request(id, **fields)
        self.outcome(outcome_of(id, ref))
        return ref

    def wait(self, ms: int) -> None:
        self.now_ms += ms

    def audit(self, from_ms: int = START_MS, to_ms: int | None = None) -> AuditResult:
        return examine(self.streams.items(), from_ms=from_ms, to_ms=to_ms or self.now_ms)


@pytest.fixture
def log() -> Log:
    """A log in which everything is as it should be, so far."""
    log = Log()
    for number in range(5):
        log.answered(f"r{number}")
    return log


def test_a_clean_log_is_clean(log: Log) -> None:
    batch = log.append(Kind.BATCH, body_of("b0"))
    log.outcome(outcome_of("b0", batch))
    result = log.audit()
    assert (result.exit_code, result.findings) == (0, 0)
    assert (result.requests, result.outcomes) == (6, {"Completed": 6})


def test_a_request_without_outcome_is_lost(log: Log) -> None:
    del log.streams[Kind.OUTCOMES][3]
    result = log.audit()
    assert result.exit_code == 1
    assert [(one.ref, one.id) for one in result.lost] == [("i0_3", "r3")]
    assert [one.id for one in result.unanswered] == ["r3"]
    assert "lost        i0_3 r3" in as_text(result)
    assert json.loads(as_json(result))["lost"][0]["id"] == "r3"


def test_a_second_outcome_of_a_record_is_a_duplicate(log: Log) -> None:
    log.outcome(outcome_of("r2", "i0_2"))
    result = log.audit()
    assert result.exit_code == 1
    assert [(one.ref, one.id, one.detail) for one in result.duplicated] == [
        ("i0_2", "r2", "2 outcomes for one record")
    ]


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (outcome_of("x", "i0_99"), "names no request record"),
        (outcome_of("x", "i7_0"), "partition that does not exist"),
        (outcome_of("x", "i0_2"), "names a record of r2"),
        (outcome_of("r2", "i0_2", tenant="other"), "names a record of r2"),
    ],
)
def test_an_outcome_that_answers_nothing_is_an_orphan(log: Log, value: bytes, detail: str) -> None:
    log.outcome(value)
    result = log.audit()
    assert result.exit_code == 1
    assert not result.lost
    (orphan,) = result.orphans
    assert detail in orphan.detail


@pytest.mark.parametrize("value", [b"{}", outcome_of("x", "somewhere")])
def test_an_outcome_that_can_not_be_read_is_a_finding(log: Log, value: bytes) -> None:
    log.outcome(value)
    log.append(Kind.DEAD, b"junk")
    result = log.audit()
    assert result.exit_code == 1
    assert "outcomes[0] 5" in result.unreadable[0].detail
    assert "requests.dead[0] 0" in result.unreadable[1].detail


def test_a_second_attempt_is_reported_but_no_finding(log: Log) -> None:
    for attempt in ("1700000000000_1", "1700000000000_1", "1700000000009_2"):
        log.append(Kind.REPLIES, begin_of("r1", "i0_1", attempt))
    log.append(Kind.REPLIES, begin_of("r2", "i0_2", "1700000000000_1"))
    log.append(Kind.REPLIES, b'{"kind":"begin"')
    result = log.audit()
    assert result.exit_code == 0
    assert [(one.ref, one.id, one.detail) for one in result.reexecuted] == [
        ("i0_1", "r1", "2 attempts began")
    ]


def test_a_repeat_of_the_same_request_needs_no_outcome(log: Log) -> None:
    log.request("r1")
    log.append(Kind.BATCH, body_of("r1"))
    result = log.audit()
    assert (result.exit_code, result.coalesced) == (0, 2)


def test_a_repeat_that_is_answered_too_is_a_duplicate(log: Log) -> None:
    again = log.answered("r1")
    result = log.audit()
    assert [(one.ref, one.id) for one in result.duplicated] == [(again, "r1")]
    assert "repeats i0_1" in result.duplicated[0].detail


def test_a_repeat_may_be_answered_in_place_of_the_first(log: Log) -> None:
    log.request("twice")
    log.answered("twice")
    assert log.audit().exit_code == 0


def test_repeats_that_nobody_answered_are_one_unanswered_id(log: Log) -> None:
    first = log.request("gone")
    log.request("gone")
    result = log.audit()
    assert [one.ref for one in result.lost] == [first]
    assert [one.id for one in result.unanswered] == ["gone"]
    assert result.coalesced == 1


@pytest.mark.parametrize(
    "change",
    [
        {"body": {"prompt": "y"}},
        {"model": "other"},
        {"endpoint": "/v1/chat/completions"},
        {"reply_to": {"partition": 1}},
    ],
)
def test_a_reused_id_needs_its_own_refusal(log: Log, change: dict[str, Any]) -> None:
    reuse = log.request("r1", **change)
    result = log.audit()
    assert result.exit_code == 1
    assert [(one.ref, one.id) for one in result.lost] == [(reuse, "r1")]
    assert result.unanswered == []
    log.outcome(id_in_use("r1", reuse))
    assert (log.audit().exit_code, log.audit().refused_ids) == (0, 1)


def test_a_reused_id_that_is_run_is_a_duplicate(log: Log) -> None:
    log.answered("r1", body={"prompt": "y"})
    (found,) = log.audit().duplicated
    assert "another body" in found.detail


def test_a_repeat_that_is_refused_instead_of_coalesced_is_a_duplicate(log: Log) -> None:
    again = log.request("r1")
    log.outcome(id_in_use("r1", again))
    (found,) = log.audit().duplicated
    assert found.ref == again


def test_the_same_id_of_another_tenant_is_another_request(log: Log) -> None:
    ref = log.request("r1", tenant="acme")
    assert [(one.tenant, one.id) for one in log.audit().lost] == [("acme", "r1")]
    log.outcome(outcome_of("r1", ref, tenant="acme"))
    assert log.audit().exit_code == 0


def test_after_its_window_an_id_is_free_again(log: Log) -> None:
    log.wait(IDENTITY_WINDOW_MS + 60_000)
    log.answered("r1")
    assert log.audit().exit_code == 0
    late = log.request("r2")
    assert [one.ref for one in log.audit().lost] == [late]


def test_an_id_lives_on_while_its_request_was_unfinished() -> None:
    log = Log()
    first = log.request("slow")
    log.wait(IDENTITY_WINDOW_MS)
    log.outcome(outcome_of("slow", first))
    log.request("slow")
    result = log.audit()
    assert (result.exit_code, result.coalesced) == (0, 1)


def test_a_repeat_of_a_request_before_the_range_is_coalesced(log: Log) -> None:
    from_ms = log.now_ms + 1
    log.request("r1")
    result = log.audit(from_ms)
    assert (result.exit_code, result.requests, result.coalesced) == (0, 1, 1)


def test_only_the_range_is_audited(log: Log) -> None:
    del log.streams[Kind.OUTCOMES][3]
    times = [record.timestamp for record in log.streams[Kind.INTERACTIVE]]
    assert log.audit(times[4]).exit_code == 0
    assert log.audit(to_ms=times[2]).exit_code == 0
    assert log.audit(times[3], times[3]).exit_code == 1


POISON: list[tuple[bytes | None, bytes | None]] = [
    (b"not json", None),
    (None, b""),
    (b'{"id":""}', None),
    (b"\xff", b"\xff"),
    (b"[" * 5000, None),
    (b'{"id":7}', b"k" * 300),
]


@pytest.mark.parametrize(("value", "key"), POISON)
def test_poison_without_an_id_needs_a_dead_letter(log: Log, value: bytes | None, key: bytes | None) -> None:
    ref = log.append(Kind.INTERACTIVE, value, key)
    result = log.audit()
    assert [(one.ref, one.id) for one in result.lost] == [(ref, "")]
    log.append(Kind.DEAD, letter_of(ref))
    result = log.audit()
    assert (result.exit_code, result.dead_letters) == (0, 1)


@pytest.mark.parametrize(
    ("value", "key"), [(b'{"id":"p","model":7}', None), (b"junk", b"p"), (b'{"id":"p","v":99}', b"other")]
)
def test_poison_with_an_id_needs_an_outcome(log: Log, value: bytes, key: bytes | None) -> None:
    ref = log.append(Kind.INTERACTIVE, value, key)
    log.append(Kind.DEAD, letter_of(ref))
    assert [(one.ref, one.id) for one in log.audit().lost] == [(ref, "p")]
    log.outcome(outcome_of("p", ref, OutcomeKind.REJECTED, Reason.MALFORMED, fingerprint=""))
    assert log.audit().exit_code == 0


def test_repeated_poison_may_be_coalesced_or_refused(log: Log) -> None:
    first = log.append(Kind.INTERACTIVE, b'{"id":"p"}')
    log.outcome(outcome_of("p", first, OutcomeKind.REJECTED, Reason.MALFORMED, fingerprint=""))
    second = log.append(Kind.INTERACTIVE, b'{"id":"p"}')
    assert log.audit().exit_code == 0
    log.outcome(id_in_use("p", second, fingerprint=""))
    assert log.audit().exit_code == 0


def lose(log: Log, rng: random.Random) -> tuple[str, str]:
    outcomes = log.streams[Kind.OUTCOMES]
    gone = codec.outcome_heads.decode(outcomes.pop(rng.randrange(len(outcomes))).value or b"")
    return "lost", gone.ref


def copy(log: Log, rng: random.Random) -> tuple[str, str]:
    copied = rng.choice(log.streams[Kind.OUTCOMES]).value or b""
    log.outcome(copied)
    return "duplicated", codec.outcome_heads.decode(copied).ref


def invent(log: Log, rng: random.Random) -> tuple[str, str]:
    ref = f"i0_{10_000 + rng.randrange(1000)}"
    log.outcome(outcome_of("ghost", ref))
    return "orphans", ref


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fault", [lose, copy, invent])
def test_one_fault_among_many_requests_is_found(
    fault: Callable[[Log, random.Random], tuple[str, str]], seed: int
) -> None:
    rng = random.Random(seed)
    log = Log()
    open_: list[tuple[str, str]] = []
    for number in range(200):
        open_.append((f"r{number}", log.request(f"r{number}")))
        if rng.random() < 0.2:
            log.request(f"r{number}")
        while open_ and rng.random() < 0.5:
            id, ref = open_.pop(rng.randrange(len(open_)))
            log.outcome(outcome_of(id, ref))
    for id, ref in open_:
        log.outcome(outcome_of(id, ref))
    assert log.audit().exit_code == 0
    kind, ref = fault(log, rng)
    result = log.audit()
    assert [one.ref for one in getattr(result, kind)] == [ref]
    assert result.findings == (2 if kind == "lost" else 1)


def test_times_are_iso_or_seconds() -> None:
    assert parse_time("1700000000.5") == 1_700_000_000_500
    assert parse_time("2023-11-14T22:13:20Z") == 1_700_000_000_000
    assert parse_time("2023-11-14T22:13:20") == 1_700_000_000_000
    assert parse_time("2023-11-14T23:13:20+01:00") == 1_700_000_000_000
    for wrong in ("yesterday", "nan", "-1", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            parse_time(wrong)


# Through Kafka


class Topics:
    """A pool's topics in a broker, written by this test alone."""

    def __init__(self, kafka: KafkaClients, pool: str) -> None:
        self.kafka = kafka
        self.names = Names(pool)
        self._plain: Any = None
        self._leader: Any = None

    async def start(self) -> None:
        await create_topics(self.kafka, self.names, partitions=3, replication_factor=1)
        self._plain = self.kafka.producer(acks="all", enable_idempotence=True, linger_ms=0)
        self._leader = self.kafka.producer(
            transactional_id=self.names.transactional_id, enable_idempotence=True, acks="all", linger_ms=0
        )
        await self._plain.start()
        await self._leader.start()

    async def stop(self) -> None:
        await self._plain.stop()
        await self._leader.stop()

    async def request(self, id: str, *, lane: Lane = Lane.INTERACTIVE, value: bytes | None = None) -> str:
        """Append a request; returns its ref."""
        lies = await self._plain.send_and_wait(
            self.names.requests(lane), value or body_of(id), key=id.encode() if id else None
        )
        return f"{lane.value}{lies.partition}_{lies.offset}"

    async def chunk(self, value: bytes) -> None:
        await self._plain.send_and_wait(self.names.replies, value)

    async def publish(self, *outcomes: bytes, dead: bytes = b"", partition: int | None = None) -> None:
        """Publish in one transaction."""
        async with self._leader.transaction():
            for outcome in outcomes:
                await self._leader.send(self.names.outcomes, outcome, partition=partition)
            if dead:
                await self._leader.send(self.names.dead, dead)

    async def abort(self, *outcomes: bytes) -> None:
        """Write outcomes that nobody may see."""
        await self._leader.begin_transaction()
        for outcome in outcomes:
            await self._leader.send(self.names.outcomes, outcome)
        await self._leader.flush()
        await self._leader.abort_transaction()

    async def audit(
        self, *, settle_s: float = 0.0, waits: asyncio.Event | None = None, late: bytes = b""
    ) -> AuditResult:
        """Audit everything.

        Args:
            waits: is set when the audit waits for late outcomes.
            late: an outcome published right after the audit has asked where the outcomes end.
        """

        def consumers(*topics: str, **options: Any) -> Any:
            consumer = self.kafka.consumer(*topics, **options)
            if late and self.names.outcomes in topics:
                ends = consumer.end_offsets

                async def end_offsets(partitions: Any) -> Any:
                    found = await ends(partitions)
                    await self.publish(late, partition=0)
                    return found

                consumer.end_offsets = end_offsets
            if waits is not None and self.names.outcomes in topics:
                read = consumer.getmany

                async def getmany(*partitions: Any, **options: Any) -> Any:
                    if not partitions:
                        waits.set()
                    return await read(*partitions, **options)

                consumer.getmany = getmany
            return consumer

        return await audit("", self.names.pool, 0, 2 * START_MS, settle_s, consumers=consumers)


@asynccontextmanager
async def pool_topics(kafka: KafkaClients, pool: str) -> AsyncIterator[Topics]:
    topics = Topics(kafka, pool)
    await topics.start()
    try:
        yield topics
    finally:
        await topics.stop()


async def every_control(topics: Topics) -> None:
    refs = {id: await topics.request(id) for id in (f"r{number}" for number in range(12))}
    refs["b"] = await topics.request("b", lane=Lane.BATCH)
    poison = await topics.request("", value=b"poison")
    await topics.request("r3")
    await topics.abort(outcome_of("r0", refs["r0"]), outcome_of("ghost", "i0_900"))
    held = refs.pop("r7")
    await topics.publish(
        *(outcome_of(id, ref) for id, ref in refs.items()),
        dead=letter_of(poison),
    )
    await topics.chunk(begin_of("r2", refs["r2"], "1700000000000_1"))
    result = await topics.audit()
    assert [(one.id, one.ref) for one in result.lost] == [("r7", held)]
    assert (result.exit_code, result.findings, result.coalesced, result.dead_letters) == (1, 2, 1, 1)

    waits = asyncio.Event()
    settling = asyncio.create_task(topics.audit(settle_s=60.0, waits=waits))
    await waits.wait()
    await topics.publish(outcome_of("r7", held))
    result = await settling
    assert (result.exit_code, result.requests, result.outcomes) == (0, 15, {"Completed": 13})

    await topics.chunk(begin_of("r2", refs["r2"], "1700000000000_2"))
    result = await topics.audit()
    assert [one.id for one in result.reexecuted] == ["r2"]
    assert result.exit_code == 0

    await topics.publish(outcome_of("r5", refs["r5"]), outcome_of("ghost", "i0_900"))
    result = await topics.audit()
    assert [one.id for one in result.duplicated] == ["r5"]
    assert [(one.id, one.ref) for one in result.orphans] == [("ghost", "i0_900")]
    assert result.exit_code == 1


async def an_outcome_beside_the_reading(topics: Topics) -> None:
    first, second = await topics.request("first"), await topics.request("second")
    await topics.publish(outcome_of("first", first), partition=0)
    result = await topics.audit(settle_s=20.0, late=outcome_of("second", second))
    assert (result.exit_code, result.lost, result.outcomes) == (0, [], {"Completed": 2})


@pytest.mark.kafka
async def test_an_outcome_published_while_they_are_read_is_not_missed(kafka: KafkaAddress, pool: str) -> None:
    async with pool_topics(kafka.clients, pool) as topics:
        await an_outcome_beside_the_reading(topics)


def test_an_outcome_published_while_they_are_read_is_not_missed_in_the_simulated_log() -> None:
    async def main() -> None:
        network = Network(random.Random(1), loop.current(), CALM)
        async with pool_topics(SimKafka(network).clients(network.process("audit")), "p") as topics:
            await an_outcome_beside_the_reading(topics)

    loop.run(main())


@pytest.mark.kafka
async def test_every_negative_control_in_apache_kafka(kafka: KafkaAddress, pool: str) -> None:
    async with pool_topics(kafka.clients, pool) as topics:
        await every_control(topics)


def test_every_negative_control_in_the_simulated_log() -> None:
    async def main() -> None:
        network = Network(random.Random(1), loop.current(), CALM)
        async with pool_topics(SimKafka(network).clients(network.process("audit")), "p") as topics:
            await every_control(topics)

    loop.run(main())


def options_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    configure_audit(parser)
    return parser.parse_args(arguments)


@pytest.mark.kafka
async def test_the_command_prints_and_returns_the_exit_code(
    kafka: KafkaAddress, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with pool_topics(kafka.clients, pool) as topics:
        where = ("--kafka", kafka.bootstrap, "--pool", pool, "--settle", "0")
        ref = await topics.request("r1")
        assert await run_audit(options_of(*where)) == 1
        assert f"lost        {ref} r1" in capsys.readouterr().out
        await topics.publish(outcome_of("r1", ref))
        assert await run_audit(options_of(*where, "--json")) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["requests"], report["clean"]) == (1, True)


@pytest.mark.kafka
async def test_a_pool_without_topics_is_an_error_that_says_so(kafka: KafkaAddress, pool: str) -> None:
    with pytest.raises(LogUnavailable, match="flexlb init"):
        await run_audit(options_of("--kafka", kafka.bootstrap, "--pool", pool))


async def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(SettingsError, match="before --to"):
        await run_audit(options_of("--from", "2000", "--to", "1000"))
