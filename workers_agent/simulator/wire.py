"""What is said over HTTP: OpenAI bodies in, chunks, answers and errors out, as vLLM writes them. No state."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from dispatcher.simulation.tokens import tokenise, word

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
MAX_BODY_BYTES = 64 << 20
DEFAULT_MAX_TOKENS = 16

PositiveInt = Annotated[int, Meta(ge=1)]


class _Part(Struct):
    type: str = "text"
    text: str = ""


class Message(Struct):
    """One message of a chat; parts that are not text are ignored."""

    role: str
    content: str | list[_Part] | None = None


class _StreamOptions(Struct):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class KVTransfer(Struct):
    """What a request says of blocks; fields that are none of a simulator's are ignored."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    remote_engine_id: str | None = None
    remote_request_id: str | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    remote_num_tokens: int = 0


class _Body(Struct, kw_only=True):
    model: str
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = 1
    return_token_ids: bool | None = False
    cache_salt: str | None = None
    kv_transfer_params: KVTransfer | None = None


class _Completions(_Body, kw_only=True):
    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]


class _Chat(_Body, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None


class _Tokenise(Struct, kw_only=True):
    prompt: str | None = None
    messages: list[Message] | None = None


class _Detokenise(Struct, kw_only=True):
    tokens: list[int]


class Refusal(Exception):
    """Answered with an OpenAI error object."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a body asks for, after its check."""

    is_chat: bool
    id: str
    created: int
    model: str
    prompts: tuple[array[int], ...]
    n: int
    max_tokens: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    salt: str
    kv_transfer: KVTransfer

    @property
    def sequences(self) -> int:
        """How many choices will answer it."""
        return len(self.prompts) * self.n

    @property
    def tokens(self) -> int:
        """How many tokens they will have together."""
        return self.sequences * self.max_tokens

    @cached_property
    def _head(self) -> bytes:
        kind = "chat.completion" + ".chunk" * self.stream if self.is_chat else "text_completion"
        head = {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }
        return msgspec.json.encode(head)[:-1] + b',"choices":['

    def frame(
        self,
        choices: Iterable[bytes],
        usage: dict[str, object] | None,
        *,
        is_first: bool = False,
        kv_transfer: dict[str, Any] | None = None,
    ) -> bytes:
        """Write a chunk of a stream, or the whole answer when not streaming."""
        frame = self._head + b",".join(choices) + b"]"
        if is_first and self.is_chat and self.return_token_ids:
            frame += b',"prompt_token_ids":' + msgspec.json.encode(self.prompts[0].tolist())
        if usage is not None:
            frame += b',"usage":' + msgspec.json.encode(usage)
        if kv_transfer is not None:
            frame += b',"kv_transfer_params":' + msgspec.json.encode(kv_transfer)
        return frame + b"}"

    def choice(self, index: int, ids: list[int], *, is_first: bool, is_last: bool) -> bytes:
        """Write one choice of a chunk, or of the whole answer when not streaming."""
        text = "".join(map(word, ids))
        choice: dict[str, object] = {"index": index, "finish_reason": "length" if is_last else None}
        if not self.is_chat:
            choice["text"] = text
        else:
            role = {"role": "assistant"} if is_first else {}
            choice["delta" if self.stream else "message"] = {**role, "content": text}
        if self.return_token_ids:
            choice["token_ids"] = ids
            if is_first and not self.is_chat:
                choice["prompt_token_ids"] = self.prompts[index // self.n].tolist()
        return msgspec.json.encode(choice)


def render_chat(messages: list[Message]) -> str:
    """Make the prompt of a chat."""
    rendered = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        rendered.append(f"{message.role}: {text}\n")
    return "".join(rendered)


DONE = b"data: [DONE]\n\n"
_chat = msgspec.json.Decoder(_Chat)
_completions = msgspec.json.Decoder(_Completions)
_tokenise = msgspec.json.Decoder(_Tokenise)
_detokenise = msgspec.json.Decoder(_Detokenise)


def event_of(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"


def error_of(refusal: Refusal) -> dict[str, object]:
    """An OpenAI error object."""
    fields = {"message": str(refusal), "type": refusal.kind, "param": None, "code": refusal.status}
    return {"error": fields}


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, object]:
    """Token counts as vLLM reports them with `--enable-prompt-tokens-details`."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def read_ask(body: bytes, *, is_chat: bool, id: str) -> Ask:
    """Read a body.

    Raises:
        Refusal: 400, it is none.
    """
    read: _Chat | _Completions
    try:
        read = (_chat if is_chat else _completions).decode(body)
        if isinstance(read, _Chat):
            prompts: tuple[array[int], ...] = (tokenise(render_chat(read.messages)),)
        else:
            prompts = _prompts_of(read.prompt)
    except (ValueError, OverflowError, RecursionError) as error:
        raise Refusal(400, "BadRequestError", f"body: {error}") from None
    longest = read.max_completion_tokens if isinstance(read, _Chat) else None
    options = read.stream_options or _StreamOptions()
    return Ask(
        is_chat=is_chat,
        id=id,
        created=int(time.time()),
        model=read.model,
        prompts=prompts,
        n=read.n or 1,
        max_tokens=longest or read.max_tokens or DEFAULT_MAX_TOKENS,
        stream=bool(read.stream),
        include_usage=options.include_usage,
        continuous_usage=options.continuous_usage_stats,
        return_token_ids=bool(read.return_token_ids),
        salt=read.cache_salt or "",
        kv_transfer=read.kv_transfer_params or KVTransfer(),
    )


def read_tokenise(body: bytes) -> array[int]:
    """The tokens that a body of `/tokenize` asks for: of a text, or of a chat's prompt.

    Raises:
        Refusal: 400, it asks for neither.
    """
    try:
        read = _tokenise.decode(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "BadRequestError", f"body: {error}") from None
    if read.messages:
        return tokenise(render_chat(read.messages))
    if read.prompt is None:
        raise Refusal(400, "BadRequestError", 'body: expected a "prompt" or "messages", seen neither')
    return tokenise(read.prompt)


def read_detokenise(body: bytes) -> str:
    """The text that a body of `/detokenize` asks for.

    Raises:
        Refusal: 400, it has no tokens.
    """
    try:
        return "".join(map(word, _detokenise.decode(body).tokens))
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "BadRequestError", f"body: {error}") from None


def _prompts_of(prompt: str | list[str | int | list[int]]) -> tuple[array[int], ...]:
    """Tell several prompts from one: a list of ids is one.

    Raises:
        ValueError: the list mixes them, or is empty.
        OverflowError: an id that is no token's.
    """
    if isinstance(prompt, str):
        return (tokenise(prompt),)
    kinds = {type(part) for part in prompt}
    if kinds == {int}:
        return (array("I", prompt),)  # type: ignore[arg-type]
    if int in kinds:
        raise ValueError("prompt: expected a list of texts, of token ids, or of lists of them; seen a mix")
    found = tuple(
        tokenise(part) if isinstance(part, str) else array("I", part)  # type: ignore[arg-type]
        for part in prompt
    )
    if not all(found):
        raise ValueError("prompt: expected 1 or more tokens, seen an empty list")
    return found
