"""What every local server promises: readiness, kept data, one holder per folder, no orphans, clear errors."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from dispatcher.backends.connect import connect_redis
from dispatcher.backends.scripts import Redis
from dispatcher.errors import ServerError
from dispatcher.local import embedded_kafka, valkey
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.broker import Broker, BrokerKind, choose_broker
from dispatcher.local.embedded_kafka import EmbeddedKafka
from dispatcher.local.processes import ReservedPort, ServerProcess, free_port
from dispatcher.local.valkey import ValkeyServer
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

BIG_BODY_BYTES = 10 << 20
PARENT = """
import asyncio, sys
from pathlib import Path
from dispatcher.local.valkey import ValkeyServer

async def main():
    server = ValkeyServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(
    params=[
        pytest.param("apache", marks=pytest.mark.kafka),
        "embedded",
    ]
)
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Broker]:
    """A fresh broker of each kind."""
    kind: BrokerKind = request.param
    server, why = choose_broker(kind, tmp_path / "broker")
    assert "asked for" in why
    await server.start()
    yield server
    await server.stop()


async def create_topic(bootstrap: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 1, 1)])
    finally:
        await admin.close()


async def read_committed(bootstrap: str, topic: str, count: int) -> list[bytes | None]:
    """The first `count` committed values of partition 0, waiting for them."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        isolation_level="read_committed",
        enable_auto_commit=False,
        max_partition_fetch_bytes=2 * BIG_BODY_BYTES,
        fetch_max_bytes=4 * BIG_BODY_BYTES,
    )
    partition = TopicPartition(topic, 0)
    values: list[bytes | None] = []
    async with asyncio.timeout(30), consumer:
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        while len(values) < count:
            values.append((await consumer.getone()).value)
    return values


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_valkey_is_ready_durable_and_never_evicts(redis_client: Redis) -> None:
    assert await redis_client.set("k", "v")
    settings = await redis_client.config_get("append*", "maxmemory-policy", "save")
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "everysec"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["save"] == ""


async def test_valkey_keeps_its_data_and_port_over_kill_and_loses_them_by_wipe(
    valkey: ValkeyServer, redis_client: Redis
) -> None:
    url = valkey.url
    await redis_client.set("kept", "yes")
    assert (await redis_client.execute_command("WAITAOF", 1, 0, 10_000))[0] == 1
    valkey.kill()
    await valkey.start()
    assert valkey.url == url
    assert await redis_client.get("kept") == b"yes"
    await valkey.wipe()
    assert not valkey.is_running
    await valkey.start()
    assert valkey.url == url
    assert await redis_client.dbsize() == 0


async def test_valkey_listens_on_a_unix_socket_and_takes_options(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with ValkeyServer(tmp_path / "v", unix_socket=path, options={"maxmemory": "64mb"}):
        client = connect_redis(f"unix://{path}")
        assert (await client.config_get("maxmemory"))["maxmemory"] == str(64 << 20)
        await client.aclose()


async def test_frozen_valkey_keeps_connections_and_answers_after_thaw(valkey: ValkeyServer) -> None:
    client = connect_redis(valkey.url, timeout_s=0.2)
    await client.set("k", "v")
    valkey.freeze()
    with pytest.raises(RedisTimeoutError):
        await client.get("k")
    assert valkey.is_running
    valkey.thaw()

    async def answers() -> bool:
        try:
            return bool(await client.get("k") == b"v")
        except (RedisTimeoutError, RedisConnectionError):
            return False

    await wait_until(answers, "an answer after the thaw")
    await client.aclose()


async def test_frozen_server_can_be_stopped(valkey: ValkeyServer) -> None:
    valkey.freeze()
    await valkey.stop()
    assert not valkey.is_running


async def test_second_server_on_a_folder_is_refused_by_the_holders_pid(valkey: ValkeyServer) -> None:
    with pytest.raises(ServerError, match=rf"pid {valkey.pid} holds it"):
        await ValkeyServer(valkey.folder).start()
    with pytest.raises(ServerError, match=rf"already runs on .* as pid {valkey.pid}"):
        await valkey.start()
    client = connect_redis(valkey.url)
    assert await client.ping()
    await client.aclose()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the parent-death signal of Linux")
async def test_server_dies_with_its_killed_parent_and_leaves_the_folder_free(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(folder), stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    server_pid = int(await parent.stdout.readline())
    assert is_alive(server_pid)
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not is_alive(server_pid), "the server to die with its parent")
    async with ValkeyServer(folder):
        pass


@pytest.mark.parametrize(
    "kind", [ValkeyServer, EmbeddedKafka, pytest.param(ApacheKafka, marks=pytest.mark.kafka)]
)
async def test_taken_port_is_a_clear_error(
    kind: type[ValkeyServer] | type[EmbeddedKafka] | type[ApacheKafka], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = kind(tmp_path / "data", port=port)
        with pytest.raises(ServerError, match=rf"expected port {port} of 127.0.0.1 to be free"):
            await server.start()
    await server.start()  # the refused start left nothing behind
    assert server.port == port
    await server.stop()


async def test_wrong_port_number_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="expected port 70000"):
        await ValkeyServer(tmp_path, port=70_000).start()


async def test_free_and_reserved_ports_are_usable() -> None:
    reserved = ReservedPort()
    with socket.create_server(("127.0.0.1", reserved.port)):
        with pytest.raises(ServerError, match="to be free"):
            ReservedPort(reserved.port)
    reserved.release()
    with socket.create_server(("127.0.0.1", free_port())):
        pass


async def test_missing_binary_and_missing_wheel_say_what_to_install(tmp_path: Path) -> None:
    for shipped_binary in (valkey.shipped_binary, embedded_kafka.shipped_binary):
        with pytest.raises(
            ServerError, match=r"'no_such_wheel', which is not installed; install flexlb\[local\]"
        ):
            shipped_binary("no_such_wheel")
        with pytest.raises(ServerError, match=r"there is none; reinstall flexlb\[local\]"):
            shipped_binary("json")
    with pytest.raises(ServerError, match=r"expected valkey to start from .*/nothing"):
        await ValkeyServer(tmp_path, binary=tmp_path / "nothing").start()


async def test_failed_start_carries_the_end_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"(?s)ended with status 1 .*valkey\.log.*'maxmemory"):
        await ValkeyServer(tmp_path, options={"maxmemory": "much"}).start()


async def test_server_that_is_never_ready_is_killed_at_the_timeout(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    process = ServerProcess("sleeper", tmp_path)
    with pytest.raises(ServerError, match=r"sleeper was not ready within 0\.1 s"):
        await process.start(["sleep", "600"], ready=never, timeout_s=0.1)
    assert process.pid
    assert not process.is_running


async def test_server_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    process = ServerProcess("stubborn", tmp_path)

    async def ready() -> bool:
        return "armed" in process.log_since_start()

    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('armed', flush=True)"
    argv = [sys.executable, "-c", f"{script}; signal.pause()"]
    await process.start(argv, ready=ready, timeout_s=20)
    await process.stop(grace_s=0.1)
    assert not process.is_running
    await process.stop()  # again, on a dead one


async def test_broker_commits_and_aborts_transactions(broker: Broker, pool: str) -> None:
    await create_topic(broker.bootstrap, pool)
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=f"{pool}-writer")
    async with producer:
        async with producer.transaction():
            await producer.send(pool, b"a")
            await producer.send(pool, b"b")
        await producer.begin_transaction()
        await producer.send_and_wait(pool, b"aborted")
        await producer.abort_transaction()
        async with producer.transaction():
            await producer.send(pool, b"c")
            offsets = {TopicPartition(pool, 0): 1}
            await producer.send_offsets_to_transaction(offsets, f"{pool}-group")
    assert await read_committed(broker.bootstrap, pool, 3) == [b"a", b"b", b"c"]
    consumer = AIOKafkaConsumer(
        bootstrap_servers=broker.bootstrap, group_id=f"{pool}-group", enable_auto_commit=False
    )
    async with consumer:
        assert await consumer.committed(TopicPartition(pool, 0)) == 1


async def test_frozen_broker_goes_on_after_thaw(broker: Broker, pool: str) -> None:
    await create_topic(broker.bootstrap, pool)
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, acks="all")
    async with producer:
        await producer.send_and_wait(pool, b"before")
        broker.freeze()
        sent = await producer.send(pool, b"during")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(sent), 0.3)
        assert broker.is_running
        broker.thaw()
        await asyncio.wait_for(sent, 20)
    assert await read_committed(broker.bootstrap, pool, 2) == [b"before", b"during"]


@pytest.mark.kafka
async def test_apache_kafka_keeps_acknowledged_records_and_its_port_over_kill(
    own_kafka: ApacheKafka, pool: str
) -> None:
    bootstrap = own_kafka.bootstrap
    await create_topic(bootstrap, pool)
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all") as producer:
        await producer.send_and_wait(pool, b"kept")
        own_kafka.kill()
    await own_kafka.start()
    assert own_kafka.bootstrap == bootstrap
    assert await read_committed(bootstrap, pool, 1) == [b"kept"]
    with pytest.raises(ServerError, match=rf"pid {own_kafka.pid} holds it"):
        await ApacheKafka(own_kafka.folder).start()


@pytest.mark.kafka
async def test_apache_kafka_takes_a_body_of_10_mb_stamps_times_and_creates_no_topic_by_itself(
    kafka: KafkaAddress, pool: str
) -> None:
    await create_topic(kafka.bootstrap, pool)
    body = os.urandom(BIG_BODY_BYTES)
    async with AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap, max_request_size=2 * BIG_BODY_BYTES
    ) as producer:
        done = await producer.send_and_wait(pool, body, timestamp_ms=1)
        assert done.timestamp_type == 1  # the broker's append time
        assert done.timestamp > 1
        assert await producer.client.fetch_all_metadata()
        assert f"{pool}-unknown" not in producer.client.cluster.topics()
    assert await read_committed(kafka.bootstrap, pool, 1) == [body]


async def test_auto_choice_names_the_broker_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "no-java"))
    server, why = choose_broker("auto", tmp_path)
    assert isinstance(server, EmbeddedKafka)
    assert "NOT durable" in why
    assert "needs Java 17" in why
    assert "NOT durable" in server.description
    with pytest.raises(ServerError, match=r"Apache Kafka was asked for, but .*JAVA_HOME"):
        choose_broker("apache", tmp_path)


async def test_apache_kafka_says_when_maven_is_missing_or_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = tmp_path / "java" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text("#!/bin/sh\necho 'openjdk version \"21.0.1\" 2023-10-17' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "java"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FLEXLB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ServerError, match="no mvn in PATH"):
        await ApacheKafka(tmp_path / "k").start()
    maven = tmp_path / "mvn"
    maven.write_text("#!/bin/sh\necho '[ERROR] no route to the repository'\nexit 3\n")
    maven.chmod(0o755)
    with pytest.raises(ServerError, match=r"(?s)mvn failed with status 3 .*no route to the repository"):
        await ApacheKafka(tmp_path / "k").start()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


async def test_signals_to_a_server_that_never_started_do_nothing(tmp_path: Path) -> None:
    process = ServerProcess("absent", tmp_path)
    for act in (process.kill, process.freeze, process.thaw):
        act()
    await process.stop()
    assert process.pid == 0
