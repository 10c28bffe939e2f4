"""Bytes that no honest client writes: arbitrary, damaged, oversized, nested, almost right."""

from __future__ import annotations

import json
import random
from typing import Any

TOKENS = (
    b"null",
    b"NaN",
    b"Infinity",
    b"-0",
    b"1e400",
    b"-1e-400",
    b"9" * 400,
    b'""',
    b'"\\ud800"',
    b'"\\u0000"',
    b'"\xff\xfe"',
    b"[]",
    b"{}",
    b"[" * 600,
    b'{"a":' * 600,
    b"true",
    b'"' + b"x" * 5000 + b'"',
    b",",
    b":",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\r\n\r\n",
    b'"id":"twice",',
)
BOMB = b'{"x":' * 100_000 + b"1" + b"}" * 100_000
SCALARS: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    2**63,
    -(2**64),
    10**30,
    "",
    "x",
    "\x00",
    "\u202e",
    "𝕏" * 300,
    "y" * 300,
    [],
    {},
    [[[]]],
    {"": None},
)


def any_value(rng: random.Random, depth: int = 3) -> Any:
    """A JSON value of any kind."""
    draw = rng.random()
    if depth == 0 or draw < 0.6:
        return rng.choice(SCALARS)
    if draw < 0.8:
        return [any_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    names = ("id", "model", "body", "v", "a", "", "max_tokens", "prompt", "stream")
    return {rng.choice(names): any_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to four small edits: bytes flipped, cut, repeated, replaced, hostile tokens put in."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + rng.randrange(1, 20)]
            case 2:
                found[at:at] = rng.choice(TOKENS)
            case 3:
                found[at:at] = found[at : at + rng.randrange(1, 30)]
            case 4:
                del found[at:]
            case _:
                found[at : at + rng.randrange(1, 6)] = rng.choice(TOKENS)
    return bytes(found)


def changed(rng: random.Random, record: dict[str, Any]) -> bytes:
    """`record` with some fields of any value, or without them, in JSON."""
    fields = dict(record)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*record, "v", "tokens", "reply_to", "extra", "deadline_ms", "tenant", "body_ref"])
        if rng.random() < 0.2:
            fields.pop(name, None)
        else:
            fields[name] = any_value(rng)
    return json.dumps(fields).encode()


def any_bytes(rng: random.Random, record: dict[str, Any]) -> bytes | None:
    """What might be appended in place of `record`."""
    draw = rng.random()
    if draw < 0.4:
        return changed(rng, record)
    if draw < 0.75:
        return damaged(rng, json.dumps(record).encode())
    if draw < 0.85:
        return rng.randbytes(rng.randrange(200))
    if draw < 0.93:
        return json.dumps(any_value(rng)).encode()
    return rng.choice([None, b"", b"{}", b"null", b"[]", BOMB, b'"' + b"x" * 70_000 + b'"', b'{"id":"q"}'])
