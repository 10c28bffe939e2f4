"""`flexlb replay`: a trace through a running pool, and a report; exit code 1 if not all got one answer."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from random import Random

import msgspec

from dispatcher.backends.access import KAFKA_ACCESS
from dispatcher.backends.connect import connect_kafka
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.client.client import Client
from dispatcher.protocol.names import Lane
from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.protocol.request import DEFAULT_PRIORITY
from dispatcher.replay.replay import OnProgress, ReplaySettings, Tally, replay
from dispatcher.replay.report import is_clean, summarise, table
from dispatcher.replay.traces import EXCERPT, read_excerpt, read_trace
from dispatcher.settings import DispatcherSettings

CONNECTION = {"kafka", "pool", *KAFKA_ACCESS}
PROGRESS_EVERY_S = 1.0


def configure_replay(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb replay`."""
    add = parser.add_argument
    add(
        "trace",
        nargs="?",
        help="trace file: Mooncake, RTP-LLM, Azure or what flexlb simulate --save wrote, plain or gzip "
        f"(default: {EXCERPT}, in the package)",
    )
    add_flags(parser, DispatcherSettings, only=CONNECTION)
    add("--model", default="sim", help="model to ask for (default sim)")
    add("--tenant", default="", help="tenant of the requests")
    add("--speed", type=float, default=1.0, help="multiple of the recorded pace (default 1)")
    add("--limit", type=int, default=None, help="only the first N requests")
    add("--poisson", action="store_true", help="exponential gaps of the trace's mean rate, not its times")
    add("--poisson-seed", type=int, default=1, help="seed of those gaps (default 1)")
    add(
        "--scale-tokens",
        type=_scale,
        default=1.0,
        help="multiply prompt and output lengths, e.g. 0.1 on a small machine (default 1)",
    )
    add("--block-size", type=_positive, default=BLOCK_TOKENS, help="routing block of the pool, tokens")
    add("--lane", choices=[lane.name.lower() for lane in Lane], default="interactive", help="request topic")
    add("--priority", type=int, default=DEFAULT_PRIORITY, help="1 to 100 (default 50)")
    add("--deadline-s", type=float, default=None, help="deadline of each request, seconds")
    add("--timeout", type=float, default=600.0, help="patience for the last outcomes, seconds (default 600)")
    add("--json", action="store_true", help="print the report as JSON")


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"expected above 0 and up to 100, seen {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, seen {text}")
    return value


async def run_replay(options: argparse.Namespace) -> int:
    """Replay a trace and print the report."""
    flags = {name: value for name, value in vars(options).items() if name in CONNECTION}
    connection = read_settings(DispatcherSettings, flags)
    requests = read_trace(options.trace) if options.trace else read_excerpt()
    settings = ReplaySettings(
        model=options.model,
        speed=options.speed,
        limit=options.limit,
        poisson=Random(options.poisson_seed) if options.poisson else None,
        token_scale=options.scale_tokens,
        block_size=options.block_size,
        lane=Lane[options.lane.upper()],
        priority=options.priority,
        deadline_ms=round(options.deadline_s * 1000) if options.deadline_s is not None else None,
        timeout_s=options.timeout,
    )
    async with Client(
        connect_kafka(connection.kafka, connection.kafka_access),
        connection.pool,
        options.tenant,
        most_finished=len(requests),
    ) as client:
        result = await replay(client, requests, settings, progress_line(sys.stderr.write))
    report = summarise(result)
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if options.json else table(report))
    return 0 if is_clean(report) else 1


def progress_line(write: Callable[[str], object]) -> OnProgress:
    """Report progress by one line a second, and at the end."""
    last_s = time.monotonic()

    def show(tally: Tally) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PROGRESS_EVERY_S or tally.answered == tally.planned:
            last_s = time.monotonic()
            write(f"sent {tally.sent} of {tally.planned}, answered {tally.answered}\n")

    return show
