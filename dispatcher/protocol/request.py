"""The request record, as producers write it to `requests` and `requests.batch`.

A producer in any language needs only `id`, `model`, `endpoint` and `body`. Unknown fields are
ignored, wrong types are refused with the field's path. The body stays raw bytes: nothing between
the producer and the engine re-encodes it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

PROTOCOL_VERSION = 1
"""The newest version of records that this release knows."""
FIRST_VERSION = 1
"""What a record without `v` is: absent for ever means 1, so later versions must write theirs."""
INLINE_BODY_BYTES = 16_384
"""Bodies above this travel by reference."""
DEFAULT_PRIORITY = 50

NO_BODY = msgspec.Raw(b"")
"""An absent body: this very object, so that the encoder leaves the field out."""

BlockHash = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]
RequestIdText = Annotated[str, Meta(min_length=1, max_length=256)]
LeaseText = Annotated[str, Meta(min_length=1, max_length=128)]
MAX_LEASE_TTL_MS = 60_000
"""The longest time that a lease runs on without being prolonged."""


class Endpoint(StrEnum):
    """The engine endpoints that a request may ask for; an agent calls no other path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class Tokens(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the producer knows of the prompt's tokens.

    `block_hashes` are the routing-block hashes of `prefix_hash`, one per full block of
    `block_size` tokens, as 16 lowercase hex digits each.
    """

    count: Count
    block_size: Annotated[int, Meta(ge=1, le=65_536)] = 256
    block_hashes: Annotated[tuple[BlockHash, ...], Meta(max_length=65_536)] = ()


class BodyRef(Struct, frozen=True, kw_only=True):
    """Where a body lies: a record of `requests.bodies`, whose value is the body itself.

    Inside FlexLB it may also point at the request record whose inline body was too large to carry.
    """

    topic: str
    partition: Annotated[int, Meta(ge=0, le=100_000)]
    offset: Annotated[int, Meta(ge=0)]
    bytes: Annotated[int, Meta(ge=1, le=1 << 30)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class ReplyTo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where chunks go; the pool's replies topic, partitioned by request id, when absent."""

    topic: str | None = None
    partition: Annotated[int, Meta(ge=0, le=100_000)] | None = None


class InferenceRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Exactly one of `body` and `body_ref` is given.

    `text_hashes` are those of `text_hash`, for a body by reference whose tokens nobody knows.
    """

    id: RequestIdText
    model: Annotated[str, Meta(min_length=1, max_length=256)]
    endpoint: Endpoint
    body: msgspec.Raw = NO_BODY
    body_ref: BodyRef | None = None
    v: int = FIRST_VERSION
    tenant: Annotated[str, Meta(max_length=256)] = ""
    priority: Annotated[int, Meta(ge=1, le=100)] = DEFAULT_PRIORITY
    deadline_ms: int | None = None
    ttft_slo_ms: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None
    tokens: Tokens | None = None
    text_hashes: Annotated[tuple[BlockHash, ...], Meta(max_length=65_536)] = ()
    reply_to: ReplyTo | None = None
    session: Annotated[str, Meta(max_length=256)] | None = None
    lora: Annotated[str, Meta(max_length=256)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    detached: bool = False
    requeued_from: str | None = None
    lease: LeaseText | None = None


class CancelRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ask for the end of a request: same tenant as the request, or nothing happens."""

    id: RequestIdText
    tenant: Annotated[str, Meta(max_length=256)] = ""
    v: int = FIRST_VERSION


class LeaseRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A client's sign of life on `requests.cancel`: its lease runs for `ttl_ms` more; 0 ends it.

    All records of a lease lie in one partition.
    """

    lease: LeaseText
    ttl_ms: Annotated[int, Meta(ge=0, le=MAX_LEASE_TTL_MS)]
    tenant: Annotated[str, Meta(max_length=256)] = ""
    v: int = FIRST_VERSION
