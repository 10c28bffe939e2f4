"""`flexlb simulate --from-topic`: the traffic of a pool's requests topic instead of a trace file.

Reads the topic and its outcomes, changes nothing there, and tells on stderr how far it is and what it found.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import TextIO

from dispatcher.audit import parse_time
from dispatcher.backends.access import KAFKA_ACCESS
from dispatcher.backends.addresses import KAFKA_SERVERS, is_kafka_servers
from dispatcher.backends.connect import KafkaClients, connect_kafka
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.backends.traffic_log import TrafficLog
from dispatcher.errors import SettingsError
from dispatcher.parameters import admission_limits
from dispatcher.protocol.names import Lane, Names
from dispatcher.replay.traces import TraceRequest
from dispatcher.settings import DispatcherSettings
from dispatcher.simulation.recorded_traffic import RecordedTraffic, told_counts
from dispatcher.telemetry.live_line import LiveLine

CONNECTION = {"kafka", "pool", *KAFKA_ACCESS}
SINCE_S = 3600.0
"""How far back is looked when neither a time nor a number is given."""
MOST_PARTITIONS = 100_001
"""Whether a reply partition exists is not asked: the request was served or not by what there was then."""
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def configure_from_topic(parser: argparse.ArgumentParser) -> None:
    """Flags of a simulation of recorded traffic."""
    group = parser.add_argument_group("recorded traffic, instead of a trace file")
    add = group.add_argument
    add(
        "--from-topic",
        nargs="?",
        const="",
        default=None,
        metavar="SERVERS|FILE.toml",
        help="read the interactive requests topic of a pool and its outcomes, without group or commits; of "
        "these Kafka servers, of a settings file's, or by --kafka, --config and FLEXLB_KAFKA",
    )
    add(
        "--since",
        type=since_ms,
        default=None,
        metavar="T",
        help="from so long ago (90s, 30m, 2h, 1d) or from this time (ISO 8601, epoch seconds) until now "
        "(default 1h, with --last all)",
    )
    add("--last", type=_number, default=None, metavar="N", help="only the last N requests of that")
    add("--model", default=None, help="only requests for this model")
    add(
        "--save",
        default=None,
        metavar="FILE",
        help="write what was read as a trace that simulate reads (gzip with .gz): times, lengths, "
        "priorities, deadlines, and which prompts begin alike, by numbers; no prompt, hash, id or tenant's "
        "name leaves",
    )
    add_flags(parser, DispatcherSettings, only=CONNECTION)


def since_ms(text: str) -> int:
    """Read `--since`; returns epoch milliseconds.

    Raises:
        argparse.ArgumentTypeError: it is neither a duration nor a time.
    """
    if (ago := _AGO.fullmatch(text.strip())) is not None:
        return int(1000 * (time.time() - float(ago[1]) * SECONDS[ago[2]]))
    try:
        return parse_time(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected a duration like 30m or 2h, ISO 8601 like 2026-01-31T12:00:00Z, or epoch seconds, "
            f"seen {text[:60]!r}"
        ) from None


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, seen {text}")
    return value


def check_flags(options: argparse.Namespace) -> None:
    """Refuse a mixture of a trace file and recorded traffic.

    Raises:
        SettingsError: what was given belongs to different sources.
    """
    if options.from_topic is not None:
        if options.trace is not None:
            raise SettingsError(f"--from-topic: expected it or a trace file, seen both ({options.trace})")
        return
    given = [name for name in ("since", "last", "model", "save") if getattr(options, name) is not None]
    given += [name for name in sorted(CONNECTION) if hasattr(options, name)]
    if given:
        flag = given[0].replace("_", "-")
        raise SettingsError(f"--{flag}: expected --from-topic with it, seen it alone")


def settings_of(options: argparse.Namespace) -> DispatcherSettings:
    """Settings of the pool that is read.

    Raises:
        SettingsError: one is wrong, or what --from-topic names is neither servers nor a file.
    """
    flags = {name: value for name, value in vars(options).items() if name in {*CONNECTION, "config_file"}}
    named: str = options.from_topic
    if named.endswith(".toml"):
        flags["config_file"] = named
    elif named:
        if not is_kafka_servers(named):
            raise SettingsError(
                f"--from-topic: expected {KAFKA_SERVERS.expected}, or a settings file FILE.toml, "
                f"seen {named!r}"
            )
        flags["kafka"] = named
    return read_settings(DispatcherSettings, flags)


async def read_traffic(
    options: argparse.Namespace,
    settings: DispatcherSettings,
    *,
    clients: KafkaClients | None = None,
    stream: TextIO | None = None,
) -> Sequence[TraceRequest]:
    """Read what the flags ask for.

    Args:
        clients: makes Kafka clients; those of the settings when absent.
        stream: is told how far it is and what was found; stderr when absent.
    Raises:
        FlexLBError: the brokers do not answer, the topic does not exist, or nothing is there to simulate.
    """
    stream = stream if stream is not None else sys.stderr
    names = Names(settings.pool)
    live = LiveLine(stream)

    def tell(topic: str, read: int, of: int) -> None:
        live.show(f"reading {topic}: {read:,} of {of:,} records")

    kafka = clients if clients is not None else connect_kafka(settings.kafka, settings.kafka_access)
    log = TrafficLog(kafka, names, tell)
    traffic = RecordedTraffic(
        admission_limits(settings, names, MOST_PARTITIONS), model=options.model, last=options.last
    )
    since = options.since
    if since is None and options.last is None:
        since = int(1000 * (time.time() - SINCE_S))
    # Of one model among several more have to be read for the last N of it.
    last = options.last if options.model is None else None
    try:
        async with aclosing(log.requests(since_ms=since, last=last)) as records:
            async for record in records:
                traffic.take(record)
        if (first_ms := traffic.first_ms) is not None:
            async with aclosing(log.outcomes(first_ms)) as values:
                async for value in values:
                    traffic.answer(value)
    finally:
        live.clear()
    trace = traffic.trace()
    for line in told_counts(traffic.counts, traffic.models, options.model):
        stream.write(f"{line}\n")
    return trace


def topic_of(settings: DispatcherSettings) -> str:
    """The topic that is read."""
    return Names(settings.pool).requests(Lane.INTERACTIVE)
