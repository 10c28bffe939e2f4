"""Execute: run one claimed request on the engine, stream its chunks, and say how it ended.

An attempt ends in an outcome (finished, or given up at its deadline) or as failed, with the cause that
the leader's retry decision reads; one that was taken away is cancelled and says nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from hashlib import sha256

import msgspec

from dispatcher.backends.body_log import BodyLog
from dispatcher.backends.node_store import Ending
from dispatcher.backends.reply_log import ReplyLog
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.names import Attempt
from dispatcher.protocol.outcome import (
    Choice,
    FailedAttempt,
    FailureCause,
    Outcome,
    OutcomeKind,
    Reason,
    Timing,
    Usage,
)
from workers_agent.engines.engine import Engine, EngineFailure, Piece
from workers_agent.services.reply_stream import Pacer, ReplyStream
from workers_agent.state import AgentState

BODY_PAUSE_S = 0.5
SAME_STEP_S = 0.001
_MAY_BE_ITS_END = frozenset({FailureCause.CONNECT, FailureCause.TRUNCATED, FailureCause.ENGINE_ERROR})


async def _no_check() -> None:
    """Where nobody watches the engine."""


def failed_ending(job: str, ref: str, id: str, failed: FailedAttempt, kind: str = "failed") -> Ending:
    """The ending of an attempt without an outcome."""
    return Ending(job=job, kind=kind, ref=ref, id=id, payload=codec.encode(failed))


class Answer:
    """What the engine has generated so far."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.tokens = 0
        self.first_token_ms = 0
        self.prefill_us = 0
        self._texts: dict[int, list[str]] = {}
        self._deltas: dict[int, list[msgspec.Raw]] = {}
        self._reasons: dict[int, str] = {}

    def add(self, piece: Piece, now_ms: int) -> None:
        """Take one piece."""
        for delta in piece.choices:
            self._take(delta)
        for index, reason in piece.finish_reasons:
            self._texts.setdefault(index, [])
            self._reasons[index] = reason
        self.tokens += piece.tokens
        if piece.choices and not self.first_token_ms:
            self.first_token_ms = now_ms
        if piece.usage is not None:
            self.usage = piece.usage

    def _take(self, delta: ChoiceDelta) -> None:
        self._texts.setdefault(delta.index, []).append(delta.text)
        if delta.deltas:
            self._deltas.setdefault(delta.index, []).extend(delta.deltas)

    @property
    def finish_reason(self) -> str:
        """The first choice's."""
        return self._reasons.get(0, "")

    def choices(self) -> tuple[Choice, ...]:
        """All choices, whole."""
        return tuple(
            Choice(
                index=index,
                text="".join(texts),
                finish_reason=self._reasons.get(index, ""),
                deltas=tuple(self._deltas.get(index, ())),
            )
            for index, texts in sorted(self._texts.items())
        )


class Prefills:
    """How long each prefill took, as far as that can be told from when first tokens came.

    An engine computes prompts in turn: one began when it was submitted or when the one before gave its
    first token, whichever was later. Of those whose first tokens came from one step nothing can be told.
    """

    def __init__(self) -> None:
        self._last_s = float("-inf")
        self._last: Answer | None = None

    def first_token(self, answer: Answer, submitted_s: float, now_s: float) -> None:
        """Note an answer's first token."""
        if now_s - self._last_s < SAME_STEP_S:
            if self._last is not None:
                self._last.prefill_us = 0
        else:
            answer.prefill_us = round((now_s - max(submitted_s, self._last_s)) * 1e6)
        self._last_s, self._last = now_s, answer


class Executor:
    """Runs the attempts of one incarnation.

    Args:
        check_engine: called when an attempt failed in a way that may be the engine's end, before that is
            told: who decides about the next attempt should know by then whether the engine lives.
    """

    def __init__(
        self,
        state: AgentState,
        engine: Engine,
        replies: ReplyLog,
        bodies: BodyLog,
        pacer: Pacer,
        *,
        check_engine: Callable[[], Awaitable[None]] = _no_check,
    ) -> None:
        self._state = state
        self._engine = engine
        self._replies = replies
        self._bodies = bodies
        self._pacer = pacer
        self._check_engine = check_engine
        self._prefills = Prefills()

    async def run(self, job: str, attempt: Attempt, work: Work) -> None:
        """Run one attempt to its ending."""
        state = self._state
        began = state.clock.monotonic()
        held = state.held.get(job)
        hit_tokens = held.claimed.hit_tokens if held is not None else 0
        ending, reason = await self.attempt(job, attempt, work, hit_tokens=hit_tokens)
        state.metrics.endings.labels(ending.kind, reason).inc()
        state.metrics.attempt_s.observe(state.clock.monotonic() - began)
        state.end(job, ending)

    async def attempt(
        self, job: str, attempt: Attempt, work: Work, *, hit_tokens: int = 0
    ) -> tuple[Ending, str]:
        """Run one attempt; how it ended, and the reason or cause for metrics.

        Args:
            hit_tokens: what the leader expected of the engine's cache.
        """
        state = self._state
        claimed_ms = state.clock.now_ms()
        answer = Answer()
        stream = ReplyStream(self._replies, work, attempt, state.identity.node, self._pacer, state.metrics)
        kind, reason, message = OutcomeKind.COMPLETED, Reason.FINISHED, ""
        try:
            async with asyncio.timeout(self._seconds_left(work)):
                await self._generate(job, work, answer, stream)
        except TimeoutError:
            kind, reason = OutcomeKind.EVICTED, Reason.DEADLINE_EXCEEDED
            message = f"deadline passed after {answer.tokens} tokens"
        except EngineFailure as failure:
            if failure.cause is FailureCause.STALLED:
                state.is_suspect = True
            if failure.cause in _MAY_BE_ITS_END:
                await self._check_engine()
            return self._failed(job, attempt, work, failure.cause, str(failure), failure.http_status)
        except LogRefused as error:
            return self._failed(job, attempt, work, FailureCause.REPLY_UNWRITABLE, str(error))
        except Exception as error:
            state.log.error("attempt broke", job=job, error=repr(error))
            return self._failed(job, attempt, work, FailureCause.ENGINE_ERROR, f"in the agent: {error!r}")
        finally:
            stream.close()
        outcome = Outcome(
            id=work.id,
            ref=work.ref,
            tenant=work.tenant,
            kind=kind,
            reason=reason,
            message=message,
            fingerprint=work.fingerprint,
            attempt=str(attempt),
            node=state.identity.node,
            model=work.model,
            choices=answer.choices(),
            usage=answer.usage or Usage(completion_tokens=answer.tokens),
            timing=Timing(
                appended=work.appended_ms,
                claimed=claimed_ms,
                first_token=answer.first_token_ms,
                ended=state.clock.now_ms(),
                prefill_us=answer.prefill_us,
            ),
            predicted_cached_tokens=hit_tokens,
        )
        cached = outcome.usage.cached_tokens
        state.metrics.unexplained_hits.inc(max(0, cached - hit_tokens))
        if answer.first_token_ms:
            state.metrics.first_token_s.observe((answer.first_token_ms - claimed_ms) / 1000)
        payload = codec.encode(outcome)
        return Ending(job=job, kind="outcome", ref=work.ref, id=work.id, payload=payload), reason.value

    def _seconds_left(self, work: Work) -> float | None:
        if not work.deadline_at_ms:
            return None
        return (work.deadline_at_ms - self._state.clock.now_ms()) / 1000

    async def _generate(self, job: str, work: Work, answer: Answer, stream: ReplyStream) -> None:
        body = await self._body(work)
        await stream.begin()
        clock = self._state.clock
        submitted_s = clock.monotonic()
        async with contextlib.aclosing(self._engine.stream(work, body)) as pieces:
            async for piece in pieces:
                if not answer.first_token_ms and piece.choices:
                    self._prefills.first_token(answer, submitted_s, clock.monotonic())
                    self._state.note_token(job)
                answer.add(piece, clock.now_ms())
                await stream.add(piece)
        await stream.end(answer.finish_reason)

    async def _body(self, work: Work) -> bytes:
        ref = work.body_ref
        if ref is None:
            return bytes(work.body)
        while True:
            try:
                value = await self._bodies.fetch(ref)
                break
            except LogUnavailable:
                self._state.metrics.log_errors.inc()
                await asyncio.sleep(BODY_PAUSE_S)
            except LogRefused as error:
                raise EngineFailure(FailureCause.BODY_UNREADABLE, str(error)) from error
        if work.body_in_request:
            try:
                value = bytes(codec.requests.decode(value).body)
            except codec.MalformedRecord as error:
                raise EngineFailure(FailureCause.BODY_UNREADABLE, str(error)) from error
        digest = sha256(value).hexdigest()
        if digest != ref.sha256:
            raise EngineFailure(
                FailureCause.BODY_UNREADABLE,
                f"body: expected SHA-256 {ref.sha256} at {ref.topic}[{ref.partition}] {ref.offset}, "
                f"seen {digest} of {len(value)} bytes",
            )
        return value

    def _failed(
        self,
        job: str,
        attempt: Attempt,
        work: Work,
        cause: FailureCause,
        message: str,
        http_status: int = 0,
    ) -> tuple[Ending, str]:
        failed = FailedAttempt(
            attempt=str(attempt),
            node=self._state.identity.node,
            cause=cause,
            message=message[:2000],
            http_status=http_status,
        )
        self._state.log.info(
            "attempt failed", job=job, cause=cause.value, http_status=http_status, message=message[:500]
        )
        return failed_ending(job, work.ref, work.id, failed), cause.value
