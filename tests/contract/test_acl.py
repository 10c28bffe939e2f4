"""The sample ACL file on a real Valkey: each process can do its work as its user, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.exceptions import NoPermissionError, ResponseError

from dispatcher.backends.connect import KafkaClients, connect_redis
from dispatcher.backends.leader_lock import LeaderLock, Lease
from dispatcher.backends.leader_store import AdoptItem, AssignItem, CloseItem, LeaderStore, RetryItem
from dispatcher.backends.node_store import Ending, NodeStore
from dispatcher.backends.operator_store import OperatorStore
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.backends.store_view import StoreView
from dispatcher.backends.topics import create_topics
from dispatcher.doctor.ask_redis import ask_pool, ask_redis
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope, Work, encode_job_data
from dispatcher.protocol.names import Attempt, JobId, Lane, Names, Ref
from dispatcher.protocol.node import BlockEvent, BlockEventKind, Medium, NodeIdentity, NodeReport, Wish
from dispatcher.protocol.outcome import FailedAttempt, FailureCause, OutcomeKind
from dispatcher.protocol.request import Endpoint
from tests.contract.test_agent import HeldEngine, running_agent
from tests.contract.test_rq_model import rq_command, simulated_engine
from tests.e2e.test_cli import flexlb
from tests.support.pool import Pool, request
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

SAMPLE = files("dispatcher") / "deploy" / "redis-acl.conf"
NODE, OTHER = "gpu-17", "gpu-18"
DISPATCHER, AGENT, READER = "flexlb-dispatcher", f"flexlb-agent-{NODE}", "flexlb-reader"
OPERATOR, SHADOW, RQ_WORKER = "flexlb-operator", "flexlb-shadow", f"flexlb-rq-{NODE}"
PASSWORD = "hush"
NOW_ISO = "2027-01-15T08:00:00.000000Z"


def sample_for(pool: str) -> str:
    """The sample as an operator fills it in: a pool, a second node, passwords."""
    text = SAMPLE.read_text().replace(":default:", f":{pool}:").replace("default--", f"{pool}--")
    agent = next(line for line in text.splitlines() if line.startswith(f"user {AGENT} "))
    text += agent.replace(NODE, OTHER) + "\n"
    return re.sub(r"(?m)^user .*$", rf"\g<0> >{PASSWORD}", text)


class Guarded:
    """A server with the sample's users, and clients of each."""

    def __init__(self, server: ValkeyServer, names: Names) -> None:
        self.server = server
        self.names = names
        self._clients: list[Redis] = []

    def url(self, user: str) -> str:
        """The server's address for a user."""
        return self.server.url.replace("redis://", f"redis://{user}:{PASSWORD}@")

    def client(self, user: str = "") -> Redis:
        """A client of a user; of the all-powerful one by default."""
        client = connect_redis(self.url(user) if user else self.server.url)
        self._clients.append(client)
        return client

    def node(self, node: str = NODE) -> NodeStore:
        """The agent's scripts as the node's own user."""
        runner = ScriptRunner(self.client(f"flexlb-agent-{node}"))
        return NodeStore(runner, self.names, node, heartbeat_ttl_s=3600, lease_s=3600)

    async def lead(self) -> tuple[LeaderLock, LeaderStore]:
        """The leader's scripts as the dispatcher's user."""
        runner = ScriptRunner(self.client(DISPATCHER))
        lock = LeaderLock(runner, self.names, ttl_s=3600, clock=asyncio.get_running_loop().time)
        lease = await lock.acquire("one")
        assert isinstance(lease, Lease)
        await lock.renew(lease)
        return lock, LeaderStore(runner, self.names, lease)

    async def close(self) -> None:
        """Close the clients."""
        for client in self._clients:
            await client.aclose()


@pytest.fixture
async def guarded(tmp_path: Path, pool: str) -> AsyncIterator[Guarded]:
    """A Valkey whose configuration includes the sample."""
    rules = tmp_path / "redis-acl.conf"
    rules.write_text(sample_for(pool))
    async with ValkeyServer(tmp_path / "valkey", options={"include": str(rules)}) as server:
        one = Guarded(server, Names(pool))
        yield one
        await one.close()


def job(names: Names, offset: int, node: str = NODE, n: int = 1) -> JobId:
    """The job id of a request at an offset."""
    return JobId(names.pool, node, Ref(Lane.INTERACTIVE, 0, offset), Attempt(5, n))


def bound(names: Names, offset: int, node: str = NODE, *, n: int = 1, again: bool = False) -> AssignItem:
    """A request to bind."""
    return AssignItem(
        job=job(names, offset, node, n),
        incarnation=f"{node}-1",
        cost_tokens=1,
        from_pending=again,
        identity=names.identity("", f"r{offset}"),
        fingerprint="aa",
        data=b"" if again else b"data",
        envelope=b"" if again else b"envelope",
    )


def ended(job: JobId, kind: str) -> Ending:
    """How an attempt ended."""
    failed = FailedAttempt(attempt="5_1", node=NODE, cause=FailureCause.ENGINE_ERROR, message="no")
    return Ending(job=str(job), kind=kind, ref=str(job.ref), id="r", payload=codec.encode(failed))


async def join(guarded: Guarded, leader: LeaderStore, node: str = NODE) -> NodeStore:
    """Register and admit a node."""
    store = guarded.node(node)
    identity = NodeIdentity(node=node, incarnation=f"{node}-1", models=("m",))
    assert isinstance(await store.register(identity, {"held": (b"e", b"d")}, now_iso=NOW_ISO), str)
    await leader.admit(node)
    return store


async def test_every_script_runs_as_its_user(guarded: Guarded) -> None:
    names = guarded.names
    lock, leader = await guarded.lead()
    await leader.begin_generation("g", {"i0": 0}, {"i0": [9]})
    node = await join(guarded, leader)
    assert (await leader.held_inventory(NODE)).keys() == {"held"}

    assert await node.report(NodeReport(node=NODE, incarnation=f"{NODE}-1", sequence=1)) == "g"
    event = BlockEvent(
        node=NODE,
        incarnation=f"{NODE}-1",
        sequence=1,
        kind=BlockEventKind.STORED,
        medium=Medium.GPU,
        hashes=("00" * 8,),
    )
    assert await node.publish_blocks([event]) == 1

    answers = await leader.assign([bound(names, offset) for offset in range(3)], {"i0": 0}, now_iso=NOW_ISO)
    assert [answer for answer, _ in answers] == ["ok"] * 3
    assert await node.wait_for_work(5)
    claimed = await node.claim(f"{NODE}-1", 1, 3, now_iso=NOW_ISO)
    assert len(claimed.jobs) == 3
    assert claimed == await node.claim(f"{NODE}-1", 1, 3, now_iso=NOW_ISO)
    ids = [one.job for one in claimed.jobs]
    assert await node.extend(f"{NODE}-1", ids, now_iso=NOW_ISO) == (0, [])
    endings = [ended(job(names, 0), "outcome"), ended(job(names, 1), "failed")]
    assert await node.complete(f"{NODE}-1", endings) == ["ok", "ok"]

    view = StoreView(guarded.client(DISPATCHER), names)
    entries, generation = await view.read_closing(b"0-0", block_ms=10, count=10)
    assert [entry.fields[b"kind"] for entry in entries] == [b"outcome", b"failed"]
    assert generation is not None
    dead = str(job(names, 0))
    await leader.settle({0: 1}, [(entries[0].id, dead)], errors={dead: "poison: no"}, now_iso=NOW_ISO)
    retry = RetryItem(
        entry=entries[1].id,
        job=job(names, 1),
        not_before_ms=0,
        failures=1,
        excluded=(),
        crashed=(NODE,),
        cause="engine_error",
        error="engine_error: no",
    )
    await guarded.client().zadd(names.failed(NODE), {f"old{n}": n for n in range(300)})
    assert await leader.retry([retry], now_iso=NOW_ISO) == ["ok"]
    again = await leader.assign([bound(names, 1, n=2, again=True)], {}, now_iso=NOW_ISO)
    assert [answer for answer, _ in again] == ["ok"]

    cancel = CloseItem(
        place="job", ref=Ref(Lane.INTERACTIVE, 0, 2), kind="outcome", id="r2", payload=b"p", job=job(names, 2)
    )
    dropped = CloseItem(
        place="log",
        ref=Ref(Lane.INTERACTIVE, 0, 3),
        kind="outcome",
        id="r3",
        payload=b"p",
        identity=names.identity("", "r3"),
        fingerprint="aa",
    )
    assert "ok" in await leader.close([cancel, dropped])
    await leader.remember({names.identity("", "r4"): "i0_4|aa"})
    await leader.explain([("", f"r{number}", b"{}") for number in range(4)])
    adopted = AdoptItem(
        job=job(names, 5),
        cost_tokens=1,
        identity=names.identity("", "r5"),
        fingerprint="aa",
        envelope=b"e",
        data=b"d",
    )
    assert await leader.adopt(NODE, f"{NODE}-1", [adopted], lease_s=1, now_iso=NOW_ISO) == ["ok"]

    ledger = await view.ledger()
    assert {str(stored.ref) for stored in ledger.jobs} >= {"i0_1", "i0_5"}
    assert [stored.node for stored in await view.nodes(await view.node_names())] == [NODE]
    blocks = await view.cached_blocks(NODE)
    assert blocks is not None
    assert await view.last_id(names.blocks) != b"0-0"
    for mode in ("expired", "others", "fence"):
        assert await leader.requeue(NODE, mode, f"{NODE}-1", "silent") is not None
    assert [entry.fields[b"kind"] for entry in await node.read_control(b"0-0", block_ms=10)][-1] == b"fence"
    await leader.forget(NODE)
    await lock.resign(leader.lease)


async def test_reader_sees_nodes_and_the_leader_and_no_request(guarded: Guarded) -> None:
    _, leader = await guarded.lead()
    await leader.begin_generation("g", {"i0": 0}, {})
    await join(guarded, leader)
    await leader.assign([bound(guarded.names, 0)], {}, now_iso=NOW_ISO)
    client = guarded.client(READER)
    facts = await ask_pool(client, guarded.names)
    assert [node.node for node in facts.nodes] == [NODE]
    assert facts.generation == "g"
    key = guarded.names.job(job(guarded.names, 0))
    for words in (
        ("HMGET", key, "data"),
        ("HGETALL", guarded.names.node(NODE)),
        ("XREAD", "STREAMS", guarded.names.closing, "0"),
        ("SET", guarded.names.leader, "me"),
        ("DEL", guarded.names.node(NODE)),
        ("EVAL", "return 1", "0"),
        ("KEYS", "*"),
    ):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*words)


async def test_operator_says_what_it_wishes_of_nodes_and_touches_no_request(guarded: Guarded) -> None:
    names = guarded.names
    _, leader = await guarded.lead()
    await leader.begin_generation("g", {"i0": 0}, {})
    await join(guarded, leader)
    await leader.assign([bound(names, 0)], {}, now_iso=NOW_ISO)
    client = guarded.client(OPERATOR)
    operator, view = OperatorStore(ScriptRunner(client), names), StoreView(client, names)
    assert await operator.wish(NODE, Wish.DRAIN) == ""
    assert (await view.cordons()).wishes == {NODE: Wish.DRAIN}
    assert await operator.wish(NODE, None) == "drain"
    assert await operator.wish("unknown", Wish.CORDON) is None
    assert [node.node for node in await view.nodes(await view.node_names())] == [NODE]
    assert (await view.node_work([NODE]))[NODE].queued == 1
    assert [node.node for node in (await ask_pool(client, names)).nodes] == [NODE]
    assert (await ask_redis(client, names)).info is not None
    code, out, err = await flexlb(
        "cordon", NODE, environment={"FLEXLB_REDIS": guarded.url(OPERATOR), "FLEXLB_POOL": names.pool}
    )
    assert (code, err) == (0, ""), out
    await leader.explain([("", "r0", b"{}")])
    assert await view.explanations("", "r0") == [b"{}"]
    assert await view.owner("", "r0") == "i0_0"
    log = await guarded.client().execute_command("ACL", "LOG")
    refused = {entry[entry.index(b"object") + 1] for entry in log}
    assert refused <= {b"config|get"}, refused
    key = names.job(job(names, 0))
    for words in (
        ("HMGET", key, "data"),
        ("HSET", names.node(NODE), "fenced", "x"),
        ("HSET", names.marks, "i0", "9"),
        ("HSET", names.generation, "id", "x"),
        ("XREAD", "STREAMS", names.reports, "0"),
        ("XADD", names.closing, "*", "kind", "outcome"),
        ("DEL", names.cordons),
        ("SET", names.leader, "me"),
        ("HDEL", names.explanations, names.digest("", "r0")),
        ("SET", names.identity("", "r0"), "i0_9|aa"),
        ("KEYS", "*"),
        ("CONFIG", "GET", "*"),
    ):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*words)


async def test_doctor_finds_nothing_missing_for_a_dispatcher(guarded: Guarded) -> None:
    facts = await ask_redis(guarded.client(DISPATCHER), guarded.names)
    assert facts.user == DISPATCHER
    assert facts.denied == {}
    assert facts.info is not None


SERVER_WIDE = (
    "CONFIG GET *",
    "CONFIG SET maxmemory 1",
    "KEYS *",
    "SCAN 0",
    "FLUSHALL",
    "FLUSHDB",
    "SCRIPT FLUSH",
    "SCRIPT KILL",
    "FUNCTION LIST",
    "ACL LIST",
    "ACL SETUSER x",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "DEBUG SLEEP 0",
    "MONITOR",
    "SHUTDOWN",
    "SAVE",
    "SWAPDB 0 1",
    "REPLICAOF NO ONE",
    "MODULE LIST",
    "PUBLISH c m",
    "RANDOMKEY",
)
OF_OTHERS = (
    "BLMOVE {other_queue} {queue} LEFT RIGHT 1",
    "BLMOVE {queue} {other_queue} LEFT RIGHT 1",
    "LRANGE {other_queue} 0 -1",
    "LPOP {other_queue}",
    "HGET {other_job} data",
    "HSET {other_job} data x",
    "DEL {other_job}",
    "EXISTS {other_job}",
    "ZADD {failed} 1 x",
    "ZREM {failed} x",
    "ZADD {other_claimed} 1 x",
    "ZREM {other_claimed} x",
    "HSET {other_node} fenced x",
    "HGET {other_node} incarnation",
    "XREAD STREAMS {other_node}:control 0",
    "GET {epoch}",
    "SET {epoch} x",
    "GET {leader}",
    "SET {leader} x",
    "DEL {leader}",
    "HGET {marks} i0",
    "HSET {marks} i0 9",
    "HSET {generation} id x",
    "DEL {generation}",
    "HGETALL {generation}",
    "XREAD STREAMS {closing} 0",
    "XRANGE {closing} - +",
    "XTRIM {closing} MAXLEN 0",
    "XDEL {closing} 1-1",
    "DEL {closing}",
    "RENAME {closing} {queue}",
    "XREAD STREAMS {reports} 0",
    "DEL {reports}",
    "XREAD STREAMS {blocks} 0",
    "PEXPIRE {blocks} 1",
    "ZADD {pending} 1 i0_0",
    "SMEMBERS {nodes}",
    "SADD rq:queues x",
    "HGET unrelated x",
)


@pytest.mark.parametrize("command", SERVER_WIDE)
async def test_agent_is_refused_commands_of_the_whole_server(guarded: Guarded, command: str) -> None:
    with pytest.raises(NoPermissionError):
        await guarded.client(AGENT).execute_command(*command.split())


@pytest.mark.parametrize("command", OF_OTHERS)
async def test_agent_is_refused_what_is_not_its_node_s(guarded: Guarded, command: str) -> None:
    names = guarded.names
    keys = {
        "queue": names.queue_key(NODE),
        "failed": names.failed(NODE),
        "other_queue": names.queue_key(OTHER),
        "other_job": names.job(job(names, 0, OTHER)),
        "other_claimed": names.claimed(OTHER),
        "other_node": names.node(OTHER),
        **{
            key: getattr(names, key)
            for key in (
                "epoch",
                "leader",
                "marks",
                "generation",
                "closing",
                "reports",
                "blocks",
                "pending",
                "nodes",
            )
        },
    }
    words = command.format(**keys).split()
    client = guarded.client(AGENT)
    with pytest.raises(NoPermissionError):
        await client.execute_command(*words)
    literal = ", ".join(f"'{word}'" for word in words)
    with pytest.raises(ResponseError, match=r"(?i)acl|permission"):
        await client.eval(f"return redis.call({literal})", 0)


async def test_agent_s_scripts_work_for_no_other_node(guarded: Guarded) -> None:
    _, leader = await guarded.lead()
    await join(guarded, leader, OTHER)
    await leader.assign([bound(guarded.names, 0, OTHER)], {}, now_iso=NOW_ISO)
    runner = ScriptRunner(guarded.client(AGENT))
    thief = NodeStore(runner, guarded.names, OTHER, heartbeat_ttl_s=9, lease_s=9)
    before = await guarded.client().lrange(guarded.names.queue_key(OTHER), 0, -1)
    for attempt in (
        lambda: thief.claim(f"{OTHER}-1", 1, 1, now_iso=NOW_ISO),
        lambda: thief.complete(f"{OTHER}-1", [ended(job(guarded.names, 0, OTHER), "outcome")]),
        lambda: thief.wait_for_work(1),
        lambda: thief.report(NodeReport(node=OTHER, incarnation=f"{OTHER}-1", sequence=1)),
    ):
        with pytest.raises(Exception, match=r"(?i)permission"):
            await attempt()
    assert await guarded.client().lrange(guarded.names.queue_key(OTHER), 0, -1) == before


async def test_agent_can_t_have_the_leader_move_another_node_s_job(guarded: Guarded) -> None:
    names = guarded.names
    _, leader = await guarded.lead()
    await leader.begin_generation("g", {"i0": 0}, {})
    await join(guarded, leader)
    other = await join(guarded, leader, OTHER)
    await leader.assign([bound(names, 0, OTHER)], {}, now_iso=NOW_ISO)
    assert len((await other.claim(f"{OTHER}-1", 1, 1, now_iso=NOW_ISO)).jobs) == 1
    theirs = str(job(names, 0, OTHER))
    evil = guarded.client(AGENT)
    await evil.zadd(
        names.claimed(NODE), {theirs: 1, b"\xff\xfe": 1, f"{names.pool}--{NODE}--\xff": 1, "x": 1}
    )
    ledger = await StoreView(guarded.client(DISPATCHER), names).ledger()
    assert [(stored.job, stored.node) for stored in ledger.jobs] == [(theirs, OTHER)]
    for mode in ("expired", "fence"):
        assert await leader.requeue(NODE, mode, f"{NODE}-1", "silent") == []
    assert await other.complete(f"{OTHER}-1", [ended(job(names, 0, OTHER), "outcome")]) == ["ok"]


@pytest.mark.kafka
async def test_pool_serves_with_each_process_as_its_user(
    guarded: Guarded, kafka_clients: KafkaClients
) -> None:
    names = guarded.names
    engine = HeldEngine()
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(Pool(kafka_clients, guarded.url(DISPATCHER), names.pool))
        await stack.enter_async_context(pool.running(pool.dispatcher()))
        agent_side: Any = Pool(kafka_clients, guarded.url(AGENT), names.pool)
        stack.push_async_callback(agent_side.redis.aclose)
        await stack.enter_async_context(running_agent(agent_side, engine, node=NODE))
        await pool.append(request("cancelled"))
        await wait_until(lambda: engine.started == ["cancelled"], "the engine running the first request")
        await pool.cancel("cancelled")
        assert (await pool.outcome("cancelled")).kind is OutcomeKind.CANCELLED
        engine.go_on.set()
        await pool.append(request("served"))
        outcome = await pool.outcome("served")
        assert outcome.kind is OutcomeKind.COMPLETED
        assert outcome.node == NODE
    log = await guarded.client().execute_command("ACL", "LOG")
    assert log == []


@pytest.mark.kafka
@pytest.mark.parametrize("worker_class", ["rq.SimpleWorker", "rq.Worker"])
async def test_a_stock_rq_worker_runs_our_jobs_as_its_user(
    guarded: Guarded, kafka: KafkaAddress, kafka_clients: KafkaClients, worker_class: str
) -> None:
    names = guarded.names
    await create_topics(kafka_clients, names, partitions=1, replication_factor=1)
    _, leader = await guarded.lead()
    await leader.begin_generation("g", {"i0": 0}, {})
    await join(guarded, leader)
    ref = str(job(names, 0).ref)
    work = Work(
        ref=ref,
        id="r0",
        model="m",
        endpoint=Endpoint.COMPLETIONS,
        body=msgspec.Raw(b'{"model":"m","prompt":"Once upon","max_tokens":4}'),
    )
    envelope = codec.encode(Envelope(ref=ref, id="r0", model="m"))
    item = replace(bound(names, 0), data=encode_job_data(work), envelope=envelope)
    assert [answer for answer, _ in await leader.assign([item], {}, now_iso=NOW_ISO)] == ["ok"]
    admin = guarded.client()
    await admin.delete(names.load(NODE))
    name = f"{names.queue(NODE)}--rq"
    async with simulated_engine(model="m") as engine_url:
        log = await rq_command(
            guarded.url(RQ_WORKER),
            *("worker", "--burst", "--name", name, "--worker-class", worker_class, names.queue(NODE)),
            environment={
                "FLEXLB_REDIS": guarded.url(RQ_WORKER),
                "FLEXLB_KAFKA": kafka.bootstrap,
                "FLEXLB_POOL": names.pool,
                "FLEXLB_NODE": NODE,
                "FLEXLB_ENGINE_URL": engine_url,
                "FLEXLB_MODELS": "m",
            },
        )
    refused = await admin.execute_command("ACL", "LOG")
    assert refused == [], log
    assert [fields[b"kind"] for _, fields in await admin.xrange(names.closing)] == [b"outcome"], log
    worker = guarded.client(RQ_WORKER)
    other = names.job(job(names, 0, OTHER))
    for words in (
        ("HGETALL", other),
        ("DEL", names.queue_key(OTHER)),
        ("XREAD", "STREAMS", names.closing, "0"),
        ("HSET", names.marks, "i0", "9"),
        ("GET", names.leader),
        ("DEL", "rq:queues"),
        ("KEYS", "*"),
        ("PUBLISH", f"rq:pubsub:{name}", "x"),
        ("SUBSCRIBE", "rq:pubsub:other"),
    ):
        with pytest.raises(NoPermissionError):
            await worker.execute_command(*words)
