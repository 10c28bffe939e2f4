"""How release 1 reads its records: a frozen copy of its definitions.

Never edited after the release. What today's code writes must still be read by these, because releases
N and N-1 run together during an upgrade.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

BlockHash = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]
RequestIdText = Annotated[str, Meta(min_length=1, max_length=256)]


class Endpoint(StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class Tokens(Struct, frozen=True, kw_only=True):
    count: Count
    block_size: Annotated[int, Meta(ge=1, le=65_536)] = 256
    block_hashes: Annotated[tuple[BlockHash, ...], Meta(max_length=65_536)] = ()


class BodyRef(Struct, frozen=True, kw_only=True):
    topic: str
    partition: Annotated[int, Meta(ge=0, le=100_000)]
    offset: Annotated[int, Meta(ge=0)]
    bytes: Annotated[int, Meta(ge=1, le=1 << 30)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class ReplyTo(Struct, frozen=True, kw_only=True):
    topic: str | None = None
    partition: Annotated[int, Meta(ge=0, le=100_000)] | None = None


class Request(Struct, frozen=True, kw_only=True):
    id: RequestIdText
    model: Annotated[str, Meta(min_length=1, max_length=256)]
    endpoint: Endpoint
    body: Raw = Raw(b"")
    body_ref: BodyRef | None = None
    v: int = 1
    tenant: Annotated[str, Meta(max_length=256)] = ""
    priority: Annotated[int, Meta(ge=1, le=100)] = 50
    deadline_ms: int | None = None
    ttft_slo_ms: Annotated[int, Meta(ge=1)] | None = None
    tokens: Tokens | None = None
    reply_to: ReplyTo | None = None
    session: Annotated[str, Meta(max_length=256)] | None = None
    lora: Annotated[str, Meta(max_length=256)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    detached: bool = False
    requeued_from: str | None = None
    lease: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


class Cancel(Struct, frozen=True, kw_only=True):
    id: RequestIdText
    tenant: Annotated[str, Meta(max_length=256)] = ""
    v: int = 1


class Lease(Struct, frozen=True, kw_only=True):
    lease: Annotated[str, Meta(min_length=1, max_length=128)]
    ttl_ms: Annotated[int, Meta(ge=0, le=60_000)]
    tenant: Annotated[str, Meta(max_length=256)] = ""
    v: int = 1


class Envelope(Struct, frozen=True, kw_only=True):
    ref: str
    id: str
    model: str
    tenant: str = ""
    priority: int = 50
    prompt_tokens: int = 0
    max_tokens: int = 16
    tokens_exact: bool = False
    block_size: int = 0
    block_hashes: tuple[str, ...] = ()
    appended_ms: int = 0
    deadline_at_ms: int = 0
    ttft_slo_ms: int = 0
    fingerprint: str = ""
    session: str = ""
    lora: str = ""
    lease: str = ""
    v: int = 1


class Work(Struct, frozen=True, kw_only=True):
    ref: str
    id: str
    model: str
    endpoint: Endpoint
    tenant: str = ""
    body: Raw = Raw(b"")
    body_ref: BodyRef | None = None
    body_in_request: bool = False
    reply_to: ReplyTo | None = None
    deadline_at_ms: int = 0
    appended_ms: int = 0
    fingerprint: str = ""
    cache_salt: str = ""
    traceparent: str = ""
    v: int = 1


class ChunkKind(StrEnum):
    BEGIN = "begin"
    TOKENS = "tokens"
    END = "end"


class ChoiceDelta(Struct, frozen=True, kw_only=True):
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] | None = None
    deltas: tuple[Raw, ...] = ()


class Chunk(Struct, frozen=True, kw_only=True):
    id: str
    ref: str
    attempt: str
    kind: ChunkKind
    tenant: str = ""
    node: str = ""
    first_token: int = 0
    tokens: int = 0
    choices: tuple[ChoiceDelta, ...] = ()
    restarted: bool = False
    finish_reason: str = ""
    v: int = 1


class OutcomeKind(StrEnum):
    COMPLETED = "Completed"
    REJECTED = "Rejected"
    EVICTED = "Evicted"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class Reason(StrEnum):
    FINISHED = "finished"
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
    DEADLINE_EXCEEDED = "deadline_exceeded"
    WAIT_EXCEEDED = "wait_exceeded"
    ENGINE_REFUSED = "engine_refused"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    CLIENT_CANCELLED = "client_cancelled"
    CLIENT_GONE = "client_gone"


class FailureCause(StrEnum):
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


class Usage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Choice(Struct, frozen=True, kw_only=True):
    index: int = 0
    text: str = ""
    finish_reason: str = ""
    deltas: tuple[Raw, ...] = ()


class Timing(Struct, frozen=True, kw_only=True):
    appended: int = 0
    claimed: int = 0
    first_token: int = 0
    ended: int = 0


class Outcome(Struct, frozen=True, kw_only=True):
    id: str
    ref: str
    kind: OutcomeKind
    reason: Reason
    tenant: str = ""
    message: str = ""
    fingerprint: str = ""
    attempt: str = ""
    node: str = ""
    model: str = ""
    choices: tuple[Choice, ...] = ()
    usage: Usage = Usage()
    timing: Timing = Timing()
    http_status: int = 0
    v: int = 1


class OutcomeHead(Struct, frozen=True, kw_only=True):
    id: str
    ref: str
    kind: OutcomeKind
    reason: Reason
    tenant: str = ""
    fingerprint: str = ""
    attempt: str = ""
    v: int = 1


class FailedAttempt(Struct, frozen=True, kw_only=True):
    attempt: str
    node: str
    cause: FailureCause
    message: str = ""
    http_status: int = 0


class DeadLetter(Struct, frozen=True, kw_only=True):
    ref: str
    reason: Reason
    message: str
    topic: str
    id: str = ""
    tenant: str = ""
    record_base64: str = ""
    attempts: tuple[FailedAttempt, ...] = ()
    dead_at_ms: int = 0
    v: int = 1


class Role(StrEnum):
    FUSED = "fused"
    PREFILL = "prefill"
    DECODE = "decode"
    VIT = "vit"


class NodeIdentity(Struct, frozen=True, kw_only=True):
    node: str
    incarnation: str
    models: tuple[str, ...]
    role: Role = Role.FUSED
    group: str = ""
    loras: tuple[str, ...] = ()
    max_running: int = 32
    max_model_len: int = 131_072
    kv_total_tokens: int = 0
    engine_block_size: int = 0
    engine_url: str = ""
    engine_version: str = ""
    v: int = 1


class NodeReport(Struct, frozen=True, kw_only=True):
    node: str
    incarnation: str
    sequence: int
    running: int = 0
    waiting: int = 0
    held_tokens: int = 0
    queued_uncached_tokens: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    gpu_utilisation: float = 0.0
    gpu_memory_used: float = 0.0
    seen_seq: int = 0
    draining: bool = False
    engine_ok: bool = True
    left: bool = False
    v: int = 1


class BlockEventKind(StrEnum):
    STORED = "stored"
    REMOVED = "removed"
    RESET = "reset"


class BlockEvent(Struct, frozen=True, kw_only=True):
    node: str
    incarnation: str
    sequence: int
    kind: BlockEventKind
    medium: str = "GPU"
    hashes: tuple[str, ...] = ()
    v: int = 1


class Stage(StrEnum):
    WHOLE = ""
    PREFILL = "prefill"
    DECODE = "decode"


class Rule(StrEnum):
    LEAST_COST = "least_cost"
    MOST_CACHED = "most_cached"
    CHANCE = "chance"
    TURN = "turn"
    FEWEST_TOKENS = "fewest_tokens"
    FEWEST_REQUESTS = "fewest_requests"
    LONGEST_UNCHOSEN = "longest_unchosen"
    NEARLY_LEAST_WAIT = "nearly_least_wait"
    DECODE_POLICY = "decode_policy"
    LEAST_FULL = "least_full"


class Bar(StrEnum):
    CORDONED = "cordoned"
    GONE = "gone"
    NOT_ADMITTED = "not_admitted"
    ON_PROBATION = "on_probation"
    ENGINE_DOWN = "engine_down"
    DRAINING = "draining"
    ROLE = "role"
    LORA = "lora"
    TOO_LONG = "too_long"
    SUSPECT = "suspect"
    EXCLUDED = "excluded"


class Doubt(StrEnum):
    STALE_LOAD = "stale_load"
    EMPTY_REGISTRY = "empty_registry"
    OTHER_BLOCKS = "other_blocks"
    TEXT_ONLY = "text_only"
    NO_BLOCKS = "no_blocks"
    ESTIMATED_LENGTH = "estimated_length"


class Candidate(Struct, frozen=True, kw_only=True):
    node: str
    cost_ms: float = 0.0
    matched_blocks: int = 0
    cached_tokens: int = 0
    compute_tokens: int = 0
    queue_ms: float = 0.0
    slot_ms: float = 0.0
    planned_ms: float = 0.0
    prefill_ms: float = 0.0
    work_ms: float = 0.0
    stall_ms: float = 0.0
    burst_ms: float = 0.0
    pressure_ms: float = 0.0
    transfer_ms: float = 0.0
    queued_tokens: int = 0
    held: int = 0
    most: int = 0
    kv_use: float = 0.0
    is_tied: bool = False
    has_room: bool = False
    is_stale: bool = False


class BarredNode(Struct, frozen=True, kw_only=True):
    node: str
    why: Bar


class Explanation(Struct, frozen=True, kw_only=True):
    ref: str
    id: str
    model: str
    node: str
    epoch: int
    n: int
    at_ms: int
    policy: str
    rule: Rule
    tenant: str = ""
    stage: Stage = Stage.WHOLE
    is_priced: bool = False
    near_tie: float = 0.0
    prompt_tokens: int = 0
    max_tokens: int = 0
    blocks: int = 0
    block_size: int = 0
    priority: int = 0
    waited_ms: int = 0
    read_ms: int = 0
    put_off_ms: int = 0
    busy_rounds: int = 0
    busy_node: str = ""
    unplaced_rounds: int = 0
    failures: int = 0
    excluded: tuple[str, ...] = ()
    serving: int = 0
    looked_at: int = 0
    candidates: tuple[Candidate, ...] = ()
    asked: int = 0
    barred: dict[str, int] = {}
    barred_nodes: tuple[BarredNode, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    v: int = 1


class CommitNote(Struct, frozen=True, kw_only=True):
    positions: dict[str, int] = {}
    epoch: int = 0
    generation: str = ""
    counter: int = 0
    v: int = 1


READERS: dict[str, msgspec.json.Decoder[Any]] = {
    "request": msgspec.json.Decoder(Request),
    "cancel": msgspec.json.Decoder(Cancel),
    "lease": msgspec.json.Decoder(Lease),
    "envelope": msgspec.json.Decoder(Envelope),
    "job_data": msgspec.json.Decoder(tuple[str, None, tuple[Work], dict[str, Raw]]),
    "chunk": msgspec.json.Decoder(Chunk),
    "outcome": msgspec.json.Decoder(Outcome),
    "outcome_head": msgspec.json.Decoder(OutcomeHead),
    "dead_letter": msgspec.json.Decoder(DeadLetter),
    "failed_attempt": msgspec.json.Decoder(FailedAttempt),
    "identity": msgspec.json.Decoder(NodeIdentity),
    "report": msgspec.json.Decoder(NodeReport),
    "block_event": msgspec.json.Decoder(BlockEvent),
    "explanation": msgspec.json.Decoder(Explanation),
    "commit_note": msgspec.json.Decoder(CommitNote),
}
"""Release 1's readers, by record."""
