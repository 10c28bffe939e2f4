"""Coefficients of the step time, by least squares over spans of measured time.

The model is linear, so a span of engine time is a row: what was computed in it, and how long it lasted.
Three kinds of spans tell the coefficients apart: from one first token to the next while cold prompts queue
at a run's beginning; from sending to the first token while hardly anybody else is there; and from the first
token of an answer to its last. Each kind counts the same, its errors are relative, none is negative, and
spans whose error is beyond three times the median are set aside.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from tests.bench.calibration_trace import Measured, Run

STEP_TOKENS = 8_192
"""`max_num_batched_tokens` of the measured engines."""
SHORTEST_STEP_S = 0.003
"""Some answers came in bursts: a shorter time between tokens is no step of this model."""
SHORTEST_ANSWER = 200
QUIET_USERS = 2
FIT_USERS = 16
"""Larger runs are left to the replay: what it says of them is a prediction."""
ROUNDS = 8
SWEEPS = 50_000
COEFFICIENTS = (
    "request_s",
    "fixed_s",
    "prefill_token_s",
    "attention_s",
    "prefill_context_s",
    "decode_sequence_s",
    "decode_context_s",
)


class Kind(StrEnum):
    """What a span of measured time is."""

    COLD = "cold prompt"
    WARM = "warm prompt"
    DECODE = "answer"


@dataclass(frozen=True, kw_only=True)
class Span:
    """`features` are in the order of `COEFFICIENTS`; `batch` the mean number of decoding sequences."""

    kind: Kind
    features: tuple[float, ...]
    seconds: float
    batch: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Coefficients by name, and for each kind of span how many and what relative errors they leave."""

    coefficients: dict[str, float]
    errors: dict[str, dict[str, float]]


def fit(runs: Sequence[Run], kv_tokens: int) -> Fit:
    """Fit one engine's runs; `kv_tokens` is what its KV cache holds."""
    spans = [
        span
        for run in runs
        if run.users <= FIT_USERS
        for spans in (_cold, _warm, _answers)
        for span in spans(run, kv_tokens)
    ]
    features = np.array([span.features for span in spans])
    seconds = np.array([span.seconds for span in spans])
    kinds = np.array([span.kind for span in spans])
    kept = np.ones(len(spans), dtype=bool)
    errors = np.zeros(len(spans))
    solution = np.zeros(len(COEFFICIENTS))
    for _ in range(ROUNDS):
        weights = np.zeros(len(spans))
        for kind in Kind:
            chosen = kept & (kinds == kind)
            weights[chosen] = 1 / np.sqrt(chosen.sum())
        solution = _not_negative(features / seconds[:, None] * weights[:, None], weights)
        errors = features @ solution / seconds - 1
        for kind in Kind:
            own = kinds == kind
            kept[own] = np.abs(errors[own]) < 3 * np.median(np.abs(errors[own & kept]))
    return Fit(
        coefficients=dict(zip(COEFFICIENTS, solution.tolist(), strict=True)),
        errors={kind.value: spread(errors[kinds == kind].tolist()) for kind in Kind},
    )


def spread(errors: list[float]) -> dict[str, float]:
    """Count, median and 90th percentile of the absolute errors, and the median error."""
    absolute = sorted(abs(error) for error in errors)
    return {
        "count": len(errors),
        "median": round(statistics.median(absolute), 3),
        "p90": round(absolute[int(0.9 * len(absolute))], 3),
        "bias": round(statistics.median(errors), 3),
    }


def _not_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients: one coefficient after the other, until none moves."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    gram = (matrix / scale).T @ (matrix / scale)
    target = (matrix / scale).T @ wanted
    solution = np.zeros(len(scale))
    for _ in range(SWEEPS):
        before = solution.copy()
        for place in range(len(scale)):
            solution[place] = max(0.0, solution[place] + target[place] - gram[place] @ solution)
        if np.abs(solution - before).max() <= 1e-10 * np.abs(solution).max():
            break
    return np.asarray(solution / scale)


def prefill(before: int, tokens: int) -> tuple[int, int, int, int]:
    """(steps, tokens, pairs, context read back) of computing `tokens` that follow `before` others."""
    steps = -(-tokens // STEP_TOKENS)
    pairs = tokens * (tokens + 2 * before)
    read_back = sum(before + step * STEP_TOKENS for step in range(steps))
    return steps, tokens, pairs, read_back


def _cold(run: Run, kv_tokens: int) -> Iterable[Span]:
    """Spans between first tokens while only cold prompts were computed and the KV cache had room."""
    done: list[Measured] = []
    for one in sorted(run.begun(), key=lambda one: one.first_s):
        if one.cached or sum(other.prompt for other in done) + one.prompt > 0.9 * kv_tokens:
            return
        if done and one.sent_s < done[-1].first_s < one.first_s - SHORTEST_STEP_S:
            # The end of one prompt shares a step with the next one's beginning.
            steps = one.prompt / STEP_TOKENS
            _, tokens, pairs, read_back = prefill(0, one.prompt)
            decoding = [other for other in done if other.ended_s > one.first_s]
            context = sum(other.prompt for other in decoding)
            yield Span(
                kind=Kind.COLD,
                features=(0, steps, tokens, pairs, read_back, steps * len(decoding), steps * context),
                seconds=one.first_s - done[-1].first_s,
            )
        done.append(one)


def _warm(run: Run, kv_tokens: int) -> Iterable[Span]:
    """Spans from sending to the first token where nothing queues."""
    if run.users > QUIET_USERS:
        return
    for one in run.begun():
        if one.cached:
            steps, tokens, pairs, read_back = prefill(one.prompt - one.uncached, one.uncached)
            yield Span(
                kind=Kind.WARM, features=(1, steps, tokens, pairs, read_back, 0, 0), seconds=one.ttft_s
            )


def _answers(run: Run, kv_tokens: int) -> Iterable[Span]:
    """Spans from an answer's first token to its last, in runs whose conversations all fit the KV cache."""
    if run.conversation_tokens > kv_tokens:
        return
    finished = run.finished()
    for one in finished:
        lasted_s = one.ended_s - one.first_s
        if one.output < SHORTEST_ANSWER or one.itl_s < SHORTEST_STEP_S:
            continue

        def mean(of: Callable[[Measured], float], one: Measured = one, lasted_s: float = lasted_s) -> float:
            """The mean over the answer's time of what each one decoding adds."""
            return sum(
                of(other)
                * max(0.0, min(one.ended_s, other.ended_s) - max(one.first_s, other.first_s))
                / lasted_s
                for other in finished
            )

        batch = mean(lambda other: 1.0)
        context = mean(lambda other: other.prompt + other.output / 2)
        computed = [
            prefill(other.prompt - other.uncached, other.uncached)
            for other in finished
            if one.first_s < other.first_s < one.ended_s
        ]
        _, tokens, pairs, read_back = (sum(column) for column in zip((0, 0, 0, 0), *computed, strict=True))
        steps = one.output - 1
        yield Span(
            kind=Kind.DECODE,
            features=(0, steps, tokens, pairs, read_back, steps * batch, steps * context),
            seconds=lasted_s,
            batch=batch,
        )
