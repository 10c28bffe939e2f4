"""`python -m tests.bench scheduling`: ours against the field's routing policies, in simulated fleets.

For each trace it finds every policy's knee, then runs all of them at shares of the best baseline's knee for
several seeds, at random's knee ours beside random, and at the lower share among slow nodes and with degraded
signals. What is told are ratios of ours to the best baseline, equal arrivals against equal arrivals; and the
knee of ours among slow nodes against that of ours when it is told each node's speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from msgspec import Struct

from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.replay.traces import EXCERPT
from dispatcher.simulation.command import nodes_of
from dispatcher.simulation.conditions import Conditions
from dispatcher.simulation.fleet import coarse
from dispatcher.simulation.fleet_plot import plot, plotting
from dispatcher.simulation.fleet_report import Report, Run, knees, told_nodes
from dispatcher.simulation.fleet_runs import Fleets, Task, running
from dispatcher.simulation.fleet_workload import FleetWorkload, workloads_of
from dispatcher.simulation.goodput import Objectives
from dispatcher.simulation.knee import told
from dispatcher.simulation.named_router import OURS, oracle_of, router_of
from dispatcher.simulation.policies import BY_NAME
from dispatcher.simulation.profile import Profile
from dispatcher.simulation.profiles import PROFILES
from tests.bench.machine import describe_machine
from tests.bench.scheduling_floor import Floor, floor_of
from tests.bench.scheduling_ratios import MEASURES, Ratio, ratios
from tests.bench.tuning import Kind, read_tuned, tuned_baselines

SHARES = (0.8, 0.95)
"""Of the best baseline's knee."""
SLOW = Conditions(slow_share=0.25, slow_factor=0.5)
DEGRADED = (Conditions(report_delay_s=1.0), Conditions(dropped_kv_events=0.2))
UNEVEN = Conditions(slow_share=0.3, slow_factor=0.5)
"""Where ours is held against itself with each node's speed known."""
SEEDS = 5
KNEE_SEEDS = 2
QUICK_SEEDS = 3
QUICK_REQUESTS = 600


class Case(Struct, frozen=True, kw_only=True):
    """One rate under one set of conditions: ours to the best of each measure, and to the best by its knee."""

    name: str
    rate: float
    per_s: float
    to_best: dict[str, Ratio]
    to_first: dict[str, Ratio]
    runs: list[Run]


class Knowledge(Struct, frozen=True, kw_only=True):
    """What it costs to learn how fast nodes are: the knees of ours and of `oracle`, which is told."""

    conditions: Conditions
    oracle: str
    knee: float
    oracle_knee: float
    sweep: list[Run]


class Comparison(Struct, frozen=True, kw_only=True):
    """One trace. `first` is the baseline with the highest knee; `knowledge` is of ours alone."""

    trace: str
    profile: str
    nodes: int
    prefill: int
    decode: int
    requests: int
    seeds: list[int]
    ours: str
    first: str
    knee: dict[str, float]
    knee_per_s: dict[str, float]
    cases: list[Case]
    sweep: list[Run]
    knowledge: Knowledge | None
    floor: Floor


class Result(Struct, frozen=True, kw_only=True):
    """What `--json` holds."""

    bench: str
    machine: str
    objectives: str
    comparisons: list[Comparison]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is simulated."""

    ours: str = OURS
    baselines: Sequence[str] = tuple(BY_NAME)
    nodes: int = 8
    decode: int = 0
    profile: Profile = PROFILES["h100-llama-8b"]
    seeds: Sequence[int] = tuple(range(1, SEEDS + 1))
    knee_seeds: int = KNEE_SEEDS
    jobs: int = 1


def compare(plan: Plan, trace: str, workloads: dict[int, FleetWorkload]) -> Comparison:
    """Simulate one trace."""
    policies = (plan.ours, *plan.baselines)
    fleets = Fleets(
        workloads=workloads,
        trace=trace,
        profile=plan.profile,
        nodes=plan.nodes,
        decode=plan.decode,
        objectives=Objectives(),
    )
    cases: list[Case] = []

    def case(
        name: str, rate: float, others: Sequence[str], *, first: str, amiss: Conditions | None = None
    ) -> None:
        rate = told(rate)
        conditions = amiss if amiss is not None else Conditions()
        with running(replace(fleets, conditions=conditions), jobs=plan.jobs) as runner:
            runs = runner.run(
                [Task(policy, rate, seed) for policy in (plan.ours, *others) for seed in plan.seeds]
            )
        cases.append(
            Case(
                name=name,
                rate=rate,
                per_s=runs[0].per_s,
                to_best=ratios(runs, plan.ours, others),
                to_first=ratios(runs, plan.ours, (first,)),
                runs=runs,
            )
        )

    with running(fleets, jobs=plan.jobs) as runner:
        sweep = runner.sweep(policies, plan.seeds[: plan.knee_seeds])
    knee = knees(sweep)
    first = max(plan.baselines, key=knee.__getitem__)
    for share in SHARES:
        case(f"{share:g} of the best baseline's knee", share * knee[first], plan.baselines, first=first)
    if knee.get("random"):
        case("at random's knee, to random", knee["random"], ("random",), first="random")
    # Slow nodes carry less: the same load, for what is left.
    left = sum(SLOW.speeds(plan.nodes, plan.seeds[0])) / plan.nodes
    for amiss, carries in ((SLOW, left), *((one, 1.0) for one in DEGRADED)):
        rate = SHARES[0] * knee[first] * carries
        name = f"{SHARES[0]:g}" + (f" x {carries:g} (slower nodes)" if carries < 1 else "")
        case(f"{name}, {amiss}", rate, plan.baselines, first=first, amiss=amiss)
    workload = workloads[plan.seeds[0]]
    oracle = oracle_of(plan.ours)
    return Comparison(
        trace=trace,
        profile=plan.profile.name,
        nodes=plan.nodes,
        prefill=plan.nodes - plan.decode if plan.decode else 0,
        decode=plan.decode,
        requests=workload.requests,
        seeds=list(plan.seeds),
        ours=plan.ours,
        first=first,
        knee=knee,
        knee_per_s={policy: round(rate * workload.per_s, 3) for policy, rate in knee.items()},
        cases=cases,
        sweep=sweep,
        knowledge=None if oracle is None else _knowledge(plan, fleets, oracle),
        floor=floor_of(workload, coarse(plan.profile, workload.block_tokens)),
    )


def _knowledge(plan: Plan, fleets: Fleets, oracle: str) -> Knowledge:
    with running(replace(fleets, conditions=UNEVEN), jobs=plan.jobs) as runner:
        sweep = runner.sweep((plan.ours, oracle), plan.seeds[: plan.knee_seeds])
    knee = knees(sweep)
    return Knowledge(
        conditions=UNEVEN, oracle=oracle, knee=knee[plan.ours], oracle_knee=knee[oracle], sweep=sweep
    )


def told_comparison(comparison: Comparison) -> str:
    """A comparison for a terminal."""
    ours = comparison.ours
    lines = [
        f"{comparison.trace}: {comparison.requests} requests, "
        f"{told_nodes(comparison.nodes, comparison.decode)} x {comparison.profile}, "
        f"{len(comparison.seeds)} seeds, {sum(len(case.runs) for case in comparison.cases)} runs and "
        f"{len(comparison.sweep)} for the knees",
        "",
        "knees, req/s: "
        + ", ".join(
            f"{policy} {per_s:.2f}"
            for policy, per_s in sorted(comparison.knee_per_s.items(), key=lambda one: -one[1])
        ),
    ]
    first = comparison.knee[comparison.first]
    if first:
        lines.append(f"{ours} to {comparison.first}, by knee: {comparison.knee[ours] / first:.2f}")
    knowledge = comparison.knowledge
    if knowledge is not None and knowledge.oracle_knee:
        lines.append(
            f"{knowledge.conditions}: {ours} to {knowledge.oracle}, by knee: "
            f"{knowledge.knee / knowledge.oracle_knee:.2f}"
        )
    floor = comparison.floor
    lines.append(
        f"no policy is faster, an idle engine for each request and all caches in one: TTFT mean "
        f"{floor.ttft_mean_ms:.0f} ms, p99 {floor.ttft_p99_ms:.0f} ms, {floor.hit_ratio:.1%} of prompts "
        "cached"
    )
    for case in comparison.cases:
        lines += ["", f"{case.name}: {case.per_s:.2f} req/s", *_rows(case)]
    return "\n".join(lines)


def _rows(case: Case) -> Iterable[str]:
    width = 2 + max([24, *(len(best.policy) for best in case.to_best.values())])
    whose = f"{'whose':<{width}}"
    yield f"  {'':<14}{'ours':>9}{'best':>9}  {'ours/best':<13}{whose}to the one with the best knee"
    for name in MEASURES:
        if name in case.to_best:
            best, first = case.to_best[name], case.to_first.get(name)
            whose = f"{best.policy:<{width}}"
            yield (
                f"  {name:<14}{_figure(best.ours):>9}{_figure(best.other):>9}  {best!s:<13}{whose}"
                + (f"{first} ({first.policy})" if first is not None else "")
            )


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.4g}"


def draw(comparison: Comparison, objectives: Objectives, folder: Path) -> None:
    """Leave a picture of the sweep and one of the ratios."""
    pyplot = plotting()
    folder.mkdir(parents=True, exist_ok=True)
    nodes = told_nodes(comparison.nodes, comparison.decode)
    name = f"{comparison.trace.partition('.')[0]}-{comparison.nodes}"
    if comparison.decode:
        name = f"{comparison.trace.partition('.')[0]}-{comparison.prefill}p{comparison.decode}d"
    title = f"{comparison.trace}: {comparison.requests} requests, {nodes} x {comparison.profile}"
    plot(
        Report(runs=comparison.sweep, knee=comparison.knee),
        folder / f"{name}-sweep.png",
        f"{title}\ngood: {objectives}",
    )
    figure, axes = pyplot.subplots(
        1, len(MEASURES), figsize=(20, 1.5 + 0.7 * len(comparison.cases)), sharey=True
    )
    for axis, (measure, way) in zip(axes, MEASURES.items(), strict=True):
        for place, case in enumerate(comparison.cases):
            if (found := case.to_best.get(measure)) is not None:
                axis.errorbar(found.ratio, place, xerr=found.half, fmt="o", color="black", capsize=4)
                axis.annotate(
                    found.policy, (found.ratio, place), (0, 7), textcoords="offset points", ha="center"
                )
        axis.axvline(1, color="grey", linestyle=":")
        axis.margins(x=0.35, y=0.15)
        axis.set_title(f"{measure}, {'more' if way.is_more_better else 'less'} is better", fontsize="medium")
    axes[0].set_yticks(range(len(comparison.cases)), [case.name for case in comparison.cases])
    axes[0].invert_yaxis()
    figure.suptitle(f"{title}: {comparison.ours} / the best baseline of each measure")
    figure.tight_layout()
    figure.savefig(folder / f"{name}-ratios.png", dpi=80)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Simulate what the flags say."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench scheduling", description=__doc__)
    add = parser.add_argument
    add("traces", nargs="*", metavar="TRACE", help=f"trace files (default: {EXCERPT}, in the package)")
    add("--nodes", type=int, action="append", help="engines; repeatable (default 8)")
    add("--prefill", type=int, metavar="P", help="engines that prefill only, instead of --nodes")
    add("--decode", type=int, metavar="D", help="engines that decode only; with --prefill")
    add("--profile", choices=sorted(PROFILES), default=Plan.profile.name)
    add("--requests", type=int, help="so many of each trace")
    add("--ours", default=OURS, help="what is compared, named as by flexlb simulate")
    add("--baseline", action="append", help="what with; repeatable (default: every policy of the field)")
    add("--tuned", type=Path, metavar="FILE", help="baselines with the constants that tuning --json found")
    add("--seeds", type=int, help=f"how many (default {SEEDS}, with --quick {QUICK_SEEDS})")
    add("--recorded", action="store_true", help="the trace's own times, equal for all seeds, not drawn gaps")
    add("--quick", action="store_true", help=f"{QUICK_REQUESTS} requests, {QUICK_SEEDS} seeds, knees by one")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--json", type=Path, metavar="FILE", help="write everything, runs included")
    add("--plots", type=Path, metavar="DIR", help="leave two pictures for each trace (needs flexlb[plot])")
    options = parser.parse_args(arguments)
    if options.plots is not None:
        plotting()
    seeds = tuple(range(1, 1 + (options.seeds or (QUICK_SEEDS if options.quick else SEEDS))))
    plan = Plan(
        ours=options.ours,
        baselines=tuple(dict.fromkeys(options.baseline or BY_NAME)),
        profile=PROFILES[options.profile],
        seeds=seeds,
        knee_seeds=1 if options.quick else KNEE_SEEDS,
        jobs=options.jobs,
    )
    fleets = [nodes_of(nodes, options.prefill, options.decode) for nodes in options.nodes or (None,)]
    for policy in (plan.ours, *plan.baselines):
        router_of(policy)
    tunings = read_tuned(options.tuned) if options.tuned is not None else None
    traces = [(trace, Path(trace or EXCERPT).name) for trace in options.traces or (None,)]

    def baselines(trace: str, nodes: int, decode: int) -> Sequence[str]:
        kind = Kind(trace=trace, profile=plan.profile.name, nodes=nodes, decode=decode)
        return plan.baselines if tunings is None else tuned_baselines(tunings, kind, plan.baselines)

    plans = {
        (name, nodes, decode): replace(
            plan, nodes=nodes, decode=decode, baselines=baselines(name, nodes, decode)
        )
        for _, name in traces
        for nodes, decode in fleets
    }
    result = Result(
        bench="scheduling", machine=describe_machine(), objectives=str(Objectives()), comparisons=[]
    )
    print(f"{result.machine}\ngood: {result.objectives}", flush=True)
    for trace, name in traces:
        workloads = workloads_of(
            trace,
            seeds,
            is_drawn=not options.recorded,
            requests=options.requests or (QUICK_REQUESTS if options.quick else None),
            longest=coarse(plan.profile, BLOCK_TOKENS).kv_tokens,
        )
        for nodes, decode in fleets:
            comparison = compare(plans[name, nodes, decode], name, workloads)
            result.comparisons.append(comparison)
            print(f"\n{told_comparison(comparison)}", flush=True)
            if options.json is not None:
                options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
            if options.plots is not None:
                draw(comparison, Objectives(), options.plots)
    return 0
