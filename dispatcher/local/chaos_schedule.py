"""Which fault strikes when: a pure schedule, made from a seed before the first one is done.

A run is a number of rounds; each round holds every kind once, in an order of its own, so that all kinds come
up equally often. What a schedule can't know (who leads at that moment) is left as a draw in [0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from dispatcher.errors import SettingsError

LEAST_SLOT_S, SLOT_S = 6.0, 8.0
"""Least and usual time from one fault to the next, one at a time."""
OVERLAP_LEAST_SLOT_S, OVERLAP_SLOT_S = 2.5, 3.3
"""The same when faults may overlap."""
CALM_S = 3.0
"""Load without faults before the first one and after the last one's slot."""


class FaultKind(StrEnum):
    """What can be broken, by its name on the command line."""

    KILL_LEADER = "kill-leader"
    FREEZE_LEADER = "freeze-leader"
    KILL_STANDBY = "kill-standby"
    FREEZE_STANDBY = "freeze-standby"
    RESTART_DISPATCHER = "restart-dispatcher"
    KILL_AGENT = "kill-agent"
    FREEZE_AGENT = "freeze-agent"
    RESTART_AGENT = "restart-agent"
    KILL_ENGINE = "kill-engine"
    FREEZE_ENGINE = "freeze-engine"
    STALL_ENGINE = "stall-engine"
    FAIL_ENGINE = "fail-engine"
    SLOW_ENGINE = "slow-engine"
    CRASH_ENGINE = "crash-engine"
    KILL_REDIS = "kill-redis"
    FREEZE_REDIS = "freeze-redis"
    LOSE_REDIS = "lose-redis"
    REFUSE_REDIS = "refuse-redis"
    FAILOVER_REDIS = "failover-redis"
    SLOW_DISK_REDIS = "slow-disk-redis"
    KILL_KAFKA = "kill-kafka"
    FREEZE_KAFKA = "freeze-kafka"
    CUT_KAFKA = "cut-kafka"
    SLOW_KAFKA = "slow-kafka"
    SLOW_DISK_KAFKA = "slow-disk-kafka"
    CUT_AGENT = "cut-agent"
    SLOW_AGENT = "slow-agent"
    CUT_DISPATCHER = "cut-dispatcher"
    SLOW_DISPATCHER = "slow-dispatcher"


NETWORK = frozenset(
    {FaultKind.CUT_AGENT, FaultKind.SLOW_AGENT, FaultKind.CUT_DISPATCHER, FaultKind.SLOW_DISPATCHER}
)
"""Kinds that need members to reach Redis through a proxy of ours."""
KAFKA_NETWORK = frozenset({FaultKind.CUT_KAFKA, FaultKind.SLOW_KAFKA})
"""Kinds that need everybody to reach Kafka through a proxy of ours, whose address the broker hands out."""
SLOW_DISKS = frozenset({FaultKind.SLOW_DISK_REDIS, FaultKind.SLOW_DISK_KAFKA})
"""Kinds that need strace, and the right to trace."""
STANDBY = frozenset({FaultKind.KILL_STANDBY, FaultKind.FREEZE_STANDBY})
"""Kinds that need a second dispatcher."""

LASTS_S: dict[FaultKind, tuple[float, float]] = {
    FaultKind.KILL_LEADER: (0.5, 2.0),
    FaultKind.FREEZE_LEADER: (4.0, 5.0),
    FaultKind.KILL_STANDBY: (0.5, 2.0),
    FaultKind.FREEZE_STANDBY: (4.0, 5.0),
    FaultKind.RESTART_DISPATCHER: (0.0, 1.0),
    FaultKind.KILL_AGENT: (0.5, 3.0),
    FaultKind.FREEZE_AGENT: (3.0, 5.0),
    FaultKind.RESTART_AGENT: (0.0, 1.0),
    FaultKind.KILL_ENGINE: (0.5, 3.0),
    FaultKind.FREEZE_ENGINE: (4.0, 5.0),
    FaultKind.STALL_ENGINE: (1.0, 3.0),
    FaultKind.FAIL_ENGINE: (1.0, 4.0),
    FaultKind.SLOW_ENGINE: (2.0, 4.0),
    FaultKind.CRASH_ENGINE: (2.0, 3.0),
    FaultKind.KILL_REDIS: (0.2, 2.0),
    FaultKind.FREEZE_REDIS: (3.0, 3.0),
    FaultKind.LOSE_REDIS: (0.2, 2.0),
    FaultKind.REFUSE_REDIS: (1.0, 4.0),
    FaultKind.FAILOVER_REDIS: (0.5, 2.0),
    FaultKind.SLOW_DISK_REDIS: (3.0, 5.0),
    FaultKind.KILL_KAFKA: (0.2, 1.0),
    FaultKind.FREEZE_KAFKA: (1.0, 4.0),
    FaultKind.CUT_KAFKA: (1.0, 4.0),
    FaultKind.SLOW_KAFKA: (3.0, 5.0),
    FaultKind.SLOW_DISK_KAFKA: (3.0, 5.0),
    FaultKind.CUT_AGENT: (1.0, 4.0),
    FaultKind.SLOW_AGENT: (2.0, 4.0),
    FaultKind.CUT_DISPATCHER: (1.0, 5.0),
    FaultKind.SLOW_DISPATCHER: (2.0, 4.0),
}
"""How long each lasts, from and to, before what was broken is mended or started again. The TTLs are 3 s for a
leader and 2 s for an agent; an engine is given up after 3 s without a token. A primary that failed over is
started again so long after another took its place."""


@dataclass(frozen=True, kw_only=True)
class PlannedFault:
    """One fault: when, counted from the start of the load, for how long, and the draw of its victim."""

    at_s: float
    kind: FaultKind
    lasts_s: float
    draw: float

    def victim(self, candidates: int) -> int:
        """The index of its victim among so many candidates."""
        return min(int(self.draw * candidates), candidates - 1)


def plan_faults(
    seed: int, seconds: float, kinds: Sequence[FaultKind], *, overlap: bool
) -> list[PlannedFault]:
    """Plan the faults of a run of `seconds`.

    Args:
        kinds: those to choose from; each comes up equally often, whatever their order here.
        overlap: strike more than twice as often, whether or not the one before is mended.
    Raises:
        SettingsError: the run is too short to have every kind once.
    """
    chosen = sorted(set(kinds))
    rng = Random(seed)
    usable_s = seconds - 2 * CALM_S
    least_s, usual_s = (OVERLAP_LEAST_SLOT_S, OVERLAP_SLOT_S) if overlap else (LEAST_SLOT_S, SLOT_S)
    if usable_s < least_s * len(chosen):
        needed = (least_s * len(chosen) + 2 * CALM_S) / 60
        raise SettingsError(
            f"--minutes: expected at least {needed:.2f} for {len(chosen)} kinds of fault, seen "
            f"{seconds / 60:.2f}; give more minutes, or fewer kinds by --faults"
        )
    rounds = max(1, int(usable_s / (usual_s * len(chosen))))
    slot_s = usable_s / (rounds * len(chosen))
    planned: list[PlannedFault] = []
    for _ in range(rounds):
        for kind in rng.sample(chosen, len(chosen)):
            planned.append(
                PlannedFault(
                    at_s=CALM_S + (len(planned) + 0.1 * rng.random()) * slot_s,
                    kind=kind,
                    lasts_s=rng.uniform(*LASTS_S[kind]),
                    draw=rng.random(),
                )
            )
    return planned
