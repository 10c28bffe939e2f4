"""`flexlb simulate`: a trace through a fleet in virtual time, our live decisions beside the field's.

Deterministic: the same trace, flags and seed give the same figures on every machine, but for the wall time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dispatcher.errors import SettingsError
from dispatcher.explain.text import as_data, as_text
from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.replay.traces import EXCERPT, write_trace
from dispatcher.scheduling.policies import POLICIES
from dispatcher.simulation.conditions import Conditions
from dispatcher.simulation.fleet import coarse
from dispatcher.simulation.fleet_plot import plot, plotting
from dispatcher.simulation.fleet_report import Report, knees, table
from dispatcher.simulation.fleet_runs import Fleets, Task, running
from dispatcher.simulation.fleet_workload import Source, workloads_of
from dispatcher.simulation.from_topic import (
    check_flags,
    configure_from_topic,
    read_traffic,
    settings_of,
    topic_of,
)
from dispatcher.simulation.goodput import Objectives
from dispatcher.simulation.named_router import EVERY, ORACLE, OURS, explaining_router_of, router_of
from dispatcher.simulation.policies import BY_NAME
from dispatcher.simulation.profiles import PROFILES

DEFAULT_NODES = 8


def configure_simulate(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb simulate`."""
    add = parser.add_argument
    add(
        "trace",
        nargs="?",
        help="trace file: Mooncake, RTP-LLM, Azure, agents' sessions, or what --save wrote (default: "
        f"{EXCERPT}, in the package)",
    )
    add("--nodes", type=_count, default=None, help="engines that do both prefill and decode (default 8)")
    add("--prefill", type=_count, default=None, metavar="P", help="engines that prefill only; with --decode")
    add("--decode", type=_count, default=None, metavar="D", help="engines that decode only; with --prefill")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--rate",
        type=_rate,
        action="append",
        default=None,
        help="multiple of the trace's pace; repeatable (default 1)",
    )
    rates.add_argument(
        "--sweep", action="store_true", help="find each policy's knee: some eight runs of each, for each seed"
    )
    add(
        "--policy",
        action="append",
        default=None,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"{OURS} (the live code), {ORACLE} (and told each node's speed), {OURS}:POLICY for "
        f"{', '.join(POLICIES)}, or {', '.join(BY_NAME)}; "
        f"repeatable (default {OURS} and all of these)",
    )
    add("--profile", choices=sorted(PROFILES), default="h100-llama-8b", help="engines' speed and memory")
    add(
        "--requests",
        type=_count,
        default=None,
        help="so many requests; the trace is repeated for more than it has",
    )
    add("--poisson", action="store_true", help="exponential gaps of the trace's mean rate, not its times")
    add(
        "--block-tokens",
        type=_count,
        default=BLOCK_TOKENS,
        help=f"tokens of a cache block (default {BLOCK_TOKENS})",
    )
    add(
        "--seed",
        type=int,
        action="append",
        default=None,
        help="seed of all chance; repeatable, for intervals over the seeds (default 1)",
    )
    add(
        "--ttft-slo-ms",
        type=_rate,
        default=1_000.0,
        help="time to the first token that is good for any prompt (default 1000)",
    )
    add(
        "--ttft-slo-times",
        type=_rate,
        default=3.0,
        help="so many times its prefill on an idle engine with an empty cache is good as well (default 3)",
    )
    add("--tpot-slo-ms", type=_rate, default=50.0, help="time per further token that is good (default 50)")
    add(
        "--slow",
        type=_slow,
        default=(0.0, 1.0),
        metavar="SHARE:FACTOR",
        help="so many of the nodes, chosen by the seed, at that part of the speed (0.3:0.5)",
    )
    add("--report-delay-s", type=_rate, default=0.0, help="nodes' load reports arrive so much later")
    add("--drop-kv-events", type=_share, default=0.0, metavar="SHARE", help="share of block events lost")
    add(
        "--perturb",
        type=_perturbation,
        default=0.0,
        metavar="SHARE",
        help="engines' coefficients are up to so much off the profile, by the seed; no policy is told (0.3)",
    )
    add(
        "--explain",
        type=_count,
        default=None,
        metavar="N",
        help=f"tell why the N-th request went to its node, of one run of ours (default: {OURS})",
    )
    add("--jobs", type=_count, default=1, help="runs at a time, with equal results (default 1)")
    add("--json", type=Path, default=None, metavar="FILE", help="write the report as JSON")
    add("--plot", type=Path, default=None, metavar="FILE.png", help="draw the report (needs flexlb[plot])")
    configure_from_topic(parser)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, seen {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected above 0, seen {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, seen {text}")
    return value


def _perturbation(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected 0 to below 1, seen {text}")
    return value


def _slow(text: str) -> tuple[float, float]:
    share, _, factor = text.partition(":")
    return _share(share), _rate(factor)


async def run_simulate(options: argparse.Namespace) -> int:
    """Simulate and print."""
    nodes, decode = nodes_of(options.nodes, options.prefill, options.decode)
    policies: Sequence[str] = tuple(dict.fromkeys(options.policy or EVERY))
    for policy in policies:
        router_of(policy)
    if options.plot is not None:
        plotting()
    check_flags(options)
    source: Source = options.trace
    name = Path(options.trace or EXCERPT).name
    if options.from_topic is not None:
        settings = settings_of(options)
        source, name = await read_traffic(options, settings), topic_of(settings)
        if options.save is not None:
            write_trace(options.save, source)
    profile = PROFILES[options.profile]
    seeds: Sequence[int] = tuple(dict.fromkeys(options.seed or (1,)))
    fleets = Fleets(
        workloads=workloads_of(
            source,
            seeds,
            is_drawn=options.poisson,
            requests=options.requests,
            block_tokens=options.block_tokens,
            # The last block of each prompt and answer is a whole one.
            longest=coarse(profile, options.block_tokens).kv_tokens,
        ),
        trace=name,
        profile=profile,
        nodes=nodes,
        decode=decode,
        objectives=Objectives(
            ttft_floor_s=options.ttft_slo_ms / 1000,
            ttft_times=options.ttft_slo_times,
            tpot_s=options.tpot_slo_ms / 1000,
        ),
        conditions=Conditions(
            slow_share=options.slow[0],
            slow_factor=options.slow[1],
            report_delay_s=options.report_delay_s,
            dropped_kv_events=options.drop_kv_events,
            perturbed=options.perturb,
        ),
    )
    if options.explain is not None:
        return _explain(fleets, options, seeds[0])
    if options.from_topic is not None:
        _tell_too_long(source, fleets, is_cut=options.requests is not None)
    with running(fleets, jobs=options.jobs) as runner:
        if options.sweep:
            runs = runner.sweep(policies, seeds)
        else:
            rates: Sequence[float] = tuple(dict.fromkeys(options.rate or (1.0,)))
            runs = runner.run(
                [Task(policy, rate, seed) for rate in rates for policy in policies for seed in seeds]
            )
    report = Report(runs=runs, knee=knees(runs) if options.sweep else {})
    print(table(report, fleets.objectives))
    if options.json is not None:
        _write(options.json, lambda path: path.write_bytes(msgspec.json.format(msgspec.json.encode(report))))
    if options.plot is not None:
        _write(options.plot, lambda path: plot(report, path, fleets.title))
    return 0


def _explain(fleets: Fleets, options: argparse.Namespace, seed: int) -> int:
    """Print why one request of one run went where it went; returns the exit code."""
    requests = fleets.workloads[seed].requests
    if options.explain > requests:
        raise SettingsError(
            f"--explain: expected 1 to {requests}, the workload's requests, seen {options.explain}"
        )
    policies, rates = options.policy or [OURS], options.rate or [1.0]
    one_each = (policies, rates, options.seed or [seed])
    if options.sweep or options.plot is not None or any(len(set(given)) > 1 for given in one_each):
        raise SettingsError("--explain: expected one policy, rate and seed, no --sweep and no --plot")
    router = explaining_router_of(policies[0], options.explain - 1)
    run = fleets.run(Task(policies[0], rates[0], seed), router)
    if options.json is not None:
        told = [as_data(one) for one in router.explanations]
        _write(options.json, lambda path: path.write_bytes(msgspec.json.format(msgspec.json.encode(told))))
    print(table(Report(runs=[run], knee={}), fleets.objectives))
    for one in router.explanations:
        print(f"\n{as_text(one)}")
    return 0


def _tell_too_long(source: Source, fleets: Fleets, *, is_cut: bool) -> None:
    """Tell of recorded requests that no engine of this profile could hold."""
    held = next(iter(fleets.workloads.values())).requests
    if isinstance(source, Sequence) and not isinstance(source, str) and not is_cut and held < len(source):
        print(
            f"left out: {len(source) - held} longer than the KV cache of {fleets.profile.name} "
            f"({fleets.profile.kv_tokens} tokens)",
            file=sys.stderr,
        )


def nodes_of(nodes: int | None, prefill: int | None, decode: int | None) -> tuple[int, int]:
    """How many nodes there are, and how many of them only decode.

    Raises:
        SettingsError: only one of prefill and decode is given, or nodes as well.
    """
    if prefill is None and decode is None:
        return (nodes if nodes is not None else DEFAULT_NODES), 0
    if prefill is None or decode is None or nodes is not None:
        raise SettingsError(
            f"expected --nodes, or --prefill and --decode, seen --nodes {nodes} --prefill {prefill} "
            f"--decode {decode}; leave out what does not belong"
        )
    return prefill + decode, decode


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}; name a file that can be written") from None
