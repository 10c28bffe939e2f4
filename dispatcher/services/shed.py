"""Shed: overload control, carried out: who is turned away of what arrives and of what waits.

Intake asks it about each request it has read, Expire has it look at the queues every tick. What is decided
where it waits is withdrawn in the same step, so that it can't be bound while its ending is written.
"""

from __future__ import annotations

from collections.abc import Callable

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.scheduling.choice import Capacity
from dispatcher.scheduling.overload import Overload, OverloadParameters, Shed
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.services.close import Endings
from dispatcher.services.state import LeaderState

MOST_MODELS = 64
"""Models with metrics of their own; more names than any pool serves would only cost Prometheus."""


class Shedder:
    """Turns requests of one pool away.

    Args:
        healthy_s: time during which Redis answered: time without it makes nobody late.
    """

    def __init__(
        self,
        state: LeaderState,
        endings: Endings,
        scheduler: Scheduler,
        *,
        parameters: OverloadParameters,
        healthy_s: Callable[[], float],
    ) -> None:
        self._state = state
        self._endings = endings
        self._scheduler = scheduler
        self._healthy_s = healthy_s
        self._overload = Overload(parameters)
        self._told: set[str] = set()
        self._shown: set[str] = set()

    def tick(self) -> None:
        """Turn away what has waited too long while its model is overloaded."""
        state = self._state
        backlogs = state.window.backlogs
        shed = self._overload.tick(
            backlogs,
            self._capacity_of,
            now_ms=state.clock.now_ms(),
            now_s=state.clock.monotonic(),
            healthy_s=self._healthy_s(),
            any_served=any(node.is_eligible for node in state.fleet.nodes.values()),
        )
        for one in shed:
            self._end(one)
        self._tell()
        self._show()

    def arrival(self, envelope: Envelope) -> Shed | None:
        """How an arriving request is to be refused; None when it may enter."""
        state = self._state
        shed = self._overload.admit(
            envelope,
            state.window.backlogs.get(envelope.model),
            now_ms=state.clock.now_ms(),
            now_s=state.clock.monotonic(),
        )
        if shed is None:
            return None
        if shed.envelope is envelope:
            state.metrics.shed.labels(shed.reason.value).inc()
            return shed
        self._end(shed)
        return None

    def _capacity_of(self, model: str) -> Capacity | None:
        return self._scheduler.capacity(model) if self._state.fleet.serving(model) else None

    def _end(self, shed: Shed) -> None:
        waiting = self._state.withdraw(shed.envelope.ref)
        if waiting is None:
            return
        self._state.metrics.shed.labels(shed.reason.value).inc()
        self._endings.end_withdrawn(
            waiting, OutcomeKind.REJECTED, shed.reason, shed.message, retry_after_ms=shed.retry_after_ms
        )
        self._state.room.set()

    def _tell(self) -> None:
        overloaded = self._overload.overloaded()
        for model in overloaded - self._told:
            self._state.log.warning("model overloaded: requests are turned away", model=model)
        for model in self._told - overloaded:
            self._state.log.info("model no longer overloaded", model=model)
        self._told = overloaded

    def _show(self) -> None:
        """Set the gauges of models that something waits for, or that are overloaded."""
        metrics, backlogs = self._state.metrics, self._state.window.backlogs
        shown: set[str] = set()
        for model in sorted(self._overload.known())[:MOST_MODELS]:
            backlog = backlogs.get(model)
            wait_s = self._overload.predicted_wait_s(model, backlog) if backlog is not None else 0.0
            metrics.overloaded.labels(model).set(model in self._told)
            metrics.predicted_wait_s.labels(model).set(wait_s or 0.0)
            shown.add(model)
        for model in self._shown - shown:
            metrics.overloaded.remove(model)
            metrics.predicted_wait_s.remove(model)
        self._shown = shown
