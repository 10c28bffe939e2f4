"""Whether it is the nodes that fail, or the request.

A node is *ailing* while its breaker is not closed and it failed at least two different requests since it
last answered one: a single bad request opens breakers too, and must not pass for an outage. It is *down* when
it is ailing or its agent says that the engine does not work. One poison ends after two engines, so that
three engines down at once are not its doing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dispatcher.scheduling.fleet import NodeState

MOST_BY_ONE_POISON = 2


@dataclass(frozen=True, kw_only=True)
class Outage:
    """How many of a model's living nodes are ailing or down."""

    nodes: int = 0
    ailing: int = 0
    down: int = 0

    @property
    def excuses_failure(self) -> bool:
        """Whether a failure is held against no request: more than half of the nodes fail whatever comes."""
        return 2 * self.ailing > self.nodes

    @property
    def excuses_crash(self) -> bool:
        """Whether a crash is held against no request: more engines are down than one poison could kill."""
        return 2 * self.down > self.nodes and self.down > MOST_BY_ONE_POISON


NO_OUTAGE = Outage()


def outage_of(nodes: Iterable[NodeState]) -> Outage:
    """Count what is wrong with the nodes of a model; those without a living agent are no part of it."""
    count = ailing = down = 0
    for node in nodes:
        if not node.available:
            continue
        count += 1
        is_ailing = node.breaker.is_ailing
        ailing += is_ailing
        down += is_ailing or (node.report is not None and not node.report.engine_ok)
    return Outage(nodes=count, ailing=ailing, down=down)
