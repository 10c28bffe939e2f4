"""Which bodies may be answered in two runs, and what the second run is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dispatcher.protocol.request import Endpoint
from dispatcher.simulation.tokens import Answer, tokenise
from workers_agent.engines.continuation import MAX_BODY_BYTES, continuable
from workers_agent.engines.openai_http import streaming_body

TEXT = {"model": "m", "prompt": "Once upon", "max_tokens": 8}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}

SOUND: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "ignore_eos": True},
    {"n": 1, "best_of": 1, "stop": [], "seed": None, "presence_penalty": 0, "frequency_penalty": 0.0},
    {"repetition_penalty": 1.0, "logprobs": None, "stream": True, "stream_options": {"include_usage": True}},
    {"return_token_ids": True, "user": "u", "response_format": {"type": "text"}, "tools": []},
    {"stop_token_ids": [2], "logit_bias": {"5": -100}, "some_new_field": None},
]
UNSOUND: list[dict[str, Any]] = [
    {"n": 2},
    {"best_of": 3},
    {"stop": ["\n\n"]},
    {"stop": "END"},
    {"seed": 7},
    {"echo": True},
    {"logprobs": 0},
    {"logprobs": True},
    {"top_logprobs": 3},
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.1},
    {"repetition_penalty": 1.1},
    {"min_tokens": 4},
    {"suffix": "end"},
    {"use_beam_search": True},
    {"skip_special_tokens": False},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tool_choice": "auto"},
    {"response_format": {"type": "json_object"}},
    {"guided_json": {}},
    {"structured_outputs": {"regex": "a"}},
    {"some_new_field": 0},
    {"max_tokens": None},
    {"max_tokens": 0},
    {"max_tokens": "8"},
]


@pytest.mark.parametrize("base", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("fields", SOUND, ids=str)
def test_what_changes_no_token_may_go_on(base: dict[str, Any], fields: dict[str, Any]) -> None:
    assert continuable(_endpoint(base), json.dumps({**base, **fields}).encode()) is not None


@pytest.mark.parametrize("base", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("fields", UNSOUND, ids=str)
def test_what_looks_beyond_the_tokens_before_it_starts_over(
    base: dict[str, Any], fields: dict[str, Any]
) -> None:
    assert continuable(_endpoint(base), json.dumps({**base, **fields}).encode()) is None


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (Endpoint.COMPLETIONS, {"prompt": ["a", "b"]}),
        (Endpoint.COMPLETIONS, {"prompt": ["a"]}),
        (Endpoint.COMPLETIONS, {"prompt": [[1, 2]]}),
        (Endpoint.COMPLETIONS, {"prompt": []}),
        (Endpoint.COMPLETIONS, {"prompt": [-1]}),
        (Endpoint.COMPLETIONS, {"prompt": None}),
        (Endpoint.CHAT, {"messages": []}),
        (
            Endpoint.CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        ),
        (Endpoint.CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}),
    ],
)
def test_prompts_that_are_not_one_text_start_over(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    assert continuable(endpoint, json.dumps({"max_tokens": 8, **fields}).encode()) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt":"\xff","max_tokens":1}', b"[" * 100_000])
def test_bodies_that_are_none_start_over(body: bytes) -> None:
    assert continuable(Endpoint.COMPLETIONS, body) is None


def test_a_very_long_prompt_is_not_asked_about() -> None:
    body = json.dumps({**TEXT, "prompt": "x" * MAX_BODY_BYTES}).encode()
    assert continuable(Endpoint.COMPLETIONS, body) is None
    assert b"return_token_ids" not in streaming_body(Endpoint.COMPLETIONS, body, "m")[0]


def test_the_second_run_is_asked_for_the_rest() -> None:
    body = json.dumps({**CHAT, "max_completion_tokens": 5, "temperature": 0.5, "stream": True}).encode()
    plan = continuable(Endpoint.CHAT, body)
    assert plan is not None
    assert plan.prompt_ids is None
    assert json.loads(plan.body([1, 2], [7, 8, 9])) == {
        "model": "m",
        "temperature": 0.5,
        "prompt": [1, 2, 7, 8, 9],
        "max_tokens": 2,
    }


def test_a_prompt_of_token_ids_is_known() -> None:
    plan = continuable(Endpoint.COMPLETIONS, b'{"prompt":[4,5],"max_tokens":3}')
    assert plan is not None
    assert plan.prompt_ids == (4, 5)


@pytest.mark.parametrize(("fields", "asks"), [({}, True), ({"n": 2}, False), ({"seed": 1}, False)])
def test_token_ids_are_asked_for_where_they_may_be_of_use(fields: dict[str, Any], asks: bool) -> None:
    body, _ = streaming_body(Endpoint.COMPLETIONS, json.dumps({**TEXT, **fields}).encode(), "m")
    assert json.loads(body).get("return_token_ids", False) is asks


@pytest.mark.parametrize("cut", [0, 1, 7, 63, 199])
def test_a_simulated_answer_goes_on_as_if_it_had_not_been_cut(cut: int) -> None:
    prompt = tokenise("Once upon a time there was a long prompt" * 9)
    whole = Answer(prompt)
    ids = [whole.token_id(place) for place in range(200)]
    assert len(set(ids)) > 150
    rest = Answer([*prompt, *ids[:cut]])
    assert [rest.token_id(place) for place in range(200 - cut)] == ids[cut:]
    assert Answer(prompt, 1).text(20) != whole.text(20)
    assert Answer(tokenise("Another")).text(20) != whole.text(20)


def _endpoint(base: dict[str, Any]) -> Endpoint:
    return Endpoint.CHAT if "messages" in base else Endpoint.COMPLETIONS
