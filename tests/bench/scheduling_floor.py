"""What no policy can beat: each request alone on an engine, each prefix that came before in its cache.

Held against the best baseline's figures it tells how much is left for any policy to gain.
"""

from __future__ import annotations

from itertools import zip_longest

from msgspec import Struct

from dispatcher.simulation.fleet_report import times_ms
from dispatcher.simulation.fleet_workload import FleetWorkload, Turn
from dispatcher.simulation.goodput import cold_prefill_s
from dispatcher.simulation.profile import Profile


class Floor(Struct, frozen=True, kw_only=True):
    """The least mean and 99th percentile of the times to the first token, and the most of prompts cached."""

    ttft_mean_ms: float
    ttft_p99_ms: float
    hit_ratio: float


def floor_of(workload: FleetWorkload, profile: Profile) -> Floor:
    """The floor of a workload: one cache for all, which forgets nothing and has each block once it was sent.

    Of sessions the first turns come first, then the second ones: each block is computed once, whenever.
    """
    sent: set[int] = set()
    seconds, hits, prompts = [], 0, 0
    for turn in _in_order(workload):
        cached = 0
        for block in turn.blocks:
            if block not in sent:
                break
            cached += workload.block_tokens
        cached = min(cached, turn.prompt_tokens - 1)
        sent.update(turn.blocks)
        seconds.append(cold_prefill_s(profile, turn.prompt_tokens, cached))
        hits += cached
        prompts += turn.prompt_tokens
    times = times_ms(seconds)
    return Floor(ttft_mean_ms=times.mean, ttft_p99_ms=times.p99, hit_ratio=round(hits / prompts, 4))


def _in_order(workload: FleetWorkload) -> list[Turn]:
    return [turn for turns in zip_longest(*workload.sessions) for turn in turns if turn is not None]
