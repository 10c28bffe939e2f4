"""`python -m tests.bench ablation`: what each part of our policy is worth, by leaving it out.

The knee of the whole is found; then it and each variant without one part get the same arrivals at shares of
that knee, for several seeds. Told are the shares of requests that are good, and ratios to the whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.replay.traces import EXCERPT
from dispatcher.simulation.command import nodes_of
from dispatcher.simulation.fleet import coarse
from dispatcher.simulation.fleet_report import Run, estimate, knees, told_nodes
from dispatcher.simulation.fleet_runs import Fleets, Task, running
from dispatcher.simulation.fleet_workload import workloads_of
from dispatcher.simulation.goodput import Objectives
from dispatcher.simulation.knee import told
from dispatcher.simulation.named_router import OURS
from dispatcher.simulation.profiles import PROFILES
from tests.bench.machine import describe_machine

PARTS: Mapping[str, str] = {
    "stall of those who decode": f"{OURS}:stall_weight=0.0",
    "long prompts had of late": f"{OURS}:burst_weight=0.0",
    "short prompts first": f"{OURS}:size_weight=0.0",
    "pressure of fullness": f"{OURS}:pressure_s=0.0",
    "own work counted again": f"{OURS}:work_weight=0.0",
    "near ties to the cache": f"{OURS}:near_tie=0.0",
    "late binding": f"{OURS}:lookahead_min_s=60.0,lookahead_max_s=60.0",
    "all prices (work alone)": (
        f"{OURS}:stall_weight=0.0,burst_weight=0.0,size_weight=0.0,pressure_s=0.0,work_weight=0.0"
    ),
    "cost (least tokens instead)": f"{OURS}:least_outstanding_tokens",
}
"""Each part by what it is, and the policy without it."""
SHARES = (0.8, 1.0, 1.1)
"""Of the knee of the whole."""
SEEDS = 3
KNEE_SEEDS = 2


class Without(Struct, frozen=True, kw_only=True):
    """One variant at one rate, means over the seeds; ratios are to the whole, seed by seed."""

    part: str
    policy: str
    share: float
    per_s: float
    slo_attainment: float
    good_ratio: float
    ttft_mean_ratio: float
    ttft_p99_ratio: float
    tpot_mean_ratio: float
    hit_ratio: float
    runs: list[Run]


class Ablation(Struct, frozen=True, kw_only=True):
    """One trace; the first of `variants` at each rate is the whole."""

    trace: str
    fleet: str
    requests: int
    seeds: list[int]
    knee: float
    knee_per_s: float
    variants: list[Without]


class Result(Struct, frozen=True, kw_only=True):
    """What `--json` holds."""

    bench: str
    machine: str
    objectives: str
    ablations: list[Ablation]


def ablate(fleets: Fleets, seeds: Sequence[int], *, jobs: int) -> Ablation:
    """Simulate the whole and every variant of one fleet and trace."""
    per_s = fleets.workloads[seeds[0]].per_s
    named = {"nothing": OURS, **PARTS}
    with running(fleets, jobs=jobs) as runner:
        knee = knees(runner.sweep((OURS,), seeds[:KNEE_SEEDS]))[OURS]
        rates = [told(share * knee) for share in SHARES]
        runs = runner.run(
            [Task(policy, rate, seed) for rate in rates for policy in named.values() for seed in seeds]
        )
    found: dict[tuple[float, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.rate, run.policy), []).append(run)
    return Ablation(
        trace=fleets.trace,
        fleet=f"{told_nodes(fleets.nodes, fleets.decode)} x {fleets.profile.name}",
        requests=fleets.workloads[seeds[0]].requests,
        seeds=list(seeds),
        knee=knee,
        knee_per_s=round(knee * per_s, 3),
        variants=[
            _without(part, share, found[rate, policy], found[rate, OURS])
            for share, rate in zip(SHARES, rates, strict=True)
            for part, policy in named.items()
        ],
    )


def _without(part: str, share: float, runs: list[Run], whole: list[Run]) -> Without:
    def ratio(values: Iterable[float], others: Iterable[float]) -> float:
        return round(estimate([a / b for a, b in zip(values, others, strict=True) if b]).mean, 4)

    return Without(
        part=part,
        policy=runs[0].policy,
        share=share,
        per_s=runs[0].per_s,
        slo_attainment=round(estimate([run.slo_attainment for run in runs]).mean, 4),
        good_ratio=ratio((run.slo_attainment for run in runs), (run.slo_attainment for run in whole)),
        ttft_mean_ratio=ratio((run.ttft_ms.mean for run in runs), (run.ttft_ms.mean for run in whole)),
        ttft_p99_ratio=ratio((run.ttft_ms.p99 for run in runs), (run.ttft_ms.p99 for run in whole)),
        tpot_mean_ratio=ratio((run.tpot_ms.mean for run in runs), (run.tpot_ms.mean for run in whole)),
        hit_ratio=round(estimate([run.hit_ratio for run in runs]).mean, 4),
        runs=runs,
    )


def told_ablation(ablation: Ablation) -> str:
    """An ablation for a terminal."""
    lines = [
        f"{ablation.trace}: {ablation.requests} requests, {ablation.fleet}, {len(ablation.seeds)} seeds; "
        f"the whole carries {ablation.knee_per_s:.2f} req/s"
    ]
    for share in SHARES:
        shown = [one for one in ablation.variants if one.share == share]
        lines += [
            "",
            f"{share:g} of that, {shown[0].per_s:.2f} req/s; ratios to the whole",
            f"  {'without':<30}{'good':>7}{'good':>8}{'TTFT mean':>11}{'p99':>7}{'TPOT':>7}{'hits':>8}",
        ]
        lines += [
            f"  {one.part:<30}{one.slo_attainment:>7.1%}{one.good_ratio:>8.2f}{one.ttft_mean_ratio:>11.2f}"
            f"{one.ttft_p99_ratio:>7.2f}{one.tpot_mean_ratio:>7.2f}{one.hit_ratio:>8.1%}"
            for one in shown
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Simulate what the flags say."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench ablation", description=__doc__)
    add = parser.add_argument
    add("traces", nargs="*", metavar="TRACE", help=f"trace files (default: {EXCERPT}, in the package)")
    add("--nodes", type=int, help="engines (default 8)")
    add("--prefill", type=int, metavar="P", help="engines that prefill only, instead of --nodes")
    add("--decode", type=int, metavar="D", help="engines that decode only; with --prefill")
    add("--profile", choices=sorted(PROFILES), default="h100-llama-8b")
    add("--requests", type=int, help="so many of each trace")
    add("--seeds", type=int, default=SEEDS, help=f"how many (default {SEEDS})")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--json", type=Path, metavar="FILE", help="write everything, runs included")
    options = parser.parse_args(arguments)
    seeds = tuple(range(1, 1 + options.seeds))
    profile = PROFILES[options.profile]
    nodes, decode = nodes_of(options.nodes, options.prefill, options.decode)
    result = Result(bench="ablation", machine=describe_machine(), objectives=str(Objectives()), ablations=[])
    print(f"{result.machine}\ngood: {result.objectives}", flush=True)
    for trace in options.traces or (None,):
        fleets = Fleets(
            workloads=workloads_of(
                trace,
                seeds,
                is_drawn=True,
                requests=options.requests,
                longest=coarse(profile, BLOCK_TOKENS).kv_tokens,
            ),
            trace=Path(trace or EXCERPT).name,
            profile=profile,
            nodes=nodes,
            decode=decode,
            objectives=Objectives(),
        )
        result.ablations.append(ablate(fleets, seeds, jobs=options.jobs))
        print(f"\n{told_ablation(result.ablations[-1])}", flush=True)
        if options.json is not None:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2))
    return 0
