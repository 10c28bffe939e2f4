"""What a request costs at each hop in microseconds of CPU, measured one hop at a time in this process.

Scripts run on a real Valkey, in batches as production calls them; the figure is the client's CPU and
the server's, by `INFO cpu`. Absolute numbers belong to the machine; compare within one run.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dispatcher.backends.connect import connect_redis
from dispatcher.backends.leader_lock import LeaderLock, Lease
from dispatcher.backends.leader_store import AssignItem, LeaderStore
from dispatcher.backends.node_store import Ending, NodeStore
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import decode_job_data
from dispatcher.protocol.names import Attempt, JobId, Lane, Names, Ref
from dispatcher.protocol.node import NodeIdentity
from dispatcher.protocol.outcome import Outcome, OutcomeKind, Reason
from dispatcher.protocol.prefix_hash import block_hashes
from dispatcher.scheduling.admission import AdmissionLimits, Admitted, admit
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import Waiting, Window

BATCH = 128
ROUNDS = 40
NOW_ISO = "2026-01-01T00:00:00.000000Z"


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    rows: dict[str, dict[str, float]] = {}
    records = [_record(number) for number in range(BATCH * ROUNDS)]
    admitted = _admit_all(records, rows)
    _choose_all(admitted, rows)
    with tempfile.TemporaryDirectory(prefix="flexlb-bench-") as folder:
        async with ValkeyServer(Path(folder)) as valkey:
            await _scripts(valkey, admitted, rows)
    print(f"{'hop':34} {'client us':>10} {'server us':>10}")
    for name, row in rows.items():
        print(f"{name:34} {row['client_us']:10.2f} {row.get('server_us', 0):10.2f}")
    return {"batch": BATCH, "hops": rows}


def _record(number: int) -> bytes:
    record = {
        "id": f"bench-{number}",
        "model": "m",
        "endpoint": "/v1/completions",
        "body": {"prompt": "word " * 150, "max_tokens": 64},
        "tokens": {"count": 600, "block_hashes": ["0123456789abcdef"] * 2},
    }
    return json.dumps(record).encode()


def _timed(rows: dict[str, dict[str, float]], name: str, count: int, work: Callable[[], Any]) -> Any:
    began = time.process_time()
    result = work()
    rows[name] = {"client_us": (time.process_time() - began) / count * 1e6}
    return result


def _admit_all(records: list[bytes], rows: dict[str, dict[str, float]]) -> list[Admitted]:
    limits = AdmissionLimits(
        max_record_bytes=1 << 20,
        default_deadline_ms=600_000,
        max_deadline_ms=600_000,
        request_topic="requests",
        bodies_topic="bodies",
        reply_topics={"replies": 4},
    )

    def work() -> list[Admitted]:
        return [
            decision
            for offset, record in enumerate(records)
            if isinstance(
                decision := admit(
                    Ref(Lane.INTERACTIVE, 0, offset),
                    None,
                    record,
                    appended_ms=0,
                    now_ms=0,
                    traceparent="",
                    limits=limits,
                    carry_bodies=True,
                ),
                Admitted,
            )
        ]

    admitted: list[Admitted] = _timed(rows, "admit 1.2 kB record", len(records), work)
    tokens = list(range(4096))
    _timed(
        rows,
        "hash 16 blocks of 256 tokens",
        200,
        lambda: [block_hashes(tokens, model="m") for _ in range(200)],
    )
    return admitted


def _choose_all(admitted: list[Admitted], rows: dict[str, dict[str, float]]) -> None:
    for nodes in (4, 100, 1000):
        fleet = Fleet()
        for number in range(nodes):
            identity = NodeIdentity(node=f"n{number}", incarnation="i", models=("m",), max_running=100_000)
            fleet.admit(identity, 0.0).admitted = True
        window = Window()
        some = admitted[:512]
        for one in some:
            window.push(Waiting(ref=Ref.parse(one.envelope.ref), envelope=one.envelope, data=one.data))
        scheduler = Scheduler(fleet, PrefixIndex(), rng=random.Random(1))

        def work(window: Window = window, fleet: Fleet = fleet, scheduler: Scheduler = scheduler) -> None:
            round = window.begin_round()
            while (found := window.choose(scheduler, round, 0)) is not None:
                waiting, choice = found
                fleet.reserve(choice.node.name, waiting.envelope.ref, waiting.envelope.cost_tokens)

        _timed(rows, f"choose among {nodes} nodes", len(some), work)


async def _scripts(valkey: ValkeyServer, admitted: list[Admitted], rows: dict[str, dict[str, float]]) -> None:
    client = connect_redis(valkey.url)
    runner = ScriptRunner(client)
    names = Names()
    lock = LeaderLock(runner, names, ttl_s=60, clock=time.monotonic)
    lease = await lock.acquire("bench")
    assert isinstance(lease, Lease)
    leader = LeaderStore(runner, names, lease)
    node = NodeStore(runner, names, "n1", heartbeat_ttl_s=60, lease_s=60)
    await leader.begin_generation("g", {"i0": 0}, {})
    await node.register(NodeIdentity(node="n1", incarnation="i", models=("m",)), {}, now_iso=NOW_ISO)
    await leader.admit("n1")
    costs: dict[str, list[float]] = {"assign": [], "claim": [], "complete": []}
    server: dict[str, list[float]] = {"assign": [], "claim": [], "complete": []}

    async def measured(name: str, call: Any) -> Any:
        before, began = await _server_cpu_s(client), time.process_time()
        result = await call
        costs[name].append((time.process_time() - began) / BATCH * 1e6)
        server[name].append((await _server_cpu_s(client) - before) / BATCH * 1e6)
        return result

    for number in range(ROUNDS):
        items = [_item(one, lease.epoch, names) for one in admitted[number * BATCH : (number + 1) * BATCH]]
        await measured("assign", leader.assign(items, {"i0": (number + 1) * BATCH}, now_iso=NOW_ISO))
        claim = await measured("claim", node.claim("i", number + 1, BATCH, now_iso=NOW_ISO))
        endings = [_ending(job.job, job.data) for job in claim.jobs]
        assert len(endings) == BATCH
        await measured("complete", node.complete("i", endings))
    await client.aclose()
    for name, values in costs.items():
        rows[f"{name}, batch of {BATCH}"] = {
            "client_us": sorted(values)[len(values) // 2],
            "server_us": sum(server[name]) / len(server[name]),
        }


async def _server_cpu_s(client: Any) -> float:
    info = await client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def _item(one: Admitted, epoch: int, names: Names) -> AssignItem:
    envelope = one.envelope
    return AssignItem(
        job=JobId(names.pool, "n1", Ref.parse(envelope.ref), Attempt(epoch, 1)),
        incarnation="i",
        cost_tokens=envelope.cost_tokens,
        from_pending=False,
        identity=names.identity(envelope.tenant, envelope.id),
        fingerprint=envelope.fingerprint,
        data=one.data,
        envelope=codec.encode(envelope),
    )


def _ending(job: str, data: bytes) -> Ending:
    work = decode_job_data(data)
    outcome = Outcome(id=work.id, ref=work.ref, kind=OutcomeKind.COMPLETED, reason=Reason.FINISHED)
    return Ending(job=job, kind="outcome", ref=work.ref, id=work.id, payload=codec.encode(outcome))
