"""Cache views from agents' scripts to the leader's index, on a real Valkey and on the simulated one."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.node_store import NodeStore
from dispatcher.backends.store_view import StoreView
from dispatcher.errors import Fenced, StoreFull
from dispatcher.protocol.node import BlockEvent, BlockEventKind, Medium, NodeIdentity
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.services.registry import Registry
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics
from tests.contract.test_scripts import NOW_ISO, Stage, everywhere, shared_valkey

__all__ = ["shared_valkey"]
STORED, REMOVED, RESET = BlockEventKind.STORED, BlockEventKind.REMOVED, BlockEventKind.RESET


def hashes(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:016x}" for number in numbers)


def raw(*numbers: int) -> set[bytes]:
    return {number.to_bytes(8, "big") for number in numbers}


def event(
    sequence: int,
    kind: BlockEventKind,
    *numbers: int,
    node: str = "n",
    incarnation: str = "x",
    medium: Medium = Medium.GPU,
) -> BlockEvent:
    return BlockEvent(
        node=node,
        incarnation=incarnation,
        sequence=sequence,
        kind=kind,
        medium=medium,
        hashes=hashes(*numbers),
    )


class Scene:
    """Agents that publish, and a registry that follows."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.fleet = Fleet()
        self.index = PrefixIndex()
        self.prometheus = CollectorRegistry()
        self.registry = Registry(
            StoreView(stage.client, stage.names),
            self.fleet,
            self.index,
            block_size=256,
            clock=Clock(),
            metrics=DispatcherMetrics(self.prometheus),
            log=Log(),
        )

    async def node(self, node: str = "n", incarnation: str = "x", block: int = 256) -> NodeStore:
        store = NodeStore(self.stage.runner, self.stage.names, node, heartbeat_ttl_s=0.001, lease_s=10.0)
        identity = NodeIdentity(node=node, incarnation=incarnation, models=("m",), routing_block_size=block)
        while not isinstance(await store.register(identity, {}, now_iso=NOW_ISO), str):
            pass
        self.fleet.admit(identity, 0.0)
        return store

    async def follow(self) -> None:
        await self.registry.step(block_ms=None)
        await self.registry.step(block_ms=None)

    def held(self, node: str = "n") -> dict[Medium, set[bytes]]:
        return {medium: set(found) for medium, found in self.index.held_by(node).items() if found}

    def rebuilt(self, reason: str) -> float:
        return self.prometheus.get_sample_value("flexlb_index_rebuilds_total", {"reason": reason}) or 0.0


@everywhere
async def test_events_become_the_index_and_the_sets(stage: Stage) -> None:
    scene = Scene(stage)
    node = await scene.node()
    await scene.follow()
    events = [
        event(1, STORED, 1, 2, 3),
        event(2, STORED, 9, medium=Medium.CPU),
        event(3, REMOVED, 2, 3),
    ]
    assert await node.publish_blocks(events) == 3
    await scene.follow()
    assert scene.held() == {Medium.GPU: raw(1), Medium.CPU: raw(9)}
    stored = await StoreView(stage.client, stage.names).cached_blocks("n")
    assert stored is not None
    assert (stored.sequence, stored.incarnation) == (3, "x")
    assert {medium: set(found) for medium, found in stored.tiers.items() if found} == scene.held()
    assert scene.rebuilt("gap") == 0


@everywhere
async def test_a_repeated_call_changes_nothing_and_a_gap_asks_for_the_whole_view(stage: Stage) -> None:
    scene = Scene(stage)
    node = await scene.node()
    assert await node.publish_blocks([event(1, STORED, 1), event(2, STORED, 2)]) == 2
    before = await stage.client.xlen(stage.names.blocks)
    assert await node.publish_blocks([event(1, STORED, 1), event(2, STORED, 2)]) == 2
    assert await stage.client.xlen(stage.names.blocks) == before == 2
    assert await node.publish_blocks([event(4, STORED, 4)]) == 2
    assert await node.publish_blocks([event(5, RESET), event(6, STORED, 4)]) == 6
    await scene.follow()
    assert scene.held() == {Medium.GPU: raw(4)}


@everywhere
async def test_a_follower_that_missed_events_reads_the_sets(stage: Stage) -> None:
    scene = Scene(stage)
    node = await scene.node()
    await scene.follow()
    await node.publish_blocks([event(1, STORED, 1)])
    await node.publish_blocks([event(2, STORED, 2)])
    await stage.client.xtrim(stage.names.blocks, maxlen=0)
    await node.publish_blocks([event(3, STORED, 3)])
    await scene.follow()
    assert scene.held() == {Medium.GPU: raw(1, 2, 3)}
    assert scene.rebuilt("gap") == 1


@everywhere
async def test_a_new_incarnation_begins_empty_and_the_old_one_may_say_no_more(stage: Stage) -> None:
    scene = Scene(stage)
    old = await scene.node()
    await old.publish_blocks([event(1, STORED, 1, 2)])
    await scene.follow()
    assert scene.held() == {Medium.GPU: raw(1, 2)}
    new = await scene.node(incarnation="y")
    with pytest.raises(Fenced):
        await old.publish_blocks([event(2, STORED, 3)])
    assert await new.publish_blocks([event(1, STORED, 7, incarnation="y")]) == 1
    await scene.follow()
    assert scene.held() == {Medium.GPU: raw(7)}


@everywhere
async def test_after_a_loss_of_all_data_the_view_is_what_agents_publish_anew(stage: Stage) -> None:
    scene = Scene(stage)
    node = await scene.node()
    await node.publish_blocks([event(1, STORED, 1), event(2, STORED, 2)])
    await scene.follow()
    await stage.client.flushall()
    with pytest.raises(Fenced):
        await node.publish_blocks([event(3, STORED, 3)])
    await scene.node()
    assert await node.publish_blocks([event(3, STORED, 3)]) == 0, "a gap: Redis knows nothing of 1 and 2"
    assert await node.publish_blocks([event(4, RESET), event(5, STORED, 1, 2, 3)]) == 5
    await scene.follow()
    assert scene.held() == {Medium.GPU: raw(1, 2, 3)}


@everywhere
async def test_a_view_of_another_block_size_is_ignored_and_counted(stage: Stage) -> None:
    scene = Scene(stage)
    node = await scene.node(block=512)
    await node.publish_blocks([event(1, STORED, 1)])
    await scene.follow()
    assert scene.held() == {}
    assert scene.prometheus.get_sample_value("flexlb_index_mismatched_nodes") == 1
    await scene.node(incarnation="mended", block=256)
    await scene.follow()
    assert scene.prometheus.get_sample_value("flexlb_index_mismatched_nodes") == 0


@everywhere
async def test_at_maxmemory_the_registry_stops_growing_and_says_so(stage: Stage) -> None:
    scene = Scene(stage)
    node = await scene.node()
    await stage.fill(True)
    with pytest.raises(StoreFull):
        await node.publish_blocks([event(1, STORED, 1)])
    await stage.fill(False)
    assert await node.publish_blocks([event(1, STORED, 1)]) == 1


@everywhere
async def test_foreign_entries_are_counted_and_passed_over(stage: Stage) -> None:
    scene = Scene(stage)
    node = await scene.node()
    await scene.follow()
    await stage.client.xadd(stage.names.blocks, {"body": b"junk"})
    await stage.client.xadd(stage.names.blocks, {"other": b"field"})
    await node.publish_blocks([event(1, STORED, 1)])
    await scene.follow()
    assert scene.held() == {Medium.GPU: raw(1)}
    assert scene.prometheus.get_sample_value("flexlb_foreign_entries_total") == 2


@everywhere
async def test_a_follower_agrees_with_the_sets_whatever_it_missed(stage: Stage) -> None:
    rng = random.Random(7)
    scene = Scene(stage)
    node = await scene.node()
    held: set[int] = set()
    sequence = 0
    for _ in range(60):
        sequence += 1
        some = rng.sample(range(50), 5)
        if rng.random() < 0.6:
            held.update(some)
            await node.publish_blocks([event(sequence, STORED, *some)])
        elif rng.random() < 0.8:
            held.difference_update(some)
            await node.publish_blocks([event(sequence, REMOVED, *some)])
        else:
            held.clear()
            sequence += rng.randrange(3)
            await node.publish_blocks([event(sequence, RESET)])
        if rng.random() < 0.2:
            await stage.client.xtrim(stage.names.blocks, maxlen=rng.randrange(3))
        if rng.random() < 0.4:
            await scene.follow()
    await node.publish_blocks([event(sequence + 1, STORED, 99)])
    await scene.follow()
    assert scene.held().get(Medium.GPU, set()) == raw(*held, 99)
