"""The leader's whole path under a burst: a topic full of requests, and how fast one dispatcher assigns them.

Kafka record in, decode, admit, match, choose, Redis assign, mark. Real `flexlb dispatcher`, Apache Kafka, and
a Valkey that appends to its file each second; 1,250 nodes that told of their caches and go on reporting. The
burst is one Kafka transaction, which its commit shows to a leader that is warm and idle. The nodes take
nothing, so that every assignment can be looked at afterwards: all there, none twice, no node over its bound,
and each predicted hit worked out anew from what the node was said to hold. They report all prompts as
computed: a node that computes nothing would be overdue, and be given no more, before a slow burst is over.
CPU time is the kernel's, from the last moment without an assignment to the first with all. The same run
measures yardsticks: what a bare consumer and a bare batched assign cost on this machine at that time.

A second, shorter burst runs with a sampler in the dispatcher and tells where its time goes.
Variables: FLEXLB_BENCH_RECORDS (default 30000), FLEXLB_BENCH_NODES (1250).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aiokafka import TopicPartition

from dispatcher.protocol import codec
from dispatcher.protocol.names import JobId
from tests.bench import prompts
from tests.bench.machine import cpu_s, load_average
from tests.bench.pool import PARTITIONS, Pool
from tests.bench.profile_stages import read_stages

RECORDS = int(os.environ.get("FLEXLB_BENCH_RECORDS", "30000"))
NODES = int(os.environ.get("FLEXLB_BENCH_NODES", "1250"))
SAMPLED_SHARE = 0.3
MAX_RUNNING = 512
BOUND = MAX_RUNNING + MAX_RUNNING // 8
"""By `NodeState.request_bound`."""
FLAGS = (
    *("--heartbeat-ttl-s", "30", "--log-level", "WARNING"),
    # Between two reports a node is to be given far more work than it would get otherwise.
    *("--lookahead-min-s", "10", "--lookahead-max-s", "60"),
)
BURST_S = 300.0
POLL_S = 0.01
YARDSTICK_BATCH = 128
TARGETS = {"assignments_per_s": 30_000.0, "dispatcher_us": 30.0, "redis_us": 40.0}
ASSIGN = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('DEPOSED') end
for i = 2, #ARGV, 3 do
  local key = 'yard:job:' .. ARGV[i]
  if redis.call('HSETNX', key, 'data', ARGV[i + 2]) == 1 then
    redis.call('HSET', key, 'status', 'queued', 'origin', ARGV[i + 1], 'created_at', 'x', 'enqueued_at', 'x')
    redis.call('RPUSH', 'yard:queue:' .. ARGV[i + 1], ARGV[i])
    redis.call('HINCRBY', 'yard:load', ARGV[i + 1], 1)
  end
end
return 1
"""


async def run() -> dict[str, Any]:
    """Measure; prints a table."""
    load = load_average()
    burst, checks, yardsticks = await _plain()
    profile = await _sampled(int(RECORDS * SAMPLED_SHARE))
    used = burst["cpu_us_per_request"]
    ratios = {
        "of a bare consumer's rate": burst["assignments_per_s"] / yardsticks["consume_per_s"],
        "of a bare assign's rate": burst["assignments_per_s"] / yardsticks["assign_per_s"],
        "dispatcher us of both bare clients' us": used["dispatcher"]
        / (yardsticks["consume_us"] + yardsticks["assign_client_us"]),
        "redis us of the bare assign's us": used["redis"] / yardsticks["assign_server_us"],
    }
    result = {
        "nodes": NODES,
        "records": RECORDS,
        "load_average": load,
        **burst,
        "checks": checks,
        "yardsticks": yardsticks,
        "assignments_per_dispatcher_cpu_s": round(1e6 / used["dispatcher"], 1),
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "targets": TARGETS,
        "profile": profile,
    }
    print(
        f"{RECORDS} requests, {NODES} nodes: {burst['assignments_per_s']:.0f} assignments/s by the clock, "
        f"{result['assignments_per_dispatcher_cpu_s']:.0f} a second of the dispatcher's CPU"
    )
    print("us of CPU per request: " + ", ".join(f"{role} {us:.1f}" for role, us in used.items()))
    print(f"checks: {checks}")
    for name, value in (yardsticks | result["ratios"]).items():
        print(f"{name:44} {value:10.2f}")
    for name, share in profile["stages"].items():
        print(f"{name:44} {share:10.1%}")
    return result


async def _plain() -> tuple[dict[str, Any], dict[str, int], dict[str, float]]:
    async with Pool(FLAGS) as pool:
        burst = await _burst(pool, RECORDS)
        await pool.stop_nodes()
        await pool.dispatcher.stop()
        checks = await _check(pool, RECORDS)
        yardsticks = {**await _consume(pool, RECORDS), **await _assign(pool)}
        return burst, checks, yardsticks


async def _sampled(records: int) -> dict[str, Any]:
    async with Pool(FLAGS, is_sampled=True) as pool:
        burst = await _burst(pool, records, is_sampled=True)
        await pool.dispatcher.stop()
        return {
            **asdict(read_stages(pool.samples_path)),
            "records": records,
            "sampled_us": burst["cpu_us_per_request"],
        }


async def _burst(pool: Pool, records: int, *, is_sampled: bool = False) -> dict[str, Any]:
    """Fill the topic, show all of it to the leader at once, and let it assign."""
    await pool.start_dispatcher()
    await pool.start_nodes(NODES, "--max-running", str(MAX_RUNNING), "--views", "--idle")
    await pool.preload(records, NODES, "burst")
    before, began_s = pool.cpu_s(), time.monotonic()
    if is_sampled:
        os.kill(pool.dispatcher.pid, signal.SIGUSR1)
    seen, until_s = 0, time.monotonic() + BURST_S
    while seen < records:
        now, now_s = pool.cpu_s(), time.monotonic()
        seen = await pool.marks()
        if not seen:
            before, began_s = now, now_s
        assert now_s < until_s, f"expected {records} assignments within {BURST_S:.0f} s, seen {seen}"
        await asyncio.sleep(POLL_S)
    took_s, after = time.monotonic() - began_s, pool.cpu_s()
    if is_sampled:
        os.kill(pool.dispatcher.pid, signal.SIGUSR2)
    return {
        "seconds": round(took_s, 3),
        "assignments_per_s": round(records / took_s, 1),
        "cpu_us_per_request": {
            role: round((after[role] - before[role]) / records * 1e6, 2) for role in before
        },
    }


async def _check(pool: Pool, records: int) -> dict[str, int]:
    """Look at every assignment.

    Raises:
        AssertionError: one is missing, there twice, at a node over its bound, or its hit is not what the
            node was said to hold.
    """
    refs: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    most = 0
    for number in range(NODES):
        node = prompts.node_name(number)
        jobs = await _jobs_of(pool, node)
        most = max(most, len(jobs))
        refs.update(str(JobId.parse(job).ref) for _, job, _, _ in jobs)
        known = {block for blocks in prompts.view(number, NODES) for block in blocks}
        for _, _, hit, blocks in sorted(jobs):
            hits[judge_hit(hit, blocks, known)] += 1
            known.update(blocks)
    twice = [ref for ref, count in refs.items() if count > 1]
    assert not twice, f"assigned twice: {twice[:5]}"
    assert len(refs) == records, f"expected {records} assignments, seen {len(refs)}"
    assert most <= BOUND, f"expected at most {BOUND} at a node, seen {most}"
    assert not hits["more than was held"], f"hits: {hits}"
    return {"assigned": len(refs), "twice": len(twice), "most_at_a_node": most, **hits}


def judge_hit(hit: int, blocks: tuple[str, ...], known: set[str]) -> str:
    """Whether a predicted hit is what the node held of the prompt's beginning when it was bound."""
    depth = 0
    while depth < len(blocks) and blocks[depth] in known:
        depth += 1
    most = (prompts.PROMPT_TOKENS - 1) // prompts.ENGINE_BLOCK * prompts.ENGINE_BLOCK
    held = min(depth * prompts.BLOCK_TOKENS, most)
    if hit == held:
        return "hits as held" if hit else "no hit, none held"
    return "fewer than held" if hit < held else "more than was held"


async def _jobs_of(pool: Pool, node: str) -> list[tuple[int, str, int, tuple[str, ...]]]:
    """(number, job id, predicted hit, blocks) of everything queued at a node."""
    names = pool.names
    jobs = [job.decode() for job in await pool.redis.lrange(names.queue_key(node), 0, -1)]
    async with pool.redis.pipeline(transaction=False) as pipe:
        for job in jobs:
            pipe.hmget(names.job(job), "seq", "hit", "envelope")
        rows = await pipe.execute() if jobs else []
    return [
        (int(seq), job, int(hit), codec.envelopes.decode(envelope).block_hashes)
        for job, (seq, hit, envelope) in zip(jobs, rows, strict=True)
    ]


async def _consume(pool: Pool, records: int) -> dict[str, float]:
    """What reading the same topic costs a bare consumer."""
    consumer = pool.kafka.consumer(group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(pool.topic, number) for number in range(PARTITIONS)])
        await consumer.seek_to_beginning()
        seen, began, began_s = 0, time.process_time(), time.monotonic()
        async with asyncio.timeout(BURST_S):
            while seen < records:
                batches = await consumer.getmany(timeout_ms=200, max_records=1000)
                seen += sum(map(len, batches.values()))
        took, took_s = time.process_time() - began, time.monotonic() - began_s
    finally:
        await consumer.stop()
    return {"consume_us": round(took / seen * 1e6, 2), "consume_per_s": round(seen / took_s, 1)}


async def _assign(pool: Pool) -> dict[str, float]:
    """What assigning the same bytes costs with nothing but a fence, a job and a queue."""
    rounds = max(1, RECORDS // YARDSTICK_BATCH)
    digest = await pool.redis.script_load(ASSIGN)
    await pool.redis.set("yard:epoch", "1")
    values = [prompts.record(number, NODES, "yard")[1] for number in range(YARDSTICK_BATCH)]
    before, began, began_s = cpu_s(pool.valkey.pid), time.process_time(), time.monotonic()
    for turn in range(rounds):
        words: list[Any] = []
        for place, value in enumerate(values):
            number = turn * YARDSTICK_BATCH + place
            words += (f"job{number}", prompts.node_name(number % NODES), value)
        await pool.redis.evalsha(digest, 1, "yard:epoch", "1", *words)
    took, took_s = time.process_time() - began, time.monotonic() - began_s
    server = cpu_s(pool.valkey.pid) - before
    count = rounds * YARDSTICK_BATCH
    return _rounded(
        {
            "assign_client_us": took / count * 1e6,
            "assign_server_us": server / count * 1e6,
            "assign_per_s": count / took_s,
        }
    )


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}
