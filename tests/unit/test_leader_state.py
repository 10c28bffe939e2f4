"""What a leader expects of caches after a request ended, by who will tell of it."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Attempt, JobId, Names, Ref
from dispatcher.protocol.node import NodeIdentity
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import blocks_of
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
