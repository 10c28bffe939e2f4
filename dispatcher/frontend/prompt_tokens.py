"""What a body tells of its prompt's tokens, so that the leader can find the node that has them cached. Pure.

The one seam for it: whoever renders chat templates and tokenises text does so here. Until then a prompt
of token ids is exact, and of any other the leader estimates the length.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta

from dispatcher.frontend.openai import Ask
from dispatcher.protocol.prefix_hash import block_hashes
from dispatcher.protocol.request import Tokens

MAX_BLOCKS = 16_384
"""Blocks hashed: what lies beyond them makes no difference to where a prompt is cached."""

_NUMBERS = re.compile(rb"\s*\[\s*[0-9]")
_token_ids = msgspec.json.Decoder(list[Annotated[int, Meta(ge=0, lt=1 << 32)]])


def tokens_of(ask: Ask, model: str, block_size: int, *, salt: str) -> Tokens | None:
    """Count and hash the prompt's tokens; None when the body does not give them."""
    if not _NUMBERS.match(ask.prompt):
        return None
    try:
        ids = _token_ids.decode(ask.prompt)
    except msgspec.DecodeError:
        return None
    hashes = block_hashes(ids[: MAX_BLOCKS * block_size], model=model, block_size=block_size, cache_salt=salt)
    return Tokens(count=len(ids), block_size=block_size, block_hashes=hashes)
