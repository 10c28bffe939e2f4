"""What binds a request to a node: the envelope that scheduling reads, the work that an agent runs.

Both are made once, at intake, and never change: an attempt's number is in its job id, so that a
retry renames the job instead of rewriting a body. `data` is RQ's own job payload (JSON serializer).
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from dispatcher.protocol.names import Lane, Names, Ref
from dispatcher.protocol.request import FIRST_VERSION, NO_BODY, BodyRef, Endpoint, ReplyTo

ENTRY_POINT = "workers_agent.rq_job.execute"
"""The function that a stock RQ worker calls for a job."""


class Envelope(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What scheduling needs of a request; small, kept for every request in the leader's memory.

    `block_hashes` are routing blocks, or chunks of text when `text_hashed`: those no engine tells of.
    `lease`: its client's, '' when it goes on without its client.
    """

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
    text_hashed: bool = False
    appended_ms: int = 0
    deadline_at_ms: int = 0
    ttft_slo_ms: int = 0
    fingerprint: str = ""
    session: str = ""
    lora: str = ""
    lease: str = ""
    v: int = FIRST_VERSION

    @property
    def cost_tokens(self) -> int:
        """The tokens a node works through for it: prompt and what it may generate."""
        return self.prompt_tokens + self.max_tokens


class Work(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an agent needs to run a request. Exactly one of `body` and `body_ref` is given."""

    ref: str
    id: str
    model: str
    endpoint: Endpoint
    tenant: str = ""
    body: msgspec.Raw = NO_BODY
    body_ref: BodyRef | None = None
    body_in_request: bool = False
    reply_to: ReplyTo | None = None
    deadline_at_ms: int = 0
    appended_ms: int = 0
    fingerprint: str = ""
    cache_salt: str = ""
    traceparent: str = ""
    v: int = FIRST_VERSION


def stray_route(work: Work, names: Names) -> str:
    """Tell which topic of `work` an agent must neither read nor write, and why; '' when all are the pool's.

    The leader admits no such request: whoever put the job there was not it.
    """
    reply = work.reply_to.topic if work.reply_to is not None else None
    if reply not in {None, names.replies}:
        return f"reply_to.topic: expected {names.replies}, seen {reply[:120]!r}"
    body = work.body_ref.topic if work.body_ref is not None else names.bodies
    if body not in {names.bodies, *map(names.requests, Lane)}:
        return f"body_ref.topic: expected {names.bodies} or a request topic, seen {body[:120]!r}"
    return ""


def ref_of(envelope: Envelope) -> Ref:
    """The parsed ref of an envelope."""
    return Ref.parse(envelope.ref)


def encode_job_data(work: Work) -> bytes:
    """Encode `work` as RQ's payload: `[function, instance, args, kwargs]` in JSON."""
    return msgspec.json.encode((ENTRY_POINT, None, (work,), {}))


_job_data = msgspec.json.Decoder(tuple[str, None, tuple[Work], dict[str, msgspec.Raw]])


def decode_job_data(data: bytes) -> Work:
    """Read what `encode_job_data` wrote.

    Raises:
        ValueError: it is not our payload (a pickled or foreign job): never executed, only reported.
    """
    try:
        function, _, args, _ = _job_data.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"job data: expected FlexLB work in JSON, seen {len(data)} other bytes ({str(error)[:400]})"
        ) from None
    if function != ENTRY_POINT:
        raise ValueError(f"job data: expected function {ENTRY_POINT}, seen {function[:120]!r}")
    return args[0]
