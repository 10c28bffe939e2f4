"""What operators wish of nodes, on a real Kafka and a real Valkey: cordon, drain, and what outlives what."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.cli import build_parser
from dispatcher.errors import SettingsError
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.outcome import OutcomeKind
from tests.contract.test_dispatcher import UnclaimingNode
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.wait import wait_until


class Operator:
    """Runs `flexlb nodes` and its kin in this process: exit code, stdout, stderr."""

    def __init__(self, redis: str, pool: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._where = ("--redis", redis, "--pool", pool)
        self._capsys = capsys

    async def __call__(self, command: str, *arguments: str) -> tuple[int, str, str]:
        options: argparse.Namespace = build_parser(command).parse_args([command, *arguments, *self._where])
        self._capsys.readouterr()
        code = await options.run(options)
        out, err = self._capsys.readouterr()
        return code, out, err

    async def nodes(self) -> dict[str, tuple[str, str, int, int]]:
        """State, wish, queued and claimed of each node."""
        code, out, _ = await self("nodes", "--json")
        assert code == 0
        lines: list[dict[str, Any]] = json.loads(out)
        return {one["node"]: (one["state"], one["wish"], one["queued"], one["claimed"]) for one in lines}


@pytest.fixture
def operator(valkey: ValkeyServer, pool: str, capsys: pytest.CaptureFixture[str]) -> Operator:
    """The commands, pointed at the test's pool."""
    return Operator(valkey.url, pool, capsys)


@pytest.mark.kafka
async def test_draining_gives_back_the_queue_and_lets_what_runs_finish(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, operator: Operator
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()) as dispatcher:
        drained = UnclaimingNode(one, "n1")
        async with one.running(drained):
            for number in range(4):
                await one.append(request(f"r{number}"))
            await wait_until(lambda: dispatcher.state and len(dispatcher.state.bound) == 4, "four bound")
            assert await operator.nodes() == {"n1": ("available", "", 4, 0)}
            await drained.claim(1)
            assert await operator("drain", "n1") == (0, "n1: draining\n", "")
            async with one.running(ScriptedNode(one, "n2")):
                outcomes = [await one.outcome(f"r{number}") for number in range(1, 4)]
                assert {(outcome.kind, outcome.node) for outcome in outcomes} == {
                    (OutcomeKind.COMPLETED, "n2")
                }
                await one.append(request("new"))
                assert (await one.outcome("new")).node == "n2"
                assert await operator.nodes() == {
                    "n1": ("available", "drain", 0, 1),
                    "n2": ("available", "", 0, 0),
                }
                assert await drained.finish() == ["ok"]
                assert (await one.outcome("r0")).node == "n1"
        assert [len(one.of(f"r{number}")) for number in range(4)] == [1, 1, 1, 1]
        assert dispatcher.health()["cordoned"] == {"n1": "drain"}
        assert dispatcher.metrics.cordoned.labels("drain")._value.get() == 1


@pytest.mark.kafka
async def test_a_cordon_outlives_the_leader_and_the_agent(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, operator: Operator
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(one.dispatcher()), one.running(ScriptedNode(one, "n1")) as first:
            await one.append(request("before"))
            assert (await one.outcome("before")).node == "n1"
            assert await operator("cordon", "n1") == (0, "n1: cordoned\n", "")
            assert await operator("cordon", "n1") == (0, "n1: cordoned (was cordoned)\n", "")

        async def is_silent() -> bool:
            return not await one.redis.exists(one.names.load(first.name))

        await wait_until(is_silent, "the first incarnation's heartbeat to end")
        async with one.running(one.dispatcher()) as second, one.running(ScriptedNode(one, "n1")) as restarted:
            await wait_until(
                lambda: (
                    (node := second.mirror.fleet.nodes.get("n1")) is not None
                    and node.identity.incarnation == restarted.incarnation
                    and node.admitted
                ),
                "the new incarnation to be admitted",
            )
            assert not second.mirror.fleet.nodes["n1"].is_eligible
            await one.append(request("waits"))
            async with one.running(ScriptedNode(one, "n2")):
                assert (await one.outcome("waits")).node == "n2"
            assert await operator("uncordon", "n1") == (0, "n1: gets new work (was cordoned)\n", "")
            await one.append(request("after"))
            assert (await one.outcome("after")).node == "n1"


@pytest.mark.kafka
async def test_wishes_that_went_with_the_data_of_redis_are_told_of(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str, operator: Operator
) -> None:
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()) as dispatcher:
        async with one.running(ScriptedNode(one, "n1")):
            await one.append(request("before"))
            await one.outcome("before")
            assert (await operator("cordon", "n1"))[0] == 0
            await wait_until(lambda: dispatcher.health()["cordoned"] == {"n1": "cordon"}, "the cordon")
        await one.redis.flushall()
        await wait_until(lambda: dispatcher.metrics.cordons_lost._value.get() == 1, "the loss to be counted")
        async with one.running(ScriptedNode(one, "n1")):
            await one.append(request("after"))
            assert (await one.outcome("after")).node == "n1"
        assert dispatcher.health()["cordoned"] == {}


async def test_an_unknown_node_is_refused_and_the_others_are_not(
    valkey: ValkeyServer, redis_client: Any, pool: str, operator: Operator
) -> None:
    assert await operator("nodes") == (0, f"no nodes in pool {pool}\n", "")
    await redis_client.sadd(f"flexlb:{pool}:nodes", "n1")
    await redis_client.hset(f"flexlb:{pool}:node:n1", "incarnation", "x")
    code, out, err = await operator("drain", "n7", "n1")
    assert (code, out) == (1, "n1: draining\n")
    assert "n7: expected a node" in err
    assert await operator.nodes() == {"n1": ("silent", "drain", 0, 0)}
    code, out, _ = await operator("cordon", "n1", "n7", "--json")
    assert code == 1
    assert json.loads(out) == [
        {"node": "n1", "known": True, "before": "drain", "now": "cordon"},
        {"node": "n7", "known": False, "before": "", "now": "cordon"},
    ]
    with pytest.raises(SettingsError, match="rename the node"):
        await operator("cordon", "a--b")
