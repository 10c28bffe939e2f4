"""How soon a standby leads after the leader was killed, in virtual time: when the lock expires, no later."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.cluster import PARTITIONS, Cluster
from tests.support.sim.loop import current, run
from tests.support.sim.network import CALM

ONE_SLOW_CALL_S = 0.06


async def overdue_s(seed: int) -> float:
    """Seconds from the moment a killed leader's lock expired to the next one's epoch in Redis."""
    cluster = Cluster(seed)
    cluster.network.profile = CALM  # a cut connection may end a session, or cost the standby a second call
    for topic in cluster.names.topics:
        cluster.kafka.create_topic(topic, PARTITIONS)
    for name in ("d1", "d2"):
        cluster.start_dispatcher(name)

    async def epoch_after(token: bytes | None) -> bytes:
        async with asyncio.timeout(30):
            while (found := cluster.redis.call("GET", cluster.names.epoch)) in {token, None}:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert isinstance(found, bytes)
        return found

    first = await epoch_after(None)
    await asyncio.sleep(5.0)
    assert cluster.redis.call("GET", cluster.names.epoch) == first, "two led without a fault"
    leader = next(name for name in ("d1", "d2") if cluster.running[name].election.leading)
    cluster.processes[leader].kill()
    expires_s: float = current().time() + cluster.redis.call("PTTL", cluster.names.leader) / 1000
    await epoch_after(first)
    taken_s = current().time()
    for process in cluster.processes.values():
        if process.is_alive:
            process.kill()
    return taken_s - expires_s


@pytest.mark.parametrize("seed", range(10))
def test_a_standby_takes_the_lock_the_moment_it_expires(seed: int) -> None:
    assert run(overdue_s(seed)) <= ONE_SLOW_CALL_S
