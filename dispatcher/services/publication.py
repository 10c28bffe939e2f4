"""What a closing entry becomes on Kafka: the outcome, and a dead letter when the request failed for good.

Pure values; `publish` and `failures` make them, one transaction carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from dispatcher.backends.outcome_log import Publication
from dispatcher.backends.store_view import StreamEntry
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import JobId, Ref
from dispatcher.protocol.outcome import DeadLetter, FailedAttempt, Outcome, OutcomeKind, Reason, Timing

LARGEST_OUTCOME_BYTES = 8 << 20
SMALL_OUTCOME_BYTES = 512 << 10
"""Taken by every topic: Kafka's own limit for records is 1 MiB."""
LARGEST_DEAD_BYTES = 900 << 10
"""Above what the leader writes, which copies no larger record, and below what every topic takes."""
ATTEMPTS_KEPT = 8
"""Failed attempts in a dead letter, the newest; the scripts keep as many in a job."""
ATTEMPT_MESSAGE_CHARS = 500


@dataclass(frozen=True, kw_only=True)
class ReadyEnding:
    """A closing entry ready to be published; one without a publication is only dropped.

    `error` is what RQ's failed registry shall say of `job_to_delete`.
    """

    entry: bytes
    ref: Ref
    id: str
    publication: Publication | None
    job_to_delete: str = ""
    error: str = ""


def own_job(entry: StreamEntry) -> str:
    """The job whose attempt an entry ends, '' when it names none or another request's."""
    try:
        job = JobId.parse(entry.text("job"))
    except ValueError:
        return ""
    return str(job) if str(job.ref) == entry.text("ref") else ""


def dropped(entry: StreamEntry, ref: Ref) -> ReadyEnding:
    """What becomes of an entry whose request is answered already."""
    return ReadyEnding(entry=entry.id, ref=ref, id="", publication=None, job_to_delete=own_job(entry))


def ready_ending(entry: StreamEntry, ref: Ref) -> ReadyEnding:
    """The ending of an entry that holds its outcome.

    Raises:
        ValueError: it holds none, or that of another request.
    """
    payload = entry.fields.get(b"payload", b"")
    outcome, dead = payload, b""
    if entry.text("kind") == "dead":
        outcome, _, dead = payload.partition(b"\n")
    id = entry.text("id")
    if outcome and (seen := codec.outcome_heads.decode(outcome).ref) != str(ref):
        raise ValueError(f"outcome: expected that of {ref}, seen {seen[:80]!r}")
    if len(outcome) > LARGEST_OUTCOME_BYTES:
        outcome = _without_text(outcome)
    elif len(outcome) > SMALL_OUTCOME_BYTES:
        codec.outcomes.decode(outcome)  # its topic may refuse it: then it is published without its text
    if len(dead) > LARGEST_DEAD_BYTES:
        raise ValueError(f"dead letter: expected at most {LARGEST_DEAD_BYTES} bytes, seen {len(dead)}")
    publication = Publication(key=id.encode(), outcome=outcome, dead=dead)
    return ReadyEnding(entry=entry.id, ref=ref, id=id, publication=publication)


def without_long_text(publication: Publication) -> Publication:
    """What also a topic with Kafka's default limit takes."""
    if len(publication.outcome) <= SMALL_OUTCOME_BYTES:
        return publication
    return replace(publication, outcome=_without_text(publication.outcome))


def _without_text(payload: bytes) -> bytes:
    """An outcome that Kafka would refuse, without what makes it so large."""
    outcome = codec.outcomes.decode(payload)
    message = f"the answer of {len(payload)} bytes is on the reply topic only; {outcome.message}"
    return codec.encode(msgspec.structs.replace(outcome, choices=(), message=message[:2000]))


def cut_attempt(failed: FailedAttempt) -> FailedAttempt:
    """An attempt as it is kept: engines may answer pages."""
    return msgspec.structs.replace(failed, message=failed.message[:ATTEMPT_MESSAGE_CHARS])


def error_text(failed: FailedAttempt) -> str:
    """What RQ's tools show of a failed attempt, as they show a traceback."""
    crash = ", and the engine died" if failed.crash else ""
    status = f" (HTTP {failed.http_status})" if failed.http_status else ""
    message = failed.message[:ATTEMPT_MESSAGE_CHARS]
    return f"{failed.cause.value}{status}{crash}: {message}\nattempt {failed.attempt} at {failed.node}"


def ended(
    envelope: Envelope,
    kind: OutcomeKind,
    reason: Reason,
    message: str,
    *,
    now_ms: int,
    retry_after_ms: int = 0,
) -> bytes:
    """The outcome of a request that the leader ends, encoded."""
    return codec.encode(
        Outcome(
            id=envelope.id,
            ref=envelope.ref,
            tenant=envelope.tenant,
            kind=kind,
            reason=reason,
            message=message,
            fingerprint=envelope.fingerprint,
            model=envelope.model,
            timing=Timing(appended=envelope.appended_ms, ended=now_ms),
            retry_after_ms=retry_after_ms,
        )
    )


def given_up(
    entry: StreamEntry,
    ref: Ref,
    envelope: Envelope,
    attempts: Sequence[FailedAttempt],
    reason: Reason,
    *,
    topic: str,
    now_ms: int,
) -> ReadyEnding:
    """The ending of a request that failed for good, by its attempts in their order.

    Args:
        topic: where its record lies.
    """
    failed = attempts[-1]
    message = failed.message
    if reason is Reason.POISON:
        nodes = ", ".join(dict.fromkeys(attempt.node for attempt in attempts if attempt.crash))
        message = f"engines died while they ran it, at {nodes}: {message}"
    outcome = Outcome(
        id=envelope.id,
        ref=envelope.ref,
        tenant=envelope.tenant,
        kind=OutcomeKind.FAILED,
        reason=reason,
        message=message,
        fingerprint=envelope.fingerprint,
        attempt=failed.attempt,
        node=failed.node,
        model=envelope.model,
        http_status=failed.http_status,
        timing=Timing(appended=envelope.appended_ms, ended=now_ms),
    )
    letter = DeadLetter(
        ref=envelope.ref,
        reason=reason,
        message=message,
        topic=topic,
        id=envelope.id,
        tenant=envelope.tenant,
        attempts=tuple(map(cut_attempt, attempts[-ATTEMPTS_KEPT:])),
        dead_at_ms=now_ms,
    )
    publication = Publication(
        key=envelope.id.encode(), outcome=codec.encode(outcome), dead=codec.encode(letter)
    )
    return ReadyEnding(
        entry=entry.id,
        ref=ref,
        id=envelope.id,
        publication=publication,
        job_to_delete=entry.text("job"),
        error=error_text(failed),
    )
