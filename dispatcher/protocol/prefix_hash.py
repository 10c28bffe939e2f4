"""The routing-block hash: what makes two prompts with an equal prefix comparable.

`h[-1] = SHA-256(seed)[:8]`, `h[i] = SHA-256(h[i-1] || tokens of block i as uint32 little-endian)[:8]`,
where the seed spells version, block size, model, LoRA and cache salt, each with its length, so that no
two of them can be confused. `docs/protocol.md` gives it byte by byte, with test vectors for any language.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from hashlib import sha256

BLOCK_TOKENS = 256
"""Default routing block; a pool's is the least common multiple of this and its engines' block."""
HASH_BYTES = 8


def seed(*, model: str, block_size: int = BLOCK_TOKENS, lora: str = "", cache_salt: str = "") -> bytes:
    """The chain's first link: 8 bytes that stand for everything that makes caches incomparable."""
    parts = b"flexlb-prefix-v1" + struct.pack("<I", block_size)
    for text in (model, lora, cache_salt):
        encoded = text.encode()
        parts += struct.pack("<I", len(encoded)) + encoded
    return sha256(parts).digest()[:HASH_BYTES]


def block_hashes(
    token_ids: Sequence[int],
    *,
    model: str,
    block_size: int = BLOCK_TOKENS,
    lora: str = "",
    cache_salt: str = "",
) -> tuple[str, ...]:
    """Hash each full block of `token_ids`; a partial last block has no hash.

    Args:
        token_ids: the prompt, each id in [0, 2**32).
        block_size: tokens in a block, at least 1.
    Returns:
        One string of 16 lowercase hex digits per full block.
    Raises:
        ValueError: block_size below 1.
        OverflowError: a token id that does not fit 32 bits.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1 token, seen {block_size}")
    full = len(token_ids) - len(token_ids) % block_size
    packed = _little_endian(token_ids[:full])
    link = seed(model=model, block_size=block_size, lora=lora, cache_salt=cache_salt)
    width = 4 * block_size
    hashes = []
    for start in range(0, len(packed), width):
        link = sha256(link + packed[start : start + width]).digest()[:HASH_BYTES]
        hashes.append(link.hex())
    return tuple(hashes)


def _little_endian(token_ids: Sequence[int]) -> bytes:
    values = array("I", token_ids)
    if values.itemsize != 4:  # pragma: no cover  (exotic platforms)
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    if sys.byteorder == "big":  # pragma: no cover
        values.byteswap()
    return values.tobytes()
