"""What a dispatcher's samples (`sampled`) say: shares of its time, by stage and by function."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

STAGES = (
    ("admission.py:admit", "admit"),
    ("scheduling/fleet.py:longest_prompt", "the longest prompt that any node takes"),
    ("services/intake.py:_take", "window: enter"),
    ("services/intake.py:run", "intake: read"),
    ("services/explain.py:", "explain"),
    ("scheduling/scheduler.py:choose", "choose"),
    ("scheduling/batch_prices.py:", "choose"),
    ("scheduling/window.py:choose", "window: take out"),
    ("services/dispatch.py:_choose", "bind"),
    ("services/dispatch.py:_assign", "assign"),
    ("services/dispatch.py:", "dispatch: the rest"),
    ("services/publish.py:", "publish"),
    ("services/watch.py:", "reports and guard"),
    ("services/registry.py:", "registry"),
    ("aiokafka/", "kafka client"),
    ("consumer/fetcher.py:", "kafka client"),
    ("consumer/", "kafka client"),
    ("producer/", "kafka client"),
    ("services/", "other services"),
)
"""The first that any frame of a stack begins with."""
REST = "event loop and the rest"
SHOWN = 25


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Shares of all samples, largest first."""

    samples: int
    stages: dict[str, float]
    functions: dict[str, float]


def read_stages(path: Path) -> Stages:
    """Shares by stage and by function, of the samples taken."""
    stages: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        text, _, number = line.rpartition(" ")
        frames, count = text.split(";"), int(number)
        if any("importlib" in frame for frame in frames):
            continue
        stages[_stage(frames)] += count
        functions[frames[-1]] += count
    total = sum(stages.values())
    return Stages(
        samples=total,
        stages={name: round(count / total, 4) for name, count in stages.most_common()},
        functions={name: round(count / total, 4) for name, count in functions.most_common(SHOWN)},
    )


def _stage(frames: list[str]) -> str:
    for marker, stage in STAGES:
        if any(frame.startswith(marker) or f"/{marker}" in frame for frame in frames):
            return stage
    return REST
