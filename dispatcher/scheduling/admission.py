"""Reading a request record: what enters the window, and what is refused with which words.

Everything about a record that does not need the fleet is decided here, from its bytes alone, so
that a bad input costs nobody else anything. The body is parsed only for the few numbers that
scheduling needs; its meaning is the engine's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

import msgspec

from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope, Work, encode_job_data
from dispatcher.protocol.names import Lane, Names, Ref
from dispatcher.protocol.outcome import Reason
from dispatcher.protocol.request import INLINE_BODY_BYTES, NO_BODY, BodyRef, InferenceRequest
from dispatcher.protocol.tenant_salt import effective_salt, salted_hashes
from dispatcher.protocol.text_hash import CHUNK_TOKENS, text_hashes

BYTES_PER_TOKEN = 4
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """What a pool accepts. `reply_topics` maps each allowed topic to its number of partitions; the
    first is the default. `isolate_tenants` salts the blocks of each tenant by its name."""

    max_record_bytes: int
    default_deadline_ms: int
    max_deadline_ms: int
    request_topic: str
    bodies_topic: str
    reply_topics: Mapping[str, int]
    isolate_tenants: bool = False


def lane_limits(limits: AdmissionLimits, ref: Ref, names: Names) -> AdmissionLimits:
    """What the lane of a record accepts: batch has time."""
    if ref.lane is Lane.INTERACTIVE:
        return limits
    return replace(
        limits, default_deadline_ms=limits.max_deadline_ms, request_topic=names.requests(Lane.BATCH)
    )


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request for the window: what scheduling reads, and what the agent will run."""

    envelope: Envelope
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A record that is not admitted. `id` is '' when none can be read: then it is only dead-lettered."""

    reason: Reason
    message: str
    id: str = ""
    tenant: str = ""
    fingerprint: str = ""
    dead_letter: bool = False


class _BodyHead(msgspec.Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_body_head = msgspec.json.Decoder(_BodyHead)


def admit(
    ref: Ref,
    key: bytes | None,
    value: bytes | None,
    *,
    appended_ms: int,
    now_ms: int,
    traceparent: str,
    limits: AdmissionLimits,
    carry_bodies: bool,
) -> Admitted | Refused:
    """Read one record.

    Args:
        appended_ms: the broker's append time, from which deadlines count.
        carry_bodies: False when the window's bytes are spent: even a small body then travels by
            reference to this very record.
    """
    if value is None:
        return _poison(
            key, b"", "record: expected a JSON object, seen no value (a tombstone); send a request", False
        )
    if len(value) > limits.max_record_bytes:
        message = (
            f"record: expected at most {limits.max_record_bytes} bytes, seen {len(value)}; "
            f"put the body on {limits.bodies_topic} and send body_ref"
        )
        return _poison(key, value, message, False, Reason.TOO_LARGE)
    try:
        request = codec.requests.decode(value)
    except codec.UnsupportedVersion as error:
        return _poison(key, value, str(error), True, Reason.UNSUPPORTED_VERSION)
    except codec.MalformedRecord as error:
        return _poison(key, value, str(error), True)
    problem = _check(request, appended_ms, now_ms, limits)
    if problem is not None:
        reason, message = problem
        return Refused(
            reason=reason,
            message=message,
            id=request.id,
            tenant=request.tenant,
            fingerprint=fingerprint(request),
        )
    return _admitted(ref, request, value, appended_ms, traceparent, limits, carry_bodies)


def _poison(
    key: bytes | None, value: bytes, message: str, dead: bool, reason: Reason = Reason.MALFORMED
) -> Refused:
    named = codec.salvage_identity(value)
    if named is None and key is not None and 0 < len(key) <= 256:
        try:
            named = ("", key.decode())
        except UnicodeDecodeError:
            named = None
    if named is None:
        return Refused(reason=reason, message=message, dead_letter=True)
    return Refused(reason=reason, message=message, tenant=named[0], id=named[1], dead_letter=dead)


def _check(
    request: InferenceRequest, appended_ms: int, now_ms: int, limits: AdmissionLimits
) -> tuple[Reason, str] | None:
    body = bytes(request.body)
    if bool(body) == (request.body_ref is not None):
        seen = "both" if body else "neither"
        return Reason.MALFORMED, f"record: expected exactly one of body and body_ref, seen {seen}"
    if body and body.lstrip()[:1] != b"{":
        return Reason.MALFORMED, "record: expected body to be a JSON object - at `$.body`"
    if not _is_text(body):
        return Reason.MALFORMED, "record: expected body to be UTF-8, seen other bytes - at `$.body`"
    if request.body_ref is not None and request.body_ref.topic != limits.bodies_topic:
        return (
            Reason.BODY_UNREADABLE,
            f"body_ref.topic: expected {limits.bodies_topic}, seen {request.body_ref.topic[:120]!r}",
        )
    if request.deadline_ms is not None:
        if not 0 < request.deadline_ms <= limits.max_deadline_ms:
            return (
                Reason.INVALID_DEADLINE,
                f"deadline_ms: expected 1 to {limits.max_deadline_ms} ms, seen {request.deadline_ms}",
            )
        if appended_ms + request.deadline_ms <= now_ms:
            late = now_ms - appended_ms - request.deadline_ms
            return Reason.DEADLINE_PASSED, f"deadline_ms: passed {late} ms before the record was read"
    reply = request.reply_to
    if reply is not None and reply.topic is not None and reply.topic not in limits.reply_topics:
        allowed = ", ".join(sorted(limits.reply_topics))
        return (
            Reason.REPLY_ROUTE_UNKNOWN,
            f"reply_to.topic: expected one of {allowed}, seen {reply.topic[:120]!r}",
        )
    if reply is not None and reply.partition is not None:
        partitions = limits.reply_topics[reply.topic or next(iter(limits.reply_topics))]
        if reply.partition >= partitions:
            return (
                Reason.REPLY_ROUTE_UNKNOWN,
                f"reply_to.partition: expected 0 to {partitions - 1}, seen {reply.partition}",
            )
    return None


def _is_text(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def fingerprint(request: InferenceRequest) -> str:
    """What tells a repeated request from a reused id: 16 hex digits over body and reply route."""
    digest = sha256(f"{request.endpoint}\0{request.model}\0".encode())
    digest.update(request.body_ref.sha256.encode() if request.body_ref else bytes(request.body))
    if request.reply_to is not None:
        digest.update(msgspec.json.encode(request.reply_to))
    return digest.hexdigest()[:16]


def _admitted(
    ref: Ref,
    request: InferenceRequest,
    value: bytes,
    appended_ms: int,
    traceparent: str,
    limits: AdmissionLimits,
    carry_bodies: bool,
) -> Admitted:
    body = bytes(request.body)
    print_ = fingerprint(request)
    deadline = request.deadline_ms or limits.default_deadline_ms
    prompt_tokens, exact, max_tokens = _sizes(request, body)
    salt = effective_salt(request.tenant, request.cache_salt or "", isolate=limits.isolate_tenants)
    block_size, hashes, of_text = _hashes(request, body, salt, isolate=limits.isolate_tenants)
    body_ref, in_request = request.body_ref, False
    if body and (len(body) > INLINE_BODY_BYTES or not carry_bodies):
        in_request = True
        body_ref = BodyRef(
            topic=limits.request_topic,
            partition=ref.partition,
            offset=ref.offset,
            bytes=len(value),
            sha256=sha256(body).hexdigest(),
        )
        body = b""
    envelope = Envelope(
        ref=str(ref),
        id=request.id,
        model=request.model,
        tenant=request.tenant,
        priority=request.priority,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        tokens_exact=exact,
        block_size=block_size,
        block_hashes=hashes,
        text_hashed=of_text,
        appended_ms=appended_ms,
        deadline_at_ms=appended_ms + deadline,
        ttft_slo_ms=request.ttft_slo_ms or 0,
        fingerprint=print_,
        session=request.session or "",
        lora=request.lora or "",
        lease="" if request.detached else request.lease or "",
    )
    work = Work(
        ref=str(ref),
        id=request.id,
        model=request.model,
        endpoint=request.endpoint,
        tenant=request.tenant,
        body=msgspec.Raw(body) if body else NO_BODY,
        body_ref=body_ref,
        body_in_request=in_request,
        reply_to=request.reply_to,
        deadline_at_ms=appended_ms + deadline,
        appended_ms=appended_ms,
        fingerprint=print_,
        cache_salt=salt,
        traceparent=traceparent,
    )
    return Admitted(envelope=envelope, data=encode_job_data(work))


def _hashes(
    request: InferenceRequest, body: bytes, salt: str, *, isolate: bool
) -> tuple[int, tuple[str, ...], bool]:
    """(block size, hashes, whether they are of text): what tells which prompts begin alike."""
    if request.tokens is not None:
        return request.tokens.block_size, request.tokens.block_hashes, False
    given = salted_hashes(request.text_hashes, salt) if isolate else request.text_hashes
    hashes = given or text_hashes(body, model=request.model, lora=request.lora or "", cache_salt=salt)
    return (CHUNK_TOKENS, hashes, True) if hashes else (0, (), False)


def _sizes(request: InferenceRequest, body: bytes) -> tuple[int, bool, int]:
    """(prompt tokens, whether they are exact, most tokens it may generate)."""
    head = _BodyHead()
    if body:
        try:
            head = _body_head.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # the engine will say what is wrong with its own parameters
    wanted = head.max_completion_tokens if head.max_completion_tokens is not None else head.max_tokens
    max_tokens = max(1, min(wanted, 1_000_000)) if wanted is not None else DEFAULT_MAX_TOKENS
    if request.tokens is not None:
        return request.tokens.count, True, max_tokens
    size = len(body) if body else (request.body_ref.bytes if request.body_ref else 0)
    return max(1, size // BYTES_PER_TOKEN), False, max_tokens
