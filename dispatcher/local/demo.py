"""`flexlb demo`: a real workload through a whole stack on this machine, faults on request, then the audit.

Engines are simulated in as much a faster time as the trace is replayed, so that their load is the
trace's own. Exit code 0 only when the audit of the raw topics is clean and every request was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from dispatcher.audit import AuditResult, as_text, audit
from dispatcher.client.client import Client
from dispatcher.local.stack import LocalStack, Member
from dispatcher.local.up import configure_stack, stack_settings
from dispatcher.replay.replay import ReplayResult, ReplaySettings, replay
from dispatcher.replay.report import Report, is_clean, summarise, table
from dispatcher.replay.traces import TraceRequest, read_excerpt

KILLS = ("dispatcher", "agent", "engine", "redis", "redis-data")
FIRST_KILL_SHARE, LAST_KILL_SHARE = 0.25, 0.8
DOWN_S = 1.0
ANSWER_PATIENCE_S = 120.0
SETTLE_S = 20.0


def configure_demo(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb demo`."""
    configure_stack(parser)
    add = parser.add_argument
    add("--requests", type=_requests, default=500, help="requests of the conversation trace (default 500)")
    add("--speed", type=_speed, default=8.0, help="multiple of the trace's own pace (default 8)")
    add(
        "--kill",
        action="append",
        default=[],
        choices=KILLS,
        help="kill -9 this in mid-run (repeatable); redis-data also deletes everything Redis held",
    )
    add("--seed", type=int, default=0, help="chooses which node is killed (default 0)")
    add("--json", type=Path, metavar="FILE", help="leave the report here")


def _requests(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 2000:
        raise argparse.ArgumentTypeError(f"expected 1 to 2000 (what the excerpt holds), seen {text}")
    return value


def _speed(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected 0.1 to 100, seen {text}")
    return value


async def run_demo(options: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    trace = read_excerpt()[: options.requests]
    settings = stack_settings(options, time_scale=1 / options.speed)
    async with LocalStack(settings, folder=options.folder, tell=_say) as stack:
        _say(
            f"{settings.dispatchers} dispatchers, {settings.nodes} nodes are up; {len(trace)} requests "
            f"of the conversation trace at {options.speed:g} times its pace"
        )
        result = await _replay(stack, trace, options)
        report = summarise(result)
        print(table(report))
        _say("auditing the raw topics")
        found = await audit(stack.kafka, settings.pool, result.began_ms - 1000, settle_s=SETTLE_S)
        print(as_text(found))
        is_good = is_clean(report) and not found.findings and not report["unsent"]
        if options.json:
            options.json.write_text(json.dumps(_merged(report, found, stack, options), indent=2) + "\n")
        _say("clean: nothing lost, one answer each" if is_good else "NOT clean, see above")
        return 0 if is_good else 1


async def _replay(stack: LocalStack, trace: list[TraceRequest], options: argparse.Namespace) -> ReplayResult:
    seconds = (trace[-1].arrival_s - trace[0].arrival_s) / options.speed
    settings = ReplaySettings(model=stack.settings.model, speed=options.speed, timeout_s=ANSWER_PATIENCE_S)
    async with Client(stack.kafka, stack.settings.pool, most_finished=len(trace)) as client:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(replay(client, trace, settings, _progress()))
            breaking = group.create_task(_break(stack, options.kill, seconds, random.Random(options.seed)))
        await breaking
        return await running


async def _break(stack: LocalStack, kills: list[str], seconds: float, rng: random.Random) -> None:
    faults: dict[str, Callable[[LocalStack, random.Random], Coroutine[Any, Any, None]]] = {
        "dispatcher": _kill_dispatcher,
        "agent": _kill_agent,
        "engine": _kill_engine,
        "redis": _kill_redis,
        "redis-data": _lose_redis,
    }
    if not kills:
        return
    gap_s = (LAST_KILL_SHARE - FIRST_KILL_SHARE) * seconds / len(kills)
    await asyncio.sleep(FIRST_KILL_SHARE * seconds)
    for kill in kills:
        async with asyncio.TaskGroup() as group:
            group.create_task(faults[kill](stack, rng))
            group.create_task(asyncio.sleep(gap_s))


async def _kill_dispatcher(stack: LocalStack, _: random.Random) -> None:
    leader = await stack.leader()
    await _kill(stack, leader or stack.dispatchers[0])


async def _kill_agent(stack: LocalStack, rng: random.Random) -> None:
    await _kill(stack, rng.choice(stack.agents))


async def _kill_engine(stack: LocalStack, rng: random.Random) -> None:
    await _kill(stack, rng.choice(stack.engines))


async def _kill(stack: LocalStack, member: Member) -> None:
    _say(f"kill -9 {member.name} (pid {member.pid})")
    await member.kill()
    await asyncio.sleep(DOWN_S)
    await stack.start_member(member)
    _say(f"{member.name} is back")


async def _kill_redis(stack: LocalStack, _: random.Random) -> None:
    assert stack.valkey is not None
    _say(f"kill -9 redis (pid {stack.valkey.pid})")
    stack.valkey.kill()
    await asyncio.sleep(DOWN_S)
    await stack.valkey.start()
    _say("redis is back with its data")


async def _lose_redis(stack: LocalStack, _: random.Random) -> None:
    assert stack.valkey is not None
    _say(f"kill -9 redis (pid {stack.valkey.pid}) and delete its data")
    await stack.valkey.wipe()
    await asyncio.sleep(DOWN_S)
    await stack.valkey.start()
    _say("redis is back, empty")


def _merged(
    report: Report, found: AuditResult, stack: LocalStack, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        **report,
        "lost": len(found.lost) + len(found.unanswered),
        "duplicated": len(found.duplicated),
        "reexecuted": len(found.reexecuted),
        "audit_findings": found.findings,
        "broker": stack.broker.description if stack.broker else stack.kafka,
        "killed": options.kill,
    }


def _progress() -> Callable[[int, int, int], None]:
    shown = -1

    def show(sent: int, answered: int, planned: int) -> None:
        nonlocal shown
        if sys.stderr.isatty():
            print(f"\r\x1b[K{sent}/{planned} sent, {answered} answered", end="", file=sys.stderr, flush=True)
            if answered == planned:
                print(file=sys.stderr)
        elif answered * 10 // planned > shown:
            shown = answered * 10 // planned
            _say(f"{sent}/{planned} sent, {answered} answered")

    return show


def _say(text: str) -> None:
    start = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{start}flexlb: {text}", file=sys.stderr, flush=True)
