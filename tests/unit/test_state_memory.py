"""What a leader keeps of finished requests: nothing, whatever stands in the way."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Names, Ref
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.window import Waiting
from dispatcher.services.state import FEWEST_PAST, LeaderState
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

DAY_MS = 86_400_000


def leader_state() -> LeaderState:
    """The ledger of a leader that knows nothing."""
    return LeaderState(
        names=Names(),
        fleet=Fleet(),
        index=PrefixIndex(),
        clock=Clock(),
        rng=random.Random(1),
        metrics=DispatcherMetrics(CollectorRegistry()),
        log=Log(),
    )


def waiting(offset: int, id: str = "") -> Waiting:
    """A request that may take a day."""
    ref = Ref.parse(f"i0_{offset}")
    deadline = Clock().now_ms() + DAY_MS
    return Waiting(
        ref=ref, envelope=Envelope(ref=str(ref), id=id or f"r{offset}", model="m", deadline_at_ms=deadline)
    )


def test_deadlines_of_finished_requests_are_forgotten_long_before_they_pass() -> None:
    state = leader_state()
    for offset in range(10 * FEWEST_PAST):
        state.enter(waiting(offset))
        state.withdraw(f"i0_{offset}")
        state.forget(f"i0_{offset}")
    assert len(state.deadlines) <= FEWEST_PAST + 1
    state.enter(waiting(99_999))
    assert any(ref == "i0_99999" for _, ref in state.deadlines)


def test_forgetting_a_repeat_keeps_what_is_known_of_the_first() -> None:
    state = leader_state()
    state.enter(waiting(1, "same"))
    state.enter(waiting(2, "same"))
    assert state.identities[("", "same")][0] == "i0_1"
    state.forget("i0_2")
    assert state.identities[("", "same")][0] == "i0_1"
    assert state.is_unfinished("i0_1")
    state.forget("i0_1")
    assert not state.identities
