"""Admission: what enters, what is refused with which words, and that no bytes make it raise."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol import codec
from dispatcher.protocol.assignment import decode_job_data
from dispatcher.protocol.names import Lane, Ref
from dispatcher.protocol.outcome import Reason
from dispatcher.protocol.request import INLINE_BODY_BYTES, InferenceRequest
from dispatcher.protocol.text_hash import CHUNK_TOKENS, text_hashes
from dispatcher.scheduling.admission import (
    DEFAULT_MAX_TOKENS,
    AdmissionLimits,
    Admitted,
    Refused,
    admit,
    fingerprint,
)

REF = Ref(Lane.INTERACTIVE, 3, 1024)
NOW_MS = 1_790_000_000_000
BODIES = "flexlb.p.requests.bodies"
REPLIES = "flexlb.p.replies"
LIMITS = AdmissionLimits(
    max_record_bytes=100_000,
    default_deadline_ms=600_000,
    max_deadline_ms=3_600_000,
    request_topic="flexlb.p.requests",
    bodies_topic=BODIES,
    reply_topics={REPLIES: 4, "flexlb.p.other": 1},
)
SMALLEST: dict[str, Any] = {
    "id": "a",
    "model": "m",
    "endpoint": "/v1/completions",
    "body": {"prompt": "x", "max_tokens": 5},
}
BODY_REF = {"topic": BODIES, "partition": 0, "offset": 9, "bytes": 4_000, "sha256": "5e" * 32}


def decide(
    value: bytes | None,
    *,
    key: bytes | None = b"key",
    appended_ms: int = NOW_MS,
    now_ms: int = NOW_MS,
    carry_bodies: bool = True,
) -> Admitted | Refused:
    """Admit with this file's limits."""
    return admit(
        REF,
        key,
        value,
        appended_ms=appended_ms,
        now_ms=now_ms,
        traceparent="00-trace",
        limits=LIMITS,
        carry_bodies=carry_bodies,
    )


def record(**fields: Any) -> bytes:
    """The smallest valid record with `fields` over it; None leaves a field out."""
    merged = {**SMALLEST, **fields}
    return json.dumps({name: value for name, value in merged.items() if value is not None}).encode()


def admitted(**fields: Any) -> Admitted:
    """The decision about a record that must pass."""
    decision = decide(record(**fields))
    assert isinstance(decision, Admitted), decision
    return decision


def refused(**fields: Any) -> Refused:
    """The decision about a record that must not pass."""
    decision = decide(record(**fields))
    assert isinstance(decision, Refused), decision
    return decision


# What enters


def test_the_smallest_request_enters_with_every_default() -> None:
    decision = admitted()
    envelope, work = decision.envelope, decode_job_data(decision.data)
    assert (envelope.ref, envelope.id, envelope.model) == ("i3_1024", "a", "m")
    assert (envelope.tenant, envelope.priority, envelope.max_tokens) == ("", 50, 5)
    assert envelope.deadline_at_ms == NOW_MS + LIMITS.default_deadline_ms
    assert not envelope.tokens_exact
    assert (work.ref, work.id, work.endpoint) == ("i3_1024", "a", "/v1/completions")
    assert json.loads(bytes(work.body)) == SMALLEST["body"]
    assert work.body_ref is None
    assert work.traceparent == "00-trace"
    assert work.fingerprint == envelope.fingerprint


def test_every_field_reaches_whom_it_concerns() -> None:
    decision = admitted(
        tenant="acme",
        priority=90,
        deadline_ms=1_000,
        ttft_slo_ms=200,
        tokens={"count": 600, "block_size": 512, "block_hashes": ["0" * 16]},
        reply_to={"topic": REPLIES, "partition": 3},
        session="s",
        lora="sql",
        cache_salt="blue",
    )
    envelope, work = decision.envelope, decode_job_data(decision.data)
    assert (envelope.tenant, envelope.priority, envelope.ttft_slo_ms) == ("acme", 90, 200)
    assert (envelope.prompt_tokens, envelope.tokens_exact, envelope.block_size) == (600, True, 512)
    assert envelope.block_hashes == ("0" * 16,)
    assert (envelope.session, envelope.lora) == ("s", "sql")
    assert envelope.deadline_at_ms == work.deadline_at_ms == NOW_MS + 1_000
    assert work.reply_to is not None
    assert (work.reply_to.topic, work.reply_to.partition) == (REPLIES, 3)
    assert (work.tenant, work.cache_salt) == ("acme", "blue")


def test_a_body_without_tokens_is_known_by_its_text() -> None:
    body = {"prompt": "x" * 3_000, "max_tokens": 5}
    expected = text_hashes(json.dumps(body).encode(), model="m", lora="sql", cache_salt="blue")
    envelope = admitted(body=body, lora="sql", cache_salt="blue").envelope
    assert len(expected) == 2
    assert (envelope.block_hashes, envelope.text_hashed) == (expected, True)
    assert envelope.block_size == CHUNK_TOKENS
    by_reference = admitted(body=None, body_ref=BODY_REF, text_hashes=list(expected)).envelope
    assert (by_reference.block_hashes, by_reference.text_hashed) == (expected, True)


def test_tokens_win_over_text() -> None:
    tokens = {"count": 600, "block_size": 512, "block_hashes": ["0" * 16]}
    envelope = admitted(body={"prompt": "x" * 3_000}, tokens=tokens, text_hashes=["1" * 16]).envelope
    assert (envelope.block_hashes, envelope.text_hashed, envelope.block_size) == (("0" * 16,), False, 512)


def test_a_deadline_counts_from_the_brokers_append_time() -> None:
    decision = decide(record(deadline_ms=5_000), appended_ms=NOW_MS - 4_000)
    assert isinstance(decision, Admitted)
    assert decision.envelope.deadline_at_ms == NOW_MS + 1_000


@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [
        ({}, DEFAULT_MAX_TOKENS),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 9}, 9),
        ({"max_completion_tokens": 9}, 9),
        ({"max_tokens": 0}, 1),
        ({"max_tokens": -5}, 1),
        ({"max_tokens": 10**9}, 1_000_000),
        ({"max_tokens": 10**30}, 1_000_000),
        ({"max_tokens": "many"}, DEFAULT_MAX_TOKENS),
        ({"max_tokens": 1.5}, DEFAULT_MAX_TOKENS),
        ({"max_tokens": None}, DEFAULT_MAX_TOKENS),
    ],
)
def test_tokens_to_generate_are_read_from_the_body_or_assumed(body: dict[str, Any], max_tokens: int) -> None:
    assert admitted(body=body).envelope.max_tokens == max_tokens


def test_a_prompts_length_is_estimated_from_bytes_when_not_given() -> None:
    body = {"prompt": "x" * 400}
    assert admitted(body=body).envelope.prompt_tokens == len(json.dumps(body)) // 4
    assert admitted(body=None, body_ref=BODY_REF).envelope.prompt_tokens == 1_000
    assert admitted(body={}).envelope.prompt_tokens == 1


# Bodies


def test_a_large_body_travels_by_reference_to_its_own_record() -> None:
    body = {"prompt": "x" * INLINE_BODY_BYTES}
    value = record(body=body)
    decision = decide(value)
    assert isinstance(decision, Admitted)
    work = decode_job_data(decision.data)
    assert work.body_in_request
    assert bytes(work.body) == b""
    assert work.body_ref is not None
    assert (work.body_ref.topic, work.body_ref.partition, work.body_ref.offset) == (
        "flexlb.p.requests",
        3,
        1024,
    )
    assert work.body_ref.bytes == len(value)
    assert work.body_ref.sha256 == sha256(json.dumps(body).encode()).hexdigest()
    assert len(decision.data) < 1_000


def test_any_body_travels_by_reference_when_the_window_is_full() -> None:
    decision = decide(record(), carry_bodies=False)
    assert isinstance(decision, Admitted)
    work = decode_job_data(decision.data)
    assert work.body_in_request
    assert work.body_ref is not None


def test_a_given_reference_is_passed_on_verbatim() -> None:
    work = decode_job_data(admitted(body=None, body_ref=BODY_REF).data)
    assert not work.body_in_request
    assert work.body_ref is not None
    assert work.body_ref.offset == 9


# What is refused


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"body": None}, Reason.MALFORMED, "exactly one of body and body_ref, seen neither"),
        ({"body_ref": BODY_REF}, Reason.MALFORMED, "exactly one of body and body_ref, seen both"),
        ({"body": "text"}, Reason.MALFORMED, "body to be a JSON object - at `$.body`"),
        ({"body": [1]}, Reason.MALFORMED, "body to be a JSON object - at `$.body`"),
        (
            {"body": None, "body_ref": {**BODY_REF, "topic": "theirs"}},
            Reason.BODY_UNREADABLE,
            f"body_ref.topic: expected {BODIES}, seen 'theirs'",
        ),
        ({"deadline_ms": 0}, Reason.INVALID_DEADLINE, "deadline_ms: expected 1 to 3600000 ms, seen 0"),
        ({"deadline_ms": -1}, Reason.INVALID_DEADLINE, "seen -1"),
        ({"deadline_ms": 3_600_001}, Reason.INVALID_DEADLINE, "seen 3600001"),
        (
            {"reply_to": {"topic": "theirs"}},
            Reason.REPLY_ROUTE_UNKNOWN,
            "reply_to.topic: expected one of flexlb.p.other, flexlb.p.replies, seen 'theirs'",
        ),
        (
            {"reply_to": {"partition": 4}},
            Reason.REPLY_ROUTE_UNKNOWN,
            "reply_to.partition: expected 0 to 3, seen 4",
        ),
        (
            {"reply_to": {"topic": "flexlb.p.other", "partition": 1}},
            Reason.REPLY_ROUTE_UNKNOWN,
            "reply_to.partition: expected 0 to 0, seen 1",
        ),
    ],
)
def test_a_readable_request_that_cannot_be_served_is_refused(
    fields: dict[str, Any], reason: Reason, words: str
) -> None:
    decision = refused(tenant="acme", **fields)
    assert decision.reason is reason
    assert words in decision.message
    assert (decision.id, decision.tenant) == ("a", "acme")
    assert len(decision.fingerprint) == 16
    assert not decision.dead_letter


def test_a_deadline_that_has_passed_is_refused() -> None:
    decision = decide(record(deadline_ms=1_000), appended_ms=NOW_MS - 1_200)
    assert isinstance(decision, Refused)
    assert decision.reason is Reason.DEADLINE_PASSED
    assert decision.message == "deadline_ms: passed 200 ms before the record was read"


def test_a_record_above_the_limit_is_refused_by_its_size_alone() -> None:
    decision = decide(record(body={"prompt": "x" * LIMITS.max_record_bytes}))
    assert isinstance(decision, Refused)
    assert decision.reason is Reason.TOO_LARGE
    assert decision.id == "a"
    assert f"put the body on {BODIES}" in decision.message


def test_a_later_version_is_refused_and_dead_lettered() -> None:
    decision = refused(v=2)
    assert decision.reason is Reason.UNSUPPORTED_VERSION
    assert decision.dead_letter
    assert decision.id == "a"


@pytest.mark.parametrize(
    ("value", "key", "id"),
    [
        (b'{"id":"a","model":5}', b"key", "a"),
        (b"not json", b"key", "key"),
        (b"not json", None, ""),
        (b"not json", b"", ""),
        (b"not json", b"\xff", ""),
        (b"not json", b"x" * 257, ""),
        (b'{"id":""}', b"key", "key"),
        (None, b"key", "key"),
        (None, None, ""),
    ],
)
def test_poison_is_answered_when_an_id_can_be_read_and_dead_lettered_else(
    value: bytes | None, key: bytes | None, id: str
) -> None:
    decision = decide(value, key=key)
    assert isinstance(decision, Refused)
    assert decision.reason is Reason.MALFORMED
    assert decision.id == id
    assert decision.fingerprint == ""
    assert decision.dead_letter or (id and value is None)


def test_a_tombstone_says_what_to_do() -> None:
    decision = decide(None)
    assert isinstance(decision, Refused)
    assert decision.message.endswith("seen no value (a tombstone); send a request")


# Repeats


def print_of(**fields: Any) -> str:
    """The fingerprint of a record."""
    return admitted(**fields).envelope.fingerprint


def test_a_repeat_has_the_same_fingerprint_whatever_does_not_change_the_answer() -> None:
    assert print_of() == print_of(priority=90, deadline_ms=5_000, tenant="t", session="s")


@pytest.mark.parametrize(
    "fields",
    [
        {"body": {"prompt": "y", "max_tokens": 5}},
        {"body": {"max_tokens": 5, "prompt": "x"}},
        {"model": "other"},
        {"endpoint": "/v1/chat/completions"},
        {"reply_to": {"partition": 1}},
        {"body": None, "body_ref": BODY_REF},
    ],
)
def test_another_body_or_reply_route_has_another_fingerprint(fields: dict[str, Any]) -> None:
    assert print_of(**fields) != print_of()


def test_a_body_by_reference_is_known_by_its_digest_not_its_place() -> None:
    again = {**BODY_REF, "offset": 10, "partition": 1}
    assert print_of(body=None, body_ref=BODY_REF) == print_of(body=None, body_ref=again)


# Anything at all


def check(decision: Admitted | Refused) -> None:
    """What holds of every decision."""
    if isinstance(decision, Admitted):
        work = decode_job_data(decision.data)
        assert work.ref == decision.envelope.ref == str(REF)
        assert bool(bytes(work.body)) != (work.body_ref is not None)
        assert decision.envelope.max_tokens >= 1
        assert decision.envelope.deadline_at_ms > NOW_MS
    else:
        assert decision.message
        assert len(decision.message) < 1_000
        assert decision.id or decision.dead_letter
        assert len(decision.id) <= 256


@given(value=st.none() | st.binary(max_size=300), key=st.none() | st.binary(max_size=300))
def test_any_bytes_are_decided(value: bytes | None, key: bytes | None) -> None:
    check(decide(value, key=key))


FULL = record(
    tenant="acme",
    priority=90,
    deadline_ms=1_000,
    tokens={"count": 600, "block_size": 512, "block_hashes": ["0" * 16]},
    reply_to={"topic": REPLIES, "partition": 3},
    lora="sql",
)


@given(data=st.data(), carry_bodies=st.booleans())
def test_a_damaged_record_is_decided(data: st.DataObject, carry_bodies: bool) -> None:
    value = bytearray(FULL)
    for _ in range(data.draw(st.integers(min_value=1, max_value=4))):
        at = data.draw(st.integers(min_value=0, max_value=len(value) - 1))
        if data.draw(st.booleans()):
            value[at] = data.draw(st.integers(min_value=0, max_value=255))
        else:
            value[at:at] = data.draw(st.binary(min_size=1, max_size=3))
    check(decide(bytes(value), carry_bodies=carry_bodies))


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(
    changes=st.dictionaries(st.sampled_from(sorted(InferenceRequest.__struct_fields__)), any_json, max_size=3)
)
def test_a_record_with_any_values_in_its_fields_is_decided(changes: dict[str, Any]) -> None:
    check(decide(json.dumps({**SMALLEST, **changes}).encode()))


@pytest.mark.parametrize(
    "body",
    [
        b'{"max_tokens":' + b"9" * 5_000 + b"}",
        b'{"max_tokens":1e400}',
        b'{"x":' * 500 + b"1" + b"}" * 500,
        b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"x":"\xff"}',
        b' \n\t{"x":1}',
        b'{"max_tokens":1,"max_tokens":"two"}',
        b'{"max_tokens":{"max_tokens":1}}',
    ],
    ids=["long int", "overflow", "deep", "too deep", "broken text", "white space", "repeated", "nested"],
)
def test_an_odd_body_is_decided(body: bytes) -> None:
    check(decide(b'{"id":"a","model":"m","endpoint":"/v1/completions","body":' + body + b"}"))


@given(
    left=st.fixed_dictionaries({"model": st.text(min_size=1, max_size=4), "body": st.just({})}),
    right=st.fixed_dictionaries({"model": st.text(min_size=1, max_size=4), "body": st.just({})}),
)
def test_models_are_told_apart_by_fingerprints(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert (print_of(**left) == print_of(**right)) == (left["model"] == right["model"])


def test_fingerprints_are_those_of_the_request_itself() -> None:
    assert fingerprint(codec.requests.decode(record())) == print_of()
