"""`flexlb explain` on a real Kafka and a real Valkey: what a leader tells of its decisions, and when not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.store_view import StoreView
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.outcome import FailureCause, OutcomeKind
from tests.contract.test_nodes import Operator
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka


@pytest.fixture
def operator(valkey: ValkeyServer, pool: str, capsys: pytest.CaptureFixture[str]) -> Operator:
    """The commands, pointed at the test's pool."""
    return Operator(valkey.url, pool, capsys)


async def kept(one: Pool, id: str, tenant: str = "", *, count: int = 1) -> None:
    """Wait until so many explanations are kept."""
    view = StoreView(one.redis, one.names)

    async def are_kept() -> bool:
        return len(await view.explanations(tenant, id)) == count

    await wait_until(are_kept, f"{count} explanations of {id}")


async def test_a_request_is_explained_to_people_and_machines(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, operator: Operator
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()):
        async with one.running(ScriptedNode(one, "n1")), one.running(ScriptedNode(one, "n2")):
            await wait_until(lambda: one.redis.scard(one.names.nodes), "a node")
            fields: dict[str, Any] = {
                "tenant": "acme",
                "tokens": {"count": 700, "block_hashes": ["0123456789abcdef"]},
            }
            await one.append(request("r1", **fields))
            outcome = await one.outcome("r1", "acme")
            await kept(one, "r1", "acme")
            code, out, err = await operator("explain", "r1", "--tenant", "acme")
            assert (code, err) == (0, "")
            assert f"acme/r1, record {outcome.ref}, model m" in out
            assert f"chosen    {outcome.node} by prefill_cost" in out
            assert f">  {outcome.node}" in out
            code, out, _ = await operator("explain", "r1", "--tenant", "acme", "--json")
            (told,) = json.loads(out)
            assert code == 0
            assert (told["node"], told["prompt_tokens"], told["stage"]) == (outcome.node, 700, "")
            assert {one["node"] for one in told["candidates"]} <= {"n1", "n2"}
            assert [one["compute_tokens"] for one in told["candidates"]] == [700] * told["looked_at"]
            code, out, err = await operator("explain", "r1")
            assert (code, out) == (1, "")
            assert "r1: expected an explanation in pool" in err


async def test_every_attempt_is_explained_in_its_order(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, operator: Operator
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()) as dispatcher:
        first = ScriptedNode(one, "n1")
        first.holds = True
        async with one.running(first):
            await one.append(request("r1"))
            await wait_until(lambda: len(first.claimed) == 1, "the claim")
            async with one.running(ScriptedNode(one, "n2")):
                nodes = dispatcher.mirror.fleet.nodes
                await wait_until(lambda: "n2" in nodes and nodes["n2"].admitted, "the second node")
                failed = first.failed(first.claimed.pop(), FailureCause.ENGINE_ERROR)
                await first.store.complete(first.incarnation, [failed])
                assert (await one.outcome("r1")).node == "n2"
                await kept(one, "r1", count=2)
    code, out, _ = await operator("explain", "r1", "--json")
    told = json.loads(out)
    assert code == 0
    assert [(one["node"], one["failures"], one["excluded"]) for one in told] == [
        ("n1", 0, []),
        ("n2", 1, ["n1"]),
    ]
    assert told[1]["barred_nodes"] == [{"node": "n1", "why": "excluded"}]
    code, out, _ = await operator("explain", "r1")
    assert out.count("chosen ") == 2
    assert "1 failed this request before (n1)" in out


async def test_a_request_that_was_not_sampled_is_known_and_not_explained(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, operator: Operator
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, explain_rate=0) as one, one.running(one.dispatcher()):
        async with one.running(ScriptedNode(one, "n1")):
            await one.append(request("r1"))
            ref = (await one.outcome("r1")).ref
    code, out, err = await operator("explain", "r1")
    assert (code, out) == (1, "")
    assert f"knows it (record {ref}), but keeps no explanation: it was not sampled" in err


async def test_a_redis_that_refuses_explanations_costs_no_request_anything(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        await one.redis.set(one.names.explanations, "of another type")
        async with one.running(one.dispatcher()) as dispatcher, one.running(ScriptedNode(one, "n1")):
            await one.append(request("r1"))
            await wait_until(
                lambda: dispatcher.metrics.explanations_lost._value.get() == 1, "the explanation being lost"
            )
            for number in range(2, 5):
                await one.append(request(f"r{number}"))
                assert (await one.outcome(f"r{number}")).kind is OutcomeKind.COMPLETED
            assert dispatcher.election.leading
            assert dispatcher.metrics.explanations._value.get() == 0
