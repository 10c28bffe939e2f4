"""`python -m tests.bench tuning`: the field's policies with their constants tuned to a workload.

A baseline at its original's defaults may be shown at its worst: those were chosen for other engines and
loads. Here every combination of `policies.TUNABLE` is simulated just above the knee that the defaults have;
of the few that keep most requests good the knees are found, and the highest is the one. What is tuned is the
baselines alone: ours keeps its defaults. `scheduling --tuned FILE` compares with what was found, on other
arrivals than it was found on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import msgspec
from msgspec import Struct

from dispatcher.errors import SettingsError
from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.replay.traces import EXCERPT
from dispatcher.simulation.command import nodes_of
from dispatcher.simulation.fleet import coarse
from dispatcher.simulation.fleet_report import Run, knees, told_nodes
from dispatcher.simulation.fleet_runs import Fleets, Runner, Task, running
from dispatcher.simulation.fleet_workload import workloads_of
from dispatcher.simulation.goodput import Objectives
from dispatcher.simulation.knee import RESOLUTION, told
from dispatcher.simulation.policies import BY_NAME, TUNABLE
from dispatcher.simulation.profiles import PROFILES
from tests.bench.machine import describe_machine

BASELINES = (
    "smg_expected_wait",
    "dynamo_kv",
    "llmd_weighted",
    "llmd_sticky",
    "sglang_cache_aware",
    "rtp_llm_cost",
)
BEYOND = 1.1
"""Every combination is tried at so many times the knee of the defaults, where they differ most."""
FINALISTS = 3
SEEDS = (101, 102)
"""Not those of comparisons: what is found must not be tailored to the arrivals that it is shown on."""
REQUESTS = 600


class Tried(Struct, frozen=True, kw_only=True):
    """One combination at the rate that all were tried at; `knee_per_s` of finalists only."""

    policy: str
    slo_attainment: float
    ttft_mean_ms: float
    knee_per_s: float | None = None


class Tuned(Struct, frozen=True, kw_only=True):
    """One baseline: `policy` has the constants that differ from the defaults, and may be the defaults'."""

    baseline: str
    policy: str
    knee_per_s: float
    default_knee_per_s: float
    tried_per_s: float
    tried: list[Tried]


class Workload(Struct, frozen=True, kw_only=True):
    """What was found for one trace on one fleet."""

    trace: str
    profile: str
    nodes: int
    decode: int
    requests: int
    seeds: list[int]
    tuned: list[Tuned]


class Tunings(Struct, frozen=True, kw_only=True):
    """What `--json` holds."""

    bench: str
    machine: str
    objectives: str
    workloads: list[Workload]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What constants are tuned to: another trace, engine or fleet has others."""

    trace: str
    profile: str
    nodes: int
    decode: int

    def __str__(self) -> str:
        return f"{self.trace} on {told_nodes(self.nodes, self.decode)} x {self.profile}"


def combinations(baseline: str) -> Iterator[str]:
    """Every policy of a baseline's grid by its name, the defaults first."""
    grid = TUNABLE[baseline]
    for values in itertools.product(*grid.values()):
        changed = [
            f"{key}={value!r}"
            for (key, tried), value in zip(grid.items(), values, strict=True)
            if value != tried[0]
        ]
        yield f"{baseline}:{','.join(changed)}" if changed else baseline


def tune(runner: Runner, baseline: str, seeds: Sequence[int]) -> Tuned:
    """Find the constants under which a baseline carries most."""
    fleets = runner.fleets
    per_s = fleets.workloads[seeds[0]].per_s
    sweep = runner.sweep([baseline], seeds)
    default = knees(sweep)[baseline]
    # Where even the least rate is too much, whatever is better there is better.
    rate = told(BEYOND * (default or min(run.rate for run in sweep)))
    names = list(combinations(baseline))
    runs = runner.run([Task(name, rate, seed) for name in names for seed in seeds])
    of_name = {name: runs[place * len(seeds) : (place + 1) * len(seeds)] for place, name in enumerate(names)}
    order = sorted(names, key=lambda name: _rank(of_name[name]), reverse=True)
    finalists = [name for name in order if name != baseline][:FINALISTS]
    knee = {baseline: default, **knees(runner.sweep(finalists, seeds))}
    best = max(knee, key=knee.__getitem__)
    if knee[best] <= default * (1 + RESOLUTION):
        # A sweep tells knees no nearer apart: what is no better than the defaults are the defaults.
        best = baseline
    return Tuned(
        baseline=baseline,
        policy=best,
        knee_per_s=round(knee[best] * per_s, 3),
        default_knee_per_s=round(default * per_s, 3),
        tried_per_s=round(rate * per_s, 3),
        tried=[
            Tried(
                policy=name,
                slo_attainment=round(fmean(run.slo_attainment for run in of_name[name]), 4),
                ttft_mean_ms=round(fmean(run.ttft_ms.mean for run in of_name[name]), 3),
                knee_per_s=round(knee[name] * per_s, 3) if name in knee else None,
            )
            for name in order
        ],
    )


def _rank(runs: Sequence[Run]) -> tuple[float, float]:
    return fmean(run.slo_attainment for run in runs), -fmean(run.ttft_ms.mean for run in runs)


def read_tuned(path: Path) -> Tunings:
    """Read what `tuning --json` wrote.

    Raises:
        SettingsError: it can't be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Tunings)
    except OSError as error:
        raise SettingsError(f"--tuned {path}: {error.strerror or error}") from None
    except msgspec.DecodeError as error:
        raise SettingsError(f"--tuned {path}: expected what tuning --json wrote: {error}") from None


def tuned_baselines(tunings: Tunings, kind: Kind, baselines: Sequence[str]) -> list[str]:
    """The baselines with the constants found for a workload; those that were not tuned as they are.

    Raises:
        SettingsError: nothing was found for this workload.
    """
    for found in tunings.workloads:
        if kind == _kind_of(found):
            policies = {one.baseline: one.policy for one in found.tuned}
            return [policies.get(baseline, baseline) for baseline in baselines]
    known = "; ".join(str(_kind_of(found)) for found in tunings.workloads) or "none"
    raise SettingsError(f"--tuned: expected constants for {kind}, seen {known}; tune them for it first")


def _kind_of(found: Workload) -> Kind:
    return Kind(trace=found.trace, profile=found.profile, nodes=found.nodes, decode=found.decode)


def told_workload(found: Workload) -> str:
    """What was found, for a terminal."""
    lines = [
        f"{_kind_of(found)}: {found.requests} requests, {len(found.seeds)} seeds",
        f"  {'':<20}{'defaults':>10}{'tuned':>10}{'gain':>7}  {'of':>3}  constants",
    ]
    for one in found.tuned:
        gain = one.knee_per_s / one.default_knee_per_s if one.default_knee_per_s else 1.0
        constants = one.policy.partition(":")[2] or "the defaults"
        lines.append(
            f"  {one.baseline:<20}{one.default_knee_per_s:>10.2f}{one.knee_per_s:>10.2f}{gain:>7.2f}"
            f"  {len(one.tried):>3}  {constants}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Tune what the flags say."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench tuning", description=__doc__)
    add = parser.add_argument
    add("traces", nargs="*", metavar="TRACE", help=f"trace files (default: {EXCERPT}, in the package)")
    add("--nodes", type=int, help="engines (default 8)")
    add("--prefill", type=int, metavar="P", help="engines that prefill only, instead of --nodes")
    add("--decode", type=int, metavar="D", help="engines that decode only; with --prefill")
    add("--profile", choices=sorted(PROFILES), default="h100-llama-8b")
    add("--requests", type=int, default=REQUESTS, help=f"so many of each trace (default {REQUESTS})")
    add(
        "--baseline",
        action="append",
        choices=sorted(BY_NAME),
        help=f"what is tuned; repeatable (default {', '.join(BASELINES)})",
    )
    add("--seed", type=int, action="append", help=f"seeds of arrivals; repeatable (default {SEEDS})")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--json", type=Path, metavar="FILE", help="write everything, for scheduling --tuned")
    options = parser.parse_args(arguments)
    nodes, decode = nodes_of(options.nodes, options.prefill, options.decode)
    profile = PROFILES[options.profile]
    seeds = tuple(dict.fromkeys(options.seed or SEEDS))
    result = Tunings(bench="tuning", machine=describe_machine(), objectives=str(Objectives()), workloads=[])
    print(f"{result.machine}\ngood: {result.objectives}", flush=True)
    for trace in options.traces or (None,):
        workloads = workloads_of(
            trace,
            seeds,
            is_drawn=True,
            requests=options.requests,
            longest=coarse(profile, BLOCK_TOKENS).kv_tokens,
        )
        fleets = Fleets(
            workloads=workloads,
            trace=Path(trace or EXCERPT).name,
            profile=profile,
            nodes=nodes,
            decode=decode,
            objectives=Objectives(),
        )
        with running(fleets, jobs=options.jobs) as runner:
            tuned = [tune(runner, one, seeds) for one in dict.fromkeys(options.baseline or BASELINES)]
        found = Workload(
            trace=fleets.trace,
            profile=profile.name,
            nodes=nodes,
            decode=decode,
            requests=workloads[seeds[0]].requests,
            seeds=list(seeds),
            tuned=tuned,
        )
        result.workloads.append(found)
        print(f"\n{told_workload(found)}", flush=True)
        if options.json is not None:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    return 0
