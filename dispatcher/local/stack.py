"""A whole stack on this machine, one process each: broker, Valkey, dispatchers, engines, agents.

Every process is a child that dies with us and may be killed and started again on its own port, which
is what the demo and the tests do to it. Processes of `workers_agent` are launched, never imported.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from dispatcher.backends.connect import connect_kafka
from dispatcher.backends.topics import create_topics
from dispatcher.errors import LogUnavailable, ServerError
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.broker import Broker, BrokerKind, choose_broker
from dispatcher.local.processes import HOST, ReservedPort, ServerProcess
from dispatcher.local.sentinel import ReplicatedValkey
from dispatcher.local.started import Started
from dispatcher.local.tcp_proxy import TcpProxy
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
    Simulated engines have the profile of that name, with `kv_blocks` blocks of KV cache each when that is not
    0, and whatever `engine_flags` of `flexlb engine-sim` say; `time_scale` is wall seconds per modelled one.
    With `redis_replica` a local Redis has a replica, and Sentinels that everybody asks for the primary.
    With `kafka_proxy` everybody reaches a local Apache Kafka through a proxy of ours, which can be cut.
    `roles`, when given, has one for each node: all else are fused.
    `redis_urls` gives some members, by name, another way to the same Redis.
    `frontend_port`: where the first of `frontends` serves the OpenAI API, 0 for any free port, None for
    nowhere; the others have any.
    """

    nodes: int = 4
    roles: tuple[str, ...] = ()
    dispatchers: int = 2
    broker: BrokerKind = "auto"
    redis: str = ""
    kafka: str = ""
    engines: tuple[str, ...] = ()
    pool: str = "default"
    partitions: int = 4
    model: str = "sim"
    max_running: int = 32
    policy: str = "prefill_cost"
    dispatcher_flags: tuple[str, ...] = ()
    agent_flags: tuple[str, ...] = ()
    redis_replica: bool = False
    kafka_proxy: bool = False
    redis_urls: Mapping[str, str] = field(default_factory=dict)
    profile: str = "h100-llama-8b"
    kv_blocks: int = 0
    engine_flags: tuple[str, ...] = ()
    time_scale: float = 1.0
    frontend_port: int | None = None
    frontends: int = 1


class Member:
    """A Python process of the stack: argv, a port of its own, and how to see that it serves."""

    def __init__(self, name: str, folder: Path, module: str, port_flag: str, *, port: int = 0) -> None:
        self.name = name
        self._process = ServerProcess(name, folder / name)
        self._module = module
        self._port = ReservedPort(port)
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
    def is_running(self) -> bool:
        """Whether its process exists, frozen or not."""
        return self._process.is_running

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


class LocalServers(Started):
    """Kafka and Redis for stacks on this machine: those that exist already, or local ones made here.

    Args:
        folder: where their data and logs are.
        tell: takes progress lines for people.
    """

    def __init__(
        self, settings: StackSettings, folder: Path, *, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._tell = tell
        super().__init__()
        self.broker: Broker | None = None
        self.kafka_proxy: TcpProxy | None = None
        self.valkey: ValkeyServer | None = None
        self.replicated: ReplicatedValkey | None = None

    @property
    def kafka(self) -> str:
        """Bootstrap servers."""
        if self.kafka_proxy is not None:
            return f"{HOST}:{self.kafka_proxy.port}"
        return self._settings.kafka or (self.broker.bootstrap if self.broker else "")

    @property
    def redis(self) -> str:
        """Redis URL."""
        local = self.valkey or self.replicated
        return self._settings.redis or (local.url if local else "")

    async def _start(self) -> None:
        settings = self._settings
        if not settings.kafka:
            self.broker, sentence = choose_broker(settings.broker, self._folder / "kafka")
            self._tell(sentence)
            self._stack.push_async_callback(self.broker.stop)
            if settings.kafka_proxy and isinstance(self.broker, ApacheKafka):
                self.broker.reserve()
                self.kafka_proxy = await self._stack.enter_async_context(TcpProxy(HOST, self.broker.port))
                self.broker.advertise(self.kafka_proxy.port)
        async with asyncio.TaskGroup() as group:
            if self.broker is not None:
                group.create_task(self.broker.start())
            if not settings.redis and settings.redis_replica:
                self.replicated = ReplicatedValkey(self._folder / "redis")
                group.create_task(self._stack.enter_async_context(self.replicated))
            elif not settings.redis:
                self.valkey = ValkeyServer(self._folder / "valkey")
                self._stack.push_async_callback(self.valkey.stop)
                group.create_task(self.valkey.start())
        if self.broker is not None:
            self._tell(f"{self.broker.description} (ready in {self.broker.start_s:.1f} s)")
        if (local := self.valkey or self.replicated) is not None:
            self._tell(local.description)


class LocalStack(Started):
    """The stack: `async with LocalStack(...) as stack` starts and stops all of it.

    Args:
        folder: where its data and logs are; a temporary one, removed at the end, when None.
        servers: running ones to use, which go on afterwards; its own when None.
        tell: takes progress lines for people.
    """

    def __init__(
        self,
        settings: StackSettings,
        *,
        folder: Path | None = None,
        servers: LocalServers | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.names = Names(settings.pool)
        self.dispatchers: list[Member] = []
        self.engines: list[Member] = []
        self.agents: list[Member] = []
        self.frontends: list[Member] = []
        self._servers = servers
        self._folder = folder
        self._tell = tell
        super().__init__()
        self._session: aiohttp.ClientSession | None = None

    @property
    def servers(self) -> LocalServers:
        """Its Kafka and Redis."""
        assert self._servers is not None, "a stack has its servers once it is entered"
        return self._servers

    @property
    def broker(self) -> Broker | None:
        """The local broker, None when Kafka is somebody else's."""
        return self.servers.broker

    @property
    def valkey(self) -> ValkeyServer | None:
        """The one local Valkey, None when Redis is somebody else's or has a replica."""
        return self.servers.valkey

    @property
    def kafka(self) -> str:
        """Bootstrap servers."""
        return self.servers.kafka

    @property
    def redis(self) -> str:
        """Redis URL."""
        return self.servers.redis

    @property
    def members(self) -> list[Member]:
        """All Python processes."""
        return [*self.dispatchers, *self.engines, *self.agents, *self.frontends]

    async def _start(self) -> None:
        # Unix sockets have short names: they never lie in a folder that somebody else chose.
        scratch = Path(self._stack.enter_context(_temporary_folder()))
        if self._folder is None:
            self._folder = scratch
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S))
        self._stack.push_async_callback(self._session.close)
        if self._servers is None:
            own = LocalServers(self.settings, self._folder, tell=self._tell)
            self._servers = await self._stack.enter_async_context(own)
        await self._create_topics()
        self._stack.push_async_callback(self._stop_members)
        self._describe_members(self._folder, scratch)
        session = self._session
        async with asyncio.TaskGroup() as group:
            for member in self.members:
                group.create_task(member.start(session))
        await self.until(self.is_ready, "a leader and all nodes", READY_TIMEOUT_S)

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

    def _describe_members(self, folder: Path, sockets: Path) -> None:
        settings = self.settings

        def common(name: str) -> list[str]:
            redis = settings.redis_urls.get(name, self.redis)
            return ["--redis", redis, "--kafka", self.kafka, "--pool", settings.pool]

        if settings.frontend_port is not None:
            ports = [settings.frontend_port, *([0] * (settings.frontends - 1))]
            for number, port in enumerate(ports, 1):
                frontend = Member(f"frontend-{number}", folder, "dispatcher frontend", "--port", port=port)
                frontend.arguments = common(frontend.name)
                self.frontends.append(frontend)
        for number in range(1, settings.dispatchers + 1):
            member = Member(f"dispatcher-{number}", folder, "dispatcher dispatcher", "--metrics-port")
            member.arguments = [*common(member.name), "--policy", settings.policy, *settings.dispatcher_flags]
            self.dispatchers.append(member)
        for number in range(1, settings.nodes + 1):
            agent = Member(f"agent-{number}", folder, "workers_agent", "--metrics-port")
            agent.arguments = [
                *common(agent.name),
                *("--node", f"node-{number}", "--models", settings.model),
                *("--max-running", str(settings.max_running)),
                *self._engine_of(number, folder, sockets),
                *(("--role", settings.roles[number - 1]) if settings.roles else ()),
                *settings.agent_flags,
            ]
            self.agents.append(agent)

    def _engine_of(self, number: int, folder: Path, sockets: Path) -> list[str]:
        """What agent `number` must know of its engine, which is made if there is none."""
        settings = self.settings
        if settings.engines:
            return ["--engine-url", settings.engines[(number - 1) % len(settings.engines)]]
        engine = Member(f"engine-{number}", folder, "workers_agent.simulator", "--port")
        kv_events = [
            *("--kv-events-endpoint", f"ipc://{sockets}/{number}.events"),
            *("--kv-replay-endpoint", f"ipc://{sockets}/{number}.replay"),
        ]
        engine.arguments = [
            *("--model", settings.model, "--profile", settings.profile),
            *("--max-running", str(settings.max_running), "--time-scale", str(settings.time_scale)),
            *(("--kv-blocks", str(settings.kv_blocks)) if settings.kv_blocks else ()),
            *kv_events,
            *settings.engine_flags,
        ]
        self.engines.append(engine)
        return ["--engine-url", engine.url, *kv_events]

    async def _stop_members(self) -> None:
        """Drain order: who takes requests first, engines last, so that what runs may finish."""
        for group in (self.frontends, self.agents, self.dispatchers, self.engines):
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


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="flexlb-", ignore_cleanup_errors=True)
