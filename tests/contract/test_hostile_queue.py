"""Jobs that others put into a queue of a node, pickled ones too: not run, told, and no harm to the rest."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Attempt, JobId, Lane, Ref
from dispatcher.protocol.outcome import OutcomeKind
from tests.contract.test_agent import HeldEngine, running_agent
from tests.support.pool import Pool, request
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self._file,))


async def test_pickled_and_foreign_jobs_run_no_code_and_cost_nobody_else_anything(
    kafka_clients: KafkaClients,
    valkey: ValkeyServer,
    pool: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    proof = tmp_path / "proof"
    bomb = pickle.dumps(Bomb(proof))
    pickle.loads(bomb)
    assert proof.exists(), "the bomb must be a live one"
    proof.unlink()
    engine = HeldEngine()
    engine.go_on.set()
    caplog.set_level(logging.WARNING, "flexlb")
    async with (
        Pool(kafka_clients, valkey.url, pool) as one,
        one.running(one.dispatcher()),
        running_agent(one, engine),
    ):
        names = one.names
        planted = ["foreign", str(JobId(pool, "n1", Ref(Lane.BATCH, 7, 7), Attempt(1, 1)))]
        for job in planted:
            await one.redis.hset(
                names.job(job), mapping={"data": bomb, "envelope": bomb, "status": "queued", "origin": "x"}
            )
            await one.redis.rpush(names.queue_key("n1"), job)
        await one.redis.rpush(names.queue_key("n1"), bomb)
        await one.append(request("served"))
        assert (await one.outcome("served")).kind is OutcomeKind.COMPLETED

        def told() -> bool:
            return "foreign jobs in the queue" in caplog.text and "claimed job can't be read" in caplog.text

        await wait_until(told, "both kinds of foreign jobs being told")
        assert await one.redis.llen(names.queue_key("n1")) == 0
        assert engine.started == ["served"]
    assert not proof.exists()
