"""The retry budget of a pool: what failed may be tried again only as often as tokens come in.

As Finagle's RetryBudget: a share of a token for each request bound for the first time, kept for ten seconds,
and a floor per second, so that a pool without traffic retries too. Beyond it, each answered retry brings two
tokens: what waits after an outage comes back by doubling while it succeeds, and not at all while it
fails. The budget delays, it never fails a request.
"""

from __future__ import annotations

from collections import deque

KEPT_S = 10
"""Seconds for which a token may be spent."""
SOON_S = 0.001
"""The least that is waited for a token: rounding may leave one a little short for ever."""
ANSWERED_TOKENS = 2.0
"""Of an answered retry: its own back, and one for another."""


class RetryBudget:
    """Tokens for retries of one pool.

    Args:
        share: tokens per request bound for the first time.
        floor_per_s: tokens per second whatever is bound; above 0, or nothing would ever be retried again.
    """

    def __init__(self, *, share: float = 0.2, floor_per_s: float = 10.0) -> None:
        self._share = share
        self._floor_per_s = floor_per_s
        self._floor = max(1.0, floor_per_s * KEPT_S)
        self._floor_at_s: float | None = None
        self._slices: deque[list[float]] = deque()

    def bound(self, now_s: float) -> None:
        """Note a request that was bound for the first time."""
        self._deposit(self._share, now_s)

    def answered(self, now_s: float) -> None:
        """Note a retry that was answered."""
        self._deposit(ANSWERED_TOKENS, now_s)

    def take(self, now_s: float) -> bool:
        """Take a token for one retry; False when there is none."""
        self._refill(now_s)
        if self._floor + sum(tokens for _, tokens in self._slices) < 1:
            return False
        needed = 1.0
        while self._slices and needed > 0:
            tokens = self._slices[0][1]
            if tokens > needed:
                self._slices[0][1] -= needed
                return True
            needed -= tokens
            self._slices.popleft()
        self._floor -= needed
        return True

    def tokens(self, now_s: float) -> float:
        """What could be taken now."""
        self._refill(now_s)
        return self._floor + sum(tokens for _, tokens in self._slices)

    def next_s(self, now_s: float) -> float:
        """Seconds until the floor alone gives a token; 0 when there is one."""
        missing = 1.0 - self.tokens(now_s)
        return max(SOON_S, missing / self._floor_per_s) if missing > 0 else 0.0

    def _deposit(self, tokens: float, now_s: float) -> None:
        second = float(int(now_s))
        if self._slices and self._slices[-1][0] == second:
            self._slices[-1][1] += tokens
        else:
            self._slices.append([second, tokens])
            self._expire(now_s)

    def _refill(self, now_s: float) -> None:
        if self._floor_at_s is not None:
            grown = self._floor + (now_s - self._floor_at_s) * self._floor_per_s
            self._floor = min(max(1.0, self._floor_per_s * KEPT_S), grown)
        self._floor_at_s = now_s
        self._expire(now_s)

    def _expire(self, now_s: float) -> None:
        while self._slices and now_s - self._slices[0][0] > KEPT_S:
            self._slices.popleft()
