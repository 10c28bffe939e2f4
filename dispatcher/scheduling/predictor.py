"""Predicted prefill time of a prompt on a node, learned from what prefills really took.

`seconds = a + b*u + d*u*(u + 2c)` for u tokens to compute after c cached ones: a fixed part, work linear
in the tokens, and attention, which for causal prefill grows with u*(u + 2c)/2 pairs of tokens. The
coefficients follow by recursive least squares with forgetting (Haykin, "Adaptive Filter Theory", ch. 10),
weighted by 1/seconds^2 so that errors count as shares, and are kept within bounds: a few odd
observations can't make a node look free.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGETTING = 0.98
FIRST_VARIANCE = 25.0
"""Of each coefficient, in units of its starting value squared: how far the first observations move it."""
SHORTEST_PREFILL_S = 1e-5
LONGEST_PREFILL_S = 600.0
OUTLIER = 8.0
"""An observation this many times above its prediction tells of something else (a stall): it is clipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillCost:
    """Coefficients: seconds, seconds per token, seconds per token squared."""

    fixed_s: float
    token_s: float
    attention_s: float

    def seconds(self, uncached_tokens: int, cached_tokens: int) -> float:
        """Time to compute `uncached_tokens` after `cached_tokens`."""
        pairs = uncached_tokens * (uncached_tokens + 2 * cached_tokens)
        return self.fixed_s + self.token_s * uncached_tokens + self.attention_s * pairs


START = PrefillCost(fixed_s=0.005, token_s=1e-4, attention_s=1e-10)
"""Before anything was observed: 10,000 tokens a second, as a 7-8B model computes on one mid-range GPU."""


class Predictor:
    """One node's prefill times."""

    def __init__(self, start: PrefillCost = START) -> None:
        self.cost = start
        self._start = start
        self._scale = (start.fixed_s, start.token_s, start.attention_s)
        self._weights = [1.0, 1.0, 1.0]
        self._covariance = [[FIRST_VARIANCE if i == j else 0.0 for j in range(3)] for i in range(3)]
        self.observations = 0

    def observe(self, uncached_tokens: int, cached_tokens: int, seconds: float) -> None:
        """Learn from one prefill; what can't be one (no tokens, too short, too long) is ignored."""
        if uncached_tokens < 1 or cached_tokens < 0 or not SHORTEST_PREFILL_S <= seconds <= LONGEST_PREFILL_S:
            return
        if self.observations >= 8:
            seconds = min(seconds, OUTLIER * self.cost.seconds(uncached_tokens, cached_tokens))
        pairs = uncached_tokens * (uncached_tokens + 2 * cached_tokens)
        fixed, token, attention = self._scale
        features = [fixed / seconds, token * uncached_tokens / seconds, attention * pairs / seconds]
        covariance, weights = self._covariance, self._weights
        spread = [sum(row[j] * features[j] for j in range(3)) for row in covariance]
        gain_divisor = FORGETTING + sum(features[i] * spread[i] for i in range(3))
        error = 1.0 - sum(weights[i] * features[i] for i in range(3))
        for i in range(3):
            weights[i] += spread[i] / gain_divisor * error
        for i in range(3):
            for j in range(3):
                covariance[i][j] = (covariance[i][j] - spread[i] * spread[j] / gain_divisor) / FORGETTING
        # What is not excited for long must not grow without bound under forgetting.
        largest = max(covariance[i][i] for i in range(3))
        if largest > 4 * FIRST_VARIANCE:
            shrink = 4 * FIRST_VARIANCE / largest
            self._covariance = [[value * shrink for value in row] for row in covariance]
        self._bound()
        self.observations += 1

    def _bound(self) -> None:
        """Keep each coefficient possible: none negative, tokens never free nor slower than 100 a second."""
        fixed, token, attention = self._scale
        weights = self._weights
        weights[0] = min(max(weights[0], 0.0), 1.0 / fixed)
        weights[1] = min(max(weights[1], 1e-7 / token), 1e-2 / token)
        weights[2] = min(max(weights[2], 0.0), 1e-6 / attention)
        self.cost = PrefillCost(
            fixed_s=weights[0] * fixed, token_s=weights[1] * token, attention_s=weights[2] * attention
        )
