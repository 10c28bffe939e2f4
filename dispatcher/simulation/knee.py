"""Which rates to simulate to find the knee: the highest at which the fleet still keeps its objectives.

Pure: `search` asks for the attainment at one rate after the other, `knee` reads the crossing off what was
seen. Coarse steps find the first rate that falls short, halving narrows it, a line between the last two says
where: no artefact of the steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from math import sqrt

ATTAINED = 0.9
"""Share of good requests down to which a rate counts as carried (DistServe's)."""
RESOLUTION = 0.02
"""How much higher than the highest rate carried the first one missed may be."""
SHARES = (0.4, 0.6, 0.8, 1.0, 1.2)
"""Shares of what the fleet carries when requests are dealt out in turn."""
RISE = 1.4
"""Beyond, each rate is so many times the one before, while the objectives are kept."""
MOST_RATES = 14
FALLS = 4
"""How often the lowest rate is halved when even that falls short."""


def search(carried: float) -> Generator[float, float, None]:
    """Yield rates to simulate, be sent the share of good requests at each.

    Args:
        carried: the rate that keeps all engines busy when requests are dealt out in turn.
    """
    good = bad = 0.0
    share = SHARES[0]
    for place in range(MOST_RATES):
        share = SHARES[place] if place < len(SHARES) else share * RISE
        rate = told(carried * share)
        if (yield rate) < ATTAINED:
            bad = rate
            break
        good = rate
    if not bad:
        return
    for _ in range(FALLS):
        if good:
            break
        rate = told(bad / 2)
        if (yield rate) < ATTAINED:
            bad = rate
        else:
            good = rate
    while good and bad > good * (1 + RESOLUTION):
        rate = told(sqrt(good * bad))
        if not good < rate < bad:
            return
        if (yield rate) < ATTAINED:
            bad = rate
        else:
            good = rate


def told(rate: float) -> float:
    """A rate as it is reported, so that it can be asked for again."""
    return float(f"{rate:.5g}")


def knee(attained: Iterable[tuple[float, float]]) -> float:
    """The rate at which the share of good requests first falls below `ATTAINED`.

    Args:
        attained: rate and share of good requests, in any order.
    Returns:
        By a straight line between the rates around it; the highest rate when none fell short, 0 when all did.
    """
    last: tuple[float, float] | None = None
    for rate, share in sorted(attained):
        if share < ATTAINED:
            if last is None:
                return 0.0
            return last[0] + (rate - last[0]) * (last[1] - ATTAINED) / (last[1] - share)
        last = (rate, share)
    return last[0] if last is not None else 0.0
