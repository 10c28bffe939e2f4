"""The requests of the benches that run a whole pool, and what each node is said to hold of them.

A conversation has a home, whose cache holds all of its blocks but the newest; its first block is a system
prompt that it shares with others. All is a function of numbers, so that whoever checks a result needs nothing
from whoever made it.
"""

from __future__ import annotations

import functools
import json
from hashlib import blake2b

MODEL = "m"
BLOCK_TOKENS = 256
TAIL_TOKENS = 50
"""Of a prompt, behind its last whole block."""
HELD_BLOCKS = 7
"""Of a conversation at its home, the system prompt's included."""
BLOCKS = HELD_BLOCKS + 1
PROMPT_TOKENS = BLOCKS * BLOCK_TOKENS + TAIL_TOKENS
ENGINE_BLOCK = 16
MAX_TOKENS = 64
SYSTEMS = 16
PER_NODE = 4
"""Conversations with one home."""
RECORD_BYTES = 1200
STRIDE = 7919
"""Prime: requests go through the conversations in an order of their own."""


def node_name(number: int) -> str:
    """A node."""
    return f"n{number}"


@functools.lru_cache(maxsize=100_000)
def _hash(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=20_000)
def held_blocks(conversation: int) -> tuple[str, ...]:
    """What the home of a conversation holds of it, in hex digits."""
    own = (_hash(f"c{conversation}/{block}") for block in range(1, HELD_BLOCKS))
    return (_hash(f"s{conversation % SYSTEMS}"), *own)


def view(node: int, nodes: int) -> list[tuple[str, ...]]:
    """The conversations that a node is the home of."""
    return [held_blocks(node + turn * nodes) for turn in range(PER_NODE)]


def request_blocks(number: int, nodes: int) -> tuple[str, ...]:
    """The blocks of a request's prompt."""
    return (*held_blocks(number * STRIDE % (nodes * PER_NODE)), _hash(f"r{number}"))


def record(number: int, nodes: int, run: str) -> tuple[bytes, bytes]:
    """(key, value) of a request; `run` keeps the ids of one run from those of another."""
    id = f"{run}-{number}"
    body = {"prompt": "", "max_tokens": MAX_TOKENS}
    request = {
        "id": id,
        "model": MODEL,
        "endpoint": "/v1/completions",
        "body": body,
        "tokens": {
            "count": PROMPT_TOKENS,
            "block_size": BLOCK_TOKENS,
            "block_hashes": request_blocks(number, nodes),
        },
    }
    body["prompt"] = "word " * ((RECORD_BYTES - len(json.dumps(request))) // 5)
    return id.encode(), json.dumps(request).encode()
