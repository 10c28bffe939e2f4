"""How originals end a decision: the least, by reservoir sampling or a shuffle among equals; or by softmax."""

from __future__ import annotations

import math
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


def sampled(costs: Sequence[float], temperature: float, rng: random.Random) -> int:
    """Return a place by softmax over costs scaled to [0, 1]."""
    low, high = min(costs), max(costs)
    if low == high:
        return int(rng.random() * len(costs))
    scale = (high - low) * temperature
    weights = [math.exp((low - cost) / scale) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]
