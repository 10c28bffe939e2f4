"""OpenAI's JSON: what bodies ask for, and what chunks and outcomes become."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from dispatcher.frontend.openai import AnswerStream, Ask, merge_deltas, read_ask, whole_answer
from dispatcher.frontend.problem import Problem, Refused, problem_of
from dispatcher.frontend.prompt_tokens import tokens_of
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.outcome import Choice, Outcome, OutcomeKind, Reason, Usage
from dispatcher.protocol.prefix_hash import block_hashes
from dispatcher.protocol.request import Endpoint, Tokens

CHAT = Ask(endpoint=Endpoint.CHAT, body=b"{}")
TEXT = Ask(endpoint=Endpoint.COMPLETIONS, body=b"{}")
REASON = Raw(b'{"reasoning_content":"so"}')


def raw(value: object) -> Raw:
    return Raw(json.dumps(value).encode())


def outcome(*choices: Choice, **fields: Any) -> Outcome:
    kind, reason = fields.pop("kind", OutcomeKind.COMPLETED), fields.pop("reason", Reason.FINISHED)
    return Outcome(id="r", ref="i0_1", kind=kind, reason=reason, choices=choices, **fields)


def whole(ask: Ask, *choices: Choice) -> Any:
    return json.loads(whole_answer(ask, outcome(*choices), id="r", model="m", created_s=5))


def stream(ask: Ask) -> AnswerStream:
    return AnswerStream(ask, id="r", model="m", created_s=5)


def events(data: bytes) -> list[Any]:
    parts = data.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    payloads = [part.removeprefix("data: ") for part in parts]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_a_body_is_read_for_what_serving_it_needs_and_kept_as_it_is(endpoint: Endpoint) -> None:
    body = (
        b' {"model":"m","stream":true,"stream_options":{"include_usage":true,"odd":1},'
        b'"prompt":[1,2],"cache_salt":"blue","n":"odd"}'
    )
    assert read_ask(endpoint, body) == Ask(
        endpoint=endpoint,
        body=body,
        model="m",
        is_streamed=True,
        wants_usage=True,
        cache_salt="blue",
        prompt=b"[1,2]" if endpoint is Endpoint.COMPLETIONS else b"",
    )


def test_null_and_missing_fields_are_the_same() -> None:
    body = b'{"model":null,"stream":null,"stream_options":null,"cache_salt":null}'
    assert read_ask(Endpoint.CHAT, body) == Ask(endpoint=Endpoint.CHAT, body=body)


def test_a_cache_salt_that_no_record_can_carry_is_left_to_the_engine() -> None:
    for salt in (b"7", b'"' + b"x" * 257 + b'"'):
        assert read_ask(Endpoint.CHAT, b'{"cache_salt":' + salt + b"}").cache_salt is None


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_with_400(body: bytes) -> None:
    refusal = None
    try:
        read_ask(Endpoint.CHAT, b"{" + body)
    except Refused as raised:
        refusal = raised
    assert refusal is None or refusal.problem.status == 400


def test_a_body_nested_too_deeply_is_refused() -> None:
    with pytest.raises(Refused):
        read_ask(Endpoint.CHAT, b'{"messages":' + b"[" * 100_000)


def test_token_ids_are_counted_and_hashed_as_they_are_cached() -> None:
    ids = list(range(40))
    body = json.dumps({"prompt": ids, "cache_salt": "blue"}).encode()
    hashes = block_hashes(ids, model="m", block_size=16, cache_salt="blue")
    assert len(hashes) == 2
    assert tokens_of(read_ask(Endpoint.COMPLETIONS, body), "m", 16, salt="blue") == Tokens(
        count=40, block_size=16, block_hashes=hashes
    )


@pytest.mark.parametrize("prompt", ["text", ["a"], [[1, 2]], [], [1, "a"], [1 << 32], [-1], [1.5], None])
def test_of_any_other_prompt_no_tokens_are_claimed(prompt: object) -> None:
    body = json.dumps({"prompt": prompt}).encode()
    assert tokens_of(read_ask(Endpoint.COMPLETIONS, body), "m", 16, salt="") is None
    assert tokens_of(read_ask(Endpoint.CHAT, body), "m", 16, salt="") is None


def test_one_delta_is_passed_on_as_it_is() -> None:
    assert merge_deltas([raw({"tool_calls": [{"index": 0, "id": "c", "odd": 1}]})]) == {
        "tool_calls": raw([{"index": 0, "id": "c", "odd": 1}])
    }


@pytest.mark.parametrize("odd", [b"[]", b"null", b"1", b'"x"', b" [ 1 ] "])
def test_a_delta_that_is_no_object_costs_the_answer_nothing_else(odd: bytes) -> None:
    assert merge_deltas([Raw(odd)]) == {}
    assert merge_deltas([Raw(odd), raw({"role": "a"}), Raw(odd)]) == {"role": Raw(b'"a"')}
    ask = Ask(endpoint=Endpoint.CHAT, body=b"{}")
    stream = AnswerStream(ask, id="r", model="m", created_s=1)
    assert b'"content":"hi"' in stream.added([ChoiceDelta(text="hi", deltas=(Raw(odd),))])


def test_deltas_join_by_index_and_their_text_grows() -> None:
    call = {"index": 0, "id": "a", "type": "function"}
    deltas = [
        {"reasoning_content": "be"},
        {"reasoning_content": "cause"},
        {"tool_calls": [{**call, "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{**call, "index": 1, "id": "b", "function": {"name": "g"}}]},
        {"tool_calls": [{**call, "function": {"name": "f", "arguments": "{"}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "[]"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
        {"logprobs": {"content": [{"token": "x"}]}},
        {"logprobs": {"content": [{"token": "y"}], "refusal": None}, "odd": 1},
        {"odd": 2},
    ]
    assert merge_deltas([raw(delta) for delta in deltas]) == {
        "reasoning_content": "because",
        "tool_calls": [
            {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "[]"}},
        ],
        "logprobs": {"content": [{"token": "x"}, {"token": "y"}], "refusal": None},
        "odd": 2,
    }


def test_a_whole_chat_has_its_tool_calls_without_indices() -> None:
    calls = [raw({"tool_calls": [{"index": 0, "id": "c"}]}), raw({"tool_calls": [{"index": 1, "id": "d"}]})]
    answer = whole(CHAT, Choice(deltas=tuple(calls), finish_reason="tool_calls"))
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c"}, {"id": "d"}],
    }
    assert choice["finish_reason"] == "tool_calls"


def test_the_only_part_of_a_tool_call_loses_its_index_too() -> None:
    answer = whole(CHAT, Choice(deltas=(raw({"tool_calls": [{"index": 0, "id": "c"}]}),)))
    assert answer["choices"][0]["message"]["tool_calls"] == [{"id": "c"}]


def test_a_whole_answer_counts_and_orders() -> None:
    usage = Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=8)
    logprobs = raw({"logprobs": {"tokens": ["a"]}})
    done = outcome(
        Choice(index=1, text="b", finish_reason="length"),
        Choice(index=0, text="a", deltas=(logprobs,)),
        usage=usage,
    )
    assert json.loads(whole_answer(TEXT, done, id="r", model="m", created_s=5)) == {
        "id": "cmpl-r",
        "object": "text_completion",
        "created": 5,
        "model": "m",
        "choices": [
            {"index": 0, "text": "a", "logprobs": {"tokens": ["a"]}, "finish_reason": None},
            {"index": 1, "text": "b", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 2,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
    }


def test_an_empty_chat_has_empty_content() -> None:
    assert whole(CHAT, Choice())["choices"][0]["message"] == {"role": "assistant", "content": ""}


def test_a_chat_stream_says_the_role_once_a_choice() -> None:
    writer = stream(CHAT)
    first = events(writer.added((ChoiceDelta(index=0, text="a"), ChoiceDelta(index=1, text="b"))))
    assert [(one["choices"][0]["index"], one["choices"][0]["delta"]) for one in first] == [
        (0, {"role": "assistant", "content": ""}),
        (0, {"content": "a"}),
        (1, {"role": "assistant", "content": ""}),
        (1, {"content": "b"}),
    ]
    assert all("usage" not in one and one["object"] == "chat.completion.chunk" for one in first)
    assert events(writer.added((ChoiceDelta(index=0, text="c"),)))[0]["choices"] == [
        {"index": 0, "delta": {"content": "c"}, "logprobs": None, "finish_reason": None}
    ]


def test_a_stream_passes_on_deltas_with_their_text_and_logprobs() -> None:
    delta = ChoiceDelta(text="a", deltas=(REASON, raw({"logprobs": {"content": []}})))
    _, gained = events(stream(CHAT).added((delta,)))
    assert gained["choices"][0]["delta"] == {"content": "a", "reasoning_content": "so"}
    assert gained["choices"][0]["logprobs"] == {"content": []}


def test_a_stream_ends_with_one_finish_a_choice_and_usage_when_asked() -> None:
    done = outcome(Choice(index=1, finish_reason="length"), Choice(index=0, finish_reason="stop"))
    asked = Ask(endpoint=Endpoint.CHAT, body=b"{}", is_streamed=True, wants_usage=True)
    *finishes, usage, last = events(stream(asked).ended(done))
    assert last == "[DONE]"
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 0)
    assert all(one["usage"] is None for one in finishes)
    assert [
        (one["choices"][0]["index"], one["choices"][0]["finish_reason"])
        for one in finishes
        if not one["choices"][0]["delta"]
    ] == [(0, "stop"), (1, "length")]
    *finishes, last = events(stream(TEXT).ended(done))
    assert [one["choices"][0]["text"] for one in finishes] == ["", ""]


def test_a_stream_that_breaks_off_says_so_and_is_done() -> None:
    error, last = events(stream(CHAT).failed(Problem(status=502, message="why", code="c")))
    assert error == {"error": {"message": "why", "type": "server_error", "param": None, "code": "c"}}
    assert last == "[DONE]"


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("kind", list(OutcomeKind))
def test_every_ending_without_an_answer_is_a_problem_that_is_not_asked_for_again(
    kind: OutcomeKind, reason: Reason
) -> None:
    problem = problem_of(outcome(kind=kind, reason=reason))
    assert problem is not None
    assert 400 <= problem.status < 600
    if (kind, reason) == (OutcomeKind.CANCELLED, Reason.CLIENT_GONE):
        assert (problem.status, problem.headers["Retry-After"]) == (503, "1")
    else:
        assert problem.headers["x-should-retry"] == "false"
    assert problem.message


@pytest.mark.parametrize(
    ("reason", "status", "type"),
    [
        (Reason.OVERLOADED, 429, "rate_limit_error"),
        (Reason.DEADLINE_UNREACHABLE, 429, "rate_limit_error"),
        (Reason.NO_CAPACITY, 503, "server_error"),
    ],
)
def test_what_is_shed_says_when_to_ask_again(reason: Reason, status: int, type: str) -> None:
    problem = problem_of(outcome(kind=OutcomeKind.REJECTED, reason=reason, retry_after_ms=12_001))
    assert problem is not None
    assert (problem.status, problem.type, problem.code) == (status, type, reason)
    assert problem.headers == {"Retry-After": "13", "retry-after-ms": "12001"}


def test_an_answer_is_no_problem_but_one_too_large_to_repeat_is() -> None:
    assert problem_of(outcome(Choice(text="a"))) is None
    problem = problem_of(outcome(message="above 8 MiB"))
    assert problem is not None
    assert (problem.status, problem.code, problem.message) == (502, "answer_too_large", "above 8 MiB")


@pytest.mark.parametrize(
    ("told", "status"), [(400, 400), (429, 429), (499, 499), (500, 502), (0, 502), (399, 502)]
)
def test_an_engines_refusal_keeps_its_status_if_it_blames_the_client(told: int, status: int) -> None:
    refusal = outcome(kind=OutcomeKind.FAILED, reason=Reason.ENGINE_REFUSED, http_status=told)
    problem = problem_of(refusal)
    assert problem is not None
    assert problem.status == status
