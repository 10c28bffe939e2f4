"""One pool of real servers for benches: Apache Kafka, a durable Valkey, one dispatcher, light nodes.

All are children of this process, each measured by the CPU time that the kernel counts for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.topics import create_topics
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.stack import HEALTH_TIMEOUT_S, LocalServers, Member, StackSettings, health
from dispatcher.local.started import Started
from dispatcher.protocol.names import Lane, Names
from tests.bench import prompts
from tests.bench.machine import cpu_s

PARTITIONS = 4
READY_S = 120.0
SENDING = 2000
"""Records on their way to the broker at once."""
ROLES = ("dispatcher", "redis", "kafka", "nodes")


def local_servers(folder: Path) -> LocalServers:
    """Apache Kafka and a Valkey, for one pool or several."""
    settings = StackSettings(nodes=0, dispatchers=1, broker="apache", partitions=PARTITIONS)
    return LocalServers(settings, folder)


class LightNodes:
    """A process of light nodes, spoken to by lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @staticmethod
    async def start(redis: str, nodes: int, flags: Sequence[str], *, first: int, count: int) -> LightNodes:
        """Start one and return once its nodes are registered."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.light_nodes", "--redis", redis),
            *("--first", str(first), "--count", str(count), "--nodes", str(nodes), *flags),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        light = LightNodes(process)
        async with asyncio.timeout(READY_S):
            assert (await light._answer())["ready"] == count
        return light

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def ask(self, word: str = "stats") -> dict[str, Any]:
        """What its nodes did; `reset` begins anew."""
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the process of light nodes has ended: see its error output"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class Pool(Started):
    """`async with Pool(flags) as pool`; the dispatcher and the nodes are started by name.

    Args:
        flags: of the dispatcher.
        is_sampled: whether the dispatcher notes where its time goes.
        name: the pool's.
        servers: those to use, which go on afterwards; its own when None.
    """

    def __init__(
        self,
        flags: Sequence[str] = (),
        *,
        is_sampled: bool = False,
        name: str = "default",
        servers: LocalServers | None = None,
    ) -> None:
        self.names = Names(name)
        self._shared = servers
        self.topic = self.names.requests(Lane.INTERACTIVE)
        self._flags = flags
        self._is_sampled = is_sampled
        super().__init__()
        self.light: list[LightNodes] = []
        self._nodes = 0

    async def _start(self) -> None:
        self.folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="flexlb-bench-")))
        servers = self._shared
        if servers is None:
            servers = await self._stack.enter_async_context(local_servers(self.folder))
        self.servers = servers
        assert self.servers.valkey is not None
        assert self.servers.broker is not None
        self.valkey, self.broker = self.servers.valkey, self.servers.broker
        self.kafka = connect_kafka(self.servers.kafka)
        await create_topics(self.kafka, self.names, partitions=PARTITIONS, replication_factor=1)
        self.redis = connect_redis(self.servers.redis, timeout_s=10.0)
        self._stack.push_async_callback(self.redis.aclose)
        self.session = await self._stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S))
        )
        module = "dispatcher dispatcher"
        if self._is_sampled:
            module = f"tests.bench.sampled {self.samples_path} {module}"
        self.dispatcher = Member("dispatcher-1", self.folder, module, "--metrics-port")
        self.dispatcher.arguments = [
            *("--redis", self.servers.redis, "--kafka", self.servers.kafka, "--pool", self.names.pool),
            *self._flags,
        ]
        self._stack.callback(self.dispatcher.release)
        self._stack.push_async_callback(self.dispatcher.stop)

    @property
    def samples_path(self) -> Path:
        """Where a sampled dispatcher writes when it ends."""
        return self.folder / "samples.txt"

    async def start_dispatcher(self) -> None:
        """Start it and return once it leads."""
        await self.dispatcher.start(self.session)
        await self.until_dispatcher(lambda state: bool(state.get("leading")), "a leader")

    async def until_dispatcher(self, holds: Any, what: str) -> float:
        """Wait until the dispatcher's health is as wanted; when that was seen, monotonic seconds."""
        try:
            async with asyncio.timeout(READY_S):
                while True:
                    state = await health(self.session, self.dispatcher.url)
                    if state and holds(state):
                        return time.monotonic()
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{what}: see {self.dispatcher.log_path.read_text()[-2000:]}") from None

    async def start_nodes(self, nodes: int, *flags: str, of: int = 0) -> None:
        """Let there be so many light nodes, and return once the leader takes all of them for available.

        Args:
            of: how many there will be in the end; those that are there stay.
        """
        light = await LightNodes.start(
            self.servers.redis,
            of or nodes,
            ("--pool", self.names.pool, *flags),
            first=self._nodes,
            count=nodes - self._nodes,
        )
        self._nodes = nodes
        self.light.append(light)
        self._stack.push_async_callback(light.stop)
        await self.until_dispatcher(lambda state: state.get("nodes") == nodes, f"{nodes} nodes")

    async def stop_nodes(self) -> None:
        """End all light nodes."""
        light, self.light = self.light, []
        for one in light:
            await one.stop()

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, by what they were used for."""
        pids = {"dispatcher": self.dispatcher.pid, "redis": self.valkey.pid, "kafka": self.broker.pid}
        used = {role: cpu_s(pid) for role, pid in pids.items()}
        return {**used, "nodes": sum(cpu_s(light.pid) for light in self.light)}

    @contextlib.asynccontextmanager
    async def producer(self, **options: Any) -> AsyncIterator[Any]:
        """A producer with acks=all."""
        producer = self.kafka.producer(
            acks="all", enable_idempotence=True, linger_ms=2, max_batch_size=1 << 17, **options
        )
        await producer.start()
        try:
            yield producer
        finally:
            await producer.stop()

    async def preload(self, count: int, nodes: int, run: str) -> None:
        """Append so many requests of `prompts`, for readers to see all at once."""
        await self.append(prompts.record(number, nodes, run) for number in range(count))

    async def append(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Append requests in a transaction: readers see them all at once."""
        async with (
            self.producer(transactional_id=f"preload-{self.names.pool}") as producer,
            producer.transaction(),
        ):
            sent = []
            for key, value in records:
                sent.append(await producer.send(self.topic, value, key=key))
                if len(sent) == SENDING:
                    await asyncio.gather(*sent)
                    sent.clear()
            await asyncio.gather(*sent)

    @property
    def kafka_files(self) -> list[Path]:
        """The segments of all topics."""
        assert isinstance(self.broker, ApacheKafka)
        return self.broker.files

    async def marks(self) -> int:
        """How many requests are assigned, by Redis: below the marks, and above them."""
        names = self.names
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.hvals(names.marks)
            for partition in range(PARTITIONS):
                pipe.zcard(names.above(f"{Lane.INTERACTIVE.value}{partition}"))
            lows, *above = await pipe.execute()
        return int(sum(map(int, lows)) + sum(above))
