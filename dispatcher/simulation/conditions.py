"""What may be amiss in a simulated fleet: slow nodes, late reports, lost block events, a wrong profile."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from msgspec import Struct

from dispatcher.simulation.profile import Profile

COEFFICIENTS = (
    "fixed_s",
    "prefill_token_s",
    "attention_s",
    "prefill_context_s",
    "decode_sequence_s",
    "decode_context_s",
)
"""What a step's time is made of."""


class Conditions(Struct, frozen=True, kw_only=True):
    """Of one run. Nothing is amiss by default.

    `slow_share` of the nodes work at `slow_factor` of the profile's speed; loads that nodes report arrive
    `report_delay_s` later than they would; `dropped_kv_events` is the share of block events lost. Each
    coefficient of the engines' steps is the profile's times a factor from 1 - `perturbed` to 1 + `perturbed`.
    """

    slow_share: float = 0.0
    slow_factor: float = 1.0
    report_delay_s: float = 0.0
    dropped_kv_events: float = 0.0
    perturbed: float = 0.0

    def speeds(self, nodes: int, seed: int) -> list[float]:
        """How fast each node is: 1 is the profile's speed."""
        slow = set(_chance(seed, "slow nodes").sample(range(nodes), round(self.slow_share * nodes)))
        return [self.slow_factor if node in slow else 1.0 for node in range(nodes)]

    def engine(self, profile: Profile, seed: int) -> Profile:
        """What the engines are like where nobody but the profile says how they are."""
        if not self.perturbed:
            return profile
        chance = _chance(seed, "perturbed profile")
        factors = {name: chance.uniform(1 - self.perturbed, 1 + self.perturbed) for name in COEFFICIENTS}
        return replace(profile, **{name: factors[name] * getattr(profile, name) for name in COEFFICIENTS})

    def losses(self, seed: int) -> Random:
        """The chance by which events are lost: its own, so that routers draw as they would without."""
        return _chance(seed, "lost events")

    def __str__(self) -> str:
        parts = []
        if self.slow_share:
            parts.append(f"{self.slow_share:.0%} of the nodes at {self.slow_factor:g} of the speed")
        if self.report_delay_s:
            parts.append(f"load reports {self.report_delay_s:g} s late")
        if self.dropped_kv_events:
            parts.append(f"{self.dropped_kv_events:.0%} of block events lost")
        if self.perturbed:
            parts.append(f"engines' coefficients up to {self.perturbed:.0%} off the profile")
        return ", ".join(parts)


def _chance(seed: int, what: str) -> Random:
    return Random(f"{what} {seed}")
