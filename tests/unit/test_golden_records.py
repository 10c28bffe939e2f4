"""Golden records: what release 1 wrote is read today, and what is written today release 1 can read.

`golden/v1/<record>_<minimal|full>.json` are never edited. A new field gets a default, a new release its
own folder beside this one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Raw

import dispatcher
from dispatcher.backends.outcome_log import CommitNote
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import ENTRY_POINT, Envelope, Work, decode_job_data, encode_job_data
from dispatcher.protocol.chunk import ChoiceDelta, Chunk, ChunkKind
from dispatcher.protocol.codec import MalformedRecord
from dispatcher.protocol.explanation import Bar, BarredNode, Candidate, Doubt, Explanation, Rule
from dispatcher.protocol.handoff import Stage
from dispatcher.protocol.node import BlockEvent, BlockEventKind, NodeIdentity, NodeReport, Role
from dispatcher.protocol.outcome import (
    Choice,
    DeadLetter,
    FailedAttempt,
    FailureCause,
    Outcome,
    OutcomeHead,
    OutcomeKind,
    Reason,
    Timing,
    Usage,
)
from dispatcher.protocol.request import (
    BodyRef,
    CancelRequest,
    Endpoint,
    InferenceRequest,
    LeaseRecord,
    ReplyTo,
    Tokens,
)
from tests.unit.golden.readers_v1 import READERS

FOLDER = Path(__file__).parent / "golden" / "v1"
PROTOCOL_DOCUMENT = Path(dispatcher.__file__).parent / "docs" / "protocol.md"

BODY_REF = BodyRef(
    topic="flexlb.default.requests.bodies", partition=2, offset=77, bytes=40_000, sha256="5e" * 32
)
FAILED = FailedAttempt(
    attempt="1790000000000_1",
    node="gpu-17",
    cause=FailureCause.ENGINE_ERROR,
    message="engine answered 500",
    http_status=500,
)
BODY = b'{"messages":[{"role":"user","content":"Gr\xc3\xbc\xc3\x9fe"}],"max_tokens":64}'

RECORDS: dict[str, msgspec.Struct] = {
    "request_minimal": InferenceRequest(
        id="a", model="m", endpoint=Endpoint.COMPLETIONS, body=Raw(b'{"prompt":"x"}')
    ),
    "request_full": InferenceRequest(
        id="7c1d-é",
        model="qwen3-8b",
        endpoint=Endpoint.CHAT,
        body=Raw(BODY),
        tenant="acme",
        priority=90,
        deadline_ms=30_000,
        ttft_slo_ms=500,
        tokens=Tokens(count=600, block_size=512, block_hashes=("724a45aab967ce62",)),
        reply_to=ReplyTo(topic="flexlb.default.replies", partition=3),
        session="s-1",
        lora="sql",
        cache_salt="blue",
        detached=True,
        requeued_from="i3_1024",
    ),
    "request_body_ref": InferenceRequest(id="b", model="m", endpoint=Endpoint.CHAT, body_ref=BODY_REF),
    "request_lease": InferenceRequest(
        id="c", model="m", endpoint=Endpoint.CHAT, body_ref=BODY_REF, lease="9a0b1c"
    ),
    "lease_minimal": LeaseRecord(lease="9a0b1c", ttl_ms=15_000),
    "lease_full": LeaseRecord(lease="9a0b1c", ttl_ms=0, tenant="acme"),
    "cancel_minimal": CancelRequest(id="a"),
    "cancel_full": CancelRequest(id="7c1d-é", tenant="acme"),
    "envelope_lease": Envelope(ref="i0_0", id="a", model="m", lease="9a0b1c"),
    "envelope_minimal": Envelope(ref="i0_0", id="a", model="m"),
    "envelope_full": Envelope(
        ref="i3_1024",
        id="7c1d-é",
        model="qwen3-8b",
        tenant="acme",
        priority=90,
        prompt_tokens=600,
        max_tokens=64,
        tokens_exact=True,
        block_size=512,
        block_hashes=("724a45aab967ce62",),
        appended_ms=1_790_000_000_000,
        deadline_at_ms=1_790_000_030_000,
        ttft_slo_ms=500,
        fingerprint="0123456789abcdef",
        session="s-1",
        lora="sql",
    ),
    "job_data_minimal": Work(
        ref="i0_0", id="a", model="m", endpoint=Endpoint.COMPLETIONS, body=Raw(b'{"prompt":"x"}')
    ),
    "job_data_full": Work(
        ref="i3_1024",
        id="7c1d-é",
        model="qwen3-8b",
        endpoint=Endpoint.CHAT,
        tenant="acme",
        body_ref=BODY_REF,
        body_in_request=True,
        reply_to=ReplyTo(topic="flexlb.default.replies", partition=3),
        deadline_at_ms=1_790_000_030_000,
        appended_ms=1_790_000_000_000,
        fingerprint="0123456789abcdef",
        cache_salt="blue",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
    "chunk_minimal": Chunk(id="a", ref="i0_0", attempt="1790000000000_1", kind=ChunkKind.BEGIN),
    "chunk_full": Chunk(
        id="7c1d-é",
        ref="i3_1024",
        attempt="1790000000000_2",
        kind=ChunkKind.TOKENS,
        tenant="acme",
        node="gpu-17",
        first_token=12,
        tokens=3,
        choices=(ChoiceDelta(index=1, text=" Grüße", token_ids=(5, 6), deltas=(Raw(b'{"tool_calls":[]}'),)),),
        restarted=True,
        finish_reason="stop",
    ),
    "outcome_minimal": Outcome(id="a", ref="i0_0", kind=OutcomeKind.COMPLETED, reason=Reason.FINISHED),
    "outcome_full": Outcome(
        id="7c1d-é",
        ref="i3_1024",
        kind=OutcomeKind.FAILED,
        reason=Reason.ATTEMPTS_EXHAUSTED,
        tenant="acme",
        message="engine answered 500",
        fingerprint="0123456789abcdef",
        attempt="1790000000000_4",
        node="gpu-17",
        model="qwen3-8b",
        choices=(Choice(index=1, text="Grüße", finish_reason="stop", deltas=(Raw(b'{"n":1}'),)),),
        usage=Usage(prompt_tokens=600, completion_tokens=3, cached_tokens=512),
        timing=Timing(
            appended=1_790_000_000_000,
            claimed=1_790_000_000_010,
            first_token=1_790_000_000_120,
            ended=1_790_000_000_500,
        ),
        http_status=500,
    ),
    "outcome_head_full": OutcomeHead(
        id="7c1d-é",
        ref="i3_1024",
        kind=OutcomeKind.EVICTED,
        reason=Reason.DEADLINE_EXCEEDED,
        tenant="acme",
        fingerprint="0123456789abcdef",
        attempt="1790000000000_4",
    ),
    "dead_letter_minimal": DeadLetter(
        ref="i0_0", reason=Reason.MALFORMED, message="not JSON", topic="flexlb.default.requests"
    ),
    "dead_letter_full": DeadLetter(
        ref="b3_1024",
        reason=Reason.ATTEMPTS_EXHAUSTED,
        message="engine answered 500",
        topic="flexlb.default.requests.batch",
        id="7c1d-é",
        tenant="acme",
        record_base64="eyJpZCI6NX0=",
        attempts=(FAILED,),
        dead_at_ms=1_790_000_000_500,
    ),
    "failed_attempt_minimal": FailedAttempt(
        attempt="1790000000000_1", node="gpu-17", cause=FailureCause.CONNECT
    ),
    "failed_attempt_full": FAILED,
    "identity_minimal": NodeIdentity(node="gpu-17", incarnation="c0ffee", models=("m",)),
    "identity_full": NodeIdentity(
        node="gpu-17",
        incarnation="c0ffee",
        models=("qwen3-8b", "qwen3-8b-chat"),
        role=Role.PREFILL,
        group="rack4",
        loras=("sql",),
        max_running=64,
        max_model_len=32_768,
        kv_total_tokens=400_000,
        engine_block_size=16,
        engine_url="http://127.0.0.1:8000",
        engine_version="vllm 0.11.2",
    ),
    "report_minimal": NodeReport(node="gpu-17", incarnation="c0ffee", sequence=1),
    "report_full": NodeReport(
        node="gpu-17",
        incarnation="c0ffee",
        sequence=42,
        running=7,
        waiting=2,
        held_tokens=9_000,
        queued_uncached_tokens=1_200,
        kv_used_tokens=150_000,
        kv_total_tokens=400_000,
        prefill_tokens_per_s=8_500.5,
        gpu_utilisation=0.93,
        gpu_memory_used=0.81,
        seen_seq=99,
        draining=True,
        engine_ok=False,
        left=True,
    ),
    "block_event_minimal": BlockEvent(
        node="gpu-17", incarnation="c0ffee", sequence=1, kind=BlockEventKind.RESET
    ),
    "block_event_full": BlockEvent(
        node="gpu-17",
        incarnation="c0ffee",
        sequence=2,
        kind=BlockEventKind.STORED,
        medium="CPU",
        hashes=("724a45aab967ce62", "4aca15480d7262b1"),
    ),
    "explanation_minimal": Explanation(
        ref="i3_1024",
        id="7c1e",
        model="qwen3-8b",
        node="gpu-17",
        epoch=1_790_000_000_000,
        n=1,
        at_ms=1_790_000_000_012,
        policy="round_robin",
        rule=Rule.TURN,
    ),
    "explanation_full": Explanation(
        ref="i3_1024",
        id="7c1e",
        tenant="acme",
        model="qwen3-8b",
        node="gpu-17",
        epoch=1_790_000_000_000,
        n=2,
        at_ms=1_790_000_000_912,
        policy="prefill_cost",
        rule=Rule.MOST_CACHED,
        stage=Stage.PREFILL,
        is_priced=True,
        near_tie=0.05,
        prompt_tokens=600,
        max_tokens=64,
        blocks=2,
        block_size=256,
        priority=90,
        waited_ms=912,
        read_ms=12,
        put_off_ms=40,
        busy_rounds=3,
        busy_node="gpu-18",
        unplaced_rounds=1,
        failures=1,
        excluded=("gpu-19",),
        serving=4,
        looked_at=2,
        candidates=(
            Candidate(
                node="gpu-17",
                cost_ms=136.5,
                matched_blocks=1,
                cached_tokens=256,
                compute_tokens=344,
                queue_ms=1.0,
                slot_ms=2.0,
                planned_ms=4.0,
                prefill_ms=40.0,
                work_ms=20.0,
                stall_ms=8.0,
                burst_ms=16.0,
                pressure_ms=32.0,
                transfer_ms=13.5,
                queued_tokens=10,
                held=3,
                most=36,
                kv_use=0.25,
                is_tied=True,
                has_room=True,
                is_stale=True,
            ),
        ),
        asked=4,
        barred={"excluded": 1},
        barred_nodes=(BarredNode(node="gpu-19", why=Bar.EXCLUDED),),
        doubts=(Doubt.STALE_LOAD, Doubt.ESTIMATED_LENGTH),
    ),
    "commit_note_minimal": CommitNote(),
    "commit_note_full": CommitNote(
        positions={"0": 17, "3": 0}, epoch=1_790_000_000_000, generation="b1946ac9", counter=12
    ),
}

DECODERS: dict[str, Callable[[bytes], Any]] = {
    "request": codec.requests.decode,
    "cancel": codec.cancels.decode,
    "lease": codec.leases.decode,
    "envelope": codec.envelopes.decode,
    "job_data": decode_job_data,
    "chunk": codec.chunks.decode,
    "outcome": codec.outcomes.decode,
    "outcome_head": codec.outcome_heads.decode,
    "dead_letter": codec.dead_letters.decode,
    "failed_attempt": codec.failed_attempts.decode,
    "identity": codec.identities.decode,
    "report": codec.reports.decode,
    "block_event": codec.block_events.decode,
    "explanation": codec.explanations.decode,
    "commit_note": msgspec.json.Decoder(CommitNote).decode,
}
MAY_BE_WRONG = {
    "request",
    "cancel",
    "lease",
    "outcome",
    "chunk",
    "dead_letter",
    "identity",
    "report",
    "block_event",
}
"""Records that others may write, or write wrongly."""

every_golden = pytest.mark.parametrize("name", sorted(RECORDS))


def kind_of(name: str) -> str:
    """The record of a golden file's name."""
    return max((kind for kind in DECODERS if name.startswith(f"{kind}_")), key=len)


def golden(name: str) -> bytes:
    """The bytes that release 1 wrote."""
    return (FOLDER / f"{name}.json").read_bytes().rstrip(b"\n")


def encode_today(record: msgspec.Struct) -> bytes:
    """The bytes that are written now."""
    return encode_job_data(record) if isinstance(record, Work) else codec.encode(record)


def read_by_release_1(name: str, data: bytes) -> Any:
    """What release 1 makes of `data`."""
    return READERS[kind_of(name)].decode(data)


def test_every_record_has_its_golden_file_and_every_file_its_record() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(RECORDS)
    assert {kind_of(name) for name in RECORDS} == set(DECODERS) == set(READERS)


@every_golden
def test_what_release_1_wrote_is_read_today(name: str) -> None:
    assert DECODERS[kind_of(name)](golden(name)) == RECORDS[name]


@every_golden
def test_what_is_written_today_is_read_by_release_1(name: str) -> None:
    assert read_by_release_1(name, encode_today(RECORDS[name])) == read_by_release_1(name, golden(name))


@every_golden
def test_fields_of_a_later_release_are_ignored(name: str) -> None:
    later = json.loads(golden(name))
    target = later[2][0] if kind_of(name) == "job_data" else later
    target |= {"added_later": {"deep": [1, {"x": None}]}, "zz": "é"}
    data = json.dumps(later, ensure_ascii=False, separators=(",", ":")).encode()
    assert DECODERS[kind_of(name)](data) == RECORDS[name]
    assert read_by_release_1(name, data) == read_by_release_1(name, golden(name))


@every_golden
def test_a_wrong_type_is_refused_with_the_fields_path(name: str) -> None:
    kind = kind_of(name)
    record = json.loads(golden(name))
    fields = record[2][0] if kind == "job_data" else record
    for field, value in list(fields.items()):
        if field == "body":
            continue
        fields[field] = 5 if isinstance(value, str | list | dict | bool) else "five"
        path = f"$[2][0].{field}" if kind == "job_data" else f"$.{field}"
        with pytest.raises(ValueError, match=re.escape(f"at `{path}`")) as caught:
            DECODERS[kind](json.dumps(record).encode())
        if kind in MAY_BE_WRONG:
            assert isinstance(caught.value, MalformedRecord)
        fields[field] = value


def test_job_data_names_the_function_that_release_1_named() -> None:
    assert json.loads(golden("job_data_full"))[0] == ENTRY_POINT == "workers_agent.rq_job.execute"


# The examples of the protocol document are records too


def examples() -> list[tuple[str, str]]:
    """(record, JSON) of each example in `protocol.md`."""
    text = PROTOCOL_DOCUMENT.read_text(encoding="utf-8")
    return re.findall(r"<!-- example: (\w+) -->\n```json\n(.*?)\n```", text, re.DOTALL)


@pytest.mark.parametrize(("kind", "text"), examples(), ids=lambda value: value if value in DECODERS else "")
def test_an_example_of_the_document_is_a_record_without_unknown_fields(kind: str, text: str) -> None:
    value = DECODERS[kind](text.encode())
    given_fields = json.loads(text)[2][0] if kind == "job_data" else json.loads(text)
    assert set(given_fields) <= set(value.__struct_fields__)


def test_the_document_shows_an_example_of_each_record() -> None:
    assert {kind for kind, _ in examples()} >= set(DECODERS) - {"outcome_head"}
