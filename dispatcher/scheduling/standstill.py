"""Whether a partition's readers of committed records are held up: its stable end stands still before its end.

A leader's own transactions end within moments, and each moves the stable end.
"""

from __future__ import annotations

from collections.abc import Mapping


class Standstill:
    """Follows the ends of a topic's partitions from look to look."""

    def __init__(self) -> None:
        self._since_s: dict[int, tuple[int, float]] = {}

    def look(self, ends: Mapping[int, tuple[int, int]], now_s: float) -> dict[int, float]:
        """Take one look: by partition its stable end and its end.

        Returns:
            For how many seconds each has been seen held up at the same offset; 0 for those that are not.
        """
        for partition, (stable, end) in ends.items():
            known = self._since_s.get(partition)
            if stable >= end:
                self._since_s.pop(partition, None)
            elif known is None or known[0] != stable:
                self._since_s[partition] = stable, now_s
        return {
            partition: now_s - self._since_s[partition][1] if partition in self._since_s else 0.0
            for partition in ends
        }
