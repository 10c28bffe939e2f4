"""Five protocol bugs, planted one at a time in what ships: the simulation must catch each.

A check that can't fail proves nothing. Each bug is a small edit of a shipped script or service of the
kind that a hurried change makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from dispatcher.backends.outcome_log import CommitNote, OutcomeLog, Publication
from dispatcher.backends.scripts import Script
from dispatcher.scheduling.progress import SourceProgress
from tests.support.cluster import simulate

SEEDS = 200


def edited(name: str, old: str, new: str) -> dict[str, str]:
    """The source of a shipped script with one edit, which must apply."""
    source = Script(name).source
    assert source.count(old) == 1, f"{name}.lua: expected {old!r} once"
    return {name: source.replace(old, new)}


def no_epoch_check(_: pytest.MonkeyPatch) -> dict[str, str]:
    """A deposed leader's assign goes through."""
    return edited("assign", "if redis.call('GET', KEYS[1]) ~= ARGV[1] then", "if false then")


def commit_before_assign(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """The *assigned* mark counts a request as taken when it was merely read."""
    patch.setattr(SourceProgress, "assigned", property(lambda progress: progress.next_read))
    return {}


def complete_without_attempt(_: pytest.MonkeyPatch) -> dict[str, str]:
    """`complete` accepts an ending whether or not this attempt is still held."""
    return edited(
        "complete",
        "if redis.call('ZREM', KEYS[2], job) == 1 then",
        "redis.call('ZREM', KEYS[2], job)\n  if true then",
    )


def claim_without_ownership(_: pytest.MonkeyPatch) -> dict[str, str]:
    """`claim` serves an incarnation that was fenced."""
    return edited("claim", "if known[1] ~= ARGV[1] or known[2] == ARGV[1] then", "if false then")


def outcome_outside_the_transaction(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Outcomes are sent by a producer of their own, then the marks are committed."""
    shipped = OutcomeLog.publish

    async def publish(
        log: OutcomeLog, records: Sequence[Publication], finished: Mapping[str, int], note: CommitNote
    ) -> dict[int, int]:
        plain: Any = log._kafka.producer(acks="all", enable_idempotence=True)
        await plain.start()
        after: dict[int, int] = {}
        for record in records:
            written = await plain.send_and_wait(log._names.outcomes, record.outcome, key=record.key)
            after[written.partition] = written.offset + 1
        await plain.stop()
        await shipped(log, [], finished, note)
        return after

    patch.setattr(OutcomeLog, "publish", publish)
    return {}


BUGS = [
    no_epoch_check,
    commit_before_assign,
    complete_without_attempt,
    claim_without_ownership,
    outcome_outside_the_transaction,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = plant(monkeypatch)
    for seed in range(SEEDS):
        if simulate(seed, scripts=scripts).violations:
            return
    pytest.fail(f"{plant.__name__} survived {SEEDS} seeds")
