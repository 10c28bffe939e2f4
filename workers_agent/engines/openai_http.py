"""Any OpenAI-compatible engine over HTTP: vLLM, SGLang, llama.cpp, the simulator.

Every request is streamed, whatever its body says. A stream is believed by its finish reasons alone:
a killed vLLM still sends `[DONE]`, a hung one still answers `/health`. What is not understood fails
the attempt with a cause; nothing is guessed. Closing a stream closes its connection, which is how
these engines are told to abort.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncGenerator, Callable
from typing import NoReturn

import aiohttp
import msgspec
from msgspec import Raw, Struct

from dispatcher.errors import SettingsError
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.outcome import FailureCause, Usage
from dispatcher.protocol.request import Endpoint
from workers_agent.engines.engine import EngineFailure, Piece
from workers_agent.engines.sse import EventParser

ALIVE_TIMEOUT_S = 2.0
AFTER_FINISH_S = 5.0
"""How long the usage is waited for once each choice has finished."""
AFTER_DONE_S = 0.25
"""How long the end of the body is waited for after `[DONE]`, so that the connection can be kept."""
KEEP_ALIVE_S = 3.0
"""Below the 5 s after which uvicorn and llama.cpp close an idle connection: ours never meets a closed one."""
MAX_WHOLE_ANSWER_BYTES = 64 << 20
LARGE_BODY_BYTES = 1 << 20
SHOWN_CHARS = 500

_OVERLOADED = frozenset({408, 425, 429, 503})
_BROKEN_FINISHES = frozenset({"abort", "error"})
_EMPTY = frozenset({b"null", b'""', b"[]", b"{}"})
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Choice(Struct):
    index: int = 0
    delta: dict[str, Raw] | None = None
    message: dict[str, Raw] | None = None
    text: str | None = None
    logprobs: Raw = Raw(b"null")
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None


class _Event(Struct):
    """A chunk of a stream or a whole answer: they differ in `delta` and `message` only."""

    object: str | None = None
    choices: tuple[_Choice, ...] | None = None
    usage: _Usage | None = None
    error: Raw = Raw(b"null")


class _Model(Struct):
    id: str


class _Models(Struct):
    data: tuple[_Model, ...]


_event = msgspec.json.Decoder(_Event)
_models = msgspec.json.Decoder(_Models)
_body = msgspec.json.Decoder(dict[str, Raw])
_text = msgspec.json.Decoder(str | None)
_count = msgspec.json.Decoder(int | None)
_elements = msgspec.json.Decoder(list[Raw])
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def streaming_body(endpoint: Endpoint, body: bytes) -> tuple[bytes, int]:
    """Make `body` ask for a stream with usage; return it and how many choices will answer it.

    Values are not re-encoded.

    Raises:
        EngineFailure: REFUSED, the body can't be an OpenAI body.
    """
    try:
        fields = _body.decode(body)
    except _UNREADABLE as error:
        raise EngineFailure(
            FailureCause.REFUSED, f"body: expected a JSON object, seen {len(body)} other bytes ({error})"
        ) from None
    try:
        n = _count.decode(fields.get("n", Raw(b"null")))
        prompts = _prompts(fields.get("prompt")) if endpoint is Endpoint.COMPLETIONS else 1
    except _UNREADABLE as error:
        raise EngineFailure(FailureCause.REFUSED, f"body: n or prompt: {error}") from None
    if n is not None and n < 1:
        raise EngineFailure(FailureCause.REFUSED, f"body: n: expected 1 or more, seen {n}")
    fields["stream"] = Raw(b"true")
    fields["stream_options"] = Raw(b'{"include_usage":true}')
    return msgspec.json.encode(fields), (n or 1) * prompts


def _prompts(prompt: Raw | None) -> int:
    """Count prompts: a list of texts or of lists is several, a list of token ids is one."""
    start = bytes(memoryview(prompt)[:64]).split() if prompt is not None else []
    opening = b"".join(start)[:2]
    if opening in {b'["', b"[["}:
        return len(_elements.decode(prompt or b"[]"))
    return 1


class _Answer:
    """What has come of one answer, and whether it is whole."""

    def __init__(self, choices: int) -> None:
        self._choices = choices
        self._open = set(range(choices))
        self.tokens = 0
        self.usage: Usage | None = None
        self.is_done = False

    @property
    def is_finished(self) -> bool:
        """Whether each choice has its finish reason."""
        return not self._open

    def take(self, payload: bytes) -> Piece | None:
        """Read one event; None when it adds nothing.

        Raises:
            EngineFailure: PROTOCOL, or ENGINE_ERROR when the engine reports one.
        """
        if self.is_done:
            return None
        if payload.strip() == b"[DONE]":
            self.is_done = True
            return None
        try:
            # As text first: a Raw is not checked for valid UTF-8 by its decoder.
            event = _event.decode(payload.decode())
            return self._piece(event)
        except _UNREADABLE as error:
            raise EngineFailure(
                FailureCause.PROTOCOL,
                f"answer: expected OpenAI JSON, seen {_shown(payload)!r} ({error}) after {self.tokens} tokens",
            ) from None

    def take_whole(self, body: bytes) -> Piece:
        """Read an answer that was not streamed.

        Raises:
            EngineFailure: as `take`; PROTOCOL also when it holds no choices.
        """
        piece = self.take(body)
        if piece is None:
            raise EngineFailure(
                FailureCause.PROTOCOL, f"answer: expected choices, seen JSON without any: {_shown(body)!r}"
            )
        if self.usage is not None and self.usage.completion_tokens:
            self.tokens = self.usage.completion_tokens
            piece = msgspec.structs.replace(piece) if False else piece
        return piece

    def _piece(self, event: _Event) -> Piece | None:
        if event.object == "error" or bytes(event.error) != b"null":
            # Always the engine's fault, whatever its code: vLLM reports its own death as 400 or 500.
            raise EngineFailure(
                FailureCause.ENGINE_ERROR,
                f"engine reported an error after {self.tokens} tokens: {_shown(bytes(event.error))}",
            )
        return None


def _shown(data: bytes) -> str:
    return data[: 4 * SHOWN_CHARS].decode("utf-8", "replace")[:SHOWN_CHARS]
