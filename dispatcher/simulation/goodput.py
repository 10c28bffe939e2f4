"""When a request is good, by both of DistServe's objectives: its first token and those after it in time.

A first token may take some times what its prompt takes on an idle engine with an empty cache, and never has
less than a floor: one number for all would ask the impossible of long prompts, or nothing of short ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from dispatcher.simulation.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """TTFT within the larger of `ttft_floor_s` and `ttft_times` the cold prefill, TPOT within `tpot_s`."""

    ttft_floor_s: float = 1.0
    ttft_times: float = 3.0
    tpot_s: float = 0.05

    def judge(self, profile: Profile) -> Callable[[float, float, int], bool]:
        """Return what tells whether an answer was good, of its TTFT and TPOT (seconds) and prompt tokens."""

        @cache
        def limit_s(prompt_tokens: int) -> float:
            return max(self.ttft_floor_s, self.ttft_times * cold_prefill_s(profile, prompt_tokens))

        return lambda ttft_s, tpot_s, prompt_tokens: (
            tpot_s <= self.tpot_s and ttft_s <= limit_s(prompt_tokens)
        )

    def __str__(self) -> str:
        return (
            f"TTFT within {1000 * self.ttft_floor_s:g} ms or {self.ttft_times:g} x the cold prefill, "
            f"TPOT within {1000 * self.tpot_s:g} ms"
        )


def cold_prefill_s(profile: Profile, prompt_tokens: int, cached_tokens: int = 0) -> float:
    """Seconds from sending a prompt to an idle engine, of which so much is cached, until its first token."""
    passed_s, computed = profile.request_s, cached_tokens
    while computed < prompt_tokens:
        count = min(prompt_tokens - computed, profile.max_batched_tokens)
        passed_s += profile.step_s(count, count * (count + 2 * computed), computed, 0, 0)
        computed += count
    return passed_s
