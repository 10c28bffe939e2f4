"""What a leader keeps in memory: what it expects of caches after a request ended, and delayed retries."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.store_view import StoredJob
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Attempt, JobId, Names, Ref
from dispatcher.protocol.node import NodeIdentity, NodeReport
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.retry import MAX_DELAY_S
from dispatcher.scheduling.scheduler import blocks_of
from dispatcher.scheduling.window import Waiting
from dispatcher.services.recover import Recovery
from dispatcher.services.state import EVENTS_S, Bound, LeaderState
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

REF = Ref.parse("i0_1")
UNTOLD_S = 300.0
NOW_S = 100.0


@pytest.mark.parametrize(
    ("routing_block_size", "text_hashed", "expected_s"),
    [(256, False, EVENTS_S), (0, False, UNTOLD_S), (512, False, UNTOLD_S), (256, True, UNTOLD_S)],
    ids=["events tell", "no events", "other blocks", "no engine tells of text"],
)
def test_blocks_are_expected_until_events_tell_or_for_long(
    routing_block_size: int, text_hashed: bool, expected_s: float
) -> None:
    fleet, index = Fleet(), PrefixIndex()
    fleet.admit(
        NodeIdentity(node="n", incarnation="x", models=("m",), routing_block_size=routing_block_size), 0.0
    )
    state = LeaderState(
        names=Names(),
        fleet=fleet,
        index=index,
        clock=Clock(monotonic=lambda: NOW_S),
        rng=random.Random(0),
        metrics=DispatcherMetrics(CollectorRegistry()),
        log=Log(),
        untold_linger_s=UNTOLD_S,
    )
    hashes = ("0" * 15 + "1", "0" * 15 + "2")
    envelope = Envelope(
        ref=str(REF), id="r", model="m", block_size=256, block_hashes=hashes, text_hashed=text_hashed
    )
    job = JobId("default", "n", REF, Attempt(1, 1))
    state.bind(str(REF), Bound(envelope=envelope, job=job, failures=0, excluded=()))
    state.unbind(str(REF), answered=True)

    def held_after(seconds: float) -> bool:
        index.expire(NOW_S + seconds)
        return bool(index.match(blocks_of(hashes)))

    assert held_after(expected_s - 0.1)
    assert not held_after(expected_s + 0.1)


@pytest.mark.parametrize("step_s", [-3600.0, -1.0, 0.0, 3600.0], ids=["hour back", "back", "none", "hour on"])
def test_a_retry_waits_no_longer_when_the_wall_clock_is_set(step_s: float) -> None:
    now_s, wall_s = NOW_S, 1_790_000_000.0
    clock = Clock(monotonic=lambda: now_s, epoch_s=lambda: wall_s)
    state = LeaderState(
        names=Names(),
        fleet=Fleet(),
        index=PrefixIndex(),
        clock=clock,
        rng=random.Random(0),
        metrics=DispatcherMetrics(CollectorRegistry()),
        log=Log(),
    )
    envelope = Envelope(ref=str(REF), id="r", model="m")
    state.delay(Waiting(ref=REF, envelope=envelope, from_pending=True), clock.now_ms() + 2_000)
    wall_s += step_s
    assert state.release_due() == pytest.approx(2.0)
    now_s += 2.001
    assert state.release_due() is None
    assert len(state.window) == 1


def test_a_retry_noted_by_a_leader_whose_clock_was_ahead_waits_the_longest_delay_at_most() -> None:
    state = LeaderState(
        names=Names(),
        fleet=Fleet(),
        index=PrefixIndex(),
        clock=Clock(monotonic=lambda: NOW_S, epoch_s=lambda: 1_790_000_000.0),
        rng=random.Random(0),
        metrics=DispatcherMetrics(CollectorRegistry()),
        log=Log(),
    )
    envelope = Envelope(ref=str(REF), id="r", model="m")
    state.delay(Waiting(ref=REF, envelope=envelope, from_pending=True), 1_790_000_000_000 + 3_600_000)
    assert state.release_due() == pytest.approx(MAX_DELAY_S)


def test_what_a_new_leader_finds_queued_at_a_node_takes_time_there() -> None:
    fleet = Fleet()
    node = fleet.admit(NodeIdentity(node="n", incarnation="x", models=("m",)), 0.0)
    state = LeaderState(
        names=Names(),
        fleet=fleet,
        index=PrefixIndex(),
        clock=Clock(monotonic=lambda: NOW_S),
        rng=random.Random(0),
        metrics=DispatcherMetrics(CollectorRegistry()),
        log=Log(),
    )
    envelope = Envelope(ref=str(REF), id="r", model="m", prompt_tokens=9_000)
    job = JobId("default", "n", REF, Attempt(1, 1))
    recovery = Recovery.__new__(Recovery)
    recovery._state = state
    recovery._restore(
        StoredJob(
            job=str(job),
            node="n",
            ref=str(REF),
            claimed=False,
            envelope=codec.encode(envelope),
            failures=0,
            excluded=(),
            number=1,
            hit_tokens=1_000,
        )
    )
    node.hear(NodeReport(node="n", incarnation="x", sequence=1), 0.0, NOW_S)
    assert node.queued_s(NOW_S) == pytest.approx(node.predictor.cost.seconds(8_000, 1_000))
