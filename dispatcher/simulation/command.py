"""`flexlb simulate`: a trace through a fleet in virtual time, our live decisions beside the field's.

Deterministic: the same trace, flags and seed give the same figures on every machine, but for the wall time.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from dispatcher.errors import SettingsError
from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.replay.traces import EXCERPT, read_excerpt
from dispatcher.scheduling.scheduler import POLICIES, SchedulingParameters
from dispatcher.simulation.fleet import FleetSimulation, Router, coarse
from dispatcher.simulation.fleet_plot import plot, plotting
from dispatcher.simulation.fleet_report import ATTAINED, Report, Run, knees, run_of, table
from dispatcher.simulation.fleet_workload import FleetWorkload, open_loop, read_workload
from dispatcher.simulation.jumping_engine import JumpingEngine
from dispatcher.simulation.live_router import LiveRouter
from dispatcher.simulation.policies import BY_NAME
from dispatcher.simulation.policy_router import PolicyRouter
from dispatcher.simulation.profile import Profile
from dispatcher.simulation.profiles import PROFILES

OURS = "flexlb"
SWEEP = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)
"""Shares of what the fleet carries when requests are dealt out in turn."""
SWEEP_ON = 1.2
"""Beyond, each rate is so many times the one before, while the policy keeps up."""
MOST_RATES = 24
MISSES = 2
"""Rates without attainment after which a policy's sweep ends."""


def configure_simulate(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb simulate`."""
    add = parser.add_argument
    add(
        "trace",
        nargs="?",
        help=f"trace file: Mooncake, RTP-LLM, Azure or agents' sessions (default: {EXCERPT}, in the package)",
    )
    add("--nodes", type=_count, default=8, help="engines (default 8)")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--rate",
        type=_rate,
        action="append",
        default=None,
        help="multiple of the trace's pace; repeatable (default 1)",
    )
    rates.add_argument("--sweep", action="store_true", help="rates up to where each policy falls behind")
    add(
        "--policy",
        action="append",
        default=None,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"{OURS} (the live code), {OURS}:POLICY for {', '.join(POLICIES)}, or {', '.join(BY_NAME)}; "
        f"repeatable (default {OURS} and round_robin)",
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
    add("--seed", type=int, default=1, help="seed of all chance (default 1)")
    add(
        "--ttft-slo-ms",
        type=_rate,
        default=2_000.0,
        help="time to the first token that counts as good (default 2000)",
    )
    add("--json", type=Path, default=None, metavar="FILE", help="write the report as JSON")
    add("--plot", type=Path, default=None, metavar="FILE.png", help="draw the report (needs flexlb[plot])")


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


def router_of(name: str) -> Callable[[], Router]:
    """What makes the router of a `--policy`.

    Raises:
        SettingsError: no such policy, or it has no such constant.
    """
    base, _, rest = name.partition(":")
    if base == OURS and rest in {"", *POLICIES}:
        return lambda: LiveRouter(rest or "prefill_cost")
    constants = _constants(name, rest)
    try:
        if base == OURS:
            parameters = SchedulingParameters(**constants)
            return lambda: LiveRouter(parameters=parameters)
        if base in BY_NAME:
            BY_NAME[base](**constants)
            return lambda: PolicyRouter(BY_NAME[base](**constants))
    except TypeError as error:
        raise SettingsError(f"--policy {name}: {error}") from None
    known = ", ".join((OURS, *(f"{OURS}:{policy}" for policy in POLICIES), *BY_NAME))
    raise SettingsError(f"--policy {name}: expected one of {known}")


def _constants(name: str, text: str) -> dict[str, Any]:
    constants = {}
    for pair in text.split(",") if text else ():
        key, _, value = pair.partition("=")
        try:
            constants[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise SettingsError(
                f"--policy {name}: expected NAME or KEY=VALUE after the colon, seen {pair!r}"
            ) from None
    return constants


@dataclass(frozen=True, kw_only=True)
class Fleets:
    """What all runs of a command have in common."""

    workload: FleetWorkload
    trace: str
    profile: Profile
    nodes: int
    seed: int
    slo_s: float

    def run(self, policy: str, rate: float) -> Run:
        """Simulate one policy at one rate."""
        router = router_of(policy)()
        workload = self.workload
        result = FleetSimulation(
            workload,
            router,
            nodes=self.nodes,
            profile=coarse(self.profile, workload.block_tokens),
            rate=rate,
            seed=self.seed,
        ).run()
        return run_of(
            result,
            policy=policy,
            trace=self.trace,
            profile=self.profile.name,
            rate=rate,
            per_s=rate * workload.per_s,
            nodes=self.nodes,
            seed=self.seed,
            slo_s=self.slo_s,
        )

    def carried(self) -> float:
        """The rate that the engines carry when requests are dealt out in turn and none is ever idle."""
        engines = [JumpingEngine(coarse(self.profile, self.workload.block_tokens)) for _ in range(self.nodes)]
        turns = [turn for session in self.workload.sessions for turn in session]
        for number, turn in enumerate(turns):
            engines[number % self.nodes].submit(
                number, turn.prompt_tokens, turn.output_tokens, turn.blocks, 0.0
            )
        for engine in engines:
            while engine.due is not None:
                engine.advance()
                engine.stored.clear()
                engine.cache.events.clear()
        busy_s = sum(engine.busy_s for engine in engines) / self.nodes
        return len(turns) / busy_s / self.workload.per_s

    def sweep(self, policy: str, carried: float) -> Iterator[Run]:
        """Simulate rising rates until the policy fell behind."""
        missed = 0
        shares = [*SWEEP]
        while len(shares) < MOST_RATES:
            shares.append(shares[-1] * SWEEP_ON)
        for share in shares:
            run = self.run(policy, carried * share)
            yield run
            missed = missed + 1 if run.slo_attainment < ATTAINED else 0
            if missed == MISSES:
                return


async def run_simulate(options: argparse.Namespace) -> int:
    """Simulate and print."""
    policies: Sequence[str] = options.policy or (OURS, "round_robin")
    for policy in policies:
        router_of(policy)
    if options.plot is not None:
        plotting()
    profile = PROFILES[options.profile]
    poisson = Random(options.seed) if options.poisson else None
    # The last block of each prompt and answer is a whole one.
    longest = coarse(profile, options.block_tokens).kv_tokens
    reading: dict[str, Any] = {
        "requests": options.requests,
        "block_tokens": options.block_tokens,
        "poisson": poisson,
        "longest": longest,
    }
    workload = (
        read_workload(options.trace, **reading) if options.trace else open_loop(read_excerpt(), **reading)
    )
    fleets = Fleets(
        workload=workload,
        trace=Path(options.trace or EXCERPT).name,
        profile=profile,
        nodes=options.nodes,
        seed=options.seed,
        slo_s=options.ttft_slo_ms / 1000,
    )
    runs: list[Run] = []
    if options.sweep:
        carried = fleets.carried()
        for policy in policies:
            runs += fleets.sweep(policy, carried)
    else:
        for rate in options.rate or (1.0,):
            runs += [fleets.run(policy, rate) for policy in policies]
    report = Report(runs=runs, knee=knees(runs) if options.sweep else {})
    print(table(report, options.ttft_slo_ms))
    fleet = f"{options.nodes} x {profile.name}, TTFT SLO {options.ttft_slo_ms:g} ms"
    title = f"{fleets.trace}: {workload.requests} requests, {fleet}"
    if options.json is not None:
        _write(options.json, lambda path: path.write_bytes(msgspec.json.format(msgspec.json.encode(report))))
    if options.plot is not None:
        _write(options.plot, lambda path: plot(report, path, title))
    return 0


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}; name a file that can be written") from None
