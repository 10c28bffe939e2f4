"""One request and its answer over HTTP, from its submission to its last byte.

Whoever runs it decides whether there is room; it decides what is sent. Its time is bounded: by its
deadline and the wait for an outcome beyond it, or by `stop`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from dispatcher.client import Client, Ended, Restarted, TextAdded
from dispatcher.errors import LogRefused, LogUnavailable
from dispatcher.frontend.openai import AnswerStream, Ask, whole_answer
from dispatcher.frontend.problem import CLIENT_LEFT, Problem, problem_of
from dispatcher.frontend.request_headers import REQUEST_ID, RequestHeaders
from dispatcher.frontend.sent import Sent
from dispatcher.protocol.request import Tokens
from dispatcher.telemetry.logging import Log, where_broke

LAST_WORDS_S = 1.0
"""How long a client that reads slowly is waited for when its time is up."""
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
STOPPING = Problem(
    status=503, code="stopping", message="this frontend is stopping: ask again, another one answers"
)
INTERNAL = Problem(status=500, code="internal_error", message="this frontend failed; its log says why")
RESTARTED = Problem(
    status=502,
    code="restarted",
    message="the node that wrote this answer failed, and the answer of another one does not begin with what "
    "was streamed already: ask again",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request as it goes to the queue. `shown_id` is what the client knows it by."""

    id: str
    shown_id: str
    ask: Ask
    model: str
    headers: RequestHeaders
    deadline_ms: int
    tokens: Tokens | None


class Exchange:
    """Runs one question.

    Args:
        patience_s: time until it ends without an outcome.
        submitted: called once Kafka has the body, or will not have it.
        first_token: called with the time of the first token.
    """

    def __init__(
        self,
        request: web.Request,
        question: Question,
        client: Client,
        *,
        patience_s: float,
        submitted: Callable[[], None],
        first_token: Callable[[float], None],
        log: Log,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.question = question
        self.client = client
        self.is_answered = False
        """Whether the outcome is known: then there is nothing left to cancel."""
        self._request = request
        self._submitted = submitted
        self._first_token = first_token
        self._log = log
        self._patience = asyncio.timeout(patience_s)
        self._monotonic = monotonic
        self._is_stopped = False
        self._created_s = int(time.time())
        self._response: web.StreamResponse | None = None
        self._stream = AnswerStream(
            question.ask, id=question.id, model=question.model, created_s=self._created_s
        )

    @property
    def is_to_be_cancelled(self) -> bool:
        """Whether nobody wants its answer once this exchange is over."""
        return not self.is_answered and not self.question.headers.is_detached

    def stop(self) -> None:
        """End it now, with an error."""
        self._is_stopped = True
        # It refuses when its time is up already, or the answer is at its last bytes.
        with suppress(RuntimeError):
            self._patience.reschedule(0)

    async def run(self) -> tuple[web.StreamResponse, Problem | None]:
        """Answer; returns the response and what went wrong, if anything did.

        Raises:
            CancelledError, ConnectionError: the client left.
        """
        try:
            async with self._patience:
                await self._submit()
                if self.question.ask.is_streamed:
                    return await self._answer_in_stream()
                return await self._answer_whole()
        except TimeoutError:
            if not self._patience.expired():
                raise
            problem = STOPPING if self._is_stopped else self._too_late()
        except LogRefused as error:
            self.is_answered = True
            problem = Problem(status=413, code="too_large", message=str(error), may_retry=False)
        except LogUnavailable as error:
            problem = Problem(status=503, code="queue_unavailable", message=str(error))
        except ConnectionError:
            raise
        except Exception as error:
            self._log.error("request failed", id=self.question.id, error=where_broke(error))
            problem = INTERNAL
        return await self._fail(problem)

    async def _submit(self) -> None:
        question = self.question
        headers = question.headers
        try:
            await self.client.submit(
                question.model,
                question.ask.endpoint,
                question.ask.body,
                id=question.id,
                lane=headers.lane,
                priority=headers.priority,
                deadline_ms=question.deadline_ms,
                ttft_slo_ms=headers.ttft_slo_ms,
                tokens=question.tokens,
                cache_salt=question.ask.cache_salt,
                detached=headers.is_detached,
                traceparent=headers.traceparent,
            )
        finally:
            self._submitted()

    def _too_late(self) -> Problem:
        return Problem(
            status=504,
            code="no_outcome",
            message=f"no outcome came for {self.question.id} within its deadline of "
            f"{self.question.deadline_ms} ms and the wait beyond it: does a dispatcher lead this pool?",
            may_retry=False,
        )

    async def _answer_whole(self) -> tuple[web.StreamResponse, Problem | None]:
        question = self.question
        outcome = await self.client.outcome(question.id)
        self.is_answered = True
        first_token_s = self.client.progress(question.id).first_token_s
        if first_token_s is not None:
            self._first_token(first_token_s)
        if (problem := problem_of(outcome)) is not None:
            return await self._fail(problem)
        body = whole_answer(
            question.ask, outcome, id=question.id, model=question.model, created_s=self._created_s
        )
        headers = {REQUEST_ID: question.shown_id}
        return web.Response(body=body, content_type="application/json", headers=headers), None

    async def _answer_in_stream(self) -> tuple[web.StreamResponse, Problem | None]:
        sent = Sent()
        async for event in self.client.stream(self.question.id):
            match event:
                case Restarted():
                    sent.restart()
                case TextAdded(choices=choices):
                    fresh = sent.take(choices)
                    if fresh is None:
                        return await self._fail(RESTARTED)
                    if fresh:
                        if self._response is None:
                            self._first_token(self._monotonic())
                        await self._write(self._stream.added(fresh))
                case Ended(outcome=outcome):
                    self.is_answered = True
                    problem = problem_of(outcome)
                    if problem is None and not sent.is_whole:
                        problem = RESTARTED
                    if problem is not None:
                        return await self._fail(problem)
                    await self._write(self._stream.ended(outcome))
        assert self._response is not None, "a stream of events ends with its outcome"
        return self._response, None

    async def _write(self, data: bytes) -> None:
        if self._response is None:
            headers = {**STREAM_HEADERS, REQUEST_ID: self.question.shown_id}
            self._response = web.StreamResponse(headers=headers)
            await self._response.prepare(self._request)
        await self._response.write(data)

    async def _fail(self, problem: Problem) -> tuple[web.StreamResponse, Problem | None]:
        """Say what went wrong: as the answer, or inside the stream that has begun."""
        if self._response is None:
            return problem_response(problem, self.question.shown_id), problem
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self._response.write(self._stream.failed(problem))
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
        return self._response, problem


def problem_response(problem: Problem, shown_id: str) -> web.Response:
    """A problem as an answer of its own."""
    return web.Response(
        status=problem.status,
        # The reason of 499 is nginx's; aiohttp knows none.
        reason="Client Closed Request" if problem.status == CLIENT_LEFT else None,
        body=problem.body,
        content_type="application/json",
        headers={**problem.headers, **({REQUEST_ID: shown_id} if shown_id else {})},
    )
