"""A real Apache Kafka on this machine: one KRaft process, broker and controller, from Maven's jars.

The jars are fetched once per machine into a cache keyed by `pom.xml`, together with a formatted
empty data folder, so that a fresh broker costs one JVM start. Acknowledged records survive `kill()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dispatcher.errors import ServerError
from dispatcher.local.processes import HOST, ReservedPort, ServerProcess

POM = Path(__file__).with_name("pom.xml")
MIN_JAVA = 17
CLUSTER_ID = "RmxleExCLWxvY2FsLTAwMQ"
START_TIMEOUT_S = 90.0
PROVISION_TIMEOUT_S = 900.0
MAX_MESSAGE_BYTES = 20 << 20
CLASS_ARCHIVE = "classes.jsa"
READY_LINE = "Kafka Server started"
JVM_FLAGS = ("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-Djava.net.preferIPv4Stack=true")
LOG_FLAGS = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
)


def why_unavailable() -> str | None:
    """Why this machine can't run Apache Kafka, None when it can."""
    java = _java()
    if java is None:
        return f"no java was found in JAVA_HOME or PATH; Apache Kafka needs Java {MIN_JAVA} or newer"
    version = _java_version(java)
    if version < MIN_JAVA:
        return f"{java} is Java {version or 'of an unknown version'}; Apache Kafka needs {MIN_JAVA} or newer"
    if not _home().is_dir() and shutil.which("mvn") is None:
        return f"its jars are not in {_home()} and there is no mvn in PATH to fetch them"
    return None


def is_available() -> bool:
    """Whether this machine can run Apache Kafka; `why_unavailable` says why not."""
    return why_unavailable() is None


def provision() -> Path:
    """Fetch the jars and format an empty data folder, once per machine; blocks for seconds the first time.

    Not from a running event loop's thread.

    Returns:
        A folder with `jars/` and `empty/`.

    Raises:
        ServerError: Java or Maven is missing or failed; carries the end of what it printed.
    """
    if (why := why_unavailable()) is not None:
        raise ServerError(f"Apache Kafka can't run here: {why}")
    home = _home()
    if home.is_dir():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(home.with_suffix(".lock")):
        if home.is_dir():
            return home
        print(f"flexlb: fetching Apache Kafka by Maven into {home}, once per machine", file=sys.stderr)
        draft = home.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "empty").mkdir(parents=True)
        try:
            _fetch_jars(draft)
            _format(draft)
            draft.rename(home)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(ServerError):  # costs speed alone; the next start tells what is wrong
            asyncio.run(_archive_classes(home))
    return home


class ApacheKafka:
    """One Apache Kafka on one folder. End every use with `stop()`, also after `kill()`."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = 0,
        jvm_flags: Sequence[str] = (),
        protocol: str = "PLAINTEXT",
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the broker; nothing starts yet.

        Args:
            folder: where its data lives; one broker at a time.
            port: its port on 127.0.0.1; 0 or None for one that the system gives at the first start.
            jvm_flags: flags of the JVM after our own, e.g. `-Xmx1g`.
            protocol: what its listener speaks; others than PLAINTEXT need `options`.
            options: further lines of server.properties.
        """
        self._jvm_flags = tuple(jvm_flags)
        self._protocol = protocol
        self._options = dict(options or {})
        self._process = ServerProcess("kafka", folder)
        self._ports = [port or 0, 0, 0]
        self._reserved: list[ReservedPort] = []
        self._advertised_port = 0

    @property
    def folder(self) -> Path:
        """Its data folder."""
        return self._process.folder

    @property
    def port(self) -> int:
        """Its port; the same over restarts. 0 before the first start when the system is to give it."""
        return self._ports[0]

    @property
    def bootstrap(self) -> str:
        """Its address for Kafka clients."""
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether its process exists, frozen or not."""
        return self._process.is_running

    @property
    def files(self) -> list[Path]:
        """The segments of all its topics."""
        return list((self.folder / "data").glob("*/*.log"))

    @property
    def start_s(self) -> float:
        """How long the last start took, seconds."""
        return self._process.start_s

    @property
    def description(self) -> str:
        """One line for people."""
        return f"Apache Kafka at {self.bootstrap}, durable, data in {self.folder}"

    def advertise(self, port: int) -> None:
        """Send clients to another port of this machine, such as a proxy's; for before the first start."""
        self._advertised_port = port

    def reserve(self) -> None:
        """Take its ports before the first start, for others to be told of them."""
        if not self._reserved:
            self._reserve()

    async def start(self) -> None:
        """Start and return once it serves; fetches its jars the first time on a machine.

        Raises:
            ServerError: Java or Maven is missing, port or folder in use, or it did not come up.
        """
        home = await asyncio.to_thread(provision)
        self.reserve()
        try:
            self._write_settings()
            self._take_empty_data(home / "empty")
            await self._process.start(
                _java_command(home, *self._jvm_flags, main=("kafka.Kafka", "server.properties")),
                ready=self._has_started,
                timeout_s=START_TIMEOUT_S,
            )
        except BaseException:
            self._release()
            raise

    async def stop(self, grace_s: float = 15.0) -> None:
        """Stop and keep the data."""
        await self._process.stop(grace_s)
        self._release()

    async def restart(self) -> None:
        """Stop if it runs, and start on the same data and port."""
        await self._process.stop()
        await self.start()

    def kill(self) -> None:
        """SIGKILL, without waiting for the end; `restart()` or `start()` brings it back."""
        self._process.kill()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._process.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        self._process.thaw()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _has_started(self) -> bool:
        return READY_LINE in self._process.log_since_start()

    def _reserve(self) -> None:
        for port in self._ports:
            try:
                self._reserved.append(ReservedPort(port))
            except ServerError:
                self._release()
                raise
        self._ports = [reserved.port for reserved in self._reserved]

    def _release(self) -> None:
        for reserved in self._reserved:
            reserved.release()
        self._reserved = []

    def _take_empty_data(self, empty: Path) -> None:
        data = self.folder / "data"
        if not (data / "meta.properties").is_file():
            shutil.copytree(empty, data, dirs_exist_ok=True)

    def _write_settings(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = _settings(
            self.folder / "data",
            broker_port=self._ports[0],
            controller_port=self._ports[1],
            internal_port=self._ports[2],
            advertised_port=self._advertised_port,
            protocol=self._protocol,
            options=self._options,
        )
        (self.folder / "server.properties").write_text(text)


def _settings(
    data: Path,
    *,
    broker_port: int,
    controller_port: int,
    internal_port: int = 0,
    advertised_port: int = 0,
    protocol: str = "PLAINTEXT",
    options: Mapping[str, str] | None = None,
) -> str:
    """Lines of server.properties.

    With an `advertised_port` for clients the broker talks to itself at its `internal_port`.
    """
    behind = _behind_a_proxy(broker_port, controller_port, internal_port, advertised_port, protocol)
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@{HOST}:{controller_port}",
        "listeners": f"{protocol}://{HOST}:{broker_port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"{protocol}://{HOST}:{broker_port}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": f"CONTROLLER:PLAINTEXT,{protocol}:{protocol}",
        "security.inter.broker.protocol": protocol,
        "log.dirs": str(data),
        # After a kill the same broker may register again only when its last session has expired.
        "broker.session.timeout.ms": "1500",
        "broker.heartbeat.interval.ms": "300",
        "auto.create.topics.enable": "false",
        "offsets.topic.num.partitions": "2",
        "offsets.topic.replication.factor": "1",
        "offsets.retention.minutes": "525600",
        "transaction.state.log.num.partitions": "2",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        "log.message.timestamp.type": "LogAppendTime",
        "message.max.bytes": str(MAX_MESSAGE_BYTES),
        "replica.fetch.max.bytes": str(MAX_MESSAGE_BYTES),
        "replica.fetch.response.max.bytes": str(MAX_MESSAGE_BYTES),
        "log.cleaner.dedupe.buffer.size": str(16 << 20),
        **(behind if advertised_port else {}),
        **(options or {}),
    }
    if advertised_port:
        del settings["security.inter.broker.protocol"]  # the listener's name says it
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def _behind_a_proxy(
    broker: int, controller: int, internal: int, advertised: int, protocol: str
) -> dict[str, str]:
    own = f"INTERNAL://{HOST}:{internal}"
    return {
        "listeners": f"{protocol}://{HOST}:{broker},{own},CONTROLLER://{HOST}:{controller}",
        "advertised.listeners": f"{protocol}://{HOST}:{advertised},{own}",
        "listener.security.protocol.map": f"CONTROLLER:PLAINTEXT,INTERNAL:PLAINTEXT,{protocol}:{protocol}",
        "inter.broker.listener.name": "INTERNAL",
    }


def _home() -> Path:
    if own := os.environ.get("FLEXLB_CACHE"):
        cache = Path(own)
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexlb"
    key = hashlib.sha256(POM.read_bytes()).hexdigest()[:16]
    return cache.absolute() / f"apache-kafka-{key}"


def _fetch_jars(home: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ServerError("fetching Apache Kafka needs mvn in PATH; install Maven")
    goal = ("dependency:copy-dependencies", f"-DoutputDirectory={home / 'jars'}")
    _run("mvn", [maven, "-q", "-B", "-f", str(POM), *goal])


def _format(home: Path) -> None:
    settings = home / "format.properties"
    settings.write_text(_settings(home / "empty", broker_port=9092, controller_port=9093))
    tool = ("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(settings))
    _run("kafka.tools.StorageTool", _java_command(home, main=tool))


async def _archive_classes(home: Path) -> None:
    """Let the JVM record the classes of a first broker; later ones map them and start in 1 s, not 1.7."""
    draft = home / "classes.draft"
    rehearsal = ApacheKafka(home / "rehearsal", jvm_flags=(f"-XX:ArchiveClassesAtExit={draft}",))
    async with rehearsal:
        pass
    shutil.rmtree(rehearsal.folder, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        draft.rename(home / CLASS_ARCHIVE)


def _java_command(home: Path, *flags: str, main: Sequence[str]) -> list[str]:
    archive = home / CLASS_ARCHIVE
    shared = [f"-XX:SharedArchiveFile={archive}", "-Xlog:cds=off"] if archive.is_file() else []
    classpath = ":".join(str(jar) for jar in sorted((home / "jars").glob("*.jar")))
    return [_java() or "java", *JVM_FLAGS, *LOG_FLAGS, *shared, *flags, "-cp", classpath, *main]


def _run(name: str, argv: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROVISION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"expected {name} to prepare Apache Kafka, but: {error}") from error
    if done.returncode != 0:
        tail = "\n    ".join(done.stdout.decode(errors="replace").splitlines()[-20:])
        raise ServerError(f"{name} failed with status {done.returncode} and printed:\n    {tail}")


def _java() -> str | None:
    if home := os.environ.get("JAVA_HOME"):
        return shutil.which("java", path=str(Path(home) / "bin"))
    return shutil.which("java")


@functools.cache
def _java_version(java: str) -> int:
    try:
        done = subprocess.run([java, "-version"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr.decode(errors="replace"))
    return int(found.group(1)) if found else 0


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
