"""Every decoder of bytes from outside: whatever comes, a value or the one refusal it promises, and soon.

`decoders` is the list of what a stranger can reach. Inputs are damaged and changed records, arbitrary JSON
and MessagePack, and hostile pieces put together.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.frontend.openai import read_ask
from dispatcher.frontend.problem import Refused as Told
from dispatcher.frontend.prompt_tokens import tokens_of
from dispatcher.frontend.request_headers import read_headers
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work, decode_job_data, encode_job_data
from dispatcher.protocol.codec import MalformedRecord
from dispatcher.protocol.names import Attempt, JobId, Ref
from dispatcher.protocol.request import Endpoint
from dispatcher.protocol.text_hash import text_hashes
from dispatcher.scheduling.admission import AdmissionLimits, Admitted, Refused, admit
from tests.support.hostile import BOMB, SCALARS, TOKENS, any_value, changed, damaged
from workers_agent.engines.kv_events import UnreadableBatch, decode_batch
from workers_agent.engines.sse import EventParser

CASES = 2500 if os.environ.get("FLEXLB_TEST_PROFILE") == "long" else 30
"""Of each decoder."""
SOON_S = 2.0
"""CPU seconds for the largest of inputs, tens of megabytes: seconds would be a way to stop a leader."""
LIMITS = AdmissionLimits(
    max_record_bytes=1 << 20,
    default_deadline_ms=600_000,
    max_deadline_ms=86_400_000,
    request_topic="r",
    bodies_topic="b",
    reply_topics={"p": 2},
)
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}
REQUEST = {
    "id": "a",
    "model": "m",
    "endpoint": "/v1/completions",
    "body": {"prompt": "x", "max_tokens": 2},
    "tokens": {"count": 300, "block_size": 256, "block_hashes": ["0" * 16]},
    "reply_to": {"topic": "p", "partition": 1},
    "deadline_ms": 1000,
}
WORK = Work(ref="i0_1", id="a", model="m", endpoint=Endpoint.COMPLETIONS, body=msgspec.Raw(b"{}"))
BATCH = [1.5, [["BlockStored", [1, 2], None, list(range(8)), 4, None, "GPU"], ["BlockRemoved", [1]]], 0]


@dataclass(frozen=True)
class Fuzzed:
    """A decoder, what it may raise, and a record that it takes."""

    decode: Callable[[bytes], object]
    refusal: type[Exception]
    record: dict[str, Any] | list[Any]
    is_msgpack: bool = False


def decide(data: bytes) -> object:
    """Admission never raises; what it lets in can be carried out."""
    decision = admit(
        Ref.parse("i0_1"),
        b"key",
        data,
        appended_ms=0,
        now_ms=0,
        traceparent="",
        limits=LIMITS,
        carry_bodies=True,
    )
    match decision:
        case Admitted(envelope=envelope, data=job):
            assert codec.envelopes.decode(codec.encode(envelope)) == envelope
            assert decode_job_data(job).id == envelope.id
        case Refused(message=message):
            assert message
            assert len(message) < 2000
    return decision


def ask(data: bytes) -> object:
    """What the frontend makes of a body."""
    found = read_ask(Endpoint.CHAT, data)
    tokens_of(found, found.model or "m", 256, salt="")
    return read_ask(Endpoint.COMPLETIONS, data)


def headers(data: bytes) -> object:
    """Every header of ours, with the bytes as HTTP libraries hand them on."""
    text = data.decode("latin-1")
    names = ("X-Request-Id", "X-FlexLB-Priority", "X-FlexLB-Deadline-Ms", "X-FlexLB-Lane", "traceparent")
    return read_headers(dict.fromkeys(names, text))


def parse_events(data: bytes) -> object:
    """An engine's stream."""
    return EventParser(max_event_bytes=1 << 20).feed(data)


def parse_names(data: bytes) -> object:
    """Refs, attempts and job ids, as they lie in Redis."""
    text = data.decode(errors="surrogateescape")
    found = []
    parsers: tuple[Callable[[str], object], ...] = (Ref.parse, Attempt.parse, JobId.parse)
    for parse in parsers:
        try:
            found.append(str(parse(text)))
        except ValueError:
            continue
        assert found[-1] == text
    return found


SMALL: dict[str, dict[str, Any]] = {
    "cancels": {"id": "a", "tenant": "t"},
    "outcomes": {"id": "a", "ref": "i0_1", "kind": "Completed", "reason": "finished"},
    "outcome_heads": {"id": "a", "ref": "i0_1", "kind": "Completed", "reason": "finished"},
    "published_heads": {"id": "a", "ref": "i0_1", "kind": "Completed", "reason": "finished"},
    "chunks": {"id": "a", "ref": "i0_1", "attempt": "5_1", "kind": "tokens", "choices": [{"text": "x"}]},
    "envelopes": {"ref": "i0_1", "id": "a", "model": "m", "block_hashes": ["0" * 16]},
    "identities": {"node": "n", "incarnation": "x", "models": ["m"]},
    "reports": {"node": "n", "incarnation": "x", "sequence": 1, "gpu_utilisation": 0.5},
    "block_events": {"node": "n", "incarnation": "x", "sequence": 1, "kind": "stored", "hashes": ["0" * 16]},
    "dead_letters": {"ref": "i0_1", "reason": "malformed", "message": "no", "topic": "t"},
    "failed_attempts": {"attempt": "5_1", "node": "n", "cause": "connect"},
    "checkpoints": {"partition": 3, "offset": 77},
}
decoders: dict[str, Fuzzed] = {
    "requests": Fuzzed(codec.requests.decode, MalformedRecord, REQUEST),
    **{name: Fuzzed(getattr(codec, name).decode, MalformedRecord, record) for name, record in SMALL.items()},
    "job data": Fuzzed(decode_job_data, ValueError, json.loads(encode_job_data(WORK))),
    "salvage": Fuzzed(codec.salvage_identity, MalformedRecord, {"id": "a", "tenant": "t"}),
    "admission": Fuzzed(decide, MalformedRecord, REQUEST),
    "text hashes": Fuzzed(
        lambda data: text_hashes(data, model="m", lora="", cache_salt=""), MalformedRecord, BODY
    ),
    "OpenAI body": Fuzzed(ask, Told, BODY),
    "headers": Fuzzed(headers, Told, {"X": 1}),
    "server-sent events": Fuzzed(parse_events, ValueError, {"data": "x\n\ndata: y"}),
    "names": Fuzzed(parse_names, MalformedRecord, {}),
    "KV events": Fuzzed(decode_batch, UnreadableBatch, BATCH, is_msgpack=True),
}
every_decoder = pytest.mark.parametrize("name", list(decoders))


def inputs(of: Fuzzed, rng: Random) -> bytes:
    """One input for a decoder."""
    encode: Callable[[Any], bytes] = msgspec.msgpack.encode if of.is_msgpack else msgspec.json.encode
    draw = rng.random()
    if draw < 0.35:
        return damaged(rng, encode(of.record))
    if draw < 0.6 and isinstance(of.record, dict) and of.record:
        return changed(rng, of.record)
    if draw < 0.8:
        value = any_value(rng)
        return json.dumps(value).encode() if not of.is_msgpack else encode(_small(value))
    if draw < 0.9:
        return b"".join(rng.choice(TOKENS) for _ in range(rng.randrange(1, 8)))
    return rng.randbytes(rng.randrange(120))


def _small(value: Any) -> Any:
    """`value` without integers that MessagePack does not have, in the shape of a batch."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return [0, [value % 2**32], 0]
    if isinstance(value, list):
        return [0, [_small(one) for one in value], 0]
    return [1.0, [["BlockStored", value if isinstance(value, list) else [1], None, [1], 1]], 0]


def check(of: Fuzzed, data: bytes) -> None:
    """Decode; nothing but the promised refusal may be raised, with words that are not the input's size."""
    try:
        of.decode(data)
    except of.refusal as error:
        message = str(error)
        if not 0 < len(message) < 2000:
            pytest.fail(f"a message of {len(message)} characters")


@every_decoder
@settings(max_examples=CASES)
@given(seed=st.integers(min_value=0, max_value=2**64 - 1))
def test_any_input_gives_a_value_or_the_refusal(name: str, seed: int) -> None:
    check(decoders[name], inputs(decoders[name], Random(seed)))


@every_decoder
@settings(max_examples=CASES // 5)
@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_value_or_the_refusal(name: str, data: bytes) -> None:
    check(decoders[name], data)


LARGE: dict[str, bytes] = {
    "nested 100,000 deep": BOMB,
    "a list 100,000 deep": b"[" * 100_000,
    "known fields nested": b'{"id":"a","body":' + BOMB + b"}",
    "10 MB of text": b'{"id":"' + b"x" * (10 << 20) + b'"}',
    "10 MB of body": b'{"id":"a","model":"m","endpoint":"/v1/completions","body":{"prompt":"'
    + b"x" * (10 << 20)
    + b'"}}',
    "a number of 1,000,000 digits": b'{"id":"a","v":' + b"9" * 1_000_000 + b"}",
    "1e400": b'{"id":"a","v":1e400,"gpu_utilisation":1e400,"deadline_ms":1e400}',
    "a million fields": b"{" + b",".join(b'"f%d":1' % n for n in range(1_000_000)) + b"}",
    "one field 200,000 times": b"{" + b",".join([b'"id":"a"'] * 200_000) + b"}",
    "a million empty objects": b"[" + b",".join([b"{}"] * 1_000_000) + b"]",
    "10 MB of escapes": b'{"id":"' + b"\\u0041" * (10 << 17) + b'"}',
    "10 MB of lines": b"data:\n" * (10 << 17),
    "nested MessagePack": b"\x91" * 100_000,
    "a MessagePack list that is not there": b"\xdd\xff\xff\xff\xff",
}


@every_decoder
@pytest.mark.parametrize("large", list(LARGE))
def test_a_large_input_costs_bounded_time(name: str, large: str) -> None:
    began_s = time.process_time()
    check(decoders[name], LARGE[large])
    assert time.process_time() - began_s < SOON_S


@pytest.mark.parametrize("name", [name for name, of in decoders.items() if not of.is_msgpack])
def test_every_kind_of_value_in_every_field(name: str) -> None:
    record = decoders[name].record
    for field in record if isinstance(record, dict) else ():
        for value in SCALARS:
            check(decoders[name], json.dumps({**dict(record), field: value}).encode())
