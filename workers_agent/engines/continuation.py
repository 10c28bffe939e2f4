"""Which OpenAI bodies may be answered in two runs, and the body of the second. Pure.

The second run gets the prompt and the tokens generated so far as one prompt of token ids. That is the same
answer only where each next token depends on the tokens before it and on nothing else: what looks at the
generated part apart from the prompt (penalties, structured output), at its text (stop strings), at its place
in a random sequence (seeds), or adds to the tokens (log probabilities, tool calls) rules it out. So does
every field that is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from dispatcher.protocol.request import Endpoint

MAX_BODY_BYTES = 4 << 20
"""Engines that return token ids return the prompt's too, in one event: longer prompts are not asked about."""

_CARRIED = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "ignore_eos",
        "stop_token_ids",
        "logit_bias",
        "user",
        "priority",
        "cache_salt",
        "request_id",
    }
)
"""Mean the same for each token, or for none."""
_DROPPED = frozenset(
    {
        "stream",
        "stream_options",
        "return_token_ids",
        "max_tokens",
        "max_completion_tokens",
        "metadata",
        "service_tier",
        "store",
    }
)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([], ""),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "suffix": ("",),
    "tools": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "response_format": ({"type": "text"},),
}
"""Change nothing with these values."""

TokenId = Annotated[int, Meta(ge=0, lt=1 << 32)]


class _TextPart(Struct, forbid_unknown_fields=True):
    type: str
    text: str


class _Message(Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[_TextPart]
    name: str | None = None


_fields = msgspec.json.Decoder(dict[str, Raw])
_prompt = msgspec.json.Decoder(str | Annotated[list[TokenId], Meta(min_length=1)])
_messages = msgspec.json.Decoder(Annotated[list[_Message], Meta(min_length=1)])
_positive = msgspec.json.Decoder(Annotated[int, Meta(ge=1)])


@dataclass(frozen=True, kw_only=True)
class Continuable:
    """A body that may be answered in two runs.

    Attributes:
        prompt_ids: the prompt, when the body gives it as token ids; otherwise the engine must tell.
    """

    max_tokens: int
    prompt_ids: tuple[int, ...] | None
    carried: dict[str, Raw]

    def body(self, prompt_ids: Sequence[int], generated: Sequence[int]) -> bytes:
        """The body for `/v1/completions` that asks for what follows `generated`."""
        return msgspec.json.encode(
            {
                **self.carried,
                "prompt": [*prompt_ids, *generated],
                "max_tokens": self.max_tokens - len(generated),
            }
        )


def continuable(endpoint: Endpoint, body: bytes) -> Continuable | None:
    """Read `body`; None when its answer may not be made in two runs, or nothing says where it ends."""
    if len(body) > MAX_BODY_BYTES:
        return None
    try:
        fields = {name: raw for name, raw in _fields.decode(body).items() if bytes(raw) != b"null"}
        if endpoint is Endpoint.CHAT:
            _messages.decode(fields.pop("messages"))
            limit = fields.get("max_completion_tokens") or fields["max_tokens"]
            prompt: str | list[int] = ""
        else:
            prompt = _prompt.decode(fields.pop("prompt"))
            limit = fields["max_tokens"]
        max_tokens = _positive.decode(limit)
        if not all(_is_harmless(name, raw) for name, raw in fields.items()):
            return None
    except (KeyError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return Continuable(
        max_tokens=max_tokens,
        prompt_ids=tuple(prompt) if isinstance(prompt, list) else None,
        carried={name: raw for name, raw in fields.items() if name in _CARRIED},
    )


def _is_harmless(name: str, raw: Raw) -> bool:
    if name in _CARRIED or name in _DROPPED:
        return True
    value = msgspec.json.decode(raw)
    # `logprobs: 0` asks for something, `false` does not, and Python holds the two for equal.
    return any(
        value == neutral and isinstance(value, bool) is isinstance(neutral, bool)
        for neutral in _NEUTRAL.get(name, ())
    )
