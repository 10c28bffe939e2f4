"""When each request of a trace is sent: a pure schedule, made before the first one is.

Open loop: the schedule does not depend on answers, so a system that falls behind is seen to fall
behind instead of being offered less.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from random import Random

from dispatcher.errors import SettingsError
from dispatcher.replay.traces import TraceRequest


def schedule(
    requests: Sequence[TraceRequest],
    *,
    speed: float = 1.0,
    limit: int | None = None,
    poisson: Random | None = None,
) -> list[tuple[float, TraceRequest]]:
    """Pair each request with its time of sending, in seconds from the start.

    Args:
        requests: in order of arrival.
        speed: multiple of the recorded pace, above 0.
        limit: only the first so many requests.
        poisson: draws exponential gaps of the trace's mean rate instead of the recorded times.
    Raises:
        SettingsError: a speed or limit out of range.
    """
    if not speed > 0:
        raise SettingsError(f"speed: expected a multiple above 0, seen {speed}")
    if limit is not None and limit < 1:
        raise SettingsError(f"limit: expected at least 1 request, seen {limit}")
    chosen = list(requests[:limit])
    times = spread([request.arrival_s for request in chosen])
    if poisson is not None:
        times = poisson_times(times, poisson)
    return [(time / speed, request) for time, request in zip(times, chosen, strict=True)]


def spread(arrivals_s: Sequence[float]) -> list[float]:
    """Spread arrivals that share a time evenly up to the next one.

    Some traces were recorded in ticks of seconds; sending a whole tick at once would be a burst that
    never happened. Those of the last time are spread over the gap before it.
    """
    times = list(arrivals_s)
    first = 0
    while first < len(times):
        after = bisect_right(times, arrivals_s[first], lo=first)
        if after < len(times):
            gap = arrivals_s[after] - arrivals_s[first]
        else:
            gap = arrivals_s[first] - arrivals_s[first - 1] if first else 0.0
        for place in range(first + 1, after):
            times[place] = arrivals_s[first] + gap * (place - first) / (after - first)
        first = after
    return times


def poisson_times(arrivals_s: Sequence[float], rng: Random) -> list[float]:
    """A Poisson process with the mean rate of `arrivals_s`."""
    if len(arrivals_s) < 2 or arrivals_s[-1] <= arrivals_s[0]:
        return list(arrivals_s)
    rate = (len(arrivals_s) - 1) / (arrivals_s[-1] - arrivals_s[0])
    times = [0.0]
    for _ in arrivals_s[1:]:
        times.append(times[-1] + rng.expovariate(rate))
    return times
