"""Keeping the caches of tenants apart: what salts a request's blocks.

A hit in a shared prefix cache is faster than a miss, and so tells one tenant what another has asked. With
isolation on, a pool salts each tenant's blocks by its name, in front of the request's own salt.
"""

from __future__ import annotations

from hashlib import sha256

HASH_BYTES = 8


def effective_salt(tenant: str, cache_salt: str, *, isolate: bool) -> str:
    """The salt that routing and engine use; '' is none. Lengths tell where a name ends: no two mix."""
    return f"{len(tenant)}:{tenant}:{cache_salt}" if isolate else cache_salt


def salted_hashes(hashes: tuple[str, ...], salt: str) -> tuple[str, ...]:
    """Text hashes that a client made without knowing of the salt, made again with it."""
    prefix = salt.encode() + b"\0"
    return tuple(sha256(prefix + text.encode()).digest()[:HASH_BYTES].hex() for text in hashes)
