"""Predicted prefill time of a prompt on a node, learned from what prefills really took.

`seconds = scale * (a + b*u + d*u*(u + 2c))` for u tokens to compute after c cached ones: a fixed part, work
linear in the tokens, and attention, which for causal prefill grows with u*(u + 2c)/2 pairs of tokens.

The shape (a, b, d) belongs to a model and is learned from all nodes that serve it: long prompts are rare, and
one node alone would not see enough of them to know attention from work. The scale is a node's own: how much
slower than the shape it was of late, whatever the cause. The coefficients follow by recursive least squares
with forgetting (Haykin, "Adaptive Filter Theory", ch. 10), of errors as shares of the prediction, and are
kept within bounds: a few odd observations can't make a node look free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FORGETTING = 0.998
FIRST_VARIANCE = 2500.0
"""Of each coefficient, in units of its starting value squared and of the observations' own variance (a tenth
squared): it may be five times its starting value before anything was observed."""
SHORTEST_PREFILL_S = 1e-5
LONGEST_PREFILL_S = 600.0
OUTLIER = 8.0
"""An observation this many times off its prediction tells of something else (a stall): it is clipped."""
TRUSTED_AFTER = 8
"""Observations after which predictions are good enough to tell outliers by."""
SHAPED_AFTER = 100
"""Observations of all nodes after which a new one's first is told by the shape."""
GRAIN_S = 0.01
"""Waits for a step that is under way, which no prompt's length explains: below, errors count for less."""
LEAST_GAIN = 0.05
"""How far a node's scale follows its last prefill."""
USUAL_GAIN = 0.02
ANCHOR = 0.05
"""The shape takes over what the scales of all nodes have in common, by no more than this share at a time."""
SLOWEST, FASTEST = 1e3, 1e-3
REMEMBERED_ANSWERS = 500
FIRST_ANSWER = 100
"""How long answers are taken to be at least before any was seen: a request may allow one token, or none."""


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


class PrefillShape:
    """What a model's prefills cost beside each other, from all of its nodes. `version` counts its changes.

    `usual` is the scale that its nodes have: a new one's is that until it shows its own.
    """

    def __init__(self, start: PrefillCost = START) -> None:
        self.cost = start
        self.version = 0
        self.usual = 1.0
        self._scale = (start.fixed_s, start.token_s, start.attention_s)
        self._weights = [1.0, 1.0, 1.0]
        self._covariance = [[FIRST_VARIANCE if i == j else 0.0 for j in range(3)] for i in range(3)]

    def observe(self, uncached_tokens: int, cached_tokens: int, seconds: float) -> None:
        """Learn from one prefill, its node's scale taken out."""
        predicted = self.cost.seconds(uncached_tokens, cached_tokens)
        if self.version >= TRUSTED_AFTER:
            seconds = min(max(seconds, predicted / OUTLIER), OUTLIER * predicted)
        grain = predicted + GRAIN_S
        pairs = uncached_tokens * (uncached_tokens + 2 * cached_tokens)
        fixed, token, attention = self._scale
        features = (fixed / grain, token * uncached_tokens / grain, attention * pairs / grain)
        covariance, weights = self._covariance, self._weights
        spread = [sum(row[j] * features[j] for j in range(3)) for row in covariance]
        gain_divisor = FORGETTING + sum(features[i] * spread[i] for i in range(3))
        error = seconds / grain - sum(weights[i] * features[i] for i in range(3))
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
        self.version += 1

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


class Predictor:
    """One node's prefill times.

    Args:
        shape: of its model, shared with its peers.
    """

    def __init__(self, shape: PrefillShape | None = None) -> None:
        self.shape = shape if shape is not None else PrefillShape()
        self.scale = self.shape.usual
        self.observations = 0
        self._cost = self.shape.cost
        self._of: tuple[int, float] = (self.shape.version, 1.0)

    @property
    def cost(self) -> PrefillCost:
        """What prefills cost here."""
        of = (self.shape.version, self.scale)
        if of != self._of:
            shape, scale = self.shape.cost, self.scale
            self._cost = PrefillCost(
                fixed_s=scale * shape.fixed_s,
                token_s=scale * shape.token_s,
                attention_s=scale * shape.attention_s,
            )
            self._of = of
        return self._cost

    def observe(self, uncached_tokens: int, cached_tokens: int, seconds: float) -> None:
        """Learn from one prefill; what can't be one (no tokens, too short, too long) is ignored."""
        if uncached_tokens < 1 or cached_tokens < 0 or not SHORTEST_PREFILL_S <= seconds <= LONGEST_PREFILL_S:
            return
        predicted = self.shape.cost.seconds(uncached_tokens, cached_tokens)
        ratio = seconds / predicted
        if self.observations >= TRUSTED_AFTER or self.shape.version >= SHAPED_AFTER:
            # Also a first prefill, which often takes a warm-up: a node that looks dead gets no second one.
            ratio = min(max(ratio, self.scale / OUTLIER), self.scale * OUTLIER)
        gain = max(LEAST_GAIN, 1.0 / (self.observations + 1)) * predicted / (predicted + GRAIN_S)
        self.scale = min(max(self.scale + gain * (ratio - self.scale), FASTEST), SLOWEST)
        shape = self.shape
        shape.usual += USUAL_GAIN * (self.scale - shape.usual)
        # Scales and shape are determined only together: without the last factor they drift apart for ever.
        anchor = min(max(shape.usual**0.1, 1 - ANCHOR), 1 + ANCHOR)
        shape.observe(uncached_tokens, cached_tokens, anchor * ratio * predicted / self.scale)
        self.observations += 1


class AnswerLength:
    """How long a model's answers are, in tokens: the mean of about the last `REMEMBERED_ANSWERS`."""

    def __init__(self) -> None:
        self.mean: float | None = None
        self._seen = 0

    def observe(self, tokens: int) -> None:
        """Learn from one answer."""
        if tokens > 0:
            self._seen += 1
            mean = self.mean if self.mean is not None else 0.0
            self.mean = mean + (tokens - mean) / min(self._seen, REMEMBERED_ANSWERS)

    def typical(self, most: int) -> float:
        """What an answer has by experience; before any was seen, what one may have."""
        return max(1.0, self.mean if self.mean is not None else max(most, FIRST_ANSWER))

    def expected(self, most: int) -> int:
        """What an answer of at most so many tokens is expected to have: all of them before any was seen."""
        return most if self.mean is None else min(most, math.ceil(self.mean))
