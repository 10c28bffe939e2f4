"""Trace to request: prompts whose equal blocks are equal tokens, and nothing else is.

Traces record lengths and block ids, not text. Each block id seeds its own tokens, so that prefix
sharing is as real for the router and the engines as it was when the trace was recorded. A prompt is
sent as token ids to `/v1/completions`, with the routing-block hashes that schedulers match by.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache
from hashlib import shake_128

import msgspec

from dispatcher.protocol.prefix_hash import BLOCK_TOKENS, block_hashes
from dispatcher.protocol.request import Endpoint, Tokens
from dispatcher.replay.traces import TraceRequest

FIRST_TOKEN = 1_000
"""Ids below are left alone: vocabularies keep their special tokens there."""
TOKEN_MASK = 0x3FFF
"""Ids end below 17,384, which every vocabulary of today has."""
MOST_HASHES = 65_536
"""As many block hashes as a request may carry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Synthesised:
    """What the client sends for one recorded request."""

    endpoint: Endpoint
    body: bytes
    tokens: Tokens
    max_tokens: int


class _Body(msgspec.Struct):
    model: str
    prompt: list[int]
    max_tokens: int
    ignore_eos: bool = True


def synthesise(
    request: TraceRequest, *, index: int, model: str, token_scale: float = 1.0, block_size: int = BLOCK_TOKENS
) -> Synthesised:
    """Make the request record's contents for one recorded request.

    Args:
        index: its number in the trace: seeds the tokens that no block id covers, so that they are
            shared with no other request.
        token_scale: shrinks (or stretches) prompts, outputs and trace blocks alike, for small machines.
    """
    prompt = prompt_tokens(request, index=index, token_scale=token_scale)
    hashes = block_hashes(prompt, model=model, block_size=block_size)[:MOST_HASHES]
    max_tokens = scaled(request.output_tokens, token_scale)
    body = _Body(model=model, prompt=prompt.tolist(), max_tokens=max_tokens)
    return Synthesised(
        endpoint=Endpoint.COMPLETIONS,
        body=msgspec.json.encode(body),
        tokens=Tokens(count=len(prompt), block_size=block_size, block_hashes=hashes),
        max_tokens=max_tokens,
    )


def prompt_tokens(request: TraceRequest, *, index: int, token_scale: float = 1.0) -> array[int]:
    """The prompt's token ids."""
    length = scaled(request.prompt_tokens, token_scale)
    tokens = array("I")
    if request.block_tokens:
        block_tokens = scaled(request.block_tokens, token_scale)
        for block_id in request.block_ids:
            if len(tokens) >= length:
                break
            tokens += _block(block_id, block_tokens)
    if len(tokens) < length:
        tokens += _generated(f"request {index}", length - len(tokens))
    return tokens[:length]


def scaled(tokens: int, token_scale: float) -> int:
    """A token count on another scale; at least 1."""
    return max(1, round(tokens * token_scale))


@lru_cache(maxsize=16_384)
def _block(block_id: int, tokens: int) -> array[int]:
    return _generated(f"block {block_id}", tokens)


def _generated(seed: str, tokens: int) -> array[int]:
    """Token ids that depend on the seed alone, on every machine."""
    data = shake_128(seed.encode()).digest(2 * tokens)
    low, high = data[0::2], data[1::2]
    return array("I", (FIRST_TOKEN + ((a | b << 8) & TOKEN_MASK) for a, b in zip(low, high, strict=True)))
