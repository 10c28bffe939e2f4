"""An agent turns its own keys into other types: the leader takes them for empty, fences it, and serves on.

The scripts on a real Valkey and on the simulated one, then a whole pool with one hostile node.
"""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.leader_store import AdoptItem, CloseItem, RetryItem
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Names, Ref
from dispatcher.protocol.node import Medium
from dispatcher.protocol.outcome import OutcomeKind
from tests.contract.test_scripts import (
    NOW_ISO,
    Stage,
    assign,
    claim,
    ending,
    everywhere,
    ids,
    item,
    job_id,
    shared_valkey,
)
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.wait import wait_until

__all__ = ["shared_valkey"]


def own_keys(names: Names, node: str) -> list[str]:
    """What an agent's user may write and a leader touches, but for jobs."""
    return [
        names.node(node),
        names.load(node),
        names.claimed(node),
        names.held(node),
        names.control(node),
        names.queue_key(node),
        names.intermediate(node),
        names.wip(node),
        *(names.cached_blocks(node, medium) for medium in Medium),
    ]


async def spoil(client: Stage | Pool, *keys: str) -> None:
    """Make texts of keys."""
    redis = client.client if isinstance(client, Stage) else client.redis
    for key in keys:
        await redis.set(key, "none of yours")


@everywhere
async def test_nothing_is_bound_by_halves_to_a_node_with_strange_keys(stage: Stage) -> None:
    names = stage.names
    leader = await stage.lead()
    await stage.join("other")
    for key in (names.queue_key("n"), names.node("n")):
        await stage.join()
        await spoil(stage, key)
        assert await assign(leader, item(0), item(0, node="other", n=2)) == ["gone", "ok"]
        assert leader.strange == {key}
        leader.strange.clear()
        assert await stage.places() == ["queue of other"]
        await stage.client.delete(names.above("i0"), names.queue_key("other"))
    await stage.join()
    await stage.client.hset(names.node("n"), "seq", "many")
    assert await assign(leader, item(0)) == ["gone"]
    assert leader.strange == {names.node("n")}
    await stage.join()
    await spoil(stage, names.job(job_id(1)))
    assert await assign(leader, item(1)) == ["ok"]
    assert await stage.client.hget(names.job(job_id(1)), "data") == b"data 1"


@everywhere
async def test_nothing_pending_is_bound_by_halves_either(stage: Stage) -> None:
    leader = await stage.lead()
    await stage.join()
    await stage.join("other")
    await assign(leader, item(0))
    assert await leader.requeue("n", "queued", "", "draining") == [Ref.parse("i0_0")]
    await spoil(stage, stage.names.queue_key("n"))
    assert await assign(leader, item(0, n=2, from_pending=True)) == ["gone"]
    assert await stage.places() == ["pending"]
    assert await assign(leader, item(0, node="other", n=3, from_pending=True)) == ["ok"]


@everywhere
async def test_each_requeue_takes_what_it_can_read(stage: Stage) -> None:
    for mode in ("fence", "queued", "expired", "others"):
        for key in own_keys(stage.names, "n"):
            await stage.client.flushdb()
            leader = await stage.lead()
            await stage.join()
            await spoil(stage, key)
            assert await leader.requeue("n", mode, "x", "node_lost") == []
            assert leader.strange == {key} or mode != "fence"


@everywhere
async def test_a_strange_job_costs_the_others_nothing(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1), item(2), item(3))
    await leader.admit("n")
    await claim(node, limit=2)
    await spoil(stage, stage.names.job(job_id(0)), stage.names.job(job_id(2)))
    ledger = await stage.view.ledger()
    assert sorted(job.ref for job in ledger.jobs) == ["i0_1", "i0_3"]
    moved = await leader.requeue("n", "fence", "x", "node_lost")
    assert moved is not None
    assert sorted(map(str, moved)) == ["i0_0", "i0_1", "i0_3"], (
        "what was claimed is a request whatever its job is"
    )


@everywhere
async def test_a_failure_whose_job_is_strange_is_missing(stage: Stage) -> None:
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1))
    await claim(node)
    assert await node.complete("x", [ending(job_id(0), "failed"), ending(job_id(1), "failed")]) == [
        "ok",
        "ok",
    ]
    job = stage.names.job(job_id(0))
    await spoil(stage, job)
    view = stage.view
    assert await view.stored_job(str(job_id(0))) is None
    assert await view.failed_attempts(str(job_id(0))) == []
    assert view.strange == {job}
    retries = [
        RetryItem(
            entry=entry,
            job=job_id(offset),
            not_before_ms=0,
            failures=1,
            excluded=(),
            cause="engine_error",
            error="no",
        )
        for offset, (entry, _) in enumerate(await stage.closing())
    ]
    assert await leader.retry(retries, now_iso=NOW_ISO) == ["missing", "ok"]
    await spoil(stage, job)
    await leader.settle({}, [(retries[0].entry, str(job_id(0)))], now_iso=NOW_ISO)
    assert leader.strange == {job}


@everywhere
async def test_endings_admission_adoption_and_a_new_generation_pass_strange_keys(stage: Stage) -> None:
    names = stage.names
    leader = await stage.lead()
    for key in own_keys(names, "n"):
        await stage.client.flushdb()
        leader = await stage.lead()
        await leader.begin_generation("g", {"i0": 0}, {})
        await stage.join()
        await spoil(stage, key)
        await leader.admit("n")
        assert await leader.held_inventory("n") == {}
        assert await stage.view.cached_blocks("n") is None or key != names.node("n")
        await stage.view.nodes(["n"])
        await stage.view.node_work(["n"])
        await stage.view.ledger()
        adopted = AdoptItem(
            job=job_id(0), cost_tokens=1, identity="id", fingerprint="aa", envelope=b"e", data=b"d"
        )
        assert await leader.adopt("n", "x", [adopted], lease_s=9, now_iso=NOW_ISO) in (["ok"], ["gone"])
        await spoil(stage, key)
        close = CloseItem(place="job", ref=Ref.parse("i0_0"), kind="outcome", id="r", job=job_id(0))
        assert await leader.close([close]) in (["ok"], ["already"])
        await spoil(stage, key)
        assert await leader.forget("n") in {True, False}
        await leader.begin_generation("h", {"i0": 0}, {})


@everywhere
async def test_what_stood_in_a_dropped_list_can_be_ended(stage: Stage) -> None:
    """Its job is there, but in no place; not so while its failure waits to be decided."""
    leader = await stage.lead()
    node = await stage.join()
    await assign(leader, item(0), item(1), item(2))

    async def close(offset: int) -> str:
        found = CloseItem(
            place="lost", ref=Ref.parse(f"i0_{offset}"), kind="outcome", id="r", job=job_id(offset)
        )
        return (await leader.close([found]))[0]

    assert ids(await claim(node, limit=1)) == [str(job_id(0))]
    assert await node.complete("x", [ending(job_id(0), "failed")]) == ["ok"]
    assert await close(0) == "already"
    await stage.client.delete(stage.names.queue_key("n"))
    assert await close(1) == "ok"
    assert not await stage.client.exists(stage.names.job(job_id(1)))
    await stage.client.xadd(stage.names.closing, {"kind": "x"})
    for _ in range(1001):
        await stage.client.xadd(stage.names.closing, {"kind": "x"})
    assert await close(2) == "already", "too many endings to look through: another time"


def hostile(pool: Pool) -> ScriptedNode:
    """A node that works, and holds what it is given."""
    node = ScriptedNode(pool, "n1")
    node.holds = True
    return node


async def given_work(pool: Pool, node: ScriptedNode, prefix: str) -> None:
    """Ask until one of the requests is bound to the node: where each goes is chance."""
    count = itertools.count()

    async def asked() -> bool:
        await pool.append(request(f"{prefix}-{next(count)}"))
        return node.claimed != []

    await wait_until(asked, "work at the hostile node")


@pytest.mark.kafka
async def test_a_leader_serves_on_whatever_a_node_makes_of_its_keys(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "flexlb")
    async with Pool(kafka_clients, valkey.url, pool, policy="random") as one:
        async with one.running(one.dispatcher()) as dispatcher, one.running(ScriptedNode(one, "n2")):
            names = one.names
            spoilt = (names.node("n1"), names.load("n1"), names.queue_key("n1"), names.claimed("n1"))
            for number, key in enumerate(spoilt):
                fenced = dispatcher.metrics.fenced._value.get()
                node = hostile(one)
                task = asyncio.create_task(node.run())
                alive = dispatcher.mirror.fleet.nodes
                await wait_until(
                    lambda at=alive, node=node: (  # type: ignore[misc]
                        "n1" in at
                        and at["n1"].available
                        and at["n1"].identity.incarnation == node.incarnation
                    ),
                    "the hostile node being known",
                )
                await given_work(one, node, f"{number}")
                task.cancel()
                await asyncio.wait([task])
                await spoil(one, key, one.names.job(node.claimed[0].job))
                await one.append(request(f"{number}-after"))
                assert (await one.outcome(f"{number}-after")).kind is OutcomeKind.COMPLETED
                await wait_until(
                    lambda before=fenced: dispatcher.metrics.fenced._value.get() > before,  # type: ignore[misc]
                    "the hostile node being fenced",
                )
                await one.redis.delete(key)
            assert dispatcher.metrics.elections._value.get() == 1, "the leader went on"
            assert dispatcher.metrics.foreign._value.get() > 0
        assert "keys of another type dropped" in caplog.text


@pytest.mark.kafka
async def test_a_new_leader_takes_over_past_strange_keys(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        node = hostile(one)
        async with one.running(one.dispatcher()), one.running(node):
            await one.append(request("held"))
            await wait_until(lambda: node.claimed != [], "work at the hostile node")
        await spoil(one, *(key for key in own_keys(one.names, "n1") if key != one.names.claimed("n1")))
        async with one.running(one.dispatcher()) as dispatcher, one.running(ScriptedNode(one, "n2")):
            assert (await one.outcome("held")).kind is OutcomeKind.COMPLETED
            assert dispatcher.metrics.elections._value.get() == 1, "the leader went on"


def test_whose_key_it_is() -> None:
    names = Names("p-1")
    for key in own_keys(names, "a-b_c"):
        assert names.node_of(key) == "a-b_c", key
    assert names.node_of(names.worker("a")) == "a"
    assert names.node_of(names.job(str(job_id(0)).replace("p--", "p-1--"))) == "n"
    assert names.node_of(names.marks) == ""
    assert Names("p").node_of(names.queue_key("a")) == ""
