"""`python -m workers_agent` (and `flexlb agent`): the agent of one node."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import uuid
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.effective_settings import FORMS, print_effective
from dispatcher.backends.environment import add_flags, read_effective, read_settings
from dispatcher.backends.renewal import renew_on_hangup
from dispatcher.errors import FlexLBError, SettingsError
from dispatcher.telemetry.logging import Log, configure_logging
from dispatcher.telemetry.metrics import serve_metrics
from workers_agent.app import Agent
from workers_agent.engines.engine import EngineFailure
from workers_agent.engines.openai_http import EngineDescription, OpenAIEngine
from workers_agent.settings import AgentSettings

MODELS_PAUSE_S = 1.0


def main() -> int:
    """Run the agent; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flexlb agent", description="Run the agent beside an OpenAI-compatible engine."
    )
    add_flags(parser, AgentSettings)
    parser.add_argument("--print-config", choices=FORMS, help="print the effective settings and end")
    options = parser.parse_args()
    try:
        if options.print_config:
            print(print_effective(read_effective(AgentSettings, vars(options)), options.print_config))
            return 0
        settings = read_settings(AgentSettings, vars(options))
        return asyncio.run(_run(settings, lambda: read_settings(AgentSettings, vars(options))))
    except FlexLBError as error:
        print(f"flexlb agent: {error}", file=sys.stderr)
        return 2


async def _run(settings: AgentSettings, read: Callable[[], AgentSettings]) -> int:
    configure_logging(settings.log_level)
    log = Log(process="agent", pool=settings.pool, node=settings.node, pid=os.getpid())
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    current = asyncio.current_task()
    assert current is not None

    def end() -> None:
        if stop.is_set():
            current.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    renew_on_hangup(settings, read, log=log)
    registry = CollectorRegistry()
    engine = OpenAIEngine(
        settings.engine_url,
        first_token_timeout_s=settings.first_token_timeout_s,
        inter_token_timeout_s=settings.inter_token_timeout_s,
    )
    agent: Agent | None = None
    try:
        page, port = await serve_metrics(
            registry,
            settings.metrics_host,
            settings.metrics_port,
            lambda: agent.health() if agent is not None else {"ok": True, "registered": False},
        )
    except OSError as error:
        await engine.close()
        raise SettingsError(
            f"--metrics-port: expected a free port on {settings.metrics_host}, seen {settings.metrics_port}: "
            f"{error.strerror or error}; choose another or 0 for any"
        ) from None
    log.info("agent starting", metrics=f"http://{settings.metrics_host}:{port}/metrics")
    try:
        settings = await _with_models(settings, engine, stop, log)
        agent = Agent(
            settings,
            redis=lambda: connect_redis(settings.redis, access=settings.redis_access),
            kafka=connect_kafka(settings.kafka, settings.kafka_access),
            engine=engine,
            clock=Clock(),
            new_id=lambda: uuid.uuid4().hex,
            registry=registry,
            log=log,
        )
        await agent.run(stop)
    except asyncio.CancelledError:
        log.warning("stopped at once, without a drain")
        return 130
    finally:
        await engine.close()
        await page.cleanup()
    return 0


async def _with_models(
    settings: AgentSettings, engine: OpenAIEngine, stop: asyncio.Event, log: Log
) -> AgentSettings:
    """Ask the engine what it serves, until it answers, unless the settings say so."""
    told = False
    while not settings.models and not stop.is_set():
        try:
            models = await engine.models()
            settings = settings.model_copy(update={"models": ",".join(models)})
        except EngineFailure as error:
            if not told:
                log.warning("engine does not tell its models, trying again", error=str(error))
                told = True
            await asyncio.sleep(MODELS_PAUSE_S)
    return _described(settings, await engine.describe(), log)


def _described(settings: AgentSettings, found: EngineDescription, log: Log) -> AgentSettings:
    """Settings completed by what the engine tells of itself.

    Raises:
        SettingsError: the routing block is no multiple of the engine's block.
    """
    block = settings.engine_block_size or found.block_size
    if settings.kv_events_endpoint and block and settings.block_size % block:
        raise SettingsError(
            f"--block-size: expected a multiple of the engine's KV block of {block} tokens, seen "
            f"{settings.block_size}; the pool's routing block must suit every engine in it"
        )
    longest = settings.max_model_len
    if found.max_model_len and "max_model_len" not in settings.model_fields_set:
        longest = found.max_model_len
    told = {
        "engine_block_size": block,
        "engine_version": settings.engine_version or found.version,
        "kv_total_tokens": settings.kv_total_tokens or found.kv_total_tokens,
        "max_model_len": longest,
    }
    log.info("engine found", **told)
    return settings.model_copy(update=told)


if __name__ == "__main__":
    sys.exit(main())
