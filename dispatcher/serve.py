"""The commands of a server: `flexlb dispatcher` runs one, `flexlb init` creates a pool's topics."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import sys
import uuid

import msgspec
from prometheus_client import CollectorRegistry

from dispatcher.app import Dispatcher
from dispatcher.backends.access import KAFKA_ACCESS
from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.backends.renewal import renew_on_hangup
from dispatcher.backends.topics import create_topics
from dispatcher.errors import SettingsError
from dispatcher.protocol.names import Names
from dispatcher.settings import NEEDS_RESTART, DispatcherSettings
from dispatcher.shadow import Shadow
from dispatcher.shadow_text import as_text
from dispatcher.telemetry.logging import Log, configure_logging
from dispatcher.telemetry.metrics import serve_metrics


def configure_dispatcher(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb dispatcher`: one per setting, and those of a shadow."""
    shadow = parser.add_argument_group("shadow", "decide beside the live leader, changing nothing")
    shadow.add_argument(
        "--shadow", action="store_true", help="lead never, write nothing, tell where it would differ"
    )
    shadow.add_argument(
        "--shadow-every",
        type=_count,
        default=1000,
        metavar="N",
        help="a line in the log for so many comparisons (default 1000)",
    )
    shadow.add_argument("--json", action="store_true", help="at its end, print what was found as JSON")
    add_flags(parser, DispatcherSettings)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, seen {text}")
    return value


async def run_dispatcher(options: argparse.Namespace) -> int:
    """Run a dispatcher until SIGTERM or SIGINT; a leader then resigns at once. SIGHUP renews the settings."""
    settings = read_settings(DispatcherSettings, vars(options))
    configure_logging(settings.log_level)
    log = Log(process="dispatcher", pool=settings.pool, host=socket.gethostname(), pid=os.getpid())
    registry = CollectorRegistry()
    if options.shadow:
        return await _run_shadow(settings, options, registry, log)
    if options.json:
        raise SettingsError("--json: expected with --shadow only; a dispatcher tells by /metrics and /health")
    dispatcher = Dispatcher(
        settings,
        redis=lambda: connect_redis(settings.redis, access=settings.redis_access),
        kafka=connect_kafka(settings.kafka, settings.kafka_access),
        clock=Clock(),
        new_id=lambda: uuid.uuid4().hex,
        rng=random.Random(settings.seed or None),
        registry=registry,
        log=log,
    )
    renew_on_hangup(
        settings,
        lambda: read_settings(DispatcherSettings, vars(options)),
        log=log,
        fixed=NEEDS_RESTART,
        take=dispatcher.renew,
    )
    await _serve(dispatcher, settings, registry, log, name="dispatcher")
    return 0


async def _run_shadow(
    settings: DispatcherSettings, options: argparse.Namespace, registry: CollectorRegistry, log: Log
) -> int:
    """Follow the leader until SIGTERM or SIGINT, then tell what was found."""
    shadow = Shadow(
        settings,
        redis=lambda: connect_redis(settings.redis, access=settings.redis_access),
        kafka=connect_kafka(settings.kafka, settings.kafka_access),
        clock=Clock(),
        rng=random.Random(settings.seed or None),
        registry=registry,
        log=log,
        every=options.shadow_every,
    )
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGHUP,
        lambda: log.warning("a shadow keeps its settings", fix="start another with the new ones"),
    )
    await _serve(shadow, settings, registry, log, name="shadow")
    found = shadow.summary()
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        print(as_text(found))
    return 0


async def _serve(
    process: Dispatcher | Shadow,
    settings: DispatcherSettings,
    registry: CollectorRegistry,
    log: Log,
    *,
    name: str,
) -> None:
    """Run until SIGTERM or SIGINT, and show metrics meanwhile."""
    try:
        page, port = await serve_metrics(
            registry, settings.metrics_host, settings.metrics_port, process.health
        )
    except OSError as error:
        raise SettingsError(
            f"--metrics-port: expected a free port on {settings.metrics_host}, seen {settings.metrics_port}: "
            f"{error.strerror or error}; choose another or 0 for any"
        ) from None
    log.info(f"{name} ready", metrics=f"http://{settings.metrics_host}:{port}/metrics")
    running = asyncio.create_task(process.run())
    loop = asyncio.get_running_loop()

    def end() -> None:
        # Ctrl-C under a wrapper comes twice: the second must not cut off the goodbye, which is bounded.
        if not running.cancelling():
            running.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    try:
        await running
    except asyncio.CancelledError:
        log.info(f"{name} stopped")
    finally:
        await page.cleanup()


def configure_init(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb init`."""
    only = {"kafka", "pool", "topic_partitions", "topic_replication", *KAFKA_ACCESS}
    add_flags(parser, DispatcherSettings, only=only)


async def run_init(options: argparse.Namespace) -> int:
    """Create the topics that do not exist yet."""
    settings = read_settings(DispatcherSettings, vars(options))
    created = await create_pool_topics(settings)
    for topic in Names(settings.pool).topics:
        print(f"{topic}: {'created' if topic in created else 'exists'}", file=sys.stdout)
    return 0


async def create_pool_topics(settings: DispatcherSettings) -> list[str]:
    """Create a pool's topics; returns those that did not exist."""
    return await create_topics(
        connect_kafka(settings.kafka, settings.kafka_access),
        Names(settings.pool),
        partitions=settings.topic_partitions,
        replication_factor=settings.topic_replication,
    )
