"""Jobs in Redis that a leader can't read, in each of their places: their requests run again.

The script on a real Valkey and on the simulated one, then a whole pool that changes leaders.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.leader_store import CloseItem, LeaderStore, MendItem
from dispatcher.backends.store_view import Placed
from dispatcher.errors import Deposed
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.names import Attempt, JobId, Lane, Ref
from dispatcher.protocol.outcome import FailedAttempt, FailureCause, OutcomeKind, Reason
from tests.contract.test_agent import HeldEngine, running_agent
from tests.contract.test_answered_entries import claimed_by, finished_mark
from tests.contract.test_scripts import (
    LATER_ISO,
    Stage,
    assign,
    claim,
    ending,
    everywhere,
    item,
    job_id,
    shared_valkey,
)
from tests.support.pool import CLOCK, Pool, ScriptedNode, request
from tests.support.wait import wait_until

__all__ = ["shared_valkey"]


async def mend(leader: LeaderStore, *jobs: JobId | Ref) -> list[str]:
    """Write jobs anew, each by where it is."""
    items = [
        MendItem(
            ref=one.ref if isinstance(one, JobId) else one,
            job=one if isinstance(one, JobId) else None,
            envelope=b"new envelope",
            data=b"new data",
        )
        for one in jobs
    ]
    return await leader.mend(items, now_iso=LATER_ISO)


async def in_queue(stage: Stage, leader: LeaderStore) -> JobId:
    """A request that waits at its node."""
    await stage.join()
    await assign(leader, item(0))
    return job_id()


async def in_delivery(stage: Stage, leader: LeaderStore) -> JobId:
    """A request that its agent has heard of."""
    await in_queue(stage, leader)
    await stage.client.lmove(stage.names.queue_key("n"), stage.names.intermediate("n"), "LEFT", "RIGHT")
    return job_id()


async def in_hand(stage: Stage, leader: LeaderStore) -> JobId:
    """A request that its agent runs."""
    node = await stage.join()
    await assign(leader, item(0))
    assert len(await claim(node)) == 1
    return job_id()


Put = Callable[[Stage, LeaderStore], Awaitable[JobId]]
AT_A_NODE: tuple[Put, ...] = (in_queue, in_delivery, in_hand)


@everywhere
async def test_a_job_at_a_node_moves_to_pending_written_anew(stage: Stage) -> None:
    for put in AT_A_NODE:
        for damage in ("nothing", "fields", "type", "gone"):
            await stage.client.flushdb()
            leader = await stage.lead()
            job = await put(stage, leader)
            key = stage.names.job(job)
            if damage == "fields":
                await stage.client.hset(
                    key, mapping={"failures": "many", "excluded": "a\nb", "envelope": "?"}
                )
            elif damage != "nothing":
                await stage.client.delete(key)
            if damage == "type":
                await stage.client.set(key, "none of ours")
            for _ in range(2):  # a repeated call changes nothing
                assert await mend(leader, job) == ["ok"]
                assert await stage.places() == ["pending"]
                assert not await stage.client.exists(key)
                (stored,) = (await stage.view.ledger()).jobs
                assert (stored.ref, stored.envelope) == ("i0_0", b"new envelope")
                assert (stored.failures, stored.excluded, stored.crashed) == (0, (), ())
                assert await stage.client.hget(stage.names.pending_job("i0_0"), "data") == b"new data"
                assert await stage.client.pttl(stage.names.pending_job("i0_0")) == -1
            assert not await stage.client.exists(stage.names.wip("n"))
            assert await assign(leader, item(0, n=2, from_pending=True)) == ["ok"]
            assert await stage.places() == ["queue of n"]


@everywhere
async def test_the_agent_of_a_mended_job_is_told_to_abort_and_cannot_answer(stage: Stage) -> None:
    leader = await stage.lead()
    job = await in_hand(stage, leader)
    await mend(leader, job)
    await mend(leader, job)
    told = [fields for _, fields in await stage.client.xrange(stage.names.control("n"))]
    assert [(fields[b"kind"], fields[b"job"]) for fields in told] == [(b"cancel", str(job).encode())]
    assert await stage.node_store().complete("x", [ending(job)]) == ["lost"]
    assert await stage.places() == ["pending"]


@everywhere
async def test_mending_keeps_what_can_be_read_of_the_past_and_when_to_try_again(stage: Stage) -> None:
    leader = await stage.lead()
    await in_hand(stage, leader)
    past = {"failures": "2", "excluded": "n,other", "crashed": "n", "attempts": "{}", "checkpoint": "here"}
    await stage.client.hset(stage.names.job(job_id()), mapping=past)
    await leader.requeue("n", "others", "y", "node_lost")
    await stage.client.zadd(stage.names.pending, {"i0_0": 9_000_000_000_000})
    await stage.client.hset(stage.names.pending_job("i0_0"), "envelope", "?")
    assert await mend(leader, Ref.parse("i0_0")) == ["ok"]
    (stored,) = (await stage.view.ledger()).jobs
    assert (stored.failures, stored.excluded, stored.crashed) == (2, ("n", "other"), ("n",))
    assert stored.not_before_ms == 9_000_000_000_000
    kept = await stage.client.hmget(stage.names.pending_job("i0_0"), "attempts", "checkpoint", "envelope")
    assert kept[1:] == [b"here", b"new envelope"]
    assert kept[0].startswith(b"{}\n")


@everywhere
async def test_what_ended_or_moved_meanwhile_is_not_mended(stage: Stage) -> None:
    leader = await stage.lead()
    job = await in_hand(stage, leader)
    assert await stage.node_store().complete("x", [ending(job)]) == ["ok"]
    assert await mend(leader, job, Ref.parse("i0_7")) == ["gone", "gone"]
    assert await stage.places() == ["closing"]
    assert not await stage.client.exists(stage.names.pending_job("i0_0"), stage.names.pending_job("i0_7"))


@everywhere
async def test_a_deposed_leader_mends_nothing(stage: Stage) -> None:
    leader = await stage.lead()
    job = await in_queue(stage, leader)
    await stage.lead("two", depose=leader.lease.token)
    before = await stage.snapshot()
    with pytest.raises(Deposed):
        await mend(leader, job)
    assert await stage.snapshot() == before


@everywhere
async def test_a_ledger_names_what_it_cannot_read_in_every_place(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await leader.admit("n")
    await assign(leader, *(item(offset) for offset in range(5)))
    await claim(node, limit=1)
    assert await leader.requeue("n", "expired", "", "lease_expired") == []
    await stage.client.lmove(stage.names.queue_key("n"), stage.names.intermediate("n"), "LEFT", "RIGHT")
    await stage.client.lrem(stage.names.queue_key("n"), 1, str(job_id(4)))
    await stage.client.rename(stage.names.job(job_id(4)), stage.names.pending_job("i0_4"))
    await stage.client.zadd(stage.names.pending, {"i0_4": 1, "no ref": 1})
    await stage.client.rpush(stage.names.queue_key("n"), "p--n--nonsense")
    await stage.client.delete(stage.names.job(job_id(0)))
    await stage.client.hdel(stage.names.job(job_id(1)), "ref")
    await stage.client.hset(stage.names.job(job_id(2)), "failures", "many")
    await stage.client.hset(stage.names.pending_job("i0_4"), "ref", "i0_9")
    ledger = await stage.view.ledger()
    assert [job.ref for job in ledger.jobs] == ["i0_3"]
    expected = [Placed(ref=job_id(n).ref, job=job_id(n)) for n in (0, 1, 2)]
    assert sorted(ledger.unreadable, key=lambda one: one.ref) == [
        *expected,
        Placed(ref=Ref.parse("i0_4"), job=None),
    ]


@everywhere
async def test_what_an_agent_held_is_pending_after_its_fence_whatever_became_of_its_job(stage: Stage) -> None:
    for damage in ("gone", "type", "fields"):
        await stage.client.flushdb()
        leader = await stage.lead()
        job = await in_hand(stage, leader)
        await stage.client.delete(stage.names.job(job))
        if damage == "type":
            await stage.client.set(stage.names.job(job), "none of ours")
        elif damage == "fields":
            await stage.client.hset(stage.names.job(job), "data", "?")
        assert await leader.requeue("n", "fence", "x", "node_lost") == [job.ref]
        assert await stage.places() == ["pending"]
        assert await mend(leader, job.ref) == ["ok"]


# Whole pools

DAMAGES: dict[str, Callable[[Pool, str], Awaitable[object]]] = {
    "garbage": lambda one, key: one.redis.hset(key, "envelope", b"\xff none of ours"),
    "later release": lambda one, key: one.redis.hset(key, "envelope", b'{"v":99,"ref":7}'),
    "fields": lambda one, key: one.redis.hset(key, mapping={"failures": "many", "seq": "?"}),
    "gone": lambda one, key: one.redis.delete(key),
}
PLACES = ("queue", "claimed", "pending")


async def placed(one: Pool, node: ScriptedNode, place: str, **fields: object) -> tuple[str, str]:
    """Bring a request into a place, with no leader left; the key of its job, and its id there."""
    node.holds = True
    async with one.running(one.dispatcher()):
        if place != "queue":
            await one.append_many([json.dumps(request("r1", **fields)).encode()])
            (job,) = await claimed_by(node, 1)
            if place == "claimed":
                return one.names.job(job.job), job.job
            failure = node.failed(job, FailureCause.ENGINE_ERROR)
            await one.redis.hset(one.names.cordons, node.name, "cordon")
            await one.redis.xadd(one.names.reports, {"kind": "cordon", "body": ""})
            await node.store.complete(node.incarnation, [failure])

            async def is_pending() -> bool:
                return bool(await one.redis.zcard(one.names.pending))

            await wait_until(is_pending, "it to be pending")
            return one.names.pending_job("i0_0"), "i0_0"
        node.hears.clear()
        await one.append_many([json.dumps(request("r1", **fields)).encode()])

        async def queued() -> list[bytes]:
            lists = (one.names.queue_key(node.name), one.names.intermediate(node.name))
            return [id for key in lists for id in await one.redis.lrange(key, 0, -1)]

        async def is_queued() -> bool:
            return len(await queued()) == 1

        await wait_until(is_queued, "it to be queued")
        (id,) = await queued()
        return one.names.job(id.decode()), id.decode()


async def obey(one: Pool, node: ScriptedNode, place: str) -> None:
    """Let the node take and answer again."""
    node.holds = False
    node.hears.set()
    await node.finish()  # what it took before
    if place == "pending":
        await one.redis.hdel(one.names.cordons, node.name)
        await one.redis.xadd(one.names.reports, {"kind": "cordon", "body": ""})


@pytest.mark.kafka
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", PLACES)
async def test_a_new_leader_runs_again_what_it_cannot_read(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, place: str, damage: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        key, id = await placed(one, node, place, tenant="acme")
        await DAMAGES[damage](one, key)
        async with one.running(one.dispatcher()) as second:
            mended = second.metrics.mended.labels("run_again")
            await wait_until(lambda: mended._value.get() == 1, "it to be mended")
            await obey(one, node, place)
            assert (await one.outcome("r1", "acme")).kind is OutcomeKind.COMPLETED
            await wait_until(
                lambda: second.state is not None and second.state.progress["i0"].finished == 1,
                "it to be finished",
            )
            assert mended._value.get() == 1
            assert len(one.of("r1", "acme")) == 1
            assert one.dead == []
            work = node.works[-1]
            assert (work.id, work.tenant, work.ref) == ("r1", "acme", "i0_0")
            if place == "claimed":
                _, lost = await node.store.extend(node.incarnation, [id], now_iso=CLOCK.now_iso())
                assert lost == [id]
        assert await finished_mark(one) == 1
        assert not await one.redis.keys(f"{one.names.prefix}pending*")


@pytest.mark.kafka
async def test_a_cancel_that_came_first_ends_a_request_whose_job_is_mended(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        key, _ = await placed(one, node, "pending")
        await DAMAGES["garbage"](one, key)
        await one.cancel("r1")
        async with one.running(one.dispatcher()):  # the node stays cordoned
            assert (await one.outcome("r1")).kind is OutcomeKind.CANCELLED


@pytest.mark.kafka
@pytest.mark.parametrize("place", PLACES)
async def test_a_request_that_this_release_refuses_ends_with_its_record_in_the_dead_letters(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, place: str
) -> None:
    """As after a step back to an older release; here its limits are what has become less."""
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        key, _ = await placed(one, node, place)
        await DAMAGES["later release"](one, key)
        one.settings = one.settings.model_copy(update={"max_record_bytes": 20})
        async with one.running(one.dispatcher()) as second:
            ended = await one.outcome("r1")
            assert (ended.kind, ended.reason) == (OutcomeKind.REJECTED, Reason.TOO_LARGE)
            await wait_until(lambda: len(one.dead) == 1, "its dead letter")
            assert (one.dead[0].id, one.dead[0].ref) == ("r1", "i0_0")
            await wait_until(
                lambda: second.state is not None and second.state.progress["i0"].finished == 1,
                "it to be finished",
            )
            assert len(one.of("r1")) == 1
        assert not await one.redis.keys(f"{one.names.prefix}pending*")


@pytest.mark.kafka
async def test_what_has_neither_job_nor_record_is_a_dead_letter_and_holds_up_nothing(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        key, _ = await placed(one, node, "claimed")
        await DAMAGES["gone"](one, key)
        admin = kafka_clients.admin()
        await admin.start()
        topic = TopicPartition(one.names.requests(Lane.INTERACTIVE), 0)
        await admin.delete_records({topic: RecordsToDelete(1)})
        await admin.close()
        await one.redis.hset(one.names.marks, "i0", 0)
        await obey(one, node, "claimed")
        async with one.running(one.dispatcher()) as second:
            await wait_until(lambda: second.state is not None and "i0" in second.state.progress, "it to lead")
            await one.append_many([json.dumps(request("r2")).encode()])
            assert (await one.outcome("r2")).kind is OutcomeKind.COMPLETED
            assert second.state is not None
            await wait_until(lambda: second.state.progress["i0"].finished == 2, "both to be finished")
        assert one.of("r1") == []


@pytest.mark.kafka
async def test_a_running_leader_mends_what_it_finds_in_pending(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    """As after a move whose answer was lost: the leader takes the request for bound, and finds it pending."""
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        node.holds = True
        async with one.running(one.dispatcher()) as leader:
            await one.append(request("r1"))
            (job,) = await claimed_by(node, 1)
            ref = str(JobId.parse(job.job).ref)
            moved = one.redis.pipeline(transaction=True)
            moved.zrem(one.names.claimed("n1"), job.job)
            moved.zrem(one.names.wip("n1"), f"{job.job}:flexlb")
            moved.hset(one.names.job(job.job), "envelope", "none of ours")
            moved.rename(one.names.job(job.job), one.names.pending_job(ref))
            moved.zadd(one.names.pending, {ref: 1})
            await moved.execute()
            node.holds = False
            await node.finish()
            assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED
            assert leader.metrics.mended.labels("run_again")._value.get() == 1
            assert leader.metrics.elections._value.get() == 1


@pytest.mark.kafka
async def test_a_requeued_record_of_a_failed_attempt_is_not_taken_for_a_lost_job(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    """RQ's `requeue` puts its id into the queue, which is no place of its request: that is pending."""
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        _, _ = await placed(one, node, "pending")
        (record,) = await one.redis.zrange(one.names.failed("n1"), 0, -1)
        node.hears.clear()
        await one.redis.rpush(one.names.queue_key("n1"), record)
        await obey(one, node, "pending")
        async with one.running(one.dispatcher()) as second:
            assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED
            assert second.metrics.mended.labels("run_again")._value.get() == 0
            assert len(one.of("r1")) == 1


# Under a leader that goes on


def patient(clients: KafkaClients, valkey: ValkeyServer, pool: str) -> Pool:
    """A pool whose leader goes on, also where this machine stands still for a while."""
    return Pool(clients, valkey.url, pool, leader_ttl_s=20.0)


@everywhere
async def test_a_queued_job_that_is_gone_goes_to_the_leader_when_it_is_claimed(stage: Stage) -> None:
    for damage in ("gone", "type", "no request"):
        await stage.client.flushdb()
        leader = await stage.lead()
        node = await stage.join()
        await assign(leader, item(0), item(1))
        key = stage.names.job(job_id(0))
        if damage == "no request":
            await stage.client.hdel(key, "envelope")
        else:
            await stage.client.delete(key)
        if damage == "type":
            await stage.client.set(key, "none of ours")
        for _ in range(2):  # a repeated claim changes nothing
            answer = await node.claim("x", 1, 10, now_iso=LATER_ISO)
            assert ([one.job for one in answer.jobs], answer.foreign) == ([str(job_id(1))], ())
            assert await stage.places() == ["closing"]
        ((_, told),) = await stage.closing()
        assert (told[b"kind"], told[b"id"], told[b"job"]) == (b"released", b"", str(job_id(0)).encode())
        assert codec.failed_attempts.decode(told[b"payload"]) == FailedAttempt(
            attempt="5_1",
            node="n",
            cause=FailureCause.LEASE_EXPIRED,
            message="its job was gone when it was to be claimed",
        )
        assert not await stage.client.exists(key)
        assert await stage.client.zrange(stage.names.claimed("n"), 0, -1) == [str(job_id(1)).encode()]
        close = CloseItem(place="lost", ref=job_id(0).ref, kind="outcome", id="r", job=job_id(0))
        assert await leader.close([close]) == ["already"], "its leader is to read it first"


@everywhere
async def test_a_queued_job_that_is_gone_goes_to_the_leader_when_its_node_is_emptied(stage: Stage) -> None:
    for mode in ("queued", "fence"):
        await stage.client.flushdb()
        leader = await stage.lead()
        await stage.join()
        await assign(leader, item(0), item(1))
        await stage.client.delete(stage.names.job(job_id(0)))
        record = job_id(7)
        await stage.client.hset(stage.names.job(record), mapping={"data": "mine", "exc_info": "no"})
        await stage.client.rpush(stage.names.queue_key("n"), str(record))
        assert await leader.requeue("n", mode, "x", "draining") == [Ref.parse("i0_1")]
        assert await stage.places() == ["closing"]
        assert await stage.places("i0_7") == [], "the record of a failed attempt is no request"
        ((_, told),) = await stage.closing()
        assert codec.failed_attempts.decode(told[b"payload"]).cause is FailureCause.DRAINING


@everywhere
async def test_an_agent_keeps_and_ends_what_it_holds_whatever_its_job_became(stage: Stage) -> None:
    for damage in ("gone", "type"):
        await stage.client.flushdb()
        leader = await stage.lead()
        node = await stage.join()
        await assign(leader, item(0), item(1))
        await claim(node)
        for offset in (0, 1):
            await stage.client.delete(stage.names.job(job_id(offset)))
            if damage == "type":
                await stage.client.set(stage.names.job(job_id(offset)), "none of ours")
        held = [str(job_id(0)), str(job_id(1))]
        _, lost = await node.extend("x", held, now_iso=LATER_ISO, checkpoints={held[0]: b"here"})
        assert lost == []
        assert await node.complete("x", [ending(job_id(0)), ending(job_id(1), "failed")]) == ["ok", "ok"]
        assert [await stage.places(f"i0_{n}") for n in (0, 1)] == [["closing"], ["closing"]]


@everywhere
async def test_numbers_of_a_job_that_are_none_cost_it_nothing(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0))
    await stage.client.hset(stage.names.job(job_id()), mapping={"failures": "many", "seq": "", "hit": "-"})
    (claimed,) = await claim(node)
    assert (claimed.failures, claimed.seq, claimed.hit_tokens) == (0, 0, 0)
    assert claimed.envelope != b""


Spoil = Callable[[Pool, str], Awaitable[object]]
SPOILT: dict[str, Spoil] = {
    **{name: DAMAGES[name] for name in ("garbage", "later release", "gone")},
    "garbage for data": lambda one, key: one.redis.hset(key, "data", "?"),
    "no request": lambda one, key: one.redis.hdel(key, "envelope"),
}


@pytest.mark.kafka
@pytest.mark.parametrize("damage", SPOILT)
async def test_a_running_leader_mends_what_an_agent_finds_in_its_queue(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, damage: str
) -> None:
    engine = HeldEngine()
    engine.go_on.set()
    async with patient(kafka_clients, valkey, pool) as one, one.running(one.dispatcher()) as leader:
        async with one.running(ScriptedNode(one, "n1")) as node:
            node.hears.clear()
            await one.append_many([json.dumps(request("r1", tenant="acme")).encode()])
            key = one.names.queue_key("n1")

            async def queued() -> list[bytes]:
                return [
                    id for list in (key, f"{key}:intermediate") for id in await one.redis.lrange(list, 0, -1)
                ]

            async def is_queued() -> bool:
                return len(await queued()) == 1

            await wait_until(is_queued, "it to be queued")
            ((id,)) = await queued()
            await SPOILT[damage](one, one.names.job(id.decode()))
        async with running_agent(one, engine):
            assert (await one.outcome("r1", "acme")).kind is OutcomeKind.COMPLETED
            await wait_until(
                lambda: leader.state is not None and leader.state.progress["i0"].finished == 1,
                "it to be finished",
            )
        assert leader.metrics.mended.labels("run_again")._value.get() == 1
        assert leader.metrics.elections._value.get() == 1
        assert (len(one.of("r1", "acme")), one.dead, engine.started) == (1, [], ["r1"])
        assert not await one.redis.keys(f"{one.names.prefix}pending*")


@pytest.mark.kafka
async def test_a_running_leader_mends_what_failed_and_what_waits_without_its_job(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with patient(kafka_clients, valkey, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        node.holds = True
        async with one.running(one.dispatcher()) as leader:
            mended = leader.metrics.mended.labels("run_again")
            await one.append(request("r1"))
            (job,) = await claimed_by(node, 1)
            ref = str(JobId.parse(job.job).ref)
            await one.redis.delete(one.names.job(job.job))
            node.claimed.clear()
            failure = node.failed(job, FailureCause.ENGINE_ERROR)
            assert await node.store.complete(node.incarnation, [failure]) == ["ok"]
            (again,) = await claimed_by(node, 1)
            assert (mended._value.get(), again.failures) == (1, 1)

            await one.redis.hset(one.names.cordons, "n1", "cordon")
            await one.redis.xadd(one.names.reports, {"kind": "cordon", "body": ""})
            node.claimed.clear()
            failure = node.failed(again, FailureCause.ENGINE_ERROR)
            assert await node.store.complete(node.incarnation, [failure]) == ["ok"]

            async def is_pending() -> bool:
                return bool(await one.redis.exists(one.names.pending_job(ref)))

            await wait_until(is_pending, "it to be pending")
            await one.redis.delete(one.names.pending_job(ref))
            node.holds = False
            await one.redis.hdel(one.names.cordons, "n1")
            await one.redis.xadd(one.names.reports, {"kind": "cordon", "body": ""})
            assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED
            assert mended._value.get() == 2
            assert leader.metrics.elections._value.get() == 1


@pytest.mark.kafka
async def test_a_new_leader_mends_what_an_agent_gave_back_without_its_job(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    """Nobody leads when the agent finds it: what it says waits in `closing`."""
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        key, _ = await placed(one, node, "queue")
        await one.redis.delete(key)
        await obey(one, node, "queue")

        async def is_given_back() -> bool:
            return bool(await one.redis.xlen(one.names.closing))

        await wait_until(is_given_back, "the agent to give it back")
        async with one.running(one.dispatcher()) as second:
            assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED
            assert second.metrics.mended.labels("run_again")._value.get() == 1
            assert len(one.of("r1")) == 1


@pytest.mark.kafka
async def test_an_id_without_a_job_that_is_no_attempt_of_its_request_changes_nothing(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with patient(kafka_clients, valkey, pool) as one, one.running(ScriptedNode(one, "n1")) as node:
        node.holds = True
        async with one.running(one.dispatcher()) as leader:
            await one.append(request("r1"))
            (job,) = await claimed_by(node, 1)
            other = JobId.parse(job.job)
            planted = JobId(other.pool, other.node, other.ref, Attempt(1, 1))
            await one.redis.rpush(one.names.queue_key("n1"), str(planted))

            async def is_dropped() -> bool:
                queued = await one.redis.llen(one.names.queue_key("n1"))
                return not queued and not await one.redis.xlen(one.names.closing)

            await wait_until(is_dropped, "the leader to drop it")
            assert await one.redis.zrange(one.names.claimed("n1"), 0, -1) == [job.job.encode()]
            assert await node.store.complete(node.incarnation, [node.completed(job)]) == ["ok"]
            assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED
            assert leader.metrics.mended.labels("run_again")._value.get() == 0
            assert len(one.of("r1")) == 1


@pytest.mark.kafka
async def test_an_attempt_of_a_record_that_is_yet_to_be_appended_is_dropped(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    """Who may write a node's keys can name any ref; a new leader knows nothing of it."""
    async with patient(kafka_clients, valkey, pool) as one, one.running(ScriptedNode(one, "n1")):
        async with one.running(one.dispatcher()):
            await one.append_many([json.dumps(request("r1")).encode()])
            await one.outcome("r1")
        job = JobId(pool, "n1", Ref.parse("i0_1"), Attempt(1, 1))
        failed = FailedAttempt(attempt="1_1", node="n1", cause=FailureCause.LEASE_EXPIRED)
        entry = {
            "kind": "released",
            "ref": "i0_1",
            "id": "",
            "job": str(job),
            "payload": codec.encode(failed),
        }
        await one.redis.xadd(one.names.closing, entry)
        async with one.running(one.dispatcher()) as second:

            async def is_dropped() -> bool:
                return not await one.redis.xlen(one.names.closing)

            await wait_until(is_dropped, "the leader to drop it")
            assert not await one.redis.keys(f"{one.names.prefix}pending*")
            await one.append_many([json.dumps(request("r2")).encode()])
            assert (await one.outcome("r2")).ref == "i0_1"
            assert second.metrics.mended.labels("run_again")._value.get() == 0
            assert len(one.of("r2")) == 1
