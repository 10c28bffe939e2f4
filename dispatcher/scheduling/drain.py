"""How fast the work of a model is taken by nodes: what a wait in the window is predicted from.

Only time during which something waited counts: what is bound while the queue is empty tells of arrivals, not
of capacity. The average forgets exponentially, over ten seconds, or over sixteen requests where these take
longer.
"""

from __future__ import annotations

import math

MEMORY_S = 10.0
MEMORY_REQUESTS = 16
TRUSTED_S = 5.0
TRUSTED_REQUESTS = 8


class Drain:
    """Tokens per second that nodes take of one model."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._requests = 0.0
        self._seconds = 0.0

    @property
    def is_trusted(self) -> bool:
        """Whether enough was seen to predict from."""
        return self._seconds >= TRUSTED_S and self._requests >= TRUSTED_REQUESTS

    @property
    def tokens_per_s(self) -> float:
        """The rate; 0 when nothing was seen."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def observe(self, tokens: int, requests: int, seconds: float) -> None:
        """Learn from a stretch of time during which something waited throughout."""
        memory_s = math.inf
        if self._requests:
            memory_s = max(MEMORY_S, MEMORY_REQUESTS * self._seconds / self._requests)
        kept = math.exp(-seconds / memory_s)
        self._tokens = self._tokens * kept + tokens
        self._requests = self._requests * kept + requests
        self._seconds = self._seconds * kept + seconds

    def scale(self, share: float) -> None:
        """Expect this share of the rate from now on: nodes came or went."""
        self._tokens *= share
