"""Recorded traffic as a workload: what is kept of a record, what is dropped, what is assumed."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.backends.request_log import LogRecord
from dispatcher.cli import main
from dispatcher.errors import SettingsError
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Names, Ref
from dispatcher.protocol.outcome import Choice, Outcome, OutcomeKind, Reason, Usage
from dispatcher.replay.traces import TraceRequest, read_trace, write_trace
from dispatcher.scheduling.admission import AdmissionLimits
from dispatcher.simulation.fleet import FleetSimulation, coarse
from dispatcher.simulation.fleet_workload import open_loop, read_workload
from dispatcher.simulation.from_topic import since_ms
from dispatcher.simulation.live_router import LiveRouter
from dispatcher.simulation.policies.base import Arrival
from dispatcher.simulation.profiles import PROFILES
from dispatcher.simulation.recorded_traffic import RecordedTraffic, told_counts

NAMES = Names("p")
LIMITS = AdmissionLimits(
    max_record_bytes=1 << 20,
    default_deadline_ms=600_000,
    max_deadline_ms=3_600_000,
    request_topic=NAMES.requests(Lane.INTERACTIVE),
    bodies_topic=NAMES.bodies,
    reply_topics={NAMES.replies: 4},
)
START_MS = 1_700_000_000_000
SECRET = "the prompt nobody may see"


def record(offset: int, at_ms: int = 0, **fields: Any) -> LogRecord:
    """A request record, `at_ms` after the first."""
    body = {"prompt": SECRET, "max_tokens": 200}
    value = {"id": f"r{offset}", "model": "m", "endpoint": "/v1/completions", "body": body, **fields}
    return LogRecord(
        ref=Ref(Lane.INTERACTIVE, 0, offset),
        key=None,
        value=json.dumps(value).encode(),
        timestamp_ms=START_MS + at_ms,
        traceparent="",
    )


def raw(offset: int, value: bytes | None) -> LogRecord:
    return LogRecord(
        ref=Ref(Lane.INTERACTIVE, 0, offset), key=None, value=value, timestamp_ms=START_MS, traceparent=""
    )


def ending(
    offset: int,
    tokens: int,
    kind: OutcomeKind = OutcomeKind.COMPLETED,
    reason: Reason = Reason.FINISHED,
    prompt_tokens: int = 0,
) -> bytes:
    return codec.encode(
        Outcome(
            id=f"r{offset}",
            ref=f"i0_{offset}",
            kind=kind,
            reason=reason,
            choices=(Choice(text="an answer nobody may see"),),
            usage=Usage(completion_tokens=tokens, prompt_tokens=prompt_tokens),
        )
    )


def hashes(*numbers: int) -> list[str]:
    return [f"{number:016x}" for number in numbers]


def traffic(*records: LogRecord, endings: tuple[bytes, ...] = (), **options: Any) -> RecordedTraffic:
    made = RecordedTraffic(LIMITS, **options)
    for one in records:
        made.take(one)
    for value in endings:
        made.answer(value)
    return made


def test_a_request_becomes_its_lengths_its_blocks_by_number_and_its_terms() -> None:
    tokens = {"count": 700, "block_size": 256, "block_hashes": hashes(77, 99)}
    more = {"count": 600, "block_size": 256, "block_hashes": hashes(77, 55)}
    made = traffic(
        record(7, 1_500, tokens=tokens, priority=90, deadline_ms=5_000, tenant="acme"),
        record(8, 2_750, tokens=more, tenant="other"),
        record(9, 3_000, tokens=more, tenant="acme"),
        endings=(ending(7, 31), ending(8, 57), ending(9, 12)),
    )
    assert made.trace() == [
        TraceRequest(
            arrival_s=0,
            prompt_tokens=700,
            output_tokens=31,
            block_ids=(0, 1),
            block_tokens=256,
            priority=90,
            deadline_s=5,
            tenant="t0",
        ),
        TraceRequest(
            arrival_s=1.25,
            prompt_tokens=600,
            output_tokens=57,
            block_ids=(0, 2),
            block_tokens=256,
            deadline_s=600,
            tenant="t1",
        ),
        TraceRequest(
            arrival_s=1.5,
            prompt_tokens=600,
            output_tokens=12,
            block_ids=(0, 2),
            block_tokens=256,
            deadline_s=600,
            tenant="t0",
        ),
    ]
    assert told_counts(made.counts, made.models, None) == ["3 requests, 3 with the lengths of their answers"]


def test_a_prompt_that_nobody_tokenised_is_known_by_its_text_and_measured_by_its_engine() -> None:
    common = "x" * 3_000
    made = traffic(
        *(record(n, n, body={"prompt": common + str(n) * 2_000, "max_tokens": 9}) for n in range(2)),
        endings=(ending(1, 5, prompt_tokens=1_234),),
    )
    first, second = made.trace()
    assert first.block_tokens == second.block_tokens == 256
    assert first.block_ids[:2] == second.block_ids[:2]
    assert first.block_ids[3:] != second.block_ids[3:]
    assert first.prompt_tokens == pytest.approx(5_030 / 4, abs=15), "estimated by its bytes"
    assert second.prompt_tokens == 1_234
    exact = traffic(record(1, tokens={"count": 700}), endings=(ending(1, 5, prompt_tokens=1_234),))
    assert exact.trace()[0].prompt_tokens == 700


def test_answers_that_are_not_known_are_taken_for_the_middle_one_within_what_is_allowed() -> None:
    made = traffic(
        *(record(n, n) for n in range(6)),
        record(6, 6, body={"prompt": "x", "max_tokens": 3}),
        endings=(
            ending(0, 10),
            ending(1, 50),
            ending(2, 90),
            ending(3, 7, OutcomeKind.FAILED, Reason.ATTEMPTS_EXHAUSTED),
            ending(4, 0, OutcomeKind.REJECTED, Reason.OVERLOADED),
        ),
    )
    assert [one.output_tokens for one in made.trace()] == [10, 50, 90, 50, 50, 50, 3]
    told = told_counts(made.counts, made.models, None)
    assert told == [
        "7 requests, 3 with the lengths of their answers, 4 without: taken for 50 tokens, or what they allow"
    ]
    assert traffic(record(0)).trace()[0].output_tokens == 200, "nothing is known: 256, of which it allows 200"


UNUSABLE = [None, b"", b"{", b"\xff\xfe", b"[]", b'{"id": 5}', b'{"a":' * 5_000 + b"1" + b"}" * 5_000]


def test_records_that_the_pool_would_refuse_are_counted_and_left_out() -> None:
    made = traffic(
        *(raw(number, value) for number, value in enumerate(UNUSABLE)),
        record(20, priority=101),
        record(21, reply_to={"topic": "elsewhere"}),
        record(22, deadline_ms=10**9),
        record(23, deadline_ms=1),
        endings=(ending(23, 4), b"{", b"[]", b"\xff", b'{"ref": 5, "kind": "Completed"}'),
    )
    assert [one.output_tokens for one in made.trace()] == [4], "its deadline had not passed when it came"
    assert (made.counts.refused, made.counts.unreadable_outcomes) == (len(UNUSABLE) + 3, 4)
    assert told_counts(made.counts, made.models, None)[1:] == [
        f"left out: {len(UNUSABLE) + 3} that can't be read or are refused",
        "4 outcomes can't be read",
    ]


def test_repeats_of_a_request_are_no_work_of_their_own() -> None:
    made = traffic(
        record(0, 0, id="same"),
        record(1, 50, id="same"),
        record(2, 60, id="same", tenant="another"),
        record(3, 599_000, id="same"),
        record(4, 1_300_000, id="same"),
        record(5, 1_300_100, id="same"),
        record(6, 1_300_200, id="same"),
        endings=(
            ending(0, 10),
            ending(5, 0, OutcomeKind.REJECTED, Reason.ID_IN_USE),
            # It was answered by itself, whatever the rule says: a loss of all Redis data.
            ending(6, 40),
        ),
    )
    assert [one.arrival_s for one in made.trace()] == [0, 0.06, 1_300.0, 1_300.2]
    assert made.counts.repeated == 3


def test_the_last_are_the_latest_whatever_partition_they_lie_in() -> None:
    records = [record(n, 1_000 * at) for n, at in ((0, 5), (1, 1), (2, 4), (3, 2), (4, 3))]
    made = traffic(*records, last=2, endings=tuple(ending(n, n + 1) for n in range(5)))
    assert [(one.arrival_s, one.output_tokens) for one in made.trace()] == [(0, 3), (1, 1)]


def test_one_model_of_several_can_be_taken() -> None:
    records = [record(n, n, model=("a", "b", "a")[n]) for n in range(3)]
    assert len(traffic(*records, model="a").trace()) == 2
    both = traffic(*records)
    both.trace()
    assert told_counts(both.counts, both.models, None)[-1].startswith("2 models (a, b) are taken for one; ")
    with pytest.raises(SettingsError, match=r"3 of other models than 'c': a, b\)"):
        traffic(*records, model="c").trace()
    with pytest.raises(SettingsError, match=r"seen none that can be used \(1 can't be read or are refused"):
        traffic(raw(0, b"{")).trace()


def test_neither_prompts_nor_hashes_nor_ids_nor_names_are_written(tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    tokens = {"count": 700, "block_size": 256, "block_hashes": hashes(0xABCDEF0123, 0x77)}
    made = traffic(
        record(0, id="id-of-somebody", tenant="acme", session="s-of-somebody", tokens=tokens),
        record(1, body={"prompt": SECRET * 200, "max_tokens": 5}, lora="adapter-of-somebody"),
        endings=(ending(0, 10),),
    )
    write_trace(path, made.trace())
    written = path.read_text()
    for word in (SECRET, "answer nobody", "id-of", "acme", "somebody", "abcdef0123", '"m"'):
        assert word not in written
    assert set(json.loads(written.splitlines()[0])) == {
        *("at_ms", "prompt_tokens", "output_tokens", "block_tokens", "blocks", "deadline_ms", "tenant")
    }


@given(
    st.lists(
        st.builds(
            TraceRequest,
            arrival_s=st.integers(0, 10**7).map(lambda ms: ms / 1000),
            prompt_tokens=st.integers(0, 200_000),
            output_tokens=st.integers(0, 10_000),
            block_ids=st.lists(st.integers(0, 50), min_size=1, max_size=5).map(tuple),
            block_tokens=st.sampled_from([256, 512]),
            priority=st.integers(1, 100),
            deadline_s=st.none() | st.integers(1, 10**6).map(lambda ms: ms / 1000),
            tenant=st.sampled_from(["", "t0", "t1"]),
        ),
        min_size=1,
    ),
    st.sampled_from(["trace.jsonl", "trace.jsonl.gz"]),
)
def test_what_was_saved_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, trace: list[TraceRequest], name: str
) -> None:
    trace.sort(key=lambda one: one.arrival_s)
    trace[0] = TraceRequest(arrival_s=0, prompt_tokens=1, output_tokens=1)
    path = tmp_path_factory.mktemp("saved") / name
    write_trace(path, trace)
    assert read_trace(path) == trace


def test_a_saved_trace_is_simulated_as_what_was_read(tmp_path: Path) -> None:
    rng = Random(3)
    trace = [
        TraceRequest(
            arrival_s=number / 4,
            prompt_tokens=rng.randrange(100, 3_000),
            output_tokens=rng.randrange(1, 50),
            block_ids=tuple(range(rng.randrange(5))),
            block_tokens=256,
            priority=rng.choice([10, 50, 90]),
            deadline_s=30.0,
            tenant="t1",
        )
        for number in range(60)
    ]
    path = tmp_path / "saved.jsonl.gz"
    write_trace(path, trace)
    assert read_workload(path) == open_loop(read_trace(path)) == open_loop(trace)
    assert main(["simulate", str(path), "--nodes", "2", "--policy", "flexlb"]) == 0


class Told(LiveRouter):
    """Ours, and what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[Arrival] = []

    def arrive(self, arrival: Arrival) -> None:
        self.arrivals.append(arrival)
        super().arrive(arrival)


def test_priorities_order_the_queue_of_the_simulated_leader_and_deadlines_reach_it() -> None:
    trace = [
        TraceRequest(
            arrival_s=0,
            prompt_tokens=8_000,
            output_tokens=100,
            priority=90 if number == 39 else 50,
            deadline_s=60.0 + number,
            tenant=f"t{number % 2}",
        )
        for number in range(40)
    ]
    profile = coarse(PROFILES["h100-llama-8b"], 256)
    router = Told()
    result = FleetSimulation(open_loop(trace), router, nodes=1, profile=profile, rate=1.0, seed=1).run()
    assert [(one.priority, one.deadline_s, one.tenant) for one in router.arrivals[-2:]] == [
        (50, 98.0, "t0"),
        (90, 99.0, "t1"),
    ]
    order = sorted(range(40), key=lambda number: result.ttft_s[number])
    assert order.index(39) < 15, "it passed those that waited"


@pytest.mark.parametrize(
    ("text", "ago_s"), [("90s", 90), ("30m", 1_800), ("1.5h", 5_400), ("2d", 172_800), (" 2h ", 7_200)]
)
def test_a_time_may_be_told_by_how_long_ago_it_is(text: str, ago_s: float) -> None:
    assert since_ms(text) == pytest.approx(1000 * (time.time() - ago_s), abs=5_000)


def test_a_time_may_be_told_as_it_is() -> None:
    assert since_ms("2026-01-31T12:00:00Z") == since_ms("2026-01-31T13:00:00+01:00") == 1_769_860_800_000
    assert since_ms("1769860800") == 1_769_860_800_000
    for wrong in ("soon", "-5m", "5 minutes", "1e400"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a duration like 30m"):
            since_ms(wrong)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--since", "1h"], "--since: expected --from-topic with it, seen it alone"),
        (["--last", "5"], "--last: expected --from-topic with it"),
        (["--save", "x"], "--save: expected --from-topic with it"),
        (["--pool", "p"], "--pool: expected --from-topic with it"),
        (["t.jsonl", "--from-topic"], "expected it or a trace file, seen both (t.jsonl)"),
        (["--from-topic", "nonsense:x"], "--from-topic: expected host:port[,host:port], or a settings file"),
        (["--from-topic", "missing.toml"], "expected a file that can be read, seen 'missing.toml'"),
    ],
)
def test_flags_that_do_not_belong_together_are_told(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments]) == 2
    assert said in capsys.readouterr().err
