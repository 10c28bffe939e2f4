"""The text hash: what tells that two bodies begin alike when nobody has tokenised them.

The prompt's JSON (`tools`, then `messages` or `prompt`, as they stand in the body) is hashed in chunks of
1,024 bytes, about a routing block's 256 tokens, chained like the routing-block hash. Engines report no such
hashes: they are matched against the dispatcher's own recent assignments only (`docs/protocol.md`).
"""

from __future__ import annotations

import struct
from hashlib import sha256

import msgspec

CHUNK_BYTES = 1_024
CHUNK_TOKENS = 256
"""What a chunk is taken for: four bytes a token."""
MOST_CHUNKS = 1_024
"""What lies beyond makes no difference to where a prompt is cached."""
HASH_BYTES = 8


class _Prompt(msgspec.Struct):
    tools: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")


_prompts = msgspec.json.Decoder(_Prompt)


def text_hashes(body: bytes, *, model: str, lora: str = "", cache_salt: str = "") -> tuple[str, ...]:
    """Hash each full chunk of a body's prompt; a body that can't be read has none.

    Returns:
        One string of 16 lowercase hex digits per full chunk, at most `MOST_CHUNKS`.
    """
    if len(body) < CHUNK_BYTES:
        return ()
    try:
        found = _prompts.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    text = bytes(found.tools) + (bytes(found.messages) or bytes(found.prompt))
    link = _seed(model, lora, cache_salt)
    hashes = []
    for start in range(0, min(len(text), MOST_CHUNKS * CHUNK_BYTES) - CHUNK_BYTES + 1, CHUNK_BYTES):
        link = sha256(link + text[start : start + CHUNK_BYTES]).digest()[:HASH_BYTES]
        hashes.append(link.hex())
    return tuple(hashes)


def _seed(model: str, lora: str, cache_salt: str) -> bytes:
    parts = b"flexlb-text-v1"
    for text in (model, lora, cache_salt):
        encoded = text.encode()
        parts += struct.pack("<I", len(encoded)) + encoded
    return sha256(parts).digest()[:HASH_BYTES]
