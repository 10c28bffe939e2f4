"""The command of a frontend: `flexlb frontend`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
from ipaddress import ip_address

from prometheus_client import CollectorRegistry

from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.backends.renewal import renew_on_hangup
from dispatcher.errors import SettingsError
from dispatcher.frontend.api_keys import read_api_keys
from dispatcher.frontend.app import Frontend
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.telemetry.logging import Log, configure_logging


def configure_frontend(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb frontend`: one per setting."""
    add_flags(parser, FrontendSettings)


def is_open_to_others(settings: FrontendSettings) -> bool:
    """Whether other machines may ask without a key; a name other than localhost may be anywhere."""
    if settings.api_keys_file:
        return False
    try:
        return not ip_address(settings.host.strip("[]")).is_loopback
    except ValueError:
        return settings.host != "localhost"


async def run_frontend(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; what runs then gets `shutdown_grace_s` to end."""
    settings = read_settings(FrontendSettings, vars(options))
    configure_logging(settings.log_level)
    log = Log(process="frontend", pool=settings.pool, host=socket.gethostname(), pid=os.getpid())
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    renew_on_hangup(settings, lambda: read_settings(FrontendSettings, vars(options)), log=log)
    frontend = Frontend(
        settings,
        kafka=connect_kafka(settings.kafka, settings.kafka_access),
        redis=connect_redis(settings.redis, access=settings.redis_access) if settings.redis else None,
        keys=read_api_keys(settings.api_keys_file) if settings.api_keys_file else None,
        registry=CollectorRegistry(),
        log=log,
    )
    try:
        async with frontend:
            if is_open_to_others(settings):
                log.warning(
                    "everybody who reaches this address may ask, as no tenant",
                    host=settings.host,
                    fix="set api_keys_file, or host to 127.0.0.1 behind a proxy that asks for keys",
                )
            log.info("frontend ready", address=f"http://{settings.host}:{frontend.port}/v1")
            await stopped.wait()
            log.info("frontend stopping")
            await frontend.drain(settings.shutdown_grace_s)
    except OSError as error:
        raise SettingsError(
            f"--port: expected a free port on {settings.host}, seen {settings.port}: "
            f"{error.strerror or error}; choose another or 0 for any"
        ) from None
    log.info("frontend stopped")
    return 0
