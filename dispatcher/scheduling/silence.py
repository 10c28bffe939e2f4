"""When a node's silence is charged to it: only time in which Redis and this leader were responsive.

A frozen Redis or a leader that was not scheduled hears nobody; neither may cost a node its work.
Healthy time is the sum of short steps between answers of Redis; a long step counts as nothing.
When many nodes fall silent at once the cause is probably ours, and each gets a second window.
"""

from __future__ import annotations

from collections.abc import Mapping

LONGEST_STEP_S = 0.5


class HealthyClock:
    """Counts healthy seconds: steps of at most `longest_step_s` between two answers."""

    def __init__(self, longest_step_s: float = LONGEST_STEP_S) -> None:
        self._longest_step_s = longest_step_s
        self.now_s = 0.0
        self.trouble_at_s = 0.0
        self._last: float | None = None

    def answered(self, monotonic_s: float) -> None:
        """Redis answered just now."""
        if self._last is not None and monotonic_s - self._last <= self._longest_step_s:
            self.now_s += monotonic_s - self._last
        else:
            self.trouble_at_s = self.now_s
        self._last = monotonic_s

    @property
    def since_trouble_s(self) -> float:
        """Healthy seconds since Redis last failed to answer or this leader was last held up."""
        return self.now_s - self.trouble_at_s

    def failed(self) -> None:
        """Redis did not answer: time since the last answer counts as nothing."""
        self._last = None


def silent_nodes(
    last_heard_s: Mapping[str, float], now_s: float, *, window_s: float, already_warned: set[str]
) -> list[str]:
    """Which nodes to fence now.

    Args:
        last_heard_s: healthy time of each node's last report.
        window_s: silence that costs a node its work.
        already_warned: nodes in their second window; updated here.
    """
    expired = [node for node, heard in last_heard_s.items() if now_s - heard > window_s]
    already_warned &= set(expired)
    if len(expired) > max(3, 0.1 * len(last_heard_s)) and not already_warned.issuperset(expired):
        already_warned |= set(expired)
        return [node for node in expired if now_s - last_heard_s[node] > 2 * window_s]
    return [
        node for node in expired if node not in already_warned or now_s - last_heard_s[node] > 2 * window_s
    ]
