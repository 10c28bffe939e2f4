"""What a client says in headers: the request's id, urgency and lane, its trace, whether it waits. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dispatcher.frontend.problem import refused
from dispatcher.protocol.names import Lane
from dispatcher.protocol.request import DEFAULT_PRIORITY

REQUEST_ID = "X-Request-Id"
PRIORITY = "X-FlexLB-Priority"
DEADLINE = "X-FlexLB-Deadline-Ms"
TTFT_SLO = "X-FlexLB-TTFT-SLO-Ms"
LANE = "X-FlexLB-Lane"
DETACHED = "X-FlexLB-Detached"
TRACEPARENT = "traceparent"

MAX_DEADLINE_MS = 604_800_000
MAX_TTFT_SLO_MS = 86_400_000
BOOLEANS = {"true": True, "false": False}
LANES = {"interactive": Lane.INTERACTIVE, "batch": Lane.BATCH}
SEEN_CHARS = 80

_ID = re.compile(r"[\x21-\x7e]{1,200}")
_NUMBER = re.compile(r"[0-9]{1,12}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestHeaders:
    """What the headers say; None and '' where they say nothing."""

    request_id: str = ""
    priority: int = DEFAULT_PRIORITY
    deadline_ms: int | None = None
    ttft_slo_ms: int | None = None
    lane: Lane = Lane.INTERACTIVE
    is_detached: bool = False
    traceparent: str = ""


def request_id_of(headers: Mapping[str, str]) -> str:
    """The id that the client gave: 1 to 200 visible ASCII characters; '' for any other."""
    given = headers.get(REQUEST_ID, "")
    return given if _ID.fullmatch(given) else ""


def read_headers(headers: Mapping[str, str]) -> RequestHeaders:
    """Read a request's headers. An id or a trace that can't be used is left out: proxies send what they like.

    Raises:
        Refused: 400, a header of ours has a wrong value.
    """
    traceparent = headers.get(TRACEPARENT, "")
    lane = headers.get(LANE, "interactive").strip().lower()
    if lane not in LANES:
        raise _wrong(LANE, "interactive or batch", lane)
    detached = headers.get(DETACHED, "false").strip().lower()
    if detached not in BOOLEANS:
        raise _wrong(DETACHED, "true or false", detached)
    priority = _number(headers, PRIORITY, 100)
    return RequestHeaders(
        request_id=request_id_of(headers),
        priority=DEFAULT_PRIORITY if priority is None else priority,
        deadline_ms=_number(headers, DEADLINE, MAX_DEADLINE_MS),
        ttft_slo_ms=_number(headers, TTFT_SLO, MAX_TTFT_SLO_MS),
        lane=LANES[lane],
        is_detached=BOOLEANS[detached],
        traceparent=traceparent if _TRACEPARENT.fullmatch(traceparent) else "",
    )


def _number(headers: Mapping[str, str], name: str, most: int) -> int | None:
    given = headers.get(name)
    if given is None:
        return None
    if _NUMBER.fullmatch(text := given.strip()) and 1 <= int(text) <= most:
        return int(text)
    raise _wrong(name, f"a whole number from 1 to {most}", given)


def _wrong(name: str, expected: str, seen: str) -> Exception:
    message = f"header {name}: expected {expected}, seen {seen[:SEEN_CHARS]!r}"
    return refused(400, message, code="invalid_header", param=name)
