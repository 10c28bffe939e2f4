"""Send a trace's requests through a client, open loop, and note what became of each.

A request is sent when its time has come, whether or not earlier ones were answered; when the sender
itself falls behind, its lateness is in the result. Afterwards it waits for the outcomes still missing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from dispatcher.client.client import Client, Progress
from dispatcher.errors import FlexLBError
from dispatcher.protocol.names import Lane
from dispatcher.protocol.outcome import Outcome, OutcomeKind
from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.protocol.request import DEFAULT_PRIORITY
from dispatcher.replay.arrivals import schedule
from dispatcher.replay.synthesis import synthesise
from dispatcher.replay.traces import TraceRequest


@dataclass(kw_only=True)
class Tally:
    """A replay so far. First tokens by the broker's clock, of requests that completed."""

    planned: int
    sent: int = 0
    answered: int = 0
    first_tokens: int = 0
    ttft_sum_ms: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ttft_ms(self) -> float | None:
        """Mean time to first token."""
        return self.ttft_sum_ms / self.first_tokens if self.first_tokens else None

    @property
    def hit_ratio(self) -> float | None:
        """Share of prompt tokens that engines had cached."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    def note(self, result: RequestResult) -> None:
        """Count an answered request."""
        self.answered += 1
        if result.kind != OutcomeKind.COMPLETED:
            return
        self.prompt_tokens += result.prompt_tokens
        self.cached_tokens += result.cached_tokens
        if result.ttft_ms is not None:
            self.first_tokens += 1
            self.ttft_sum_ms += result.ttft_ms


OnProgress = Callable[[Tally], None]
"""Called with the tally after each change."""


@dataclass(kw_only=True, slots=True)
class RequestResult:
    """What became of one request; times in milliseconds, None where there was nothing to see.

    `ttft_ms` and `total_ms` go by the broker's clock, from the append of the request to the append of
    its first tokens and of its outcome; the `local` ones by this process's, from before sending.
    """

    id: str
    late_ms: float
    prompt_tokens: int = 0
    unsent: str = ""
    kind: str = ""
    reason: str = ""
    node: str = ""
    cached_tokens: int = 0
    predicted_cached_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 0
    outcomes: int = 0
    ttft_ms: float | None = None
    ttft_local_ms: float | None = None
    total_ms: float | None = None
    total_local_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayResult:
    """A whole replay. `began_ms` and `ended_ms` are epoch times of this machine."""

    requests: list[RequestResult]
    began_ms: int
    ended_ms: int
    duration_s: float
    speed: float
    token_scale: float


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """How a trace's requests are made and sent; see `schedule` and `synthesise`.

    `timeout_s` is the patience for missing outcomes after the last request. `run_id` begins each id; it
    is random when empty, since an id can't be used for something else within ten minutes.
    """

    model: str
    speed: float = 1.0
    limit: int | None = None
    poisson: Random | None = None
    token_scale: float = 1.0
    block_size: int = BLOCK_TOKENS
    lane: Lane = Lane.INTERACTIVE
    priority: int = DEFAULT_PRIORITY
    deadline_ms: int | None = None
    timeout_s: float = 600.0
    run_id: str = ""


async def replay(
    client: Client,
    requests: Sequence[TraceRequest],
    settings: ReplaySettings,
    on_progress: OnProgress = lambda tally: None,
) -> ReplayResult:
    """Replay a trace; returns when every request has its outcome or patience ends."""
    plan = schedule(requests, speed=settings.speed, limit=settings.limit, poisson=settings.poisson)
    run_id = settings.run_id or uuid.uuid4().hex[:12]
    results: list[RequestResult] = []
    sending: dict[asyncio.Task[None], RequestResult] = {}
    began_ms, began_s = _epoch_ms(), time.monotonic()
    tally = Tally(planned=len(plan))

    def ended(task: asyncio.Task[None]) -> None:
        tally.note(sending.pop(task))
        on_progress(tally)

    async with asyncio.TaskGroup() as group:
        for index, (at_s, request) in enumerate(plan):
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            late_ms = (time.monotonic() - began_s - at_s) * 1000
            results.append(RequestResult(id=f"{run_id}-{index}", late_ms=late_ms))
            task = group.create_task(_send(client, request, index, settings, results[-1]))
            sending[task] = results[-1]
            task.add_done_callback(ended)
            tally.sent += 1
            on_progress(tally)
        if sending:
            _, missing = await asyncio.wait(sending, timeout=settings.timeout_s)
            for task in missing:
                task.cancel()
    for result in results:
        _note_progress(result, client)
    return ReplayResult(
        requests=results,
        began_ms=began_ms,
        ended_ms=_epoch_ms(),
        duration_s=time.monotonic() - began_s,
        speed=settings.speed,
        token_scale=settings.token_scale,
    )


def _epoch_ms() -> int:
    return int(time.time() * 1000)


async def _send(
    client: Client, request: TraceRequest, index: int, settings: ReplaySettings, result: RequestResult
) -> None:
    made = synthesise(
        request,
        index=index,
        model=settings.model,
        token_scale=settings.token_scale,
        block_size=settings.block_size,
    )
    result.prompt_tokens = made.tokens.count
    try:
        await client.submit(
            settings.model,
            made.endpoint,
            made.body,
            id=result.id,
            lane=settings.lane,
            priority=settings.priority,
            deadline_ms=settings.deadline_ms,
            tokens=made.tokens,
        )
        outcome = await client.outcome(result.id)
    except (FlexLBError, ValueError) as error:
        result.unsent = str(error)
        return
    _note_outcome(result, outcome)
    _note_progress(result, client)


def _note_outcome(result: RequestResult, outcome: Outcome) -> None:
    result.kind, result.reason, result.node = outcome.kind.value, outcome.reason.value, outcome.node
    result.cached_tokens = outcome.usage.cached_tokens
    result.completion_tokens = outcome.usage.completion_tokens
    result.predicted_cached_tokens = outcome.predicted_cached_tokens


def _note_progress(result: RequestResult, client: Client) -> None:
    try:
        seen: Progress = client.progress(result.id)
    except ValueError:
        return  # never sent, or ended so long ago that the client has forgotten it
    result.attempts, result.outcomes = seen.attempts, seen.outcomes
    if seen.appended_ms is not None:
        if seen.first_token_ms is not None:
            result.ttft_ms = seen.first_token_ms - seen.appended_ms
        if seen.ended_ms is not None:
            result.total_ms = seen.ended_ms - seen.appended_ms
    if seen.first_token_s is not None:
        result.ttft_local_ms = (seen.first_token_s - seen.submitted_s) * 1000
    if seen.ended_s is not None:
        result.total_local_ms = (seen.ended_s - seen.submitted_s) * 1000
