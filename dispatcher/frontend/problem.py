"""What an HTTP client is told when it gets no answer: OpenAI's error object, and what leads to it. Pure.

Every ending of a request that is not `Completed` has its status here, once, for answers and for streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from dispatcher.protocol.outcome import Outcome, OutcomeKind, Reason

CLIENT_LEFT = 499
RETRY_AFTER_MS = 1000

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    CLIENT_LEFT: "cancelled_error",
    504: "timeout_error",
}
_REJECTED = {
    Reason.TOO_LARGE: 413,
    Reason.DEADLINE_PASSED: 504,
    Reason.ID_IN_USE: 409,
    Reason.UNKNOWN_MODEL: 404,
    # These are no fault of the HTTP client: the record is this process's.
    Reason.UNSUPPORTED_VERSION: 503,
    Reason.REPLY_ROUTE_UNKNOWN: 502,
    Reason.BODY_UNREADABLE: 502,
    Reason.OVERLOADED: 429,
    Reason.DEADLINE_UNREACHABLE: 429,
    Reason.NO_CAPACITY: 503,
}
_CODES: dict[Reason, tuple[str, str | None]] = {
    Reason.UNKNOWN_MODEL: ("model_not_found", "model"),
    Reason.PROMPT_TOO_LONG: ("context_length_exceeded", None),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """An error as HTTP tells it.

    `may_retry` is False when asking again at once would repeat what was tried to its end already: the
    OpenAI SDKs, which otherwise repeat 408, 409, 429 and 5xx by themselves, then leave it.
    `retry_after_ms` is when to, of 429 and 503.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    may_retry: bool = True
    retry_after_ms: int = RETRY_AFTER_MS

    @property
    def type(self) -> str:
        """OpenAI's class of errors."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def headers(self) -> dict[str, str]:
        """What its answer says besides the body."""
        headers = {} if self.may_retry else {"x-should-retry": "false"}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in {429, 503} and self.may_retry:
            headers["Retry-After"] = str(math.ceil(self.retry_after_ms / 1000))
            # To the millisecond for the OpenAI SDKs, which prefer it.
            headers["retry-after-ms"] = str(self.retry_after_ms)
        return headers

    @property
    def body(self) -> bytes:
        """OpenAI's error object as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


class Refused(Exception):
    """A request that gets a `Problem` for an answer."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refused(status: int, message: str, *, code: str | None = None, param: str | None = None) -> Refused:
    """Make the exception for a problem that asking again may mend."""
    return Refused(Problem(status=status, message=message, code=code, param=param))


def problem_of(outcome: Outcome) -> Problem | None:
    """What to tell of an ending; None when it is an answer."""
    reason = outcome.reason
    code, param = _CODES.get(reason, (reason.value, None))
    match outcome.kind:
        case OutcomeKind.COMPLETED:
            if outcome.choices:
                return None
            # Too large to repeat in one record: nothing then proves that what was streamed is whole.
            status, code = 502, "answer_too_large"
        case OutcomeKind.REJECTED:
            status = _REJECTED.get(reason, 400)
        case OutcomeKind.EVICTED:
            status = 504
        case OutcomeKind.FAILED:
            status = 502
            if reason is Reason.ENGINE_REFUSED and 400 <= outcome.http_status < 500:
                status = outcome.http_status
        case OutcomeKind.CANCELLED:
            # Who still hears of it did not leave: this frontend stood still.
            status = 503 if reason is Reason.CLIENT_GONE else CLIENT_LEFT
    return Problem(
        status=status,
        message=outcome.message or f"the request ended as {outcome.kind}({reason})",
        code=code,
        param=param,
        may_retry=outcome.retry_after_ms > 0
        or (outcome.kind, reason) == (OutcomeKind.CANCELLED, Reason.CLIENT_GONE),
        retry_after_ms=outcome.retry_after_ms or RETRY_AFTER_MS,
    )
