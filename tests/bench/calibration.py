"""Fit the engine model's step times to measured requests: `python -m tests.bench.calibration TRACE.csv.gz`.

The trace is SemiAnalysis InferenceX's per-request measurements of vLLM serving DeepSeek-R1 on B200 GPUs
(github.com/SemiAnalysisAI/InferenceX, Apache-2.0). Prefill is fitted on the runs with one or two users, in
which nothing queues; decoding on the runs with up to sixteen, each request against the mean number of
others that were decoding meanwhile and the context they had. Least squares of relative errors, coefficients
not negative. Prints a table and, with `--json FILE`, the same for machines.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_TOKENS = 64
SHORTEST_STEP_S = 0.003
"""Some answers came in bursts: a shorter time between tokens is no step of this model."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One request: tokens, seconds, and when its answer began and ended (epoch seconds)."""

    users: int
    run: tuple[str, str, str]
    uncached: int
    cached: int
    output: int
    ttft_s: float
    itl_s: float
    first_at_s: float
    ended_at_s: float


def read(path: Path) -> list[Measured]:
    """The requests of the trace that succeeded."""
    with gzip.open(path, "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["success"] == "True" and row["itl"]]
    return [
        Measured(
            users=int(row["conc"]),
            run=(row["tp"], row["conc"], row["offload"]),
            uncached=int(row["cache_miss_blocks"]) * BLOCK_TOKENS,
            cached=int(row["cache_hit_blocks"]) * BLOCK_TOKENS,
            output=int(row["output_tokens_actual"]),
            ttft_s=float(row["ttft"]),
            itl_s=float(row["itl"]),
            first_at_s=float(row["prefill_complete_time"]),
            ended_at_s=float(row["request_complete_time"]),
        )
        for row in rows
    ]


def fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[list[float], list[float]]:
    """Coefficients from 0 up, by relative least squares; and the relative errors they leave."""
    matrix = np.array(features, dtype=float) / np.array(seconds)[:, None]
    ones = np.ones(len(seconds))
    active = list(range(matrix.shape[1]))
    solution = np.zeros(matrix.shape[1])
    while active:
        found, *_ = np.linalg.lstsq(matrix[:, active], ones, rcond=None)
        if (found >= 0).all():
            solution[active] = found
            break
        active = [column for column, value in zip(active, found, strict=True) if value >= 0]
    return solution.tolist(), (matrix @ solution - 1).tolist()


def prefill(requests: list[Measured]) -> tuple[list[float], list[float]]:
    """(fixed, per token, attention) of prefills that did not queue.

    The fixed part is mostly HTTP and the tokeniser, before the engine: prompts have 75,000 tokens.
    """
    chosen = [one for one in requests if one.users <= 2 and one.ttft_s < 5]
    return fit([_prefill_features(one) for one in chosen], [one.ttft_s for one in chosen])


def _prefill_features(one: Measured) -> tuple[float, float, float]:
    return 1.0, one.uncached, one.uncached * (one.uncached + 2 * one.cached)


def decode(requests: list[Measured]) -> tuple[list[float], list[float]]:
    """(fixed, per decoding sequence, per context token) of decode steps."""
    by_run: dict[tuple[str, str, str], list[Measured]] = defaultdict(list)
    for one in requests:
        if one.users <= 16:
            by_run[one.run].append(one)
    features, seconds = [], []
    for together in by_run.values():
        for one in together:
            lasted = one.ended_at_s - one.first_at_s
            if lasted <= 0 or one.output < 32 or one.itl_s < SHORTEST_STEP_S:
                continue
            sequences = context = 0.0
            for other in together:
                overlap = min(one.ended_at_s, other.ended_at_s) - max(one.first_at_s, other.first_at_s)
                if overlap > 0:
                    sequences += overlap / lasted
                    context += overlap / lasted * (other.uncached + other.cached + other.output / 2)
            features.append((1.0, sequences, context))
            seconds.append(one.itl_s)
    return fit(features, seconds)


def summary(requests: list[Measured]) -> dict[str, dict[str, Any]]:
    """Both fits for each parallelism, with what they leave unexplained."""
    found: dict[str, dict[str, Any]] = {}
    for tp in sorted({one.run[0] for one in requests}):
        own = [one for one in requests if one.run[0] == tp]
        (fixed, token, attention), prefill_errors = prefill(own)
        (step, sequence, context), decode_errors = decode(own)
        found[tp] = {
            "prefill": {"fixed_s": fixed, "prefill_token_s": token, "attention_s": attention},
            "prefill_error": _errors(prefill_errors),
            "decode": {"fixed_s": step, "decode_sequence_s": sequence, "decode_context_s": context},
            "decode_error": _errors(decode_errors),
        }
    return found


def _errors(errors: list[float]) -> dict[str, float]:
    absolute = sorted(abs(error) for error in errors)
    return {
        "requests": len(errors),
        "median": round(statistics.median(absolute), 3),
        "p90": round(absolute[int(0.9 * len(absolute))], 3),
        "bias": round(statistics.fmean(errors), 3),
    }


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description="Fit the engine model to measured requests.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = summary(read(options.trace))
    for tp, parts in found.items():
        for part in ("prefill", "decode"):
            values = "  ".join(f"{name} {value:.3e}" for name, value in parts[part].items())
            print(f"{tp} {part:8} {values}  error {parts[part + '_error']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
