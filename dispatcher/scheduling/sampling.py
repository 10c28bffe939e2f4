"""Sampling: which decisions are explained, by a hash of the request's ref, at a bounded rate.

The same ref is taken by every leader, for every attempt and stage, as long as the rate allows: when more is
decided than may be explained, the share shrinks with it instead of explaining the first of each second.
"""

from __future__ import annotations

import zlib

PERIOD_S = 1.0
"""How long the rate is counted."""
_SPREAD, _MASK = 0x9E3779B1, 0xFFFFFFFF
"""Refs that follow each other have CRCs far from random: multiplied, their upper bits are (Knuth)."""


class Sampler:
    """Says which refs are taken.

    Args:
        share: of all refs, 0 to 1.
        per_s: no more than so many in each second; 0 for none.
    """

    def __init__(self, *, share: float, per_s: float) -> None:
        self._share = share
        self._most = int(per_s * PERIOD_S)
        self._left = self._most
        self._below = int(share * (_MASK + 1))
        self._seen = 0
        self._since_s = float("-inf")

    def begin(self, now_s: float) -> None:
        """Begin a round of decisions."""
        elapsed_s = now_s - self._since_s
        if elapsed_s < PERIOD_S:
            return
        seen_per_period = self._seen * PERIOD_S / elapsed_s
        share = min(self._share, self._most / seen_per_period) if seen_per_period else self._share
        self._below = int(share * (_MASK + 1))
        self._left, self._seen, self._since_s = self._most, 0, now_s

    def takes(self, ref: str) -> bool:
        """Whether the decision about `ref` is to be explained; it counts as explained then."""
        self._seen += 1
        if not self._left or zlib.crc32(ref.encode()) * _SPREAD & _MASK >= self._below:
            return False
        self._left -= 1
        return True
