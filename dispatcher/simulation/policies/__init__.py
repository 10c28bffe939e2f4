"""The field's routing policies after their originals, to be simulated side by side with ours.

`BY_NAME` makes each from keyword arguments, its tunable constants; `TUNABLE` lists the values of each
constant worth trying, the original's default first, so that each can be shown at its best. What each is taken
from, what it sees and where it differs from its original: `dispatcher/docs/simulation.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dispatcher.simulation.policies.base import Arrival, Policy, Signal, World
from dispatcher.simulation.policies.blind import Random, RoundRobin

BY_NAME: dict[str, Callable[..., Policy]] = {
    "random": Random,
    "round_robin": RoundRobin,
}

TUNABLE: dict[str, dict[str, tuple[Any, ...]]] = {
    "random": {},
    "round_robin": {},
}

__all__ = ["BY_NAME", "TUNABLE", "Arrival", "Policy", "Signal", "World"]
