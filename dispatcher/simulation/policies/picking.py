"""Least, and equal to the least: how most originals end a decision, by reservoir sampling or a shuffle."""

from __future__ import annotations

import random
from collections.abc import Sequence


def least(costs: Sequence[float], rng: random.Random) -> int:
    """Return the place of the least cost; among equals any, each as likely."""
    best = min(costs)
    equals = costs.count(best)
    place = costs.index(best)
    if equals > 1:
        for _ in range(int(rng.random() * equals)):
            place = costs.index(best, place + 1)
    return place


def least_within(costs: Sequence[float], tolerance: float, rng: random.Random) -> int:
    """Return the place of any cost that exceeds the least by at most `tolerance`, each as likely."""
    limit = min(costs) + tolerance
    near = [place for place, cost in enumerate(costs) if cost <= limit]
    return near[int(rng.random() * len(near))]
