"""Outcomes: the one terminal answer of a request, and the reasons that type it.

An outcome is built by the agent (`Completed`, or `Evicted` at a deadline) or by the leader (all
other endings), stored in Redis by a fenced script, and published by the leader's transaction.
`OutcomeKind` and `Reason` are also the metric labels, so both lists are closed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from dispatcher.protocol.names import REF_PATTERN
from dispatcher.protocol.request import FIRST_VERSION, RequestIdText


class OutcomeKind(StrEnum):
    """How a request ended."""

    COMPLETED = "Completed"
    REJECTED = "Rejected"
    EVICTED = "Evicted"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class Reason(StrEnum):
    """Why it ended so."""

    FINISHED = "finished"
    # Rejected: refused at intake, nothing was bound
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    UNSUPPORTED_VERSION = "unsupported_version"
    INVALID_DEADLINE = "invalid_deadline"
    DEADLINE_PASSED = "deadline_passed"
    ID_IN_USE = "id_in_use"
    UNKNOWN_MODEL = "unknown_model"
    PROMPT_TOO_LONG = "prompt_too_long"
    REPLY_ROUTE_UNKNOWN = "reply_route_unknown"
    BODY_UNREADABLE = "body_unreadable"
    # Rejected: more comes than can be served; asking again later may help (`retry_after_ms`)
    OVERLOADED = "overloaded"
    NO_CAPACITY = "no_capacity"
    DEADLINE_UNREACHABLE = "deadline_unreachable"
    # Evicted: accepted, then given up
    DEADLINE_EXCEEDED = "deadline_exceeded"
    WAIT_EXCEEDED = "wait_exceeded"
    # Failed: the engine could not do it
    ENGINE_REFUSED = "engine_refused"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    POISON = "poison"
    # Cancelled
    CLIENT_CANCELLED = "client_cancelled"
    CLIENT_GONE = "client_gone"


class FailureCause(StrEnum):
    """Why an attempt ended without an outcome; what the retry decision reads."""

    CONNECT = "connect"
    REFUSED = "refused"
    OVERLOADED = "overloaded"
    ENGINE_ERROR = "engine_error"
    PROTOCOL = "protocol"
    TRUNCATED = "truncated"
    STALLED = "stalled"
    BODY_UNREADABLE = "body_unreadable"
    REPLY_UNWRITABLE = "reply_unwritable"
    DRAINING = "draining"
    NODE_LOST = "node_lost"
    LEASE_EXPIRED = "lease_expired"
    TRANSFER = "transfer"


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts, as the engine reported them; 0 where it did not."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Choice(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice, whole. `deltas` holds raw engine deltas that are not plain text (tool calls)."""

    index: int = 0
    text: str = ""
    finish_reason: str = ""
    deltas: tuple[msgspec.Raw, ...] = ()


class Timing(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Milliseconds of epoch time; `appended` is the broker's.

    `prefill_us` is a duration: from the later of the request's submission and the node's previous first
    token to its own first token; 0 when that can't be told, as when several came from one step.
    """

    appended: int = 0
    claimed: int = 0
    first_token: int = 0
    ended: int = 0
    prefill_us: int = 0


class Outcome(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record on `outcomes`.

    `ref` tells the record it answers; `fingerprint` is that of the request, so that duplicates
    can be told from reuse of an id after a loss of all Redis data. `predicted_cached_tokens` is what the
    leader expected of the node's cache when it bound the attempt; of `prefill_node`'s where that one computed
    the prompt, as `usage.cached_tokens` is. `retry_after_ms`, where it is not 0, is
    the time after which the same request, under a new id, is more likely to be served.
    """

    id: str
    ref: str
    kind: OutcomeKind
    reason: Reason
    tenant: str = ""
    message: str = ""
    fingerprint: str = ""
    attempt: str = ""
    node: str = ""
    prefill_node: str = ""
    model: str = ""
    choices: tuple[Choice, ...] = ()
    usage: Usage = Usage()
    timing: Timing = Timing()
    http_status: int = 0
    predicted_cached_tokens: int = 0
    retry_after_ms: int = 0
    v: int = FIRST_VERSION


class OutcomeHead(Struct, frozen=True, kw_only=True):
    """What recovery and the audit read of an outcome, without its text.

    Kind and reason are plain text here: a later release may have added some. The rest is bounded as it is
    in what a leader publishes: a new leader builds on it.
    """

    id: RequestIdText
    ref: Annotated[str, Meta(pattern=REF_PATTERN)]
    kind: str
    reason: str
    tenant: Annotated[str, Meta(max_length=256)] = ""
    fingerprint: Annotated[str, Meta(max_length=64, pattern=r"^[^|]*\Z")] = ""
    attempt: str = ""
    v: int = FIRST_VERSION


class FailedAttempt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt that ended without an outcome. `crash`: its engine died while it was running there."""

    attempt: str
    node: str
    cause: FailureCause
    message: str = ""
    http_status: int = 0
    crash: bool = False


class DeadLetter(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record on `requests.dead`. `record_base64` is the original value, unless it lies in a log still.

    `attempts` are the newest failed attempts, oldest first, with their messages cut.
    """

    ref: str
    reason: Reason
    message: str
    topic: str
    id: str = ""
    tenant: str = ""
    record_base64: str = ""
    attempts: tuple[FailedAttempt, ...] = ()
    dead_at_ms: int = 0
    v: int = FIRST_VERSION
