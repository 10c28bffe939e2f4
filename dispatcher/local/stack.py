"""A whole stack on this machine, one process each: broker, Valkey, dispatchers, engines, agents.

Every process is a child that dies with us and may be killed and started again on its own port, which
is what the demo and the tests do to it. Processes of `workers_agent` are launched, never imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from dispatcher.backends.connect import connect_kafka
from dispatcher.backends.topics import create_topics
from dispatcher.errors import LogUnavailable, ServerError
from dispatcher.local.broker import Broker, BrokerKind, choose_broker
from dispatcher.local.processes import HOST, ReservedPort, ServerProcess
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Names

START_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 60.0
POLL_S = 0.05
HEALTH_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class StackSettings:
    """What a stack is made of.

    `redis`, `kafka` and `engines` name servers that exist, instead of local ones; one engine per node.
    """

    nodes: int = 4
    dispatchers: int = 2
    broker: BrokerKind = "auto"
    redis: str = ""
    kafka: str = ""
    engines: tuple[str, ...] = ()
    pool: str = "default"
    partitions: int = 4
    model: str = "sim"
    max_running: int = 32
    time_scale: float = 1.0
    prefill_tokens_per_s: float = 40_000.0
    decode_step_ms: float = 8.0


class Member:
    """A Python process of the stack: argv, a port of its own, and how to see that it serves."""

    def __init__(self, name: str, folder: Path, module: str, port_flag: str) -> None:
        self.name = name
        self._process = ServerProcess(name, folder / name)
        self._module = module
        self._port = ReservedPort()
        self._port_flag = port_flag
        self.arguments: list[str] = []

    @property
    def url(self) -> str:
        """Where it serves HTTP."""
        return f"http://{HOST}:{self._port.port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """Where its logs are."""
        return self._process.log_path

    async def start(self, session: aiohttp.ClientSession) -> None:
        """Start it and return once it answers `/health`."""

        async def answers() -> bool:
            return await health(session, self.url) is not None

        module = self._module.split()
        argv = [sys.executable, "-m", *module, *self.arguments, self._port_flag, str(self._port.port)]
        await self._process.start(argv, ready=answers, timeout_s=START_TIMEOUT_S)

    async def stop(self, grace_s: float = 10.0) -> None:
        """Ask it to end."""
        await self._process.stop(grace_s)

    async def kill(self) -> None:
        """SIGKILL it."""
        self._process.kill()
        await self._process.wait_exit()

    def freeze(self) -> None:
        """SIGSTOP it."""
        self._process.freeze()

    def thaw(self) -> None:
        """SIGCONT it."""
        self._process.thaw()

    def release(self) -> None:
        """Give its port back."""
        self._port.release()


async def health(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    """What `/health` says, None when nothing answers."""
    try:
        async with session.get(f"{url}/health") as response:
            if response.content_type != "application/json":
                return {}
            answer: dict[str, Any] = await response.json()
            return answer
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None


class LocalStack:
    """The stack: `async with LocalStack(...) as stack` starts and stops all of it.

    Args:
        folder: where its data and logs are; a temporary one, removed at the end, when None.
        tell: takes progress lines for people.
    """

    def __init__(
        self,
        settings: StackSettings,
        *,
        folder: Path | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.names = Names(settings.pool)
        self.broker: Broker | None = None
        self.valkey: ValkeyServer | None = None
        self.dispatchers: list[Member] = []
        self.engines: list[Member] = []
        self.agents: list[Member] = []
        self._folder = folder
        self._tell = tell
        self._stack = contextlib.AsyncExitStack()
        self._session: aiohttp.ClientSession | None = None

    @property
    def kafka(self) -> str:
        """Bootstrap servers."""
        return self.settings.kafka or (self.broker.bootstrap if self.broker else "")

    @property
    def redis(self) -> str:
        """Redis URL."""
        return self.settings.redis or (self.valkey.url if self.valkey else "")

    @property
    def members(self) -> list[Member]:
        """All Python processes."""
        return [*self.dispatchers, *self.engines, *self.agents]

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        if self._folder is None:
            kept = tempfile.TemporaryDirectory(prefix="flexlb-", ignore_cleanup_errors=True)
            self._stack.callback(kept.cleanup)
            self._folder = Path(kept.name)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S))
        self._stack.push_async_callback(self._session.close)
        await self._start_servers(self._folder)
        self._describe_members(self._folder)
        self._stack.push_async_callback(self._stop_members)
        session = self._session
        async with asyncio.TaskGroup() as group:
            for member in self.members:
                group.create_task(member.start(session))
        await self.until(self.is_ready, "a leader and all nodes", READY_TIMEOUT_S)

    async def _start_servers(self, folder: Path) -> None:
        settings = self.settings
        async with asyncio.TaskGroup() as group:
            if not settings.kafka:
                self.broker, sentence = choose_broker(settings.broker, folder / "kafka")
                self._tell(sentence)
                self._stack.push_async_callback(self.broker.stop)
                group.create_task(self.broker.start())
            if not settings.redis:
                self.valkey = ValkeyServer(folder / "valkey")
                self._stack.push_async_callback(self.valkey.stop)
                group.create_task(self.valkey.start())
        if self.broker is not None:
            self._tell(f"{self.broker.description} (ready in {self.broker.start_s:.1f} s)")
        if self.valkey is not None:
            self._tell(self.valkey.description)
        await self._create_topics()

    async def _create_topics(self) -> None:
        async def created() -> bool:
            try:
                await create_topics(
                    connect_kafka(self.kafka),
                    self.names,
                    partitions=self.settings.partitions,
                    replication_factor=1,
                )
            except LogUnavailable:
                return False
            return True

        await self.until(created, f"Kafka at {self.kafka} to create topics", 30.0)

    def _describe_members(self, folder: Path) -> None:
        settings = self.settings
        common = ["--redis", self.redis, "--kafka", self.kafka, "--pool", settings.pool]
        for number in range(1, settings.dispatchers + 1):
            member = Member(f"dispatcher-{number}", folder, "dispatcher dispatcher", "--metrics-port")
            member.arguments = common
            self.dispatchers.append(member)
        for number in range(1, settings.nodes + 1):
            engine_url = self._engine_url(number, folder)
            agent = Member(f"agent-{number}", folder, "workers_agent", "--metrics-port")
            agent.arguments = [
                *common,
                *("--node", f"node-{number}", "--engine-url", engine_url, "--models", settings.model),
                *("--max-running", str(settings.max_running)),
            ]
            self.agents.append(agent)

    def _engine_url(self, number: int, folder: Path) -> str:
        settings = self.settings
        if settings.engines:
            return settings.engines[(number - 1) % len(settings.engines)]
        engine = Member(f"engine-{number}", folder, "workers_agent.simulator", "--port")
        engine.arguments = [
            *("--model", settings.model, "--max-running", str(settings.max_running)),
            *("--time-scale", str(settings.time_scale), "--decode-step-ms", str(settings.decode_step_ms)),
            *("--prefill-tokens-per-s", str(settings.prefill_tokens_per_s)),
        ]
        self.engines.append(engine)
        return engine.url

    async def _stop_members(self) -> None:
        """Drain order: agents first, engines last, so that what runs may finish."""
        for group in (self.agents, self.dispatchers, self.engines):
            await asyncio.gather(*(member.stop() for member in group))
        for member in self.members:
            member.release()

    async def start_member(self, member: Member) -> None:
        """Start a member again."""
        assert self._session is not None
        await member.start(self._session)

    async def leader(self) -> Member | None:
        """The dispatcher that leads."""
        for member, state in zip(self.dispatchers, await self._healths(self.dispatchers), strict=True):
            if state is not None and state.get("leading"):
                return member
        return None

    async def _healths(self, members: list[Member]) -> list[dict[str, Any] | None]:
        assert self._session is not None
        session = self._session
        return await asyncio.gather(*(health(session, member.url) for member in members))

    async def status(self) -> dict[str, Any]:
        """What the leader says of itself, {} when nobody leads."""
        leader = await self.leader()
        if leader is None:
            return {}
        assert self._session is not None
        return {"leader": leader.name, **(await health(self._session, leader.url) or {})}

    async def is_ready(self) -> bool:
        """Whether somebody leads and every node takes work."""
        status = await self.status()
        return bool(status) and status.get("nodes") == self.settings.nodes

    async def until(self, holds: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
        """Return once `holds` does.

        Raises:
            ServerError: it does not within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not await holds():  # noqa: ASYNC110 - other processes are asked, no event tells
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ServerError(
                f"expected {what} within {timeout_s:.0f} s; the logs are in {self._folder}"
            ) from None
