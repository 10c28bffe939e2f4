"""The codec: whatever the bytes, a value or MalformedRecord; errors name the field."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol import codec
from dispatcher.protocol.assignment import ENTRY_POINT, Work, decode_job_data, encode_job_data
from dispatcher.protocol.codec import Codec, MalformedRecord, UnsupportedVersion
from dispatcher.protocol.outcome import Outcome, OutcomeKind, Reason
from dispatcher.protocol.request import CancelRequest, Endpoint, InferenceRequest, LeaseRecord

CODECS: dict[str, Codec[Any]] = {
    "request": codec.requests,
    "cancel": codec.cancels,
    "outcome": codec.outcomes,
    "outcome_head": codec.outcome_heads,
    "chunk": codec.chunks,
    "envelope": codec.envelopes,
    "identity": codec.identities,
    "report": codec.reports,
    "block_event": codec.block_events,
    "dead_letter": codec.dead_letters,
    "failed_attempt": codec.failed_attempts,
}
SMALLEST: dict[str, dict[str, Any]] = {
    "request": {"id": "a", "model": "m", "endpoint": "/v1/completions", "body": {"prompt": "x"}},
    "cancel": {"id": "a"},
    "outcome": {"id": "a", "ref": "i0_1", "kind": "Completed", "reason": "finished"},
    "outcome_head": {"id": "a", "ref": "i0_1", "kind": "Completed", "reason": "finished"},
    "chunk": {"id": "a", "ref": "i0_1", "attempt": "5_1", "kind": "begin"},
    "envelope": {"ref": "i0_1", "id": "a", "model": "m"},
    "identity": {"node": "n", "incarnation": "x", "models": ["m"]},
    "report": {"node": "n", "incarnation": "x", "sequence": 1},
    "block_event": {"node": "n", "incarnation": "x", "sequence": 1, "kind": "stored"},
    "dead_letter": {"ref": "i0_1", "reason": "malformed", "message": "no", "topic": "t"},
    "failed_attempt": {"attempt": "5_1", "node": "n", "cause": "connect"},
}
DEEP = 200_000
every_record = pytest.mark.parametrize("kind", list(CODECS))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def decode(kind: str, data: bytes) -> Any:
    """Decode, letting nothing but MalformedRecord pass."""
    try:
        return CODECS[kind].decode(data)
    except MalformedRecord:
        return None


def record_of(kind: str, /, **fields: Any) -> bytes:
    """The smallest valid record with `fields` over it."""
    return json.dumps({**SMALLEST[kind], **fields}).encode()


def with_raw(kind: str, name: bytes, value: bytes) -> bytes:
    """The smallest valid record with one more field, as raw JSON."""
    return record_of(kind)[:-1] + b',"' + name + b'":' + value + b"}"


# Anything at all


@every_record
@given(data=st.binary(max_size=200))
def test_any_bytes_decode_or_are_malformed(kind: str, data: bytes) -> None:
    decode(kind, data)


@every_record
@given(value=json_values)
def test_any_json_decodes_or_is_malformed(kind: str, value: object) -> None:
    decode(kind, json.dumps(value).encode())


@every_record
@given(data=st.data())
def test_a_damaged_record_decodes_or_is_malformed(kind: str, data: st.DataObject) -> None:
    record = bytearray(record_of(kind))
    for _ in range(data.draw(st.integers(min_value=1, max_value=6))):
        at = data.draw(st.integers(min_value=0, max_value=len(record) - 1))
        match data.draw(st.sampled_from(["replace", "insert", "cut"])):
            case "replace":
                record[at] = data.draw(st.integers(min_value=0, max_value=255))
            case "insert":
                record[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            case "cut":
                del record[at + 1 :]
    decode(kind, bytes(record))


@every_record
@given(data=st.data())
def test_a_field_of_any_value_decodes_or_is_malformed(kind: str, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(list(SMALLEST[kind])))
    decode(kind, record_of(kind, **{field: data.draw(json_values)}))


# Named dangers


@every_record
@pytest.mark.parametrize(
    "data",
    [
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b'{"id":' + b"[" * DEEP,
    ],
    ids=["arrays", "objects", "inside a field"],
)
def test_deep_nesting_is_malformed(kind: str, data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        CODECS[kind].decode(data)


@pytest.mark.parametrize("field", [b"body", b"unknown"])
def test_deep_nesting_in_a_field_that_is_not_looked_into_is_malformed(field: bytes) -> None:
    deep = b'{"x":' * DEEP + b"1" + b"}" * DEEP
    with pytest.raises(MalformedRecord, match="nested too deeply"):
        codec.requests.decode(with_raw("request", field, deep))


@every_record
@pytest.mark.parametrize(
    "text", [b'"\xff"', b'"\xc3"', b'"\xed\xa0\x80"', b'"\\ud800 alone"', b'"\\udc00 alone"', b'"\\x"']
)
def test_broken_utf8_in_a_known_field_is_malformed(kind: str, text: bytes) -> None:
    name = next(name for name, value in SMALLEST[kind].items() if isinstance(value, str))
    with pytest.raises(MalformedRecord):
        CODECS[kind].decode(with_raw(kind, name.encode(), text))


@every_record
@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"01", b"+1", b".5", b"1e999"])
def test_numbers_that_json_does_not_have_are_malformed(kind: str, number: bytes) -> None:
    with pytest.raises(MalformedRecord):
        CODECS[kind].decode(with_raw(kind, b"v" if kind != "failed_attempt" else b"http_status", number))


@pytest.mark.parametrize("digits", [20, 400, 4_299, 4_301, 100_000])
@pytest.mark.parametrize("field", [b"priority", b"deadline_ms", b"ttft_slo_ms", b"v"])
def test_a_huge_integer_is_a_number_or_malformed(field: bytes, digits: int) -> None:
    request = decode("request", with_raw("request", field, b"9" * digits))
    unbounded_in_the_record = field == b"deadline_ms" and digits < 4_300
    assert (request is not None) == unbounded_in_the_record


def test_of_a_repeated_field_the_last_counts() -> None:
    assert codec.requests.decode(with_raw("request", b"id", b'"z"')).id == "z"


@every_record
@pytest.mark.parametrize(
    "data", [b"", b" ", b"null", b"true", b"1", b'"text"', b"[]", b"{}", b"\xef\xbb\xbf{}"]
)
def test_what_is_no_record_is_malformed(kind: str, data: bytes) -> None:
    with pytest.raises(MalformedRecord, match=r"^[A-Z][A-Za-z]+: "):
        CODECS[kind].decode(data)


@every_record
def test_something_after_the_record_is_malformed(kind: str) -> None:
    with pytest.raises(MalformedRecord):
        CODECS[kind].decode(record_of(kind) + b"{}")


# Versions


@pytest.mark.parametrize("kind", [kind for kind in CODECS if kind != "failed_attempt"])
def test_a_later_version_is_refused_as_such(kind: str) -> None:
    with pytest.raises(UnsupportedVersion, match="version 2 is newer than 1; upgrade this process"):
        CODECS[kind].decode(record_of(kind, v=2))
    assert CODECS[kind].decode(record_of(kind, v=1)).v == 1
    assert CODECS[kind].decode(record_of(kind)).v == 1


# Errors name the field


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"id": 5}, "Expected `str`, got `int` - at `$.id`"),
        ({"id": ""}, "length >= 1 - at `$.id`"),
        ({"id": "x" * 257}, "length <= 256 - at `$.id`"),
        ({"model": None}, "Expected `str`, got `null` - at `$.model`"),
        ({"endpoint": "/v1/embeddings"}, "Invalid enum value '/v1/embeddings' - at `$.endpoint`"),
        ({"priority": 0}, "`int` >= 1 - at `$.priority`"),
        ({"priority": 101}, "`int` <= 100 - at `$.priority`"),
        ({"priority": True}, "Expected `int`, got `bool` - at `$.priority`"),
        ({"priority": 5.5}, "Expected `int`, got `float` - at `$.priority`"),
        ({"tokens": {"count": -1}}, "`int` >= 0 - at `$.tokens.count`"),
        ({"tokens": {"count": 1, "block_hashes": ["0" * 16, "XYZ"]}}, "at `$.tokens.block_hashes[1]`"),
        ({"tokens": {"block_size": 256}}, "missing required field `count` - at `$.tokens`"),
        ({"body_ref": {"topic": "t"}}, "missing required field `partition` - at `$.body_ref`"),
        ({"reply_to": {"partition": -1}}, "at `$.reply_to.partition`"),
        ({"detached": "yes"}, "Expected `bool`, got `str` - at `$.detached`"),
        ({"tenant": "x" * 257}, "length <= 256 - at `$.tenant`"),
        ({"ttft_slo_ms": 0}, "at `$.ttft_slo_ms`"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(MalformedRecord) as caught:
        codec.requests.decode(record_of("request", **fields))
    assert where in str(caught.value)
    assert str(caught.value).startswith("InferenceRequest: ")


@pytest.mark.parametrize("missing", ["id", "model", "endpoint"])
def test_a_missing_field_is_named(missing: str) -> None:
    record = {name: value for name, value in SMALLEST["request"].items() if name != missing}
    with pytest.raises(MalformedRecord, match=f"missing required field `{missing}`"):
        codec.requests.decode(json.dumps(record).encode())


# Round trips


@given(
    id=st.text(min_size=1, max_size=256),
    model=st.text(min_size=1, max_size=64),
    endpoint=st.sampled_from(Endpoint),
    body=st.dictionaries(st.text(max_size=8), json_values, max_size=4),
    tenant=st.text(max_size=32),
    priority=st.integers(min_value=1, max_value=100),
    session=st.none() | st.text(max_size=8),
)
def test_a_request_survives_its_bytes(body: dict[str, Any], **fields: Any) -> None:
    raw = msgspec.json.encode(body)
    request = InferenceRequest(body=msgspec.Raw(raw), **fields)
    again = codec.requests.decode(codec.encode(request))
    assert bytes(again.body) == raw
    assert msgspec.structs.replace(again, body=request.body) == request


@given(
    id=st.text(min_size=1, max_size=64),
    kind=st.sampled_from(OutcomeKind),
    reason=st.sampled_from(Reason),
    message=st.text(max_size=64),
    tenant=st.text(max_size=16),
    fingerprint=st.text(alphabet="0123456789abcdef", max_size=16),
    attempt=st.just("") | st.just("5_1"),
)
def test_an_outcomes_head_tells_the_same_as_the_outcome(**fields: Any) -> None:
    data = codec.encode(Outcome(ref="i0_1", **fields))
    outcome, head = codec.outcomes.decode(data), codec.outcome_heads.decode(data)
    for name in ("id", "ref", "kind", "reason", "tenant", "fingerprint", "attempt", "v"):
        assert getattr(head, name) == getattr(outcome, name)


@pytest.mark.parametrize(
    "field",
    [
        {"id": ""},
        {"id": "x" * 257},
        {"ref": "somewhere"},
        {"ref": f"i0_{10**400}"},
        {"ref": "i0_1\n"},
        {"tenant": "t" * 257},
        {"fingerprint": "a|b"},
        {"fingerprint": "a" * 65},
    ],
    ids=str,
)
def test_what_a_new_leader_would_stumble_over_is_no_head(field: dict[str, str]) -> None:
    record = json.dumps({"id": "a", "ref": "i0_1", "kind": "Completed", "reason": "finished", **field})
    for heads in (codec.outcome_heads, codec.published_heads):
        with pytest.raises(MalformedRecord):
            heads.decode(record.encode())


def test_an_answer_of_a_later_release_is_an_answer() -> None:
    record = b'{"id":"a","ref":"i0_1","kind":"Paused","reason":"asleep","v":99,"new":[1]}'
    with pytest.raises(UnsupportedVersion):
        codec.outcome_heads.decode(record)
    assert codec.published_heads.decode(record).ref == "i0_1"


@pytest.mark.parametrize("kind", [kind for kind in CODECS if kind != "outcome_head"])
def test_defaults_are_left_out(kind: str) -> None:
    record = CODECS[kind].decode(record_of(kind))
    assert json.loads(codec.encode(record)) == SMALLEST[kind]


# What can be saved of a record that was refused


@given(data=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_salvaging_never_fails_and_never_gives_a_long_id(data: bytes) -> None:
    found = codec.salvage_identity(data)
    if found is not None:
        tenant, request_id = found
        assert 0 < len(request_id) <= 256
        assert len(tenant) <= 256


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"id":"a","priority":"high"}', ("", "a")),
        (b'{"id":"a","tenant":"t"}', ("t", "a")),
        (b'{"tenant":"t"}', None),
        (b'{"id":""}', None),
        (b'{"id":7}', None),
        (b'{"id":"a","tenant":7}', None),
        (b'{"id":"' + b"x" * 257 + b'"}', None),
        (b'{"id":"a","x":' + b"[" * DEEP, None),
        (b'{"id":"a"', None),
        (b"", None),
    ],
)
def test_an_identity_is_salvaged_from_what_is_json_at_least(
    data: bytes, found: tuple[str, str] | None
) -> None:
    assert codec.salvage_identity(data) == found


# Job data


def test_job_data_is_rqs_payload_in_json() -> None:
    work = Work(ref="i0_1", id="a", model="m", endpoint=Endpoint.CHAT, body=msgspec.Raw(b'{"n":1}'))
    data = encode_job_data(work)
    function, instance, arguments, keywords = json.loads(data)
    assert (function, instance, keywords) == (ENTRY_POINT, None, {})
    assert arguments[0]["body"] == {"n": 1}
    decoded = decode_job_data(data)
    assert bytes(decoded.body) == b'{"n":1}'
    assert msgspec.structs.replace(decoded, body=work.body) == work


@given(data=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_foreign_job_data_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="job data: expected"):
        decode_job_data(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
        b"x\x9c\x8b\x8e\x05\x00\x01\x15\x00\xb9",
        b'["os.system",null,["true"],{}]',
        b'["os.system",null,[{"ref":"i0_1","id":"a","model":"m","endpoint":"/v1/completions"}],{}]',
        b"[" * DEEP,
        b'["' + ENTRY_POINT.encode() + b'",null,[],{}]',
        b'["' + ENTRY_POINT.encode() + b'","instance",[{}],{}]',
        b'["' + ENTRY_POINT.encode() + b'",null,[{"ref":1}],{}]',
    ],
    ids=["pickle", "zlib", "other call", "other function", "deep", "no work", "a method", "wrong type"],
)
def test_job_data_of_others_is_refused_and_never_run(data: bytes) -> None:
    with pytest.raises(ValueError, match="job data: expected"):
        decode_job_data(data)


def test_a_record_of_the_cancel_topic_is_a_cancel_or_a_sign_of_life() -> None:
    assert codec.decode_cancel(b'{"id": "a", "tenant": "lease"}') == CancelRequest(id="a", tenant="lease")
    assert codec.decode_cancel(b'{"id": "a", "lease": "x"}') == CancelRequest(id="a")
    assert codec.decode_cancel(b'{"lease": null, "id": "a"}') == CancelRequest(id="a")
    assert codec.decode_cancel(b'{"lease": "x", "ttl_ms": 0}') == LeaseRecord(lease="x", ttl_ms=0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"{", "CancelRequest: "),
        (b"{}", "CancelRequest: Object missing required field `id`"),
        (b'{"lease": "x"}', "LeaseRecord: Object missing required field `ttl_ms`"),
        (b'{"lease": 5, "ttl_ms": 0}', "LeaseRecord: Expected `str`, got `int` - at `$.lease`"),
        (b'{"lease": "x", "ttl_ms": 60001}', "LeaseRecord: Expected `int` <= 60000 - at `$.ttl_ms`"),
        (b'{"lease": "x", "ttl_ms": 0, "v": 99}', "LeaseRecord: version 99 is newer"),
    ],
)
def test_a_wrong_record_of_the_cancel_topic_is_refused_in_words(record: bytes, message: str) -> None:
    with pytest.raises(codec.MalformedRecord, match=re.escape(message)):
        codec.decode_cancel(record)
