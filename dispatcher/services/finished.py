"""What is told and learned of each published outcome: the canonical log line, metrics, the node's figures."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from dispatcher.protocol.outcome import OutcomeKind, Reason, Timing, Usage
from dispatcher.scheduling.fleet import Fleet
from dispatcher.services.publication import ReadyEnding
from dispatcher.services.state import LeaderState


class _Line(msgspec.Struct):
    """What the canonical log line takes from an outcome."""

    kind: str
    reason: str
    tenant: str = ""
    node: str = ""
    attempt: str = ""
    usage: Usage = Usage()
    timing: Timing = Timing()
    predicted_cached_tokens: int = 0


_line = msgspec.json.Decoder(_Line)


def note_finished(state: LeaderState, ref: str, ending: ReadyEnding) -> None:
    """Log one published ending, count it, and learn from it."""
    if ending.publication is None or not ending.publication.outcome:
        return
    try:
        line = _line.decode(ending.publication.outcome)
    except msgspec.DecodeError as error:
        state.log.warning("request finished, its outcome is not ours", ref=ref, error=str(error))
        return
    state.metrics.outcomes.labels(_known(line.kind, OutcomeKind), _known(line.reason, Reason)).inc()
    timing = line.timing
    if line.kind == OutcomeKind.COMPLETED:
        _learn(state, line)
    state.log.info(
        "request finished",
        ref=ref,
        id=ending.id,
        tenant=line.tenant,
        kind=line.kind,
        reason=line.reason,
        node=line.node,
        attempt=line.attempt,
        prompt_tokens=line.usage.prompt_tokens,
        completion_tokens=line.usage.completion_tokens,
        cached_tokens=line.usage.cached_tokens,
        predicted_cached_tokens=line.predicted_cached_tokens,
        queue_ms=timing.claimed - timing.appended if timing.claimed else None,
        ttft_ms=timing.first_token - timing.appended if timing.first_token else None,
        total_ms=timing.ended - timing.appended,
    )


def _learn(state: LeaderState, line: _Line) -> None:
    usage = line.usage
    if line.attempt.rpartition("_")[2] != "1":
        state.retries.budget.answered(state.clock.monotonic())
    state.metrics.hit_tokens.labels("prompt").inc(usage.prompt_tokens)
    state.metrics.hit_tokens.labels("reported").inc(usage.cached_tokens)
    state.metrics.hit_tokens.labels("predicted").inc(line.predicted_cached_tokens)
    node = state.fleet.nodes.get(line.node)
    timing = line.timing
    took_s = max(0, timing.ended - timing.claimed) / 1000 if timing.claimed else 0.0
    if node is not None and node.breaker.succeeded(state.clock.monotonic() - took_s):
        state.log.info("node trusted again", node=node.name)
    if node is not None:
        node.answers.observe(usage.completion_tokens)
    learn_speed(state.fleet, line.node, usage, line.timing.prefill_us)


def learn_speed(fleet: Fleet, node: str, usage: Usage, prefill_us: int) -> None:
    """Learn from how long a prompt took a node; 0 when that can't be told."""
    known = fleet.nodes.get(node)
    if known is not None and prefill_us:
        uncached = usage.prompt_tokens - usage.cached_tokens
        known.predictor.observe(uncached, usage.cached_tokens, prefill_us / 1e6)


def _known(text: str, kind: type[StrEnum]) -> str:
    """A label from a closed list: an agent of a later release may send what we do not know."""
    return text if text in kind.__members__.values() else "other"
