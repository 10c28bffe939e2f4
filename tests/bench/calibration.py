"""Hold the engine model against measured engines: `python -m tests.bench.calibration TRACE.csv.gz`.

The trace is SemiAnalysis InferenceX's per-request records of vLLM serving DeepSeek-R1 on B200 GPUs
(github.com/SemiAnalysisAI/InferenceX, Apache-2.0). First the coefficients of the step time are fitted to the
smaller runs and shown beside those of the profiles; then every run is sent through `EngineModel` with its
profile, and times are compared. Prints tables and, with `--json FILE`, the same for machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatcher.simulation.profile import Profile
from dispatcher.simulation.profiles import PROFILES
from tests.bench.calibration_fit import COEFFICIENTS, FIT_USERS, SHORTEST_STEP_S, fit
from tests.bench.calibration_replay import pairs, replay
from tests.bench.calibration_trace import Run, read
from tests.bench.machine import describe_machine, percentile

CLOSE = 0.25
SHORTEST_ANSWER = 32


def profile_of(tp: str) -> Profile:
    """The profile that claims to be these engines."""
    return PROFILES[f"b200-deepseek-r1-{tp}"]


def fitted(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """For each parallelism the coefficients that the runs tell, the profile's, and what errors are left."""
    found = {}
    for tp in sorted({run.tp for run in runs}):
        profile = profile_of(tp)
        own = fit([run for run in runs if run.tp == tp], profile.kv_tokens)
        found[tp] = {
            "fitted": own.coefficients,
            "profile": {name: getattr(profile, name) for name in COEFFICIENTS},
            "errors": own.errors,
        }
    return found


def compared(run: Run, kv_times: int = 1) -> dict[str, Any]:
    """One run: measured and modelled times to the first token and between tokens.

    Args:
        kv_times: how many times as much the modelled KV cache holds.
    """
    profile = profile_of(run.tp)
    modelled = replay(run, replace(profile, kv_blocks=kv_times * profile.kv_blocks))
    begun = list(pairs(run, modelled))
    ended = [
        (one, answer.ended_s - answer.first_s)
        for one, answer in begun
        if one.ended_s <= run.heard_s
        and answer.ended_s is not None
        and one.output >= SHORTEST_ANSWER
        and one.itl_s >= SHORTEST_STEP_S
    ]
    return {
        "tp": run.tp,
        "users": run.users,
        "offload": run.offload,
        "requests": len(begun),
        "ttft_s": _beside([one.ttft_s for one, _ in begun], [answer.ttft_s for _, answer in begun]),
        "itl_s": _beside(
            [one.itl_s for one, _ in ended], [lasted_s / (one.output - 1) for one, lasted_s in ended]
        ),
        "modelled_hit_share": round(modelled.hit_share, 3),
        "modelled_preemptions": modelled.preemptions,
    }


def _beside(measured: list[float], modelled: list[float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, share in (("p50", 0.5), ("p90", 0.9)):
        one, other = (
            statistics.median(values) if share == 0.5 else percentile(values, share)
            for values in (measured, modelled)
        )
        found |= {name: one, f"{name}_modelled": other, f"{name}_error": round(other / one - 1, 3)}
    return found


def print_fit(found: dict[str, dict[str, Any]]) -> None:
    """Coefficients and what they leave unexplained."""
    print(f"\nfit to runs of up to {FIT_USERS} users\n{'':18}" + "".join(f"{tp:>22}" for tp in found))
    for name in COEFFICIENTS:
        cells = (f"{own['fitted'][name]:.2e} ({own['profile'][name]:.2e})" for own in found.values())
        print(f"{name:18}" + "".join(f"{cell:>22}" for cell in cells))
    for tp, own in found.items():
        for kind, errors in own["errors"].items():
            told = ", ".join(f"{name} {value}" for name, value in errors.items())
            print(f"{tp} {kind}: relative error: {told}")


def print_replay(rows: Sequence[dict[str, Any]]) -> None:
    """One line for each run."""
    print(
        "\nreplay: measured, modelled, error\n"
        f"{'tp':4}{'users':>6}{'offload':>8}{'n':>5} "
        + "".join(f"{title:>24}" for title in ("TTFT p50 s", "TTFT p90 s", "ITL p50 ms", "ITL p90 ms"))
    )
    for row in rows:
        cells = [
            f"{times[name] * scale:>9.2f}{times[f'{name}_modelled'] * scale:>8.2f}"
            f"{times[f'{name}_error']:>+7.0%}"
            for times, scale in ((row["ttft_s"], 1), (row["itl_s"], 1000))
            for name in ("p50", "p90")
        ]
        offload = "on" if row["offload"] else "off"
        print(f"{row['tp']:4}{row['users']:>6}{offload:>8}{row['requests']:>5} " + "".join(cells), flush=True)
    for name in ("p50", "p90"):
        errors = [row[times][f"{name}_error"] for row in rows for times in ("ttft_s", "itl_s")]
        within = sum(abs(error) <= CLOSE for error in errors)
        print(f"{name}: {within} of {len(errors)} within {CLOSE:.0%}")


def main() -> None:
    """Fit, replay, print."""
    parser = argparse.ArgumentParser(description="Hold the engine model against measured engines.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="leave everything here too")
    parser.add_argument(
        "--kv-times",
        type=int,
        default=1,
        metavar="N",
        help="replay with N times the KV cache: is it to blame?",
    )
    options = parser.parse_args()
    machine = describe_machine()
    print(machine)
    runs = read(options.trace)
    found = fitted(runs)
    print_fit(found)
    rows = [compared(run, options.kv_times) for run in runs]
    print_replay(rows)
    if options.json:
        result = {
            "bench": "calibration",
            "machine": machine,
            "fit": found,
            "kv_times": options.kv_times,
            "replay": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
