"""`flexlb up`: the whole stack until Ctrl-C, with a live status line on a terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

from dispatcher.backends.legacy_environment import our_policy
from dispatcher.errors import SettingsError
from dispatcher.local.stack import LocalStack, StackSettings
from dispatcher.protocol.node import Role
from dispatcher.scheduling.policies import POLICIES
from dispatcher.simulation.profiles import PROFILES
from dispatcher.telemetry.live_line import LiveLine

STATUS_EVERY_S = 1.0
DEFAULT_NODES = 4


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that `up` and `demo` share."""
    add = parser.add_argument
    add("--nodes", type=_count, help="engines, each with an agent (default 4)")
    add("--prefill", type=_count, help="instead of --nodes: engines that compute prompts only")
    add("--decode", type=_count, help="with --prefill: engines that go on from them")
    add(
        "--dispatchers",
        type=_count,
        default=2,
        help="dispatchers: one leads, the others stand by (default 2)",
    )
    add("--redis", default="", metavar="URL", help="a Redis or Valkey that exists, instead of a local Valkey")
    add(
        "--kafka",
        default="auto",
        metavar="HOST:PORT|apache|embedded",
        help="a Kafka that exists, or which local one (default: Apache Kafka where it can run)",
    )
    add("--pool", default="default", help="pool name (default 'default')")
    add("--folder", type=Path, help="keep data and logs here (default: a temporary folder)")


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"expected 1 to 64, seen {text}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, seen {text}")
    return value


def _scale(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected 0 to 100, seen {text}")
    return value


def roles_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The role of each node; the flags are checked.

    Raises:
        SettingsError: they contradict each other.
    """
    if options.prefill is None and options.decode is None:
        nodes: int = options.nodes or DEFAULT_NODES
        return (Role.FUSED.value,) * nodes
    if options.prefill is None or options.decode is None or options.nodes is not None:
        raise SettingsError("expected --nodes N, or --prefill P and --decode D; seen a mix of them")
    prefill: int = options.prefill
    decode: int = options.decode
    return (Role.PREFILL.value,) * prefill + (Role.DECODE.value,) * decode


def stack_settings(options: argparse.Namespace) -> StackSettings:
    """The stack that those flags describe."""
    local = options.kafka in {"auto", "apache", "embedded"}
    roles = roles_of(options)
    return StackSettings(
        nodes=len(roles),
        roles=roles,
        dispatchers=options.dispatchers,
        broker=options.kafka if local else "auto",
        kafka="" if local else options.kafka,
        redis=options.redis,
        pool=options.pool,
    )


def configure_up(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb up`."""
    add_server_flags(parser)
    add = parser.add_argument
    add("--port", type=_port, default=0, help="port of the OpenAI API (default 0: a free one)")
    add(
        "--policy",
        type=our_policy,
        choices=list(POLICIES),
        default="prefill_cost",
        help="how a node is chosen; an original's spelling is understood too (default prefill_cost)",
    )
    add("--profile", choices=list(PROFILES), default="h100-llama-8b", help="the engines' GPU and model")
    add(
        "--time-scale",
        type=_scale,
        default=1.0,
        help="wall seconds per second of the engines: 0.1 runs them ten times as fast (default 1)",
    )
    add("--json", action="store_true", help="print the addresses as one JSON object")


async def run_up(options: argparse.Namespace) -> int:
    """Run the stack until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    current = asyncio.current_task()
    assert current is not None
    started = False

    def end() -> None:
        stop.set()
        if not started:
            current.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    tell = (lambda _: None) if options.json else _say
    try:
        settings = replace(
            stack_settings(options),
            policy=options.policy,
            profile=options.profile,
            time_scale=options.time_scale,
            frontend_port=options.port,
        )
        async with LocalStack(settings, folder=options.folder, tell=tell) as stack:
            started = True
            _show(stack, as_json=options.json)
            await _watch(stack, stop)
            _say("stopping")
    except asyncio.CancelledError:
        _say("stopped while starting")
        return 130
    return 0


def _show(stack: LocalStack, *, as_json: bool) -> None:
    api = f"{stack.frontends[0].url}/v1"
    addresses: dict[str, str | list[str]] = {
        "api": api,
        "kafka": stack.kafka,
        "redis": stack.redis,
        "pool": stack.settings.pool,
        "model": stack.settings.model,
        "dispatchers": [member.url for member in stack.dispatchers],
        "agents": [member.url for member in stack.agents],
        "engines": [member.url for member in stack.engines],
    }
    if as_json:
        print(json.dumps(addresses), flush=True)
        return
    for name, value in addresses.items():
        print(f"  {name:12} {', '.join(value) if isinstance(value, list) else value}")
    body = json.dumps({"model": stack.settings.model, "messages": [{"role": "user", "content": "Hello"}]})
    print(
        f"Ready. Try:\n"
        f"  curl {api}/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
        f"  flexlb replay --kafka {stack.kafka} --pool {stack.settings.pool} --limit 100\n"
        f"Ctrl-C drains it and leaves nothing behind.",
        flush=True,
    )


async def _watch(stack: LocalStack, stop: asyncio.Event) -> None:
    live = LiveLine()
    while not stop.is_set():
        if live.is_live:
            status = await stack.status()
            line = (
                f"leader {status['leader']}  nodes {status['nodes']}/{stack.settings.nodes}  "
                f"waiting {status['waiting']}  running {status['bound']}"
                if status
                else "nobody leads"
            )
            live.show(line)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATUS_EVERY_S):
                await stop.wait()
    live.end()


def _say(text: str) -> None:
    print(f"flexlb: {text}", file=sys.stderr, flush=True)
