"""Alibaba FlexLB's choice of a prefill engine, as decisions over figures (rtp-llm 4b8d39cd5).

    score = prefill(prompt, hit) + wait        `CostBasedPrefillStrategy`

Engines with `queue_limit` requests pending are out until they are back at `1 - hysteresis` of it. Of the
rest those are dropped that have more than `hotspot_multiplier` times the mean of pending requests, or
`imbalance_multiplier` times the mean wait, and with `slo_s` those whose score leaves less than the margin; if
that drops all, the least wait is kept. Any engine within max(`tie_share`, `tie_s`) of the least score is
taken.

`ShortestTTFTStrategy` takes of the best engines by score the one chosen longest ago: `CandidatePool` says how
many are the best. Where the figures come from is the caller's: the live policies ask the leader's fleet, the
simulator's baseline keeps the original's own account.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CostBased:
    """Constants, the original's defaults; `slo_s` 0 for no filter by it."""

    tie_share: float = 0.1
    tie_s: float = 0.02
    hotspot_multiplier: float = 3.0
    imbalance_multiplier: float = 3.0
    queue_limit: int = 64
    hysteresis: float = 0.15
    slo_s: float = 0.0
    slo_margin_s: float = 0.1

    def is_shut(self, pending: int, *, was_shut: bool) -> bool:
        """Whether an engine's queue is full, or was and has not emptied enough since."""
        return pending >= self.queue_limit or (
            was_shut and pending > self.queue_limit * (1.0 - self.hysteresis)
        )

    def survivors(
        self, waits_s: Sequence[float], pending: Sequence[int], prefills_s: Sequence[float]
    ) -> Sequence[int]:
        """The places of the engines that pass the filters; never none."""
        engines = range(len(waits_s))
        most_pending = self.hotspot_multiplier * sum(pending) / len(pending)
        most_wait_s = self.imbalance_multiplier * sum(waits_s) / len(waits_s)
        kept = [
            place
            for place in engines
            if pending[place] <= most_pending
            and waits_s[place] <= most_wait_s
            and (not self.slo_s or waits_s[place] + prefills_s[place] <= self.slo_s - self.slo_margin_s)
        ]
        return kept or [min(engines, key=waits_s.__getitem__)]

    def choose(
        self,
        waits_s: Sequence[float],
        pending: Sequence[int],
        prefills_s: Sequence[float],
        rng: random.Random,
    ) -> int:
        """The place of any engine whose score is nearly the least."""
        kept = self.survivors(waits_s, pending, prefills_s)
        scores = [waits_s[place] + prefills_s[place] for place in kept]
        return kept[least_within(scores, max(min(scores) * self.tie_share, self.tie_s), rng)]


@dataclass(frozen=True, kw_only=True)
class CandidatePool:
    """How many engines are the best, of which `shortest_ttft` takes the one chosen longest ago."""

    mode: Literal["ratio", "fixed"] = "ratio"
    ratio: float = 0.3
    least: int = 1
    size: int = 1

    def of(self, engines: int) -> int:
        """How many of so many; at least one."""
        wanted = self.size if self.mode == "fixed" else max(self.least, int(engines * self.ratio))
        return max(1, min(engines, wanted))


def least_within(costs: Sequence[float], tolerance: float, rng: random.Random) -> int:
    """The place of any cost that exceeds the least by at most `tolerance`, each as likely."""
    limit = min(costs) + tolerance
    near = [place for place, cost in enumerate(costs) if cost <= limit]
    return near[int(rng.random() * len(near))]
