"""Every Lua script, on a real Valkey and on the simulated one: one body, two servers.

What holds of each: the happy path, a repeated call, the fence, who is entitled, and nothing left behind.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

import pytest

from dispatcher.backends.connect import connect_redis
from dispatcher.backends.leader_lock import Held, LeaderLock, Lease
from dispatcher.backends.leader_store import (
    EXPLAINED_EACH,
    EXPLAINED_MS,
    EXPLAINED_REQUESTS,
    AdoptItem,
    AssignItem,
    CloseItem,
    LeaderStore,
    MendItem,
    RetryItem,
)
from dispatcher.backends.node_store import Busy, Claimed, Ending, NodeStore
from dispatcher.backends.operator_store import OperatorStore
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.backends.store_view import StoreView
from dispatcher.errors import Deposed, Fenced, GenerationLost, StoreFull
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.handoff import Stage as WorkStage
from dispatcher.protocol.names import Attempt, JobId, Lane, Names, Ref
from dispatcher.protocol.node import NodeIdentity, NodeReport, Wish
from dispatcher.protocol.outcome import FailedAttempt, FailureCause
from tests.support.servers import run
from tests.support.sim.loop import current
from tests.support.sim.loop import run as run_in_virtual_time
from tests.support.sim.network import Network
from tests.support.sim.redis import SimRedis
from tests.support.wait import wait_until

T = TypeVar("T")
NOW_ISO = "2027-01-15T08:00:00.000000Z"
LATER_ISO = "2027-01-15T08:00:09.000000Z"
LONG_S = 3600.0


# One stage, two servers


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A Redis with one pool, and how to fill it up."""

    client: Redis
    names: Names
    fill: Callable[[bool], Awaitable[None]]

    @property
    def runner(self) -> ScriptRunner:
        """Runs scripts."""
        return ScriptRunner(self.client)

    @property
    def view(self) -> StoreView:
        """Reads."""
        return StoreView(self.client, self.names)

    def lock(self, ttl_s: float = LONG_S) -> LeaderLock:
        """The pool's leader lock."""
        return LeaderLock(self.runner, self.names, ttl_s=ttl_s, clock=asyncio.get_running_loop().time)

    async def lead(self, owner: str = "one", *, depose: str = "") -> LeaderStore:
        """Become the leader."""
        lease = await self.lock().acquire(owner, depose=depose)
        assert isinstance(lease, Lease)
        return self.store_under(lease)

    def store_under(self, lease: Lease) -> LeaderStore:
        """The leader's scripts, as a session begins with them."""
        return LeaderStore(self.runner, self.names, lease)

    def node_store(
        self, node: str = "n", *, lease_s: float = LONG_S, heartbeat_ttl_s: float = LONG_S
    ) -> NodeStore:
        """A node's scripts."""
        return NodeStore(self.runner, self.names, node, heartbeat_ttl_s=heartbeat_ttl_s, lease_s=lease_s)

    async def join(
        self,
        node: str = "n",
        incarnation: str = "x",
        *,
        lease_s: float = LONG_S,
        heartbeat_ttl_s: float = LONG_S,
    ) -> NodeStore:
        """Register a node."""
        store = self.node_store(node, lease_s=lease_s, heartbeat_ttl_s=heartbeat_ttl_s)
        answer = await store.register(identity(node, incarnation), {}, now_iso=NOW_ISO)
        assert isinstance(answer, str)
        return store

    async def snapshot(self) -> dict[str, Any]:
        """Every key with its value."""
        found: dict[str, Any] = {}
        for key in sorted(await self.client.keys("*")):
            kind = await self.client.type(key)
            match kind:
                case b"string":
                    value = await self.client.get(key)
                case b"hash":
                    value = await self.client.hgetall(key)
                case b"list":
                    value = await self.client.lrange(key, 0, -1)
                case b"set":
                    value = await self.client.smembers(key)
                case b"zset":
                    value = await self.client.zrange(key, 0, -1, withscores=True)
                case b"stream":
                    value = await self.client.xrange(key)
                case _:
                    raise AssertionError(f"{key!r} is a {kind!r}")
            found[key.decode()] = value
        return found

    async def closing(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """The entries that wait to be published."""
        entries: list[tuple[bytes, dict[bytes, bytes]]] = await self.client.xrange(self.names.closing)
        return entries

    async def places(self, ref: str = "i0_0") -> list[str]:
        """Every place where a request is."""
        names, found = self.names, []
        for node in ("n", "other"):
            for name, ids in (
                ("queue", await self.client.lrange(names.queue_key(node), 0, -1)),
                ("intermediate", await self.client.lrange(names.intermediate(node), 0, -1)),
                ("claimed", await self.client.zrange(names.claimed(node), 0, -1)),
            ):
                found += [f"{name} of {node}" for id in ids if JobId.parse(id.decode()).ref == Ref.parse(ref)]
        if await self.client.zscore(names.pending, ref) is not None:
            found.append("pending")
        found += ["closing" for _, fields in await self.closing() if fields[b"ref"] == ref.encode()]
        return found


Body = Callable[[Stage], Awaitable[None]]


@pytest.fixture(scope="module")
def shared_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """One Valkey for this module; each test finds it empty."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    run(server.start())
    yield server
    run(server.stop())


async def on_valkey(server: ValkeyServer, body: Body) -> None:
    """Run `body` on a real server."""
    client = connect_redis(server.url)
    try:
        await client.flushall()

        async def fill(is_full: bool) -> None:
            await client.config_set("maxmemory", 1 if is_full else 0)

        await body(Stage(client=client, names=Names("p"), fill=fill))
    finally:
        await client.config_set("maxmemory", 0)
        await client.aclose()


async def on_simulation(body: Body) -> None:
    """Run `body` on the simulated server."""
    network = Network(Random(1), current())
    server = SimRedis(network)

    async def fill(is_full: bool) -> None:
        server.fill(is_full)

    await body(Stage(client=server.client(network.process("test")), names=Names("p"), fill=fill))


def everywhere(body: Body) -> Callable[..., None]:
    """Make a test of `body` that runs it on each server."""

    @pytest.mark.parametrize("server", ["valkey", "simulated"])
    def test(server: str, request: pytest.FixtureRequest) -> None:
        if server == "valkey":
            run(on_valkey(request.getfixturevalue("shared_valkey"), body))
        else:
            run_in_virtual_time(on_simulation(body))

    test.__name__ = body.__name__
    test.__doc__ = body.__doc__
    return test


# What the bodies use


def identity(node: str = "n", incarnation: str = "x") -> NodeIdentity:
    """A node's identity."""
    return NodeIdentity(node=node, incarnation=incarnation, models=("m",))


def job_id(offset: int = 0, *, node: str = "n", n: int = 1, lane: Lane = Lane.INTERACTIVE) -> JobId:
    """The job id of the request at an offset."""
    return JobId("p", node, Ref(lane, 0, offset), Attempt(5, n))


def item(
    offset: int = 0,
    *,
    node: str = "n",
    incarnation: str = "x",
    n: int = 1,
    from_pending: bool = False,
    identity_of: str | None = None,
    print_: str = "aa",
) -> AssignItem:
    """A request to bind."""
    return AssignItem(
        job=job_id(offset, node=node, n=n),
        incarnation=incarnation,
        cost_tokens=20,
        from_pending=from_pending,
        identity=Names("p").identity("t", identity_of or f"r{offset}"),
        fingerprint=print_,
        data=b"" if from_pending else f"data {offset}".encode(),
        envelope=b"" if from_pending else f"envelope {offset}".encode(),
    )


async def assign(leader: LeaderStore, *items: AssignItem, marks: dict[str, int] | None = None) -> list[str]:
    """Bind requests; the answers."""
    return [answer for answer, _ in await leader.assign(items, marks or {}, now_iso=NOW_ISO)]


async def claim(
    node: NodeStore, number: int = 1, *, incarnation: str = "x", limit: int = 10
) -> list[Claimed]:
    """Take jobs."""
    answer = await node.claim(incarnation, number, limit, now_iso=LATER_ISO)
    return list(answer.jobs)


def ending(job: JobId | str, kind: str = "outcome") -> Ending:
    """How an attempt ended."""
    parsed = JobId.parse(str(job))
    return Ending(job=str(job), kind=kind, ref=str(parsed.ref), id="r", payload=b"payload")


def ids(jobs: list[Claimed]) -> list[str]:
    """The job ids of a claim."""
    return [job.job for job in jobs]


def dropped(store: LeaderStore, item: AssignItem, ref: Ref) -> CloseItem:
    """The ending of an unread record."""
    return CloseItem(
        place="log",
        ref=ref,
        kind="outcome",
        id="r",
        payload=b"rejected",
        identity=item.identity,
        fingerprint=item.fingerprint,
    )


# acquire, renew, resign


@everywhere
async def test_an_epoch_is_at_least_the_servers_time_and_one_owner_holds_it(stage: Stage) -> None:
    seconds, micros = await stage.client.time()
    lease = await stage.lock().acquire("one")
    assert isinstance(lease, Lease)
    assert lease.epoch >= seconds * 1000 + micros // 1000
    assert lease.token == f"{lease.epoch}:one"
    refused = await stage.lock().acquire("two")
    assert refused == Held(token=lease.token, renewals=1)
    assert isinstance(refused, Held)
    assert 0 < refused.left_s <= LONG_S


@everywhere
async def test_acquiring_again_finds_the_own_lock(stage: Stage) -> None:
    first = await stage.lock().acquire("one")
    again = await stage.lock().acquire("one")
    assert isinstance(first, Lease)
    assert isinstance(again, Lease)
    assert first.token == again.token


@everywhere
async def test_each_answer_of_the_lock_tells_the_servers_time(stage: Stage) -> None:
    heard: list[tuple[int, float]] = []
    loop = asyncio.get_running_loop()
    lock = LeaderLock(
        stage.runner,
        stage.names,
        ttl_s=LONG_S,
        clock=loop.time,
        heard=lambda server_ms, asked_s: heard.append((server_ms, asked_s)),
    )
    before_s = loop.time()
    lease = await lock.acquire("one")
    assert isinstance(lease, Lease)
    await lock.acquire("one")
    assert isinstance(await lock.acquire("two"), Held)
    await lock.renew(lease)
    await lock.begin_epoch(lease, "one again")
    old = Lease("1:gone", until=lease.until, clock=loop.time)
    with pytest.raises(Deposed):
        await lock.renew(old)
    seconds, micros = await stage.client.time()
    assert len(heard) == 6
    for server_ms, asked_s in heard:
        assert before_s <= asked_s <= loop.time()
        assert abs(server_ms - (seconds * 1000 + micros // 1000)) < 10_000
    assert [server_ms for server_ms, _ in heard] == sorted(server_ms for server_ms, _ in heard)


@everywhere
async def test_an_owner_that_looks_like_a_pattern_is_compared_whole(stage: Stage) -> None:
    await stage.lock().acquire("one")
    for owner in ("", "on.", ".*", "one:one", "%w+", f"{5}:one"):
        assert isinstance(await stage.lock().acquire(owner), Held)


@everywhere
async def test_epochs_rise_even_when_the_servers_clock_stood_still_or_went_back(stage: Stage) -> None:
    far = 9_000_000_000_000
    await stage.client.set(stage.names.epoch, f"{far}:old")
    lease = await stage.lock().acquire("one")
    assert isinstance(lease, Lease)
    assert lease.epoch == far + 1


@everywhere
async def test_epochs_rise_even_when_the_key_was_lost(stage: Stage) -> None:
    first = await stage.lock().acquire("one")
    assert isinstance(first, Lease)
    await stage.client.delete(stage.names.epoch, stage.names.leader)
    seconds, micros = await stage.client.time()
    second = await stage.lock().acquire("two")
    assert isinstance(second, Lease)
    assert second.epoch >= max(first.epoch, seconds * 1000 + micros // 1000)
    assert second.token != first.token


@everywhere
async def test_a_rubbish_epoch_is_replaced(stage: Stage) -> None:
    await stage.client.set(stage.names.epoch, "rubbish")
    assert isinstance(await stage.lock().acquire("one"), Lease)


@everywhere
async def test_only_the_token_that_stood_still_is_deposed(stage: Stage) -> None:
    first = await stage.lock().acquire("one")
    assert isinstance(first, Lease)
    assert isinstance(await stage.lock().acquire("two", depose="1:one"), Held)
    second = await stage.lock().acquire("two", depose=first.token)
    assert isinstance(second, Lease)
    assert second.epoch > first.epoch
    with pytest.raises(Deposed):
        await stage.lock().renew(first)
    assert await stage.client.get(stage.names.leader) == second.token.encode()


@everywhere
async def test_renewing_prolongs_counts_and_takes_an_expired_lock_again(stage: Stage) -> None:
    lock = stage.lock()
    lease = await lock.acquire("one")
    assert isinstance(lease, Lease)
    await stage.client.pexpire(stage.names.leader, 50_000)
    await lock.renew(lease)
    assert await stage.client.pttl(stage.names.leader) > 50_000
    await stage.client.delete(stage.names.leader)
    await lock.renew(lease)
    assert await stage.client.get(stage.names.leader) == lease.token.encode()
    assert await stage.client.get(stage.names.renewals) == b"3"


@everywhere
async def test_an_expired_lock_goes_to_the_next_owner(stage: Stage) -> None:
    first = await stage.lock(ttl_s=0.01).acquire("one")
    assert isinstance(first, Lease)

    async def is_free() -> bool:
        return not await stage.client.exists(stage.names.leader)

    await wait_until(is_free, "the lock to expire")
    second = await stage.lock().acquire("two")
    assert isinstance(second, Lease)
    assert second.epoch > first.epoch


@everywhere
async def test_resigning_frees_the_own_lock_only(stage: Stage) -> None:
    lock = stage.lock()
    first = await lock.acquire("one")
    assert isinstance(first, Lease)
    await lock.resign(Lease("1:other", until=0, clock=lambda: 0))
    assert isinstance(await lock.acquire("two"), Held)
    await lock.resign(first)
    await lock.resign(first)
    second = await lock.acquire("two")
    assert isinstance(second, Lease)
    await lock.resign(first)
    assert isinstance(await lock.acquire("three"), Held)


# The leader's fence


def leader_calls(leader: LeaderStore) -> dict[str, Callable[[], Awaitable[object]]]:
    """A call of every leader script."""
    retry = RetryItem(entry=b"1-1", job=job_id(), not_before_ms=0, failures=1, excluded=(), cause="connect")
    adopt = AdoptItem(job=job_id(9), cost_tokens=1, identity="id", fingerprint="aa", envelope=b"e", data=b"d")
    close = [
        dropped(leader, item(7), Ref(Lane.INTERACTIVE, 0, 7)),
        CloseItem(place="pending", ref=Ref(Lane.INTERACTIVE, 0, 3), kind="outcome", id="r"),
        CloseItem(place="job", ref=Ref(Lane.INTERACTIVE, 0, 0), kind="outcome", id="r", job=job_id(0)),
    ]
    return {
        "assign": lambda: leader.assign([item(5)], {"i0": 4}, now_iso=NOW_ISO),
        "close": lambda: leader.close(close),
        "fence": lambda: leader.requeue("n", "fence", "x", "node_lost"),
        "expired": lambda: leader.requeue("n", "expired", "", "lease_expired"),
        "others": lambda: leader.requeue("n", "others", "y", "node_lost"),
        "queued": lambda: leader.requeue("n", "queued", "", "draining"),
        "retry": lambda: leader.retry([retry]),
        "settle": lambda: leader.settle({0: 7}, [(b"1-1", str(job_id()))]),
        "admit": lambda: leader.admit("other"),
        "forget": lambda: leader.forget("n"),
        "begin_generation": lambda: leader.begin_generation("new", {"i0": 0}, {"i0": [3]}),
        "remember": lambda: leader.remember({"flexlb:p:id:x": "i0_1|aa"}),
        "explain": lambda: leader.explain([("t", "r0", b"{}")]),
        "adopt": lambda: leader.adopt("n", "x", [adopt], lease_s=1, now_iso=NOW_ISO),
    }


@everywhere
async def test_a_deposed_leader_changes_nothing(stage: Stage) -> None:
    old = await stage.lead()
    node = await stage.join(lease_s=0)
    await old.admit("n")
    await assign(old, item(0), item(1), item(2), item(3))
    await claim(node, limit=2)
    await stage.lead("two", depose=old.lease.token)
    before = await stage.snapshot()
    for name, call in leader_calls(old).items():
        with pytest.raises(Deposed, match="DEPOSED a newer epoch exists"):
            await call()
        assert await stage.snapshot() == before, name


@everywhere
async def test_a_leader_whose_epoch_key_was_lost_changes_nothing(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.client.delete(stage.names.epoch)
    before = await stage.snapshot()
    for name, call in leader_calls(leader).items():
        with pytest.raises(Deposed):
            await call()
        assert await stage.snapshot() == before, name


@everywhere
async def test_a_leader_changes_nothing_in_a_redis_that_went_back_in_time(stage: Stage) -> None:
    leader = await stage.lead()
    await leader.begin_generation("g", {}, {})
    node = await stage.join(lease_s=0)
    await assign(leader, item(0), item(1), item(2))
    await claim(node, limit=2)
    assert leader.counter == 1
    leader.note_counter(2)
    before = await stage.snapshot()
    counted = {"assign", "close", "fence", "expired", "others", "queued", "retry", "settle"}
    for name in counted:
        with pytest.raises(GenerationLost, match="REWOUND Redis went back in time"):
            await leader_calls(leader)[name]()
        assert await stage.snapshot() == before, name


@everywhere
async def test_every_move_of_a_leader_is_counted(stage: Stage) -> None:
    leader = await stage.lead()
    await leader.begin_generation("g", {}, {})
    await stage.join(lease_s=0)
    for name, call in leader_calls(leader).items():
        if name in {"begin_generation", "settle", "explain"}:
            continue  # one begins the count, one finds nothing to settle here, one moves nothing
        before = leader.counter
        await call()
        found = await stage.view.generation()
        assert found is not None
        assert found[1] == leader.counter
        assert leader.counter - before == 1, name


@everywhere
async def test_scripts_are_found_again_after_the_server_forgot_them(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    assert await assign(leader, item(0)) == ["ok"]
    await stage.client.script_flush()
    assert await assign(leader, item(1)) == ["ok"]


# The agent's fence


def agent_calls(node: NodeStore, incarnation: str) -> dict[str, Callable[[], Awaitable[object]]]:
    """A call of every agent script that needs a living incarnation."""
    report = NodeReport(node="n", incarnation=incarnation, sequence=1)
    return {
        "report": lambda: node.report(report),
        "extend": lambda: node.extend(incarnation, [str(job_id(0))], now_iso=LATER_ISO),
        "claim": lambda: node.claim(incarnation, 9, 10, now_iso=LATER_ISO),
        "claim of a stock worker": lambda: node.claim(
            incarnation, 9, 1, now_iso=LATER_ISO, execution="e", job=str(job_id(1))
        ),
        "complete": lambda: node.complete(incarnation, [ending(job_id(0))]),
    }


async def check_fenced(stage: Stage, node: NodeStore, incarnation: str, why: str) -> None:
    """Every script of that incarnation is refused and changes nothing."""
    before = await stage.snapshot()
    for name, call in agent_calls(node, incarnation).items():
        with pytest.raises(Fenced, match=f"FENCED this incarnation is {why}"):
            await call()
        assert await stage.snapshot() == before, name


@everywhere
async def test_a_fenced_incarnation_changes_nothing(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1))
    await claim(node, limit=1)
    assert await leader.requeue("n", "fence", "x", "node_lost") is not None
    await check_fenced(stage, node, "x", "fenced")
    assert await node.register(identity(), {}, now_iso=NOW_ISO) is None


@everywhere
async def test_an_unknown_incarnation_changes_nothing(stage: Stage) -> None:
    await check_fenced(stage, stage.node_store(), "x", "unknown")


@everywhere
async def test_a_replaced_incarnation_changes_nothing(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1))
    await claim(node, limit=1)
    await stage.client.delete(stage.names.load("n"))
    await stage.join(incarnation="y")
    await check_fenced(stage, node, "x", "fenced")


# register, report


@everywhere
async def test_registering_shows_a_node_to_leaders_and_to_rq(stage: Stage) -> None:
    names = stage.names
    answer = await stage.node_store().register(identity(), {}, now_iso=NOW_ISO)
    assert answer == ""
    found = await stage.view.nodes(["n"])
    assert [(node.incarnation, node.fenced, node.alive) for node in found] == [("x", "", True)]
    worker = await stage.client.hgetall(names.worker("n"))
    assert (worker[b"queues"], worker[b"birth"]) == (b"p--n", NOW_ISO.encode())
    ((_, entry),) = await stage.client.xrange(names.reports)
    assert entry[b"kind"] == b"register"


@everywhere
async def test_registering_again_is_the_same_registration(stage: Stage) -> None:
    node = await stage.join()
    await node.register(identity(), {}, now_iso=NOW_ISO)
    assert (await stage.view.nodes(["n"]))[0].incarnation == "x"


@everywhere
async def test_a_second_incarnation_waits_while_the_first_is_heard(stage: Stage) -> None:
    node = await stage.join()
    answer = await node.register(identity(incarnation="y"), {}, now_iso=NOW_ISO)
    assert isinstance(answer, Busy)
    assert answer.incarnation == "x"
    assert 0 < answer.wait_ms <= LONG_S * 1000


@everywhere
async def test_a_second_incarnation_takes_over_from_a_silent_or_fenced_one(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join(heartbeat_ttl_s=0.001)

    async def is_silent() -> bool:
        return not await stage.client.exists(stage.names.load("n"))

    await wait_until(is_silent, "the heartbeat to expire")
    assert isinstance(await node.register(identity(incarnation="y"), {}, now_iso=NOW_ISO), str)
    await stage.join(incarnation="y")
    await leader.requeue("n", "fence", "y", "node_lost")
    assert isinstance(await node.register(identity(incarnation="z"), {}, now_iso=NOW_ISO), str)
    assert (await stage.view.nodes(["n"]))[0].fenced == ""


@everywhere
async def test_an_inventory_is_what_was_registered_last(stage: Stage) -> None:
    leader = await stage.lead()
    node = stage.node_store()
    held = {"job1": (b"envelope1", b"data\n1"), "job2": (b"envelope2", b"data2")}
    await node.register(identity(), held, now_iso=NOW_ISO)
    assert await leader.held_inventory("n") == held
    await node.register(identity(), {}, now_iso=NOW_ISO)
    assert await leader.held_inventory("n") == {}


@everywhere
async def test_a_report_keeps_the_heartbeat_and_tells_the_generation(stage: Stage) -> None:
    leader = await stage.lead()
    await leader.begin_generation("g1", {}, {})
    node = await stage.join()
    await stage.client.pexpire(stage.names.load("n"), 50_000)
    report = NodeReport(node="n", incarnation="x", sequence=1, running=3)
    assert await node.report(report) == "g1"
    assert await node.report(report) == "g1"
    assert await stage.client.pttl(stage.names.load("n")) > 50_000
    assert b'"running":3' in (await stage.view.nodes(["n"]))[0].report


# assign


@everywhere
async def test_assigning_writes_an_rq_job_and_its_marks(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    assert await assign(leader, item(4), item(7), marks={"i0": 4, "b1": 9}) == ["ok", "ok"]
    names, client = stage.names, stage.client
    assert await client.lrange(names.queue_key("n"), 0, -1) == [
        str(job_id(4)).encode(),
        str(job_id(7)).encode(),
    ]
    job = await client.hgetall(names.job(job_id(7)))
    assert job == {
        b"data": b"data 7",
        b"envelope": b"envelope 7",
        b"ref": b"i0_7",
        b"hit": b"0",
        b"stage": b"",
        b"failures": b"0",
        b"excluded": b"",
        b"created_at": NOW_ISO.encode(),
        b"enqueued_at": NOW_ISO.encode(),
        b"description": b"flexlb i0_7",
        b"timeout": b"86400",
        b"result_ttl": b"0",
        b"failure_ttl": b"86400",
        b"meta": b"{}",
        b"status": b"queued",
        b"origin": b"p--n",
        b"cost": b"20",
        b"seq": b"2",
    }
    ledger = await stage.view.ledger()
    assert ledger.marks == {"i0": 4, "b1": 9}
    assert ledger.above["i0"] == [4, 7]
    assert await client.get(item(7).identity) == b"i0_7|aa"
    assert 0 < await client.pttl(item(7).identity) <= 600_000


@everywhere
async def test_assigning_again_pushes_nothing_twice(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    batch = [item(0), item(1)]
    assert await assign(leader, *batch, marks={"i0": 1}) == ["ok", "ok"]
    assert await assign(leader, *batch, marks={"i0": 1}) == ["already", "already"]
    assert await stage.client.llen(stage.names.queue_key("n")) == 2
    assert ids(await claim(node)) == [str(job_id(0)), str(job_id(1))]
    assert await assign(leader, *batch, marks={"i0": 2}) == ["already", "already"]
    assert await stage.places() == ["claimed of n"]


@everywhere
async def test_a_later_attempt_at_another_node_does_not_push_it_twice(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await stage.join("other", "y")
    await assign(leader, item(0))
    assert await assign(leader, item(0, node="other", incarnation="y", n=2)) == ["already"]
    assert await stage.places() == ["queue of n"]


@everywhere
async def test_nothing_is_bound_to_a_node_that_is_gone(stage: Stage) -> None:
    leader = await stage.lead()
    assert await assign(leader, item(0)) == ["gone"]
    await stage.join(incarnation="y")
    assert await assign(leader, item(0)) == ["gone"]
    await leader.requeue("n", "fence", "y", "node_lost")
    assert await assign(leader, item(0, incarnation="y")) == ["gone"]
    assert await stage.places() == []
    assert not await stage.client.exists(item(0).identity)
    assert (await stage.view.ledger()).above == {}


@everywhere
async def test_a_second_record_of_the_same_identity_is_told_the_first(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    answers = await assign(
        leader, item(0, identity_of="same"), item(1, identity_of="same", print_="bb"), item(2)
    )
    assert answers == ["ok", "dup|i0_0|aa", "ok"]
    assert await assign(leader, item(1, identity_of="same", print_="bb")) == ["dup|i0_0|aa"]
    assert await stage.places("i0_1") == []


@everywhere
async def test_marks_only_advance_and_forget_what_they_pass(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, *[item(offset) for offset in (0, 1, 5, 9)], marks={"i0": 2})
    assert (await stage.view.ledger()).above["i0"] == [5, 9]
    await assign(leader, marks={"i0": 1})
    ledger = await stage.view.ledger()
    assert (ledger.marks, ledger.above) == ({"i0": 2}, {"i0": [5, 9]})
    await assign(leader, marks={"i0": 10})
    ledger = await stage.view.ledger()
    assert (ledger.marks, ledger.above) == ({"i0": 10}, {"i0": []})
    assert await assign(leader, item(7)) == ["already"]


@everywhere
async def test_a_pending_request_is_bound_again_under_its_next_attempt(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await stage.join("other", "y")
    await assign(leader, item(0), marks={"i0": 1})
    assert await leader.requeue("n", "fence", "x", "node_lost") == [Ref(Lane.INTERACTIVE, 0, 0)]
    again = item(0, node="other", incarnation="y", n=2, from_pending=True)
    assert await assign(leader, again) == ["ok"]
    assert await assign(leader, again) == ["already"]
    assert await stage.places() == ["queue of other"]
    job = await stage.client.hgetall(stage.names.job(again.job))
    assert (job[b"data"], job[b"envelope"]) == (b"data 0", b"envelope 0")
    assert (job[b"status"], job[b"origin"], job[b"excluded"]) == (b"queued", b"p--other", b"n")
    assert not await stage.client.exists(stage.names.pending_job("i0_0"))


@everywhere
async def test_a_pending_request_stays_pending_when_the_node_is_gone(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0))
    await leader.requeue("n", "fence", "x", "node_lost")
    assert await assign(leader, item(0, node="other", n=2, from_pending=True)) == ["gone"]
    assert await stage.places() == ["pending"]


# claim, extend


@everywhere
async def test_claiming_takes_jobs_in_order_under_a_lease(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join(lease_s=10)
    await assign(leader, item(0), item(1), item(2))
    jobs = await claim(node, limit=2)
    assert jobs == [
        Claimed(
            job=str(job_id(n)),
            seq=n + 1,
            envelope=f"envelope {n}".encode(),
            data=f"data {n}".encode(),
            failures=0,
        )
        for n in (0, 1)
    ]
    assert ids(await claim(node, 2)) == [str(job_id(2))]
    fields = await stage.client.hgetall(stage.names.job(job_id(0)))
    assert (fields[b"status"], fields[b"worker_name"], fields[b"started_at"]) == (
        b"started",
        b"p--n",
        LATER_ISO.encode(),
    )
    seconds, _ = await stage.client.time()
    lease_ends_ms = await stage.client.zscore(stage.names.claimed("n"), str(job_id(0)))
    assert seconds * 1000 <= lease_ends_ms <= (seconds + 12) * 1000
    assert await stage.client.zrange(stage.names.wip("n"), 0, -1) == [
        f"{job_id(n)}:flexlb".encode() for n in range(3)
    ]


@everywhere
async def test_a_repeated_claim_gives_the_same_answer_and_takes_nothing_more(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1), item(2))
    first = await claim(node, 1, limit=2)
    assert await claim(node, 1, limit=2) == first
    assert await stage.places("i0_2") == ["queue of n"]
    await node.complete("x", [ending(job_id(0))])
    assert ids(await claim(node, 1, limit=2)) == [str(job_id(1))]


@everywhere
async def test_a_claim_older_than_the_last_gives_nothing(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0))
    assert await claim(node, 5, limit=1) != []
    await assign(leader, item(1))
    assert await claim(node, 4) == []
    assert await stage.places("i0_1") == ["queue of n"]


@everywhere
async def test_claim_numbers_begin_anew_with_an_incarnation(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0))
    await claim(node, 50)
    await leader.requeue("n", "fence", "x", "node_lost")
    node = await stage.join(incarnation="y")
    await assign(leader, item(1, incarnation="y"))
    assert ids(await claim(node, 1, incarnation="y")) == [str(job_id(1))]


@everywhere
async def test_what_a_blocking_read_delivered_is_claimed_first(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    assert not await node.wait_for_work(0.01)
    await assign(leader, item(0), item(1))
    assert await node.wait_for_work(1)
    assert await stage.places() == ["intermediate of n"]
    assert ids(await claim(node)) == [str(job_id(0)), str(job_id(1))]
    assert await stage.client.llen(stage.names.intermediate("n")) == 0


@everywhere
async def test_what_was_delivered_and_then_moved_elsewhere_is_not_claimed(stage: Stage) -> None:
    leader = await stage.lead()
    frozen = await stage.join()
    await stage.join("other", "y")
    await assign(leader, item(0))
    assert await frozen.wait_for_work(1)
    await leader.requeue("n", "fence", "x", "node_lost")
    await assign(leader, item(0, node="other", incarnation="y", n=2, from_pending=True))
    with pytest.raises(Fenced):
        await claim(frozen)
    woken = await stage.join(incarnation="z")
    assert await claim(woken, incarnation="z") == []
    assert await stage.places() == ["queue of other"]


@everywhere
async def test_foreign_jobs_are_named_and_never_given_out(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    queue, client = stage.names.queue_key("n"), stage.client
    await assign(leader, item(0))
    await client.hset("rq:job:pickled", mapping={"data": b"\x80\x04.", "origin": "p--n"})
    await client.hset(f"rq:job:{job_id(5, node='other')}", mapping={"data": b"theirs"})
    record = str(job_id(6))
    await client.hset(f"rq:job:{record}", mapping={"data": b"mine", "exc_info": "engine_error"})
    await client.rpush(queue, "pickled", str(job_id(5, node="other")), record, "b\xff")
    answer = await node.claim("x", 1, 10, now_iso=LATER_ISO)
    assert ids(list(answer.jobs)) == [str(job_id(0))]
    assert answer.foreign == ("pickled", str(job_id(5, node="other")), record, "b\xff")
    assert await client.llen(queue) == 0
    assert await client.zcard(stage.names.claimed("n")) == 1
    assert await stage.closing() == []


@everywhere
async def test_a_stock_worker_claims_only_what_rq_says_it_runs(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1))
    popped = (await stage.client.lpop(stage.names.queue_key("n"))).decode()

    async def claim_by(execution: str, number: int) -> list[str]:
        answer = await node.claim("x", number, 1, now_iso=LATER_ISO, execution=execution, job=popped)
        return ids(list(answer.jobs))

    assert await claim_by("e1", 1) == []
    await stage.client.zadd(stage.names.wip("n"), {f"{popped}:e1": 4_102_444_800})
    assert await claim_by("e2", 2) == []
    assert await claim_by("e1", 3) == [popped]
    assert await claim_by("e1", 3) == [popped]
    assert await claim_by("e1", 4) == []
    assert await stage.places() == ["claimed of n"]
    assert await stage.places("i0_1") == ["queue of n"]


@everywhere
async def test_extending_prolongs_what_is_held_and_names_what_was_lost(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join(lease_s=10)
    await assign(leader, item(0), item(1), item(2))
    node = stage.node_store(lease_s=10)
    await claim(node, limit=2)
    claimed, client = stage.names.claimed("n"), stage.client
    before = await client.zscore(claimed, str(job_id(0)))
    longer = stage.node_store(lease_s=1000)
    held = [str(job_id(0)), str(job_id(9))]
    for _ in range(2):
        assert await longer.extend("x", held, now_iso=LATER_ISO) == (1, [str(job_id(9))])
    assert await client.zscore(claimed, str(job_id(0))) > before + 900_000
    assert await client.zscore(claimed, str(job_id(1))) < before + 900_000
    assert await client.hget(stage.names.worker("n"), "last_heartbeat") == LATER_ISO.encode()


# complete


@everywhere
async def test_completing_stores_the_outcome_and_deletes_the_job(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0))
    await claim(node)
    assert await node.complete("x", [ending(job_id(0))]) == ["ok"]
    ((_, entry),) = await stage.closing()
    assert entry == {
        b"kind": b"outcome",
        b"ref": b"i0_0",
        b"id": b"r",
        b"job": str(job_id(0)).encode(),
        b"payload": b"payload",
    }
    assert await stage.places() == ["closing"]
    for key in (stage.names.job(job_id(0)), stage.names.claimed("n"), stage.names.wip("n")):
        assert not await stage.client.exists(key)


@everywhere
async def test_an_attempt_ends_once(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0))
    await claim(node)
    assert await node.complete("x", [ending(job_id(0)), ending(job_id(0))]) == ["ok", "lost"]
    assert await node.complete("x", [ending(job_id(0)), ending(job_id(0), "failed")]) == ["lost", "lost"]
    assert len(await stage.closing()) == 1


@everywhere
async def test_what_was_never_claimed_cannot_be_completed(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0))
    assert await node.complete("x", [ending(job_id(0)), ending(job_id(1))]) == ["lost", "lost"]
    assert await stage.places() == ["queue of n"]


@everywhere
async def test_completing_after_a_requeue_is_lost(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join(lease_s=0)
    await assign(leader, item(0))
    await claim(node)
    assert await leader.requeue("n", "expired", "", "lease_expired") == [Ref(Lane.INTERACTIVE, 0, 0)]
    assert await node.complete("x", [ending(job_id(0))]) == ["lost"]
    assert await stage.places() == ["pending"]
    await assign(leader, item(0, n=2, from_pending=True))
    assert await node.complete("x", [ending(job_id(0))]) == ["lost"]
    assert ids(await claim(node, 2)) == [str(job_id(0, n=2))]
    assert await node.complete("x", [ending(job_id(0)), ending(job_id(0, n=2))]) == ["lost", "ok"]
    assert await stage.places() == ["closing"]


@everywhere
async def test_a_failed_attempt_keeps_its_job_for_the_leaders_decision(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1))
    await claim(node)
    endings = [ending(job_id(0), "failed"), ending(job_id(1), "released")]
    assert await node.complete("x", endings) == ["ok", "ok"]
    assert [entry[b"kind"] for _, entry in await stage.closing()] == [b"failed", b"released"]
    stored = await stage.view.stored_job(str(job_id(0)))
    assert stored is not None
    assert (stored.ref, stored.envelope) == ("i0_0", b"envelope 0")
    assert await stage.client.hget(stage.names.job(job_id(0)), "status") == b"deferred"


# requeue


@everywhere
async def test_fencing_moves_everything_that_a_node_held(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, *[item(offset) for offset in range(4)])
    await claim(node, limit=1)
    await node.wait_for_work(1)
    popped = (await stage.client.lpop(stage.names.queue_key("n"))).decode()
    await stage.client.zadd(stage.names.wip("n"), {f"{popped}:execution-of-rq": 4_102_444_800})
    moved = await leader.requeue("n", "fence", "x", "node_lost")
    assert moved is not None
    assert sorted(str(ref) for ref in moved) == ["i0_0", "i0_1", "i0_2", "i0_3"]
    names, client = stage.names, stage.client
    for key in (names.queue_key("n"), names.intermediate("n"), names.claimed("n"), names.wip("n")):
        assert not await client.exists(key), key
    jobs = (await stage.view.ledger()).jobs
    assert {job.ref for job in jobs} == {"i0_0", "i0_1", "i0_2", "i0_3"}
    assert {(job.node, job.claimed, job.failures, job.excluded) for job in jobs} == {("", False, 0, ("n",))}
    fields = await client.hgetall(names.pending_job("i0_0"))
    assert (fields[b"status"], fields[b"cause"]) == (b"scheduled", b"node_lost")
    ((_, told),) = await client.xrange(names.control("n"))
    assert told[b"kind"] == b"fence"


@everywhere
async def test_fencing_again_moves_nothing_twice(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0))
    assert await leader.requeue("n", "fence", "x", "node_lost") is not None
    assert await leader.requeue("n", "fence", "x", "node_lost") is not None
    assert await stage.places() == ["pending"]
    assert (await stage.view.ledger()).jobs[0].excluded == ("n",)


@everywhere
async def test_a_node_that_came_back_is_not_fenced_for_its_former_self(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join(incarnation="y")
    assert await leader.requeue("n", "fence", "x", "node_lost") is None
    assert await assign(leader, item(0, incarnation="y")) == ["ok"]


@everywhere
async def test_only_expired_leases_are_moved(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0), item(1), item(2))
    await claim(stage.node_store(lease_s=0), 1, limit=1)
    await claim(stage.node_store(lease_s=100), 2, limit=1)
    assert await leader.requeue("n", "expired", "", "lease_expired") == [Ref(Lane.INTERACTIVE, 0, 0)]
    assert await leader.requeue("n", "expired", "", "lease_expired") == []
    assert await stage.places("i0_0") == ["pending"]
    assert await stage.places("i0_1") == ["claimed of n"]
    assert await stage.places("i0_2") == ["queue of n"]


@everywhere
async def test_what_a_former_incarnation_claimed_is_moved(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1))
    await claim(node, limit=1)
    await stage.client.delete(stage.names.load("n"))
    node = await stage.join(incarnation="y")
    assert ids(await claim(node, incarnation="y")) == [str(job_id(1))]
    for moved in ([Ref(Lane.INTERACTIVE, 0, 0)], []):
        assert await leader.requeue("n", "others", "y", "node_lost") == moved
    assert await stage.places("i0_0") == ["pending"]
    assert await stage.places("i0_1") == ["claimed of n"]


@everywhere
async def test_what_nobody_has_claimed_is_given_back_by_a_drain(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, *[item(offset) for offset in range(4)])
    await claim(node, limit=1)
    await node.wait_for_work(1)
    moved = await leader.requeue("n", "queued", "", "draining")
    assert moved is not None
    assert sorted(str(ref) for ref in moved) == ["i0_1", "i0_2", "i0_3"]
    assert await leader.requeue("n", "queued", "", "draining") == []
    assert [await stage.places(f"i0_{offset}") for offset in range(4)] == [
        ["claimed of n"],
        *[["pending"]] * 3,
    ]
    assert await claim(node, 2) == []
    assert await node.complete("x", [ending(job_id(0))]) == ["ok"]


# cordon


@everywhere
async def test_nothing_new_is_bound_to_a_cordoned_node(stage: Stage) -> None:
    leader, operator = await stage.lead(), OperatorStore(stage.runner, stage.names)
    node = await stage.join()
    await stage.join("other", "z")
    assert await assign(leader, item(0), item(1)) == ["ok", "ok"]
    await claim(node, limit=1)
    assert await operator.wish("n", Wish.CORDON) == ""
    assert await operator.wish("n", Wish.CORDON) == "cordon"
    assert await assign(leader, item(2), item(3, node="other", incarnation="z")) == ["cordoned", "ok"]
    assert await stage.places("i0_2") == []
    # What was there goes on, also under a new incarnation and a new leader.
    assert ids(await claim(node, 2)) == [str(job_id(1))]
    assert await node.complete("x", [ending(job_id(0)), ending(job_id(1))]) == ["ok", "ok"]
    leader = await stage.lead("two", depose=leader.lease.token)
    await stage.client.delete(stage.names.load("n"))
    await stage.join(incarnation="y")
    assert await assign(leader, item(2, incarnation="y")) == ["cordoned"]
    await leader.requeue("other", "fence", "z", "node_lost")
    assert await assign(leader, item(3, incarnation="y", n=2, from_pending=True)) == ["cordoned"]
    assert await stage.places("i0_3") == ["pending"]
    assert (await stage.view.cordons()).wishes == {"n": Wish.CORDON}
    assert await operator.wish("n", None) == "cordon"
    assert await operator.wish("n", None) == ""
    again = [item(2, incarnation="y"), item(3, incarnation="y", n=2, from_pending=True)]
    assert await assign(leader, *again) == ["ok", "ok"]
    assert (await stage.view.cordons()).wishes == {}


@everywhere
async def test_a_wish_of_a_node_that_nobody_knows_is_refused(stage: Stage) -> None:
    operator = OperatorStore(stage.runner, stage.names)
    before = await stage.snapshot()
    assert await operator.wish("gpu-71", Wish.DRAIN) is None
    assert await stage.snapshot() == before
    await stage.join("gpu-17")
    assert await operator.wish("gpu-17", Wish.DRAIN) == ""
    await stage.client.delete(stage.names.node("gpu-17"))
    assert await operator.wish("gpu-17", Wish.CORDON) == "drain"
    told = [fields for _, fields in await stage.client.xrange(stage.names.reports)]
    assert told[1:] == 2 * [{b"kind": b"cordon", b"body": b"gpu-17"}]


@everywhere
async def test_a_wish_of_a_later_release_binds_nothing_at_least(stage: Stage) -> None:
    await stage.client.hset(stage.names.cordons, "n", "polish")
    assert (await stage.view.cordons()).wishes == {"n": Wish.CORDON}


# retry


async def failed_attempt(stage: Stage) -> tuple[LeaderStore, NodeStore, bytes]:
    """A request whose attempt failed: its leader, its node, its closing entry."""
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0))
    await claim(node)
    await node.complete("x", [ending(job_id(0), "failed")])
    ((entry, _),) = await stage.closing()
    return leader, node, entry


@everywhere
async def test_a_retry_puts_an_attempt_back_to_pending(stage: Stage) -> None:
    leader, _, entry = await failed_attempt(stage)
    retry = RetryItem(
        entry=entry, job=job_id(0), not_before_ms=1234, failures=2, excluded=("n", "other"), cause="connect"
    )
    assert await leader.retry([retry]) == ["ok"]
    assert await leader.retry([retry]) == ["already"]
    assert await stage.places() == ["pending"]
    (job,) = (await stage.view.ledger()).jobs
    assert (job.failures, job.excluded, job.not_before_ms, job.envelope) == (
        2,
        ("n", "other"),
        1234,
        b"envelope 0",
    )
    assert not await stage.client.exists(stage.names.job(job_id(0)))


@everywhere
async def test_a_job_remembers_its_newest_eight_failed_attempts(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    assert await assign(leader, item(0)) == ["ok"]
    for n in range(1, 10):
        await claim(node, n)
        await node.complete("x", [ending(job_id(0, n=n), "failed")])
        ((entry, _),) = await stage.closing()
        retry = RetryItem(
            entry=entry,
            job=job_id(0, n=n),
            not_before_ms=0,
            failures=n,
            excluded=(),
            cause="connect",
            attempt=b'{"attempt":"5_%d"}' % n,
        )
        assert await leader.retry([retry]) == ["ok"]
        assert await leader.retry([retry]) == ["already"]
        assert await assign(leader, item(0, n=n + 1, from_pending=True)) == ["ok"]
    assert await stage.view.failed_attempts(str(job_id(0, n=10))) == [
        b'{"attempt":"5_%d"}' % n for n in range(2, 10)
    ]
    assert await leader.requeue("n", "fence", "x", "node_lost") is not None
    assert await leader.requeue("n", "fence", "x", "node_lost") is not None
    await stage.join("other", "z")
    assert await assign(leader, item(0, node="other", incarnation="z", n=11, from_pending=True)) == ["ok"]
    *older, last = await stage.view.failed_attempts(str(job_id(0, node="other", n=11)))
    assert older == [b'{"attempt":"5_%d"}' % n for n in range(3, 10)]
    assert codec.failed_attempts.decode(last) == FailedAttempt(
        attempt="5_10", node="n", cause=FailureCause.NODE_LOST
    )
    assert await stage.view.failed_attempts(str(job_id(7))) == []


@everywhere
async def test_a_retry_without_its_job_is_pending_to_be_written_anew(stage: Stage) -> None:
    leader, _, entry = await failed_attempt(stage)
    await stage.client.delete(stage.names.job(job_id(0)))
    retry = RetryItem(
        entry=entry, job=job_id(0), not_before_ms=0, failures=1, excluded=("n",), cause="connect"
    )
    assert await leader.retry([retry]) == ["missing"]
    assert await leader.retry([retry]) == ["already"]
    assert await stage.places() == ["pending"]
    assert await assign(leader, item(0, node="other", n=2, from_pending=True)) == ["gone"], "no such node"
    assert await assign(leader, item(0, n=2, from_pending=True)) == ["misread"]
    assert await stage.places() == ["pending"]
    mended = MendItem(ref=job_id().ref, job=None, envelope=b"new envelope", data=b"new data")
    assert await leader.mend([mended], now_iso=LATER_ISO) == ["ok"]
    (stored,) = (await stage.view.ledger()).jobs
    assert (stored.failures, stored.excluded, stored.envelope) == (1, ("n",), b"new envelope")
    assert await assign(leader, item(0, n=2, from_pending=True)) == ["ok"]


@everywhere
async def test_a_retry_remembers_under_whom_engines_died(stage: Stage) -> None:
    leader, _, entry = await failed_attempt(stage)
    retry = RetryItem(
        entry=entry,
        job=job_id(0),
        not_before_ms=0,
        failures=1,
        excluded=("n",),
        crashed=("n", "m"),
        cause="truncated",
    )
    assert await leader.retry([retry]) == ["ok"]
    (pending,) = (await stage.view.ledger()).jobs
    assert (pending.crashed, pending.cause) == (("n", "m"), "truncated")
    await assign(leader, item(0, n=2, from_pending=True))
    assert await leader.requeue("n", "fence", "x", "node_lost") is not None
    (moved,) = (await stage.view.ledger()).jobs
    assert (moved.crashed, moved.cause) == (("n", "m"), "node_lost")


def recorded(entry: bytes, *, offset: int = 0, error: str = "connect: refused") -> RetryItem:
    """A failed attempt that goes back to pending and into RQ's failed registry."""
    return RetryItem(
        entry=entry,
        job=job_id(offset),
        not_before_ms=0,
        failures=1,
        excluded=(),
        cause="connect",
        error=error,
    )


@everywhere
async def test_the_record_of_a_failed_attempt_is_in_no_place_wherever_rq_puts_it(stage: Stage) -> None:
    leader, node, entry = await failed_attempt(stage)
    names, record = stage.names, str(job_id(0))
    assert await leader.retry([recorded(entry)], now_iso=NOW_ISO) == ["ok"]
    assert await leader.retry([recorded(entry)], now_iso=NOW_ISO) == ["already"]
    assert await stage.client.zrange(names.failed("n"), 0, -1) == [record.encode()]
    assert await stage.client.hget(names.job(record), "exc_info") == b"connect: refused"
    for key in (names.failed("n"), names.job(record)):
        assert 0 < await stage.client.pttl(key) <= 86_400_000
    cancel = CloseItem(place="job", ref=job_id(0).ref, kind="outcome", id="r0", payload=b"p", job=job_id(0))
    assert await leader.close([cancel]) == ["already"], "its registry is no place"
    await stage.client.rpush(names.queue_key("n"), record)
    assert await leader.close([cancel]) == ["already"], "nor is its queue"
    assert [job.ref for job in (await stage.view.ledger()).jobs] == ["i0_0"]
    claimed = await node.claim("x", 2, 5, now_iso=NOW_ISO)
    assert (claimed.jobs, claimed.foreign) == ((), (record,))
    await stage.client.rpush(names.queue_key("n"), record)
    for mode in ("queued", "fence"):
        assert await leader.requeue("n", mode, "x", "draining") == []
    assert await stage.places() == ["pending"]


@everywhere
async def test_an_attempt_that_failed_for_good_leaves_its_record_too(stage: Stage) -> None:
    leader, _, entry = await failed_attempt(stage)
    job = str(job_id(0))
    for _ in range(2):
        await leader.settle({0: 7}, [(entry, job)], errors={job: "refused: no"}, now_iso=NOW_ISO)
    assert await stage.closing() == []
    assert await stage.client.zrange(stage.names.failed("n"), 0, -1) == [job.encode()]
    fields = await stage.client.hgetall(stage.names.job(job))
    assert (fields[b"exc_info"], fields[b"status"]) == (b"refused: no", b"failed")
    assert b"envelope" not in fields
    assert await stage.view.stored_job(job) is None


@everywhere
async def test_the_newest_records_are_kept_and_no_living_job_is_deleted_with_the_others(stage: Stage) -> None:
    leader, _, entry = await failed_attempt(stage)
    names = stage.names
    await assign(leader, item(1))
    old = [str(job_id(1)), *(str(job_id(offset)) for offset in range(1000, 1200))]
    await stage.client.zadd(names.failed("n"), {job: number for number, job in enumerate(old)})
    for job in old[1:]:
        await stage.client.hset(names.job(job), "data", "record")
    assert await leader.retry([recorded(entry)], now_iso=NOW_ISO) == ["ok"]
    kept = [job.decode() for job in await stage.client.zrange(names.failed("n"), 0, -1)]
    assert kept == [*old[2:], str(job_id(0))]
    assert not await stage.client.exists(names.job(old[1]))
    assert await stage.client.exists(names.job(old[2]))
    assert await stage.view.stored_job(str(job_id(1))) is not None


# close, settle


@everywhere
async def test_an_unread_record_is_closed_once_and_its_offset_is_taken(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    close = dropped(leader, item(3), Ref(Lane.INTERACTIVE, 0, 3))
    assert await leader.close([close]) == ["ok"]
    assert await leader.close([close]) == ["already"]
    assert await assign(leader, item(3)) == ["already"]
    ((_, entry),) = await stage.closing()
    assert (entry[b"kind"], entry[b"payload"], entry[b"job"]) == (b"outcome", b"rejected", b"")
    assert await stage.client.get(item(3).identity) == b"i0_3|aa"
    assert await stage.client.zrange(stage.names.above("i0"), 0, -1) == [b"3"]


@everywhere
async def test_a_bound_record_is_not_closed_as_unread(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0), item(1), marks={"i0": 1})
    for offset in (0, 1):
        close = dropped(leader, item(offset), Ref(Lane.INTERACTIVE, 0, offset))
        assert await leader.close([close]) == ["already"]
    assert await stage.closing() == []


@everywhere
async def test_a_repeated_identity_is_told_and_may_be_coalesced(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0, identity_of="same"))
    ref = Ref(Lane.INTERACTIVE, 0, 1)
    assert await leader.close([dropped(leader, item(1, identity_of="same"), ref)]) == ["dup|i0_0|aa"]
    coalesced = CloseItem(place="log", ref=ref, kind="none", fingerprint="aa")
    assert await leader.close([coalesced]) == ["ok"]
    assert await leader.close([coalesced]) == ["already"]
    assert await stage.closing() == []
    assert await stage.client.zscore(stage.names.above("i0"), "1") == 1
    assert await stage.client.get(item(0, identity_of="same").identity) == b"i0_0|aa"


@everywhere
async def test_a_pending_request_is_closed_once(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0))
    await leader.requeue("n", "fence", "x", "node_lost")
    close = CloseItem(
        place="pending", ref=Ref(Lane.INTERACTIVE, 0, 0), kind="dead", id="r", payload=b"outcome\nletter"
    )
    assert await leader.close([close]) == ["ok"]
    assert await leader.close([close]) == ["already"]
    assert await stage.places() == ["closing"]
    assert (await stage.closing())[0][1][b"kind"] == b"dead"
    assert not await stage.client.exists(stage.names.pending_job("i0_0"))


@everywhere
async def test_a_request_in_a_nodes_hands_is_closed_wherever_it_is_there(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1), item(2))
    await claim(node, limit=1)
    await node.wait_for_work(1)
    closes = [
        CloseItem(
            place="job", ref=Ref(Lane.INTERACTIVE, 0, n), kind="outcome", id="r", payload=b"c", job=job_id(n)
        )
        for n in range(3)
    ]
    assert await leader.close(closes) == ["ok", "ok", "ok"]
    assert await leader.close(closes) == ["already", "already", "already"]
    for offset in range(3):
        assert await stage.places(f"i0_{offset}") == ["closing"]
        assert not await stage.client.exists(stage.names.job(job_id(offset)))
    ((_, told),) = await stage.client.xrange(stage.names.control("n"))
    assert (told[b"kind"], told[b"job"]) == (b"cancel", str(job_id(0)).encode())
    assert await node.complete("x", [ending(job_id(0))]) == ["lost"]
    assert await claim(node, 2) == []
    entries = await node.read_control(b"0-0", block_ms=1)
    assert [entry.text("kind") for entry in entries] == ["cancel"]


@everywhere
async def test_a_lost_request_is_closed_once_however_often_its_leader_asks(stage: Stage) -> None:
    """An answer that did not come is asked for again, and nothing is left that the first call removed."""
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0), item(1), item(2), marks={"i0": 2})
    for offset in range(2):
        await stage.client.delete(stage.names.job(job_id(offset)))
    await stage.client.delete(stage.names.queue_key("n"))
    await stage.client.xadd(
        stage.names.closing,
        {"kind": "outcome", "ref": "i0_1", "job": str(job_id(1)), "payload": b"another's"},
    )
    lost = [
        CloseItem(
            place="lost",
            ref=Ref(Lane.INTERACTIVE, 0, n),
            kind="outcome",
            id="r",
            payload=b"c%d" % n,
            job=job_id(n),
        )
        for n in range(3)
    ]
    for _ in range(3):
        assert await leader.close(lost) == ["ok", "ok", "ok"]
    entries = [entry for _, entry in await stage.closing()]
    assert [(entry[b"ref"], entry[b"payload"]) for entry in entries[1:]] == [
        (b"i0_0", b"c0"),
        (b"i0_1", b"c1"),
        (b"i0_2", b"c2"),
    ], "of each one more, whatever else waits for it"


@everywhere
async def test_a_request_that_is_elsewhere_is_not_closed(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0))
    wrong = [
        CloseItem(place="pending", ref=Ref(Lane.INTERACTIVE, 0, 0), kind="outcome", id="r"),
        CloseItem(
            place="job", ref=Ref(Lane.INTERACTIVE, 0, 0), kind="outcome", id="r", job=job_id(0, node="other")
        ),
        CloseItem(place="job", ref=Ref(Lane.INTERACTIVE, 0, 0), kind="outcome", id="r", job=job_id(0, n=2)),
    ]
    assert await leader.close(wrong) == ["already"] * 3
    assert await stage.places() == ["queue of n"]


@everywhere
async def test_settling_drops_what_is_published_and_notes_how_far(stage: Stage) -> None:
    leader, _, entry = await failed_attempt(stage)
    for _ in range(2):
        await leader.settle({0: 17, 3: 5}, [(entry, str(job_id(0)))])
    assert await stage.closing() == []
    assert not await stage.client.exists(stage.names.job(job_id(0)))
    assert (await stage.view.ledger()).settled == {0: 17, 3: 5}
    await leader.settle({}, [])


@everywhere
async def test_settling_what_redis_has_lost_is_noticed(stage: Stage) -> None:
    leader, _, entry = await failed_attempt(stage)
    await stage.client.delete(stage.names.closing)
    with pytest.raises(GenerationLost, match="REWOUND a published entry is missing"):
        await leader.settle({0: 17}, [(entry, "")])
    assert (await stage.view.ledger()).settled == {}


# admit, begin_generation, remember, adopt


@everywhere
async def test_admitting_enters_a_node_into_our_sets_and_rqs(stage: Stage) -> None:
    leader = await stage.lead()
    for _ in range(2):
        await leader.admit("n")
    client = stage.client
    assert await stage.view.node_names() == ["n"]
    assert await client.smembers("rq:queues") == {b"rq:queue:p--n"}
    assert await client.smembers("rq:workers") == {b"rq:worker:p--n"}
    assert await client.smembers("rq:workers:p--n") == {b"rq:worker:p--n"}
    for _ in range(2):
        await leader.forget("n")
    assert await stage.view.node_names() == []
    assert not await client.exists("rq:queues", "rq:workers", "rq:workers:p--n")


@everywhere
async def test_a_node_that_lives_or_holds_work_is_not_forgotten(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await leader.admit("n")
    assert not await leader.forget("n")
    await assign(leader, item())
    await leader.requeue("n", "fence", "x", "node_lost")
    await stage.client.rpush("rq:queue:p--n", "work")
    assert not await leader.forget("n")
    await stage.client.delete("rq:queue:p--n")
    assert await leader.forget("n")
    assert await leader.forget("n")
    assert await stage.view.node_names() == []


@everywhere
async def test_a_new_generation_leaves_no_place_of_the_old_one(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await leader.begin_generation("g1", {"i0": 0}, {})
    await leader.admit("n")
    await assign(leader, *[item(offset) for offset in range(5)])
    await claim(node, limit=2)
    await node.wait_for_work(1)
    await node.complete("x", [ending(job_id(0))])
    await leader.requeue("n", "expired", "", "lease_expired")
    leader = stage.store_under(leader.lease)
    for _ in range(2):
        await leader.begin_generation("g2", {"i0": 1, "b0": 4}, {"i0": [3, 8], "b0": []})
    ledger = await stage.view.ledger()
    assert (ledger.jobs, ledger.closing_refs, ledger.settled) == ([], [], {})
    assert ledger.marks == {"i0": 1, "b0": 4}
    assert ledger.above == {"i0": [3, 8], "b0": []}
    assert await stage.view.generation() == ("g2", 0)
    assert await stage.client.keys("rq:job:*") == []
    assert await stage.client.get(item(4).identity) == b"i0_4|aa"
    assert await assign(leader, item(3), item(4), item(0)) == ["already", "ok", "already"]
    assert (await stage.view.generation()) == ("g2", 1)


@everywhere
async def test_many_offsets_above_a_mark_survive_a_new_generation(stage: Stage) -> None:
    leader = await stage.lead()
    offsets = list(range(5, 3_505))
    await leader.begin_generation("g", {"i0": 5}, {"i0": offsets})
    assert sorted((await stage.view.ledger()).above["i0"]) == offsets


@everywhere
async def test_identities_are_remembered_unless_known(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await assign(leader, item(0))
    known, new = item(0).identity, item(1).identity
    for _ in range(2):
        await leader.remember({known: "i0_9|zz", new: "i0_1|bb"})
    assert await stage.client.mget(known, new) == [b"i0_0|aa", b"i0_1|bb"]
    assert 0 < await stage.client.pttl(new) <= 600_000


def adopted(offset: int) -> AdoptItem:
    """An attempt that a node still runs."""
    source = item(offset)
    return AdoptItem(
        job=source.job,
        cost_tokens=source.cost_tokens,
        identity=source.identity,
        fingerprint="aa",
        envelope=source.envelope,
        data=source.data,
    )


@everywhere
async def test_an_attempt_that_still_runs_is_adopted_and_completed(stage: Stage) -> None:
    leader = await stage.lead()
    await leader.begin_generation("g", {"i0": 0}, {})
    node = await stage.join()
    await leader.admit("n")
    assert await leader.adopt("n", "x", [adopted(2)], lease_s=10, now_iso=NOW_ISO) == ["ok"]
    assert await stage.places("i0_2") == ["claimed of n"]
    (job,) = (await stage.view.ledger()).jobs
    assert (job.ref, job.claimed, job.envelope) == ("i0_2", True, b"envelope 2")
    assert await assign(leader, item(2)) == ["already"]
    assert await node.extend("x", [str(job_id(2))], now_iso=NOW_ISO) == (0, [])
    assert await leader.requeue("n", "others", "x", "node_lost") == []
    assert await node.complete("x", [ending(job_id(2))]) == ["ok"]
    assert await stage.places("i0_2") == ["closing"]


@everywhere
async def test_what_is_taken_otherwise_or_gone_is_not_adopted(stage: Stage) -> None:
    leader = await stage.lead()
    await leader.begin_generation("g", {"i0": 2}, {"i0": [4]})
    await stage.join()
    items = [adopted(1), adopted(4), adopted(5)]
    assert await leader.adopt("n", "x", items, lease_s=10, now_iso=NOW_ISO) == ["already", "already", "ok"]
    assert await leader.adopt("n", "x", items[2:], lease_s=10, now_iso=NOW_ISO) == ["ok"]
    assert await leader.adopt("n", "y", [adopted(6)], lease_s=10, now_iso=NOW_ISO) == ["gone"]
    await leader.requeue("n", "fence", "x", "node_lost")
    assert await leader.adopt("n", "x", [adopted(6)], lease_s=10, now_iso=NOW_ISO) == ["gone"]
    assert await stage.places("i0_6") == []


# explain


@everywhere
async def test_explanations_of_a_request_are_kept_in_order_and_once(stage: Stage) -> None:
    leader = await stage.lead()
    await leader.explain([("t", "r", b"{1}"), ("", "r", b"{other tenant}"), ("t", "r", b"{2}")])
    await leader.explain([("t", "r", b"{2}"), ("t", "r", b"{3}")])
    assert await stage.view.explanations("t", "r") == [b"{1}", b"{2}", b"{3}"]
    assert await stage.view.explanations("", "r") == [b"{other tenant}"]
    assert await stage.view.explanations("u", "r") == []


@everywhere
async def test_the_newest_explanations_of_a_request_are_kept(stage: Stage) -> None:
    leader = await stage.lead()
    for number in range(3 * EXPLAINED_EACH):
        await leader.explain([("", "r", f"{{{number}}}".encode())])
    kept = await stage.view.explanations("", "r")
    assert kept == [f"{{{number}}}".encode() for number in range(2 * EXPLAINED_EACH, 3 * EXPLAINED_EACH)]


@everywhere
async def test_explanations_are_bounded_in_number_and_expire(stage: Stage) -> None:
    leader = await stage.lead()
    ids = [f"r{number}" for number in range(EXPLAINED_REQUESTS + 200)]
    for start in range(0, len(ids), 100):
        await leader.explain([("", id, b"{}") for id in ids[start : start + 100]])
    client, names = stage.client, stage.names
    assert await client.hlen(names.explanations) == await client.zcard(names.explained) == EXPLAINED_REQUESTS
    assert await stage.view.explanations("", ids[-1]) == [b"{}"]
    for key in (names.explanations, names.explained):
        assert 0 < await client.pttl(key) <= EXPLAINED_MS
    # Those that are old go with the next that is written, however few there are.
    await client.zadd(names.explained, {names.digest("", ids[-1]): 1})
    await leader.explain([("", "new", b"{}")])
    assert await stage.view.explanations("", ids[-1]) == []
    assert await stage.view.explanations("", "new") == [b"{}"]


@everywhere
async def test_at_maxmemory_nothing_is_explained(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.fill(True)
    with pytest.raises(StoreFull):
        await leader.explain([("", "r", b"{}")])
    await stage.fill(False)
    assert await stage.view.explanations("", "r") == []


@everywhere
async def test_explaining_counts_as_no_move(stage: Stage) -> None:
    leader = await stage.lead()
    await leader.begin_generation("g", {"i0": 0}, {})
    before = await stage.view.generation()
    await leader.explain([("", "r", b"{}")])
    assert await stage.view.generation() == before


# maxmemory


@everywhere
async def test_at_maxmemory_nothing_new_is_bound_but_work_ends(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join(lease_s=0)
    await assign(leader, *[item(offset) for offset in range(4)])
    await claim(node, limit=2)
    await stage.fill(True)
    with pytest.raises(StoreFull, match="raise maxmemory or wait for work to end"):
        await assign(leader, item(4))
    assert await stage.places("i0_4") == []
    assert await node.complete("x", [ending(job_id(0)), ending(job_id(1), "failed")]) == ["ok", "ok"]
    assert ids(await claim(node, 2, limit=1)) == [str(job_id(2))]
    assert await node.extend("x", [str(job_id(2))], now_iso=NOW_ISO) == (1, [])
    await node.report(NodeReport(node="n", incarnation="x", sequence=1))
    failed = (await stage.closing())[1][0]
    retry = RetryItem(entry=failed, job=job_id(1), not_before_ms=0, failures=1, excluded=(), cause="connect")
    assert await leader.retry([retry]) == ["ok"]
    assert await leader.close([dropped(leader, item(5), Ref(Lane.INTERACTIVE, 0, 5))]) == ["ok"]
    moved = await leader.requeue("n", "fence", "x", "node_lost")
    assert moved is not None
    assert len(moved) == 2
    await leader.settle({0: 1}, [(entry, "") for entry, _ in await stage.closing()])
    await stage.lock().renew(leader.lease)
    await stage.fill(False)
    assert await assign(leader, item(4, incarnation="x")) == ["gone"]


# A whole life, and what it leaves behind


def declared_lifetimes() -> list[tuple[re.Pattern[str], str]]:
    """(pattern of the key, how long it lives) for each row of the table in `Names`."""
    rows = re.findall(
        r"^\s*\| (?!name|---)(.+?)\s*\| \w+\s*\| (.+?)\s*\|.*$", Names.__doc__ or "", re.MULTILINE
    )
    found = []
    for keys, lives in rows:
        for key in keys.split(", "):
            pattern = re.escape(key.strip())
            pattern = re.sub(
                r"<(?:digest|ref|lane|partition|job id|n|q)>", "[A-Za-z0-9_-]+", pattern.replace("\\ ", " ")
            )
            prefix = "" if key.strip().startswith("rq:") else "flexlb:p:"
            found.append((re.compile(prefix + pattern + r"\Z"), lives))
    return found


async def check_nothing_leaks(stage: Stage) -> None:
    """Every key has an expiry, or is declared to stay; places are empty.

    A stream whose entries are all gone stays as an empty key.
    """
    lifetimes = declared_lifetimes()
    for raw in await stage.client.keys("*"):
        key = raw.decode()
        declared = [lives for pattern, lives in lifetimes if pattern.match(key)]
        assert len(declared) == 1, f"{key}: expected one row in the table of Names, seen {declared}"
        if await stage.client.pttl(raw) > 0:
            assert declared[0] != "permanent", f"{key} is declared permanent and yet expires"
        elif not declared[0].startswith(("permanent", "capped")):
            assert key == stage.names.closing, f"{key} has no expiry and is declared to live {declared[0]}"
            assert await stage.client.xlen(raw) == 0


def test_the_table_of_names_is_read_whole() -> None:
    lifetimes = declared_lifetimes()
    assert len(lifetimes) >= 27
    for key, lives in (
        ("flexlb:p:epoch", "permanent"),
        ("flexlb:p:above:i3", "until the mark passes"),
        ("flexlb:p:node:gpu-17:load", "heartbeat TTL"),
        ("flexlb:p:pending:i3_1024", "while in this place"),
        ("rq:queue:p--n:intermediate", "while queued"),
        ("rq:workers:p--n", "permanent"),
    ):
        assert [found for pattern, found in lifetimes if pattern.match(key)] == [lives]


@everywhere
async def test_a_whole_life_leaves_nothing_behind(stage: Stage) -> None:
    leader = await stage.lead()
    await leader.begin_generation("g", {"i0": 0}, {})
    node = await stage.join(lease_s=0)
    other = await stage.join("other", "y")
    for name in ("n", "other"):
        await leader.admit(name)
    await assign(leader, *[item(offset) for offset in range(6)], marks={"i0": 0})
    await leader.close([dropped(leader, item(6), Ref(Lane.INTERACTIVE, 0, 6))])
    await node.wait_for_work(1)
    await claim(node, limit=3)
    await node.report(NodeReport(node="n", incarnation="x", sequence=1))
    await node.extend("x", [str(job_id(0))], now_iso=NOW_ISO)
    await node.complete("x", [ending(job_id(0)), ending(job_id(1), "failed"), ending(job_id(2), "released")])
    entries = {entry[b"ref"]: id for id, entry in await stage.closing()}
    retry = RetryItem(
        entry=entries[b"i0_1"], job=job_id(1), not_before_ms=0, failures=1, excluded=("n",), cause="connect"
    )
    assert await leader.retry([retry]) == ["ok"]
    await leader.settle({0: 1}, [(entries[b"i0_0"], ""), (entries[b"i0_2"], str(job_id(2)))])
    job = CloseItem(place="job", ref=Ref(Lane.INTERACTIVE, 0, 3), kind="outcome", id="r", job=job_id(3))
    assert await leader.close([job]) == ["ok"]
    await claim(node, 2, limit=1)
    await leader.requeue("n", "expired", "", "lease_expired")
    await leader.requeue("n", "fence", "x", "node_lost")
    pending = [job.ref for job in (await stage.view.ledger()).jobs]
    assert sorted(pending) == ["i0_1", "i0_4", "i0_5"]
    again = [
        item(Ref.parse(ref).offset, node="other", incarnation="y", n=2, from_pending=True)
        for ref in pending[1:]
    ]
    assert await assign(leader, *again, marks={"i0": 7}) == ["ok", "ok"]
    held = ids(await claim(other, incarnation="y"))
    assert await other.complete("y", [ending(job) for job in held]) == ["ok", "ok"]
    closed = CloseItem(place="pending", ref=Ref.parse(pending[0]), kind="outcome", id="r")
    assert await leader.close([closed]) == ["ok"]
    await leader.settle({0: 9}, [(entry, "") for entry, _ in await stage.closing()])
    await leader.forget("n")
    ledger = await stage.view.ledger()
    assert (ledger.jobs, ledger.closing_refs, ledger.marks, ledger.above) == ([], [], {"i0": 7}, {"i0": []})
    await check_nothing_leaks(stage)


# Prefill and decode stages


def handed(entry: bytes, payload: bytes, *, offset: int = 0, n: int = 1) -> RetryItem:
    """A prefill stage that did its part."""
    return RetryItem(
        entry=entry,
        job=job_id(offset, n=n),
        not_before_ms=0,
        failures=0,
        excluded=(),
        cause="handoff",
        handoff=payload,
    )


async def hand_over(stage: Stage, leader: LeaderStore, node: NodeStore) -> None:
    """Bring the request at offset 0 from its prefill stage to `pending`, with something to go on from."""
    await assign(leader, replace(item(), stage=WorkStage.PREFILL))
    (taken,) = await claim(node)
    assert (taken.stage, taken.handoff) == ("prefill", b"")
    assert await node.complete("x", [ending(job_id(), "handoff")]) == ["ok"]
    (entry,), _ = await stage.view.read_closing(b"0-0", block_ms=1, count=10)
    assert (entry.text("kind"), entry.text("job")) == ("handoff", str(job_id()))
    assert await leader.retry([handed(entry.id, b"blocks")]) == ["ok"]
    assert await leader.retry([handed(entry.id, b"blocks")]) == ["already"]


@everywhere
async def test_what_a_prefill_stage_hands_over_is_claimed_with_the_decode_stage(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await hand_over(stage, leader, node)
    (pending,) = (await stage.view.ledger()).jobs
    assert (pending.handoff, pending.cause, pending.failures) == (b"blocks", "handoff", 0)
    assert not await stage.client.keys("rq:failed:*")
    decode = replace(item(n=2, from_pending=True), stage=WorkStage.DECODE)
    assert await assign(leader, decode) == ["ok"]
    (taken,) = await claim(node, 2)
    assert (taken.job, taken.stage, taken.handoff) == (str(job_id(n=2)), "decode", b"blocks")


@everywhere
async def test_another_stage_than_decode_forgets_what_was_handed_over(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await hand_over(stage, leader, node)
    await assign(leader, item(n=2, from_pending=True))
    (taken,) = await claim(node, 2)
    assert (taken.stage, taken.handoff) == ("", b"")


@everywhere
async def test_a_failed_decode_stage_forgets_what_was_handed_over(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await hand_over(stage, leader, node)
    await assign(leader, replace(item(n=2, from_pending=True), stage=WorkStage.DECODE))
    await claim(node, 2)
    await node.complete("x", [ending(job_id(n=2), "failed")])
    (entry,), _ = await stage.view.read_closing(b"0-0", block_ms=1, count=10)
    again = replace(handed(entry.id, b"", n=2), cause="transfer", attempt=b"{}")
    assert await leader.retry([again]) == ["ok"]
    (pending,) = (await stage.view.ledger()).jobs
    assert (pending.handoff, pending.cause) == (b"", "transfer")


async def left_by_a_lost_decode_node(stage: Stage, *, has_begun: bool) -> bytes:
    """What is still handed over once the decode node is fenced."""
    leader = await stage.lead()
    node = await stage.join()
    await hand_over(stage, leader, node)
    await assign(leader, replace(item(n=2, from_pending=True), stage=WorkStage.DECODE))
    if has_begun:
        await claim(node, 2)
    assert await leader.requeue("n", "fence", "x", "node_lost") == [Ref(Lane.INTERACTIVE, 0, 0)]
    (pending,) = (await stage.view.ledger()).jobs
    return pending.handoff


@everywhere
async def test_a_decode_stage_that_had_not_begun_leaves_the_hand_off_to_the_next(stage: Stage) -> None:
    assert await left_by_a_lost_decode_node(stage, has_begun=False) == b"blocks"


@everywhere
async def test_a_decode_stage_that_had_begun_may_have_taken_the_blocks(stage: Stage) -> None:
    assert await left_by_a_lost_decode_node(stage, has_begun=True) == b""
