"""Execute: run one claimed request on the engine, stream its chunks, and say how it ended.

An attempt ends in an outcome (finished, or given up at its deadline) or as failed, with the cause that
the leader's retry decision reads; one that was taken away is cancelled and says nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from enum import StrEnum
from hashlib import sha256

import msgspec

from dispatcher.backends.body_log import BodyLog
from dispatcher.backends.node_store import Ending
from dispatcher.backends.reply_history import ReplyHistory
from dispatcher.backends.reply_log import Place, ReplyLog
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work, stray_route
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.handoff import KV_LEASE_MS, NO_PARAMETERS, Handoff, Stage
from dispatcher.protocol.names import Attempt, Names
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
from dispatcher.protocol.request import Endpoint
from dispatcher.telemetry.logging import where_broke
from workers_agent.engines.continuation import Continuable, continuable
from workers_agent.engines.engine import Engine, EngineFailure, Piece
from workers_agent.engines.openai_http import decode_body
from workers_agent.services.reply_stream import Pacer, ReplyStream
from workers_agent.state import AgentState
from workers_agent.trail import Trail

BODY_PAUSE_S = 0.5
SAME_STEP_S = 0.001
TRANSFER_TIMEOUT_S = 15.0
"""The blocks of a prompt are lent for 30 s: a pull that takes longer than half of it is given up."""
_MAY_BE_ITS_PULL = frozenset(
    {FailureCause.ENGINE_ERROR, FailureCause.PROTOCOL, FailureCause.STALLED, FailureCause.TRUNCATED}
)
_MAY_BE_ITS_END = frozenset({FailureCause.CONNECT, FailureCause.TRUNCATED, FailureCause.ENGINE_ERROR})


async def _no_check(since_s: float) -> bool:
    """Where nobody watches the engine, no death of it is known."""
    return False


def failed_ending(
    job: str, ref: str, id: str, failed: FailedAttempt, kind: str = "failed", *, checkpoint: bytes = b""
) -> Ending:
    """The ending of an attempt without an outcome."""
    return Ending(job=job, kind=kind, ref=ref, id=id, payload=codec.encode(failed), checkpoint=checkpoint)


class Answer:
    """What has been generated so far, by this attempt and by those that it went on from.

    `resumed_tokens` are those of the others.
    """

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.tokens = 0
        self.resumed_tokens = 0
        self._prompt_tokens = 0
        self.first_token_ms = 0
        self.prefill_us = 0
        self._texts: dict[int, list[str]] = {}
        self._deltas: dict[int, list[msgspec.Raw]] = {}
        self._reasons: dict[int, str] = {}

    def resume(self, trail: Trail, prompt_tokens: int) -> None:
        """Begin with what is published."""
        self._texts[0] = [trail.text]
        self.tokens = self.resumed_tokens = len(trail.ids)
        self.first_token_ms = trail.first_token_ms
        self._prompt_tokens = prompt_tokens

    def forget(self) -> None:
        """Begin with nothing after all: another run has not added to it yet."""
        self._texts.clear()
        self.tokens = self.resumed_tokens = self.first_token_ms = 0

    def finish(self, reason: str) -> None:
        """What is published was all."""
        self._reasons[0] = reason

    def whole_usage(self) -> Usage:
        """Count the whole answer: a second run counts what was generated before as a part of its prompt."""
        usage = self.usage or Usage(completion_tokens=self.tokens - self.resumed_tokens)
        if not self.resumed_tokens:
            return usage
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=usage.completion_tokens + self.resumed_tokens,
            cached_tokens=min(usage.cached_tokens, self._prompt_tokens),
        )

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


class Resume(StrEnum):
    """What an attempt made of a checkpoint; all but the first two start over."""

    CONTINUED = "continued"
    FINISHED = "finished"
    UNREADABLE = "unreadable"
    UNSOUND = "unsound"
    UNKNOWN_TOKENS = "unknown_tokens"
    REFUSED = "refused"


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
        history: reads back what earlier attempts have published; without it each attempt starts over.
        check_engine: whether the engine died since a time; called when an attempt failed in a way that may be
            the engine's end, before that is told: who decides about the next attempt should know by then
            whether the engine lives.
    """

    def __init__(
        self,
        state: AgentState,
        engine: Engine,
        replies: ReplyLog,
        bodies: BodyLog,
        pacer: Pacer,
        names: Names,
        *,
        history: ReplyHistory | None = None,
        check_engine: Callable[[float], Awaitable[bool]] = _no_check,
    ) -> None:
        self._state = state
        self._engine = engine
        self._replies = replies
        self._bodies = bodies
        self._pacer = pacer
        self._names = names
        self._history = history
        self._check_engine = check_engine
        self._prefills = Prefills()

    async def run(self, job: str, attempt: Attempt, work: Work) -> None:
        """Run one attempt to its ending."""
        state = self._state
        began = state.clock.monotonic()
        held = state.held.get(job)
        hit_tokens = held.claimed.hit_tokens if held is not None else 0
        checkpoint = held.claimed.checkpoint if held is not None else b""
        if held is not None and held.claimed.stage == Stage.PREFILL:
            ending, reason = await self.prefill(
                job, attempt, work, hit_tokens=hit_tokens, checkpoint=checkpoint
            )
        else:
            handoff = codec.decode_handoff(held.claimed.handoff) if held is not None else None
            ending, reason = await self.attempt(
                job, attempt, work, hit_tokens=hit_tokens, checkpoint=checkpoint, handoff=handoff
            )
        state.metrics.endings.labels(ending.kind, reason).inc()
        state.metrics.attempt_s.observe(state.clock.monotonic() - began)
        state.end(job, ending)

    async def prefill(
        self, job: str, attempt: Attempt, work: Work, *, hit_tokens: int = 0, checkpoint: bytes = b""
    ) -> tuple[Ending, str]:
        """Compute a prompt for another node; how it ended, and the stage or cause for metrics.

        An answer that goes on from published tokens is left to that node whole, as is what can't be split.
        """
        state = self._state
        claimed_ms = state.server_clock.now_ms()
        began_s = submitted_s = state.clock.monotonic()
        prefilled, prefill_us = None, 0
        try:
            async with asyncio.timeout(self._seconds_left(work)):
                if stray := stray_route(work, self._names):
                    raise EngineFailure(FailureCause.REFUSED, stray)
                body = await self._body(work)
                submitted_s = state.clock.monotonic()
                if not checkpoint:
                    prefilled = await self._engine.prefill(work, body)
        except TimeoutError:
            outcome = Outcome(
                id=work.id,
                ref=work.ref,
                tenant=work.tenant,
                kind=OutcomeKind.EVICTED,
                reason=Reason.DEADLINE_EXCEEDED,
                message="deadline passed while its prompt was computed",
                fingerprint=work.fingerprint,
                attempt=str(attempt),
                node=state.identity.node,
                model=work.model,
                timing=Timing(
                    appended=work.appended_ms, claimed=claimed_ms, ended=state.server_clock.now_ms()
                ),
            )
            payload = codec.encode(outcome)
            ending = Ending(job=job, kind="outcome", ref=work.ref, id=work.id, payload=payload)
            return ending, Reason.DEADLINE_EXCEEDED.value
        except EngineFailure as failure:
            crash = await self._is_crash(failure, began_s)
            return self._failed(
                job,
                attempt,
                work,
                failure.cause,
                str(failure),
                failure.http_status,
                crash=crash,
                told=failure.message,
            )
        except Exception as error:
            state.log.error("attempt broke", job=job, error=where_broke(error))
            told = f"in the agent: {where_broke(error)}"
            return self._failed(job, attempt, work, FailureCause.ENGINE_ERROR, f"{told} {error!r}", told=told)
        state.note_token(job)
        if prefilled is not None:
            answer = Answer()
            self._prefills.first_token(answer, submitted_s, state.clock.monotonic())
            prefill_us = answer.prefill_us
        now_ms = state.server_clock.now_ms()
        usage = prefilled.usage if prefilled is not None else Usage()
        handoff = Handoff(
            node=state.identity.node,
            kv_transfer_params=prefilled.kv_transfer_params if prefilled is not None else NO_PARAMETERS,
            expires_ms=now_ms + KV_LEASE_MS,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            predicted_cached_tokens=hit_tokens,
            prefill_us=prefill_us,
            prefilled_ms=now_ms,
        )
        ending = Ending(
            job=job,
            kind="handoff",
            ref=work.ref,
            id=work.id,
            payload=codec.encode(handoff),
            checkpoint=checkpoint,
        )
        return ending, "prefilled" if prefilled is not None else "unsplit"

    async def attempt(
        self,
        job: str,
        attempt: Attempt,
        work: Work,
        *,
        hit_tokens: int = 0,
        checkpoint: bytes = b"",
        handoff: Handoff | None = None,
    ) -> tuple[Ending, str]:
        """Run one attempt; how it ended, and the reason or cause for metrics.

        Args:
            hit_tokens: what the leader expected of the engine's cache.
            checkpoint: what the attempt before left.
            handoff: where its prompt was computed.
        """
        state = self._state
        claimed_ms, began_s = state.server_clock.now_ms(), state.clock.monotonic()
        answer = Answer()
        stream = ReplyStream(self._replies, work, attempt, state.identity.node, self._pacer, state.metrics)
        if (held := state.held.get(job)) is not None:
            held.checkpoint = lambda: stream.checkpoint
        kind, reason, message = OutcomeKind.COMPLETED, Reason.FINISHED, ""
        try:
            async with asyncio.timeout(self._seconds_left(work)):
                await self._generate(job, attempt, work, answer, stream, checkpoint, handoff)
        except TimeoutError:
            kind, reason = OutcomeKind.EVICTED, Reason.DEADLINE_EXCEEDED
            message = f"deadline passed after {answer.tokens} tokens"
        except EngineFailure as failure:
            crash = await self._is_crash(failure, began_s)
            await stream.publish_rest()
            return self._failed(
                job,
                attempt,
                work,
                failure.cause,
                str(failure),
                failure.http_status,
                stream.checkpoint,
                crash=crash,
                told=failure.message,
            )
        except LogRefused as error:
            return self._failed(
                job, attempt, work, FailureCause.REPLY_UNWRITABLE, str(error), told=str(error)
            )
        except Exception as error:
            state.log.error("attempt broke", job=job, error=where_broke(error))
            told = f"in the agent: {where_broke(error)}"
            return self._failed(job, attempt, work, FailureCause.ENGINE_ERROR, f"{told} {error!r}", told=told)
        finally:
            stream.close()
        usage = answer.whole_usage()
        prefill_us = answer.prefill_us if not answer.resumed_tokens else 0
        prefill_node = ""
        if handoff is not None and handoff.has_blocks:
            # This engine had all of the prompt from the other, which knows what it had cached of it.
            usage = msgspec.structs.replace(usage, cached_tokens=handoff.cached_tokens)
            hit_tokens, prefill_us = handoff.predicted_cached_tokens, 0
            prefill_node = handoff.node
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
            prefill_node=prefill_node,
            model=work.model,
            choices=answer.choices(),
            usage=usage,
            timing=Timing(
                appended=work.appended_ms,
                claimed=claimed_ms,
                first_token=answer.first_token_ms,
                ended=state.server_clock.now_ms(),
                prefill_us=prefill_us,
            ),
            predicted_cached_tokens=hit_tokens,
        )
        cached = outcome.usage.cached_tokens
        state.metrics.unexplained_hits.inc(max(0, cached - hit_tokens))
        if answer.first_token_ms and not answer.resumed_tokens:
            state.metrics.first_token_s.observe((answer.first_token_ms - claimed_ms) / 1000)
        payload = codec.encode(outcome)
        return Ending(job=job, kind="outcome", ref=work.ref, id=work.id, payload=payload), reason.value

    async def _is_crash(self, failure: EngineFailure, began_s: float) -> bool:
        """Whether the engine died of the attempt that failed; one that fell silent is to be looked at."""
        if failure.cause is FailureCause.STALLED:
            self._state.is_suspect = True
        died = failure.cause in _MAY_BE_ITS_END and await self._check_engine(began_s)
        return died and failure.reached

    def _seconds_left(self, work: Work) -> float | None:
        """Time until the deadline.

        Raises:
            TimeoutError: it has passed; a timeout would let it run as far as to its first wait.
        """
        if not work.deadline_at_ms:
            return None
        left_s = (work.deadline_at_ms - self._state.server_clock.now_ms()) / 1000
        if left_s <= 0:
            raise TimeoutError
        return left_s

    async def _generate(
        self,
        job: str,
        attempt: Attempt,
        work: Work,
        answer: Answer,
        stream: ReplyStream,
        checkpoint: bytes,
        handoff: Handoff | None,
    ) -> None:
        if stray := stray_route(work, self._names):
            raise EngineFailure(FailureCause.REFUSED, stray)
        body = await self._body(work)
        plan = continuable(work.endpoint, body)
        stream.keeps_checkpoint = plan is not None
        if plan is not None and checkpoint:
            result = await self._go_on(job, attempt, work, body, plan, answer, stream, checkpoint)
            self._state.metrics.resumes.labels(result.value).inc()
            self._state.log.info(
                "attempt met a checkpoint", job=job, result=result.value, tokens=answer.resumed_tokens
            )
            if result in {Resume.CONTINUED, Resume.FINISHED}:
                self._state.metrics.resumed_tokens.inc(answer.resumed_tokens)
                return
        await stream.begin()
        if handoff is None or not handoff.has_blocks or checkpoint:
            await self._run(job, work, body, answer, stream)
            return
        body = decode_body(body, handoff.kv_transfer_params)
        try:
            async with asyncio.timeout(TRANSFER_TIMEOUT_S) as pull:
                await self._run(job, work, body, answer, stream, pull)
        except TimeoutError:
            if not pull.expired():
                raise
            raise EngineFailure(
                FailureCause.TRANSFER,
                f"no token within {TRANSFER_TIMEOUT_S:g} s of a prompt computed at {handoff.node}",
            ) from None
        except EngineFailure as failure:
            if answer.tokens or failure.cause not in _MAY_BE_ITS_PULL:
                raise
            raise EngineFailure(
                FailureCause.TRANSFER,
                f"going on from a prompt computed at {handoff.node}: {failure.message}",
                said=failure.said,
                http_status=failure.http_status,
            ) from None

    async def _run(
        self,
        job: str,
        work: Work,
        body: bytes,
        answer: Answer,
        stream: ReplyStream,
        pull: asyncio.Timeout | None = None,
    ) -> None:
        """Stream one run of the engine; with the first token a `pull` of its prompt has come to its end."""
        clock = self._state.clock
        submitted_s = clock.monotonic()
        is_first = True
        async with contextlib.aclosing(self._engine.stream(work, body)) as pieces:
            async for piece in pieces:
                if is_first and piece.choices:
                    is_first = False
                    if pull is not None:
                        pull.reschedule(None)
                    self._prefills.first_token(answer, submitted_s, clock.monotonic())
                    self._state.note_token(job)
                answer.add(piece, self._state.server_clock.now_ms())
                await stream.add(piece)
        await stream.end(answer.finish_reason)

    async def _go_on(
        self,
        job: str,
        attempt: Attempt,
        work: Work,
        body: bytes,
        plan: Continuable,
        answer: Answer,
        stream: ReplyStream,
        checkpoint: bytes,
    ) -> Resume:
        """Answer from where earlier attempts ended; unless that can't be, nothing is left to do after it."""
        own = await stream.take_over(checkpoint)
        trail = await self._trail(work, attempt, checkpoint, own)
        if trail is None:
            return Resume.UNREADABLE
        if not trail.is_sound or not trail.ids:
            return Resume.UNSOUND
        known, prompt = len(trail.ids), plan.prompt_ids
        if prompt is None:
            prompt = await self._engine.prompt_ids(work, body)
        is_ended = bool(trail.finish_reason)
        if not is_ended and (prompt is None or await self._engine.text_of(work, trail.ids) != trail.text):
            # The text may end before a character that the last tokens only begin.
            return Resume.UNKNOWN_TOKENS
        prompt = prompt or ()
        answer.resume(trail, len(prompt))
        stream.go_on_from(known)
        if is_ended or known >= plan.max_tokens:
            answer.finish(trail.finish_reason or "length")
            await stream.end(answer.finish_reason)
            return Resume.FINISHED
        again = msgspec.structs.replace(work, endpoint=Endpoint.COMPLETIONS)
        try:
            await self._run(job, again, plan.body(prompt, trail.ids), answer, stream)
        except EngineFailure as failure:
            if failure.cause is not FailureCause.REFUSED or answer.tokens > known:
                raise
            answer.forget()
            return Resume.REFUSED
        return Resume.CONTINUED

    async def _trail(self, work: Work, attempt: Attempt, checkpoint: bytes, own: Place) -> Trail | None:
        """What clients show; None when it can't be read."""
        try:
            began = codec.checkpoints.decode(checkpoint)
            if began.partition != own.partition or self._history is None:
                return None
            topic = (work.reply_to and work.reply_to.topic) or self._history.topic
            published = await self._history.read(
                topic, own.partition, began.offset, own.offset, work.id.encode()
            )
            trail = Trail(attempt)
            for record in published:
                chunk = codec.chunks.decode(record.value)
                if chunk.ref == work.ref:
                    trail.read(chunk, record.at_ms)
        except (LogUnavailable, LogRefused, codec.MalformedRecord) as error:
            self._state.log.warning("published tokens can't be read back", id=work.id, error=str(error))
            return None
        return trail

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
        checkpoint: bytes = b"",
        *,
        crash: bool = False,
        told: str = "",
    ) -> tuple[Ending, str]:
        """End an attempt as failed; `told` is what of `message` may stand in a log."""
        failed = FailedAttempt(
            attempt=str(attempt),
            node=self._state.identity.node,
            cause=cause,
            message=message[:2000],
            http_status=http_status,
            crash=crash,
        )
        self._state.log.info(
            "attempt failed",
            job=job,
            cause=cause.value,
            http_status=http_status,
            crash=crash,
            message=told[:500],
        )
        return failed_ending(job, work.ref, work.id, failed, checkpoint=checkpoint), cause.value
