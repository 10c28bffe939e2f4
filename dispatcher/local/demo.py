"""`flexlb demo`: a real workload through a whole stack on this machine, under `random` and under ours.

The fleet is simulated engines whose caches together hold a little more than the workload's working set, and
the load is a share of what `random` can carry there, both computed first. Each run has processes, topics and
keys of its own, on one Kafka and one Redis, and ends with the audit of its raw topics. With `--kill` only
ours runs, and is broken in mid-run. Exit code 0 only when the audits are clean and completions are equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.audit import as_text, audit
from dispatcher.backends.legacy_environment import our_policy
from dispatcher.client.client import Client
from dispatcher.local.demo_report import Figures, comparison, figures, is_good
from dispatcher.local.kills import KILLS, break_stack
from dispatcher.local.stack import LocalServers, LocalStack, Member, StackSettings
from dispatcher.local.up import add_server_flags, roles_of, stack_settings
from dispatcher.protocol.node import Role
from dispatcher.replay.replay import OnProgress, ReplayResult, ReplaySettings, Tally, replay
from dispatcher.replay.report import summarise
from dispatcher.replay.traces import TraceRequest, read_excerpt
from dispatcher.replay.yardsticks import cache_bounds, carried_per_s, workload_of
from dispatcher.scheduling.choice import SchedulingParameters
from dispatcher.scheduling.policies import POLICIES
from dispatcher.simulation.profile import Profile
from dispatcher.simulation.profiles import PROFILES
from dispatcher.telemetry.live_line import LiveLine, say

OURS = "prefill_cost"
CACHE_SHARE = 1.25
"""KV cache of the fleet, as a multiple of the workload's working set."""
ANSWER_PATIENCE_S = 120.0
SETTLE_S = 20.0
BUSY = "flexlb_sim:busy_seconds"


def configure_demo(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb demo`."""
    add_server_flags(parser)
    add = parser.add_argument
    add("--requests", type=_requests, default=500, help="requests of the conversation trace (default 500)")
    add(
        "--load",
        type=_share,
        default=0.8,
        help="load, as a share of what 'random' can carry on this fleet (default 0.8)",
    )
    add("--profile", choices=list(PROFILES), default="h100-llama-8b", help="the engines' GPU and model")
    add(
        "--time-scale",
        type=_scale,
        default=0.2,
        help="wall seconds per second of the engines: 0.2 runs them five times as fast (default 0.2)",
    )
    add(
        "--policy",
        type=our_policy,
        choices=list(POLICIES),
        default=OURS,
        help=f"our policy, or an original's spelling (default {OURS})",
    )
    add(
        "--baseline",
        type=our_policy,
        choices=[*POLICIES, "none"],
        help="policy of the run to compare with (default random; none with --kill)",
    )
    add(
        "--kill",
        action="append",
        default=[],
        choices=list(KILLS),
        help="kill -9 this in mid-run (repeatable); redis-data also deletes everything Redis held",
    )
    add("--seed", type=int, default=0, help="of random choices, which node is killed among them (default 0)")
    add("--json", type=Path, metavar="FILE", help="leave the report here")


def _requests(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 2000:
        raise argparse.ArgumentTypeError(f"expected 1 to 2000 (what the excerpt holds), seen {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 2:
        raise argparse.ArgumentTypeError(f"expected 0.01 to 2, seen {text}")
    return value


def _scale(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 10:
        raise argparse.ArgumentTypeError(f"expected 0.01 to 10, seen {text}")
    return value


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What both runs have in common. `pace` is a multiple of the trace's own, by the engines' clock."""

    trace: list[TraceRequest]
    profile: Profile
    nodes: int
    prefill: int
    load: float
    time_scale: float
    ideal_hit_ratio: float
    working_set_tokens: int
    carried_per_s: float
    pace: float
    seed: int

    @property
    def caches(self) -> int:
        """Caches that prompts are computed with."""
        return self.prefill or self.nodes

    @property
    def split(self) -> str:
        """Who computes prompts, and who answers."""
        return (
            f", {self.prefill} for prompts and {self.nodes - self.prefill} for answers"
            if self.prefill
            else ""
        )

    @property
    def speed(self) -> float:
        """Multiple of the trace's own pace, by the wall clock."""
        return self.pace / self.time_scale

    @property
    def seconds(self) -> float:
        """Wall seconds from the first request to the last."""
        return (self.trace[-1].arrival_s - self.trace[0].arrival_s) / self.speed

    @property
    def milliseconds(self) -> str:
        """Which clock the report's milliseconds are of."""
        return "wall" if self.time_scale == 1 else "simulated"

    def described(self) -> str:
        """The workload in words."""
        faster = f", {1 / self.time_scale:g} times as fast as they would run" if self.time_scale != 1 else ""
        return (
            f"{len(self.trace)} requests of the conversation trace over {self.nodes} simulated engines"
            f"{self.split} ({self.profile.name}{faster}).\n"
            f"  Load {self.load:g} of the {self.carried_per_s:.1f} requests/s that 'random' can carry there; "
            f"caches hold {self.profile.kv_tokens * self.caches / self.working_set_tokens:.2f} times the "
            f"{self.working_set_tokens / 1e6:.1f} M tokens of the working set."
        )


def plan_of(options: argparse.Namespace) -> Plan:
    """Compute the fleet's caches and the load."""
    trace = read_excerpt()[: options.requests]
    workload = workload_of(trace)
    profile = PROFILES[options.profile]
    bounds = cache_bounds(workload, profile.block_tokens)
    longest = max(len(p) + o for p, o in zip(workload.prompts, workload.outputs, strict=True))
    roles = roles_of(options)
    # What decode nodes hold is of no use to a prompt that a prefill node computes.
    prefill = roles.count(Role.PREFILL.value)
    tokens = max(CACHE_SHARE * bounds.working_set_tokens / (prefill or len(roles)), longest)
    running = StackSettings.max_running
    profile = replace(profile, kv_blocks=-(-int(tokens) // profile.block_tokens) + 1, max_running=running)
    carried = carried_per_s(workload, profile, len(roles), random.Random(options.seed))
    if prefill:
        prompts = replace(workload, outputs=[1] * len(workload.outputs))
        carried = min(carried, carried_per_s(prompts, profile, prefill, random.Random(options.seed)))
    return Plan(
        trace=trace,
        profile=profile,
        nodes=len(roles),
        prefill=prefill,
        load=options.load,
        time_scale=options.time_scale,
        ideal_hit_ratio=bounds.ideal_hit_ratio,
        working_set_tokens=bounds.working_set_tokens,
        carried_per_s=carried,
        pace=options.load * carried / workload.per_s,
        seed=options.seed,
    )


async def run_demo(options: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    current = asyncio.current_task()
    assert current is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)
    try:
        return await _demo(options)
    except asyncio.CancelledError:
        say("stopped")
        return 130


async def _demo(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="flexlb-", ignore_cleanup_errors=True) as temporary:
        folder: Path = options.folder or Path(temporary)
        base = stack_settings(options)
        async with AsyncExitStack() as cleanup:
            started = cleanup.enter_async_context(LocalServers(base, folder, tell=say))
            planned = asyncio.to_thread(plan_of, options)
            servers, plan = await asyncio.gather(started, planned)
            say(plan.described())
            baseline_policy = options.baseline or ("none" if options.kill else "random")
            baseline = None
            if baseline_policy != "none":
                pool = f"{base.pool}-baseline"
                settings = _settings(replace(base, policy=baseline_policy, pool=pool), plan)
                baseline = await _run(settings, plan, servers, folder / "baseline", [])
            settings = _settings(replace(base, policy=options.policy), plan)
            ours = await _run(settings, plan, servers, folder / "ours", options.kill)
            broker = servers.broker.description if servers.broker else servers.kafka
    print(comparison(ours, baseline))
    print(f"Milliseconds are {_clock(plan)}.")
    if options.json:
        options.json.write_text(json.dumps(_merged(ours, baseline, plan, broker, options), indent=2) + "\n")
    good = is_good(ours, baseline)
    say("clean: nothing lost, one answer each" if good else "NOT clean, see above")
    return 0 if good else 1


def _clock(plan: Plan) -> str:
    if plan.time_scale == 1:
        return "wall time"
    return (
        f"simulated, by the engines' clock: {plan.time_scale:g} wall ms each. What the path itself costs is "
        f"wall time and looks {1 / plan.time_scale:g} times longer here"
    )


def _settings(base: StackSettings, plan: Plan) -> StackSettings:
    """A stack of the plan's engines. What the scheduler weighs in seconds goes by the engines' clock."""
    scaled = SchedulingParameters()
    flags: list[str] = []
    for name in ("pressure_s", "lookahead_min_s", "lookahead_max_s"):
        value = max(0.001, getattr(scaled, name) * plan.time_scale)
        flags += [f"--{name.replace('_', '-')}", f"{value:g}"]
    flags += ["--tpot-slo-ms", f"{1000 * scaled.tpot_slo_s * plan.time_scale:g}"]
    return replace(
        base,
        nodes=plan.nodes,
        profile=plan.profile.name,
        kv_blocks=plan.profile.kv_blocks,
        time_scale=plan.time_scale,
        dispatcher_flags=(*flags, "--seed", str(plan.seed + 1)),
    )


async def _run(
    settings: StackSettings, plan: Plan, servers: LocalServers, folder: Path, kills: list[str]
) -> Figures:
    """One policy: its stack, the trace, the audit."""
    async with LocalStack(settings, folder=folder, servers=servers, tell=say) as stack:
        say(f"{settings.policy}: the stack is up, the trace takes {plan.seconds:.0f} s")
        result = await _replay(stack, plan, kills)
        busy = {} if kills else await _busy_s(stack)
        say(f"{settings.policy}: auditing the raw topics")
        found = await audit(stack.kafka, settings.pool, result.began_ms - 1000, settle_s=SETTLE_S)
        if found.findings:
            print(as_text(found))
        else:
            again = len(found.reexecuted)
            say(f"{settings.policy}: audit clean: 0 lost, 0 answered twice, {again} re-executed")
    return figures(
        summarise(result),
        found,
        policy=settings.policy,
        time_scale=plan.time_scale,
        ideal_hit_ratio=plan.ideal_hit_ratio,
        busy_s=busy,
    )


async def _replay(stack: LocalStack, plan: Plan, kills: list[str]) -> ReplayResult:
    settings = ReplaySettings(model=stack.settings.model, speed=plan.speed, timeout_s=ANSWER_PATIENCE_S)
    async with Client(stack.kafka, stack.settings.pool, most_finished=len(plan.trace)) as client:
        async with asyncio.TaskGroup() as group:
            progress = _progress(stack.settings.policy, plan)
            running = group.create_task(replay(client, plan.trace, settings, progress))
            group.create_task(break_stack(stack, kills, plan.seconds, random.Random(plan.seed), say))
        return await running


async def _busy_s(stack: LocalStack) -> dict[str, float]:
    """Each engine's computing time, by node."""

    async def of(engine: Member) -> float:
        async with session.get(f"{engine.url}/metrics") as response:
            families = list(text_string_to_metric_families(await response.text()))
        return sum(one.value for family in families if family.name == BUSY for one in family.samples)

    async with aiohttp.ClientSession() as session:
        seconds = await asyncio.gather(*map(of, stack.engines))
    return {f"node-{number}": found for number, found in enumerate(seconds, start=1)}


def _merged(
    ours: Figures, baseline: Figures | None, plan: Plan, broker: str, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        **ours,
        "baseline": baseline,
        "milliseconds": plan.milliseconds,
        "time_scale": plan.time_scale,
        "profile": plan.profile.name,
        "nodes": plan.nodes,
        "kv_tokens_per_node": plan.profile.kv_tokens,
        "working_set_tokens": plan.working_set_tokens,
        "load": plan.load,
        "random_carries_per_s": round(plan.carried_per_s, 3),
        "requests_per_s": round(plan.load * plan.carried_per_s, 3),
        "broker": broker,
        "killed": options.kill,
        "seed": plan.seed,
    }


def _progress(policy: str, plan: Plan) -> OnProgress:
    """A live line on terminals, a line per tenth elsewhere."""
    live = LiveLine()
    shown = -1

    def show(tally: Tally) -> None:
        nonlocal shown
        tenth = tally.answered * 10 // tally.planned
        if not live.is_live and tenth <= shown:
            return
        shown = tenth
        line = f"{policy}: {tally.sent} of {tally.planned} sent, {tally.answered} answered"
        if tally.ttft_ms is not None:
            line += f", first token {tally.ttft_ms / plan.time_scale:,.0f} ms {plan.milliseconds} on average"
        if tally.hit_ratio is not None:
            line += f", {tally.hit_ratio:.1%} of prompt tokens from cache"
        if not live.is_live:
            say(line)
            return
        live.show(line)
        if tally.answered == tally.planned:
            live.end()

    return show
