"""OpenAI's JSON: bodies into what a request record needs, chunks and outcomes into answers. Pure.

A body is read for the few fields that serving it needs and passed on byte for byte: what else it says is
the engine's to judge. Raw deltas of engines (tool calls, reasoning, logprobs) are passed on as they are,
and merged only where several have to become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw, Struct

from dispatcher.frontend.problem import Problem, refused
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.outcome import Choice, Outcome, Usage
from dispatcher.protocol.request import Endpoint

DONE = b"data: [DONE]\n\n"
MAX_NAME_CHARS = 256
_WHOLE_ONCE = frozenset({"id", "type", "name", "role", "index"})
"""Text fields that an engine gives whole: a second copy of one is no continuation."""


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _BodyHead(Struct):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    prompt: Raw = Raw()
    cache_salt: Any = None


_body_head = msgspec.json.Decoder(_BodyHead)
_fields = msgspec.json.Decoder(dict[str, Raw])
_any_fields = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a body asks for. `model` is '' when it names none; `prompt` is a completion's, as JSON."""

    endpoint: Endpoint
    body: bytes
    model: str = ""
    is_streamed: bool = False
    wants_usage: bool = False
    cache_salt: str | None = None
    prompt: bytes = b""

    @property
    def is_chat(self) -> bool:
        """Whether it is answered with messages."""
        return self.endpoint is Endpoint.CHAT


def read_ask(endpoint: Endpoint, body: bytes) -> Ask:
    """Read a body.

    Raises:
        Refused: 400, it is no JSON object, or a field that this process needs has a wrong type.
    """
    if body.lstrip()[:1] != b"{":
        raise refused(400, f"body: expected a JSON object, seen {len(body)} other bytes")
    try:
        # A Raw and what is skipped are not checked for valid UTF-8 by the decoder.
        head = _body_head.decode(body.decode())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refused(400, f"body: {str(error)[:400]}; send the endpoint's own OpenAI body") from None
    model = head.model or ""
    if len(model) > MAX_NAME_CHARS:
        raise refused(
            400, f"model: expected at most {MAX_NAME_CHARS} characters, seen {len(model)}", param="model"
        )
    salt = head.cache_salt
    options = head.stream_options
    return Ask(
        endpoint=endpoint,
        body=body,
        model=model,
        is_streamed=bool(head.stream),
        wants_usage=options is not None and bool(options.include_usage),
        cache_salt=salt if isinstance(salt, str) and len(salt) <= MAX_NAME_CHARS else None,
        prompt=bytes(head.prompt) if endpoint is Endpoint.COMPLETIONS else b"",
    )


def answer_id(ask: Ask, id: str) -> str:
    """The id that an answer and all its chunks carry."""
    return f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{id}"


def usage_of(usage: Usage) -> dict[str, object]:
    """Token counts as OpenAI writes them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def models_of(names: Sequence[str], created_s: int) -> bytes:
    """The list of models."""
    return msgspec.json.encode({"object": "list", "data": [_model(name, created_s) for name in names]})


def model_of(name: str, created_s: int) -> bytes:
    """One model."""
    return msgspec.json.encode(_model(name, created_s))


def _model(name: str, created_s: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created_s, "owned_by": "flexlb"}


def whole_answer(ask: Ask, outcome: Outcome, *, id: str, model: str, created_s: int) -> bytes:
    """A completed outcome as the one answer of a request that did not ask for a stream."""
    choices = sorted(outcome.choices, key=lambda choice: choice.index)
    return msgspec.json.encode(
        {
            "id": answer_id(ask, id),
            "object": "chat.completion" if ask.is_chat else "text_completion",
            "created": created_s,
            "model": model,
            "choices": [_chat_choice(one) if ask.is_chat else _text_choice(one) for one in choices],
            "usage": usage_of(outcome.usage),
        }
    )


def _chat_choice(choice: Choice) -> dict[str, object]:
    rest = merge_deltas(choice.deltas)
    logprobs = rest.pop("logprobs", None)
    calls = rest.get("tool_calls")
    calls = msgspec.json.decode(calls) if isinstance(calls, Raw) else calls
    if isinstance(calls, list):
        # `index` joins the parts of a call in a stream; a whole call has none.
        rest["tool_calls"] = [_without_index(call) for call in calls]
    content = choice.text if choice.text or not rest else None
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": content, **rest},
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason or None,
    }


def _without_index(call: Any) -> Any:
    return (
        {name: value for name, value in call.items() if name != "index"} if isinstance(call, dict) else call
    )


def _text_choice(choice: Choice) -> dict[str, object]:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": None,
        "finish_reason": choice.finish_reason or None,
        **merge_deltas(choice.deltas),
    }


def merge_deltas(deltas: Sequence[Raw]) -> dict[str, Any]:
    """Several raw deltas as one: text grows, lists grow, their elements with an `index` join by it.

    A delta that is alone stays as it was written. One that is no object, as no agent of ours writes, is left
    out: the text beside it is still an answer.
    """
    deltas = [delta for delta in deltas if bytes(delta).lstrip()[:1] == b"{"]
    if not deltas:
        return {}
    if len(deltas) == 1:
        return dict(_fields.decode(deltas[0]))
    merged: dict[str, Any] = {}
    for delta in deltas:
        _merge_fields(merged, _any_fields.decode(delta))
    return merged


def _merge_fields(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        known = into.get(name)
        if known is None:
            into[name] = value
        elif isinstance(known, str) and isinstance(value, str):
            into[name] = known if name in _WHOLE_ONCE else known + value
        elif isinstance(known, dict) and isinstance(value, dict):
            _merge_fields(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            for one in value:
                _merge_element(known, one)
        elif value is not None:
            into[name] = value


def _merge_element(into: list[Any], one: Any) -> None:
    if isinstance(one, dict) and "index" in one:
        for known in into:
            if isinstance(known, dict) and known.get("index") == one["index"]:
                _merge_fields(known, one)
                return
    into.append(one)


class AnswerStream:
    """Writes one streamed answer as server-sent events: the caller sends what each call returns."""

    def __init__(self, ask: Ask, *, id: str, model: str, created_s: int) -> None:
        self._ask = ask
        self._begun: set[int] = set()
        head = {
            "id": answer_id(ask, id),
            "object": "chat.completion.chunk" if ask.is_chat else "text_completion",
            "created": created_s,
            "model": model,
        }
        # Every event begins alike: `{...,"choices":[` is encoded once.
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":'
        self._tail = b',"usage":null}\n\n' if ask.wants_usage else b"}\n\n"

    def added(self, choices: Sequence[ChoiceDelta]) -> bytes:
        """What choices gained."""
        events = []
        for one in choices:
            events += self._begin(one.index)
            rest = merge_deltas(one.deltas) if one.deltas else {}
            events.append(self._gain(one.index, one.text, rest))
        return b"".join(events)

    def ended(self, outcome: Outcome) -> bytes:
        """The end of a completed answer: finish reasons, usage when it was asked for, `[DONE]`."""
        events = []
        for choice in sorted(outcome.choices, key=lambda choice: choice.index):
            events += self._begin(choice.index)
            events.append(self._finish(choice))
        if self._ask.wants_usage:
            usage = msgspec.json.encode(usage_of(outcome.usage))
            events.append(self._head + b'[],"usage":' + usage + b"}\n\n")
        return b"".join([*events, DONE])

    def failed(self, problem: Problem) -> bytes:
        """The end of an answer that broke off after it had begun."""
        return b"data: " + problem.body + b"\n\n" + DONE

    def _begin(self, index: int) -> list[bytes]:
        if index in self._begun:
            return []
        self._begun.add(index)
        if not self._ask.is_chat:
            return []
        return [self._event(index, {"delta": {"role": "assistant", "content": ""}})]

    def _gain(self, index: int, text: str, rest: dict[str, Any]) -> bytes:
        logprobs = rest.pop("logprobs", None)
        if not self._ask.is_chat:
            return self._event(index, {"text": text, "logprobs": logprobs, **rest})
        delta = {"content": text, **rest} if text else rest
        return self._event(index, {"delta": delta, "logprobs": logprobs})

    def _finish(self, choice: Choice) -> bytes:
        said: dict[str, Any] = {"delta": {}} if self._ask.is_chat else {"text": ""}
        return self._event(choice.index, {**said, "logprobs": None}, choice.finish_reason or None)

    def _event(self, index: int, said: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = msgspec.json.encode([{"index": index, **said, "finish_reason": finish_reason}])
        return self._head + choice + self._tail
