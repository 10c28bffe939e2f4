"""Classic bugs of queues, leases and logs, each a small edit of a script or service that ships.

A check that can't fail proves nothing: the simulation must catch every one of them. `BUGS` holds the edits
in the order in which a request meets what they break; a plant that no longer applies fails loudly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pytest

from dispatcher.app import Dispatcher
from dispatcher.backends.clock import ServerClock
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.backends.outcome_log import CommitNote, Finished, OutcomeLog, Publication
from dispatcher.backends.scripts import Script
from dispatcher.backends.store_view import StoredLedger, StoreView
from dispatcher.errors import LogUnavailable
from dispatcher.scheduling.progress import SourceProgress
from dispatcher.services import recover
from dispatcher.services.failures import Failures
from dispatcher.services.publish import Publish
from tests.support.cluster import simulate

MOST_SEEDS = 400

Plant = Callable[[pytest.MonkeyPatch], dict[str, str]]


@dataclass(frozen=True)
class Caught:
    """The seed that caught a bug, which one that was, and what it saw."""

    seed: int
    seeds: int
    violation: str


def catch(plant: Plant, seeds: Iterable[int]) -> Caught | None:
    """Run `seeds` with one bug planted until one violates an invariant; None when none does."""
    with pytest.MonkeyPatch.context() as patch:
        scripts = plant(patch)
        for count, seed in enumerate(seeds, 1):
            violations = simulate(seed, scripts=scripts, faults=FAULTS.get(plant, ())).violations
            if violations:
                return Caught(seed, count, violations[0])
    return None


def seeds_from(first: int) -> Iterable[int]:
    """`first`, then all others: what a seed means changes with what is simulated."""
    return chain([first], (seed for seed in range(MOST_SEEDS) if seed != first))


def table() -> Iterable[str]:
    """A line for each bug: the seeds run, from 0 on, until it was caught, and what was seen."""
    yield f"{'planted bug':34} {'seeds':>5}  first violation"
    for plant in BUGS:
        caught = catch(plant, range(MOST_SEEDS))
        seen = (
            f"{caught.seeds:5}  {caught.violation[:120]}" if caught else f"{'none':>5}  survived {MOST_SEEDS}"
        )
        yield f"{plant.__name__:34} {seen}"


def edited(name: str, old: str, new: str) -> dict[str, str]:
    """The source of a shipped script with one edit, which must apply."""
    source = Script(name).source
    assert source.count(old) == 1, f"{name}.lua: expected {old!r} once"
    return {name: source.replace(old, new)}


def no_epoch_check(_: pytest.MonkeyPatch) -> dict[str, str]:
    """A deposed leader's assign goes through."""
    return edited("assign", "if redis.call('GET', KEYS[1]) ~= ARGV[1] then", "if false then")


def commit_before_assign(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """The *assigned* mark passes a request when it was merely read."""
    patch.setattr(SourceProgress, "assigned", property(lambda progress: progress.next_read))
    return {}


def assign_not_idempotent(_: pytest.MonkeyPatch) -> dict[str, str]:
    """An assign that is repeated after a lost answer binds the request again."""
    return edited(
        "assign", "if tonumber(offset) < low or redis.call('ZSCORE', above, offset) then", "if false then"
    )


def claim_leaves_the_delivery(_: pytest.MonkeyPatch) -> dict[str, str]:
    """`claim` takes a job without removing the entry that proves it is there to be taken."""
    return edited(
        "claim",
        "if redis.call('LREM', KEYS[4], 1, id) == 1 then take(id) end",
        "take(id)",
    )


def claim_drops_what_has_no_job(_: pytest.MonkeyPatch) -> dict[str, str]:
    """`claim` takes an id whose job was deleted out of the queue and tells nobody."""
    return edited("claim", "    give_back(id, ref, attempt)", "    foreign[#foreign + 1] = {id}")


def retry_believes_in_a_job(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """A failed attempt's request is bound again as it is, whatever became of its job."""
    patch.setattr(Failures, "to_mend", lambda failures, ref: None)
    return {}


def claim_when_fenced(_: pytest.MonkeyPatch) -> dict[str, str]:
    """`claim` serves an incarnation that was fenced."""
    return edited("claim", "if known[1] ~= ARGV[1] or known[2] == ARGV[1] then", "if false then")


def report_when_fenced(_: pytest.MonkeyPatch) -> dict[str, str]:
    """A fenced incarnation's heartbeat counts."""
    return edited("report", "if known[1] ~= ARGV[1] or known[2] == ARGV[1] then", "if false then")


def complete_without_attempt(_: pytest.MonkeyPatch) -> dict[str, str]:
    """`complete` accepts an ending whether or not this attempt is still held."""
    return edited(
        "complete",
        "if redis.call('ZREM', KEYS[2], job) == 1 then",
        "redis.call('ZREM', KEYS[2], job)\n  if true then",
    )


def fence_forgets_the_delivery(_: pytest.MonkeyPatch) -> dict[str, str]:
    """Taking a node's work back moves its queue and what it claimed, not what was between the two."""
    source = Script("requeue").source
    old = "for _, list in ipairs({KEYS[7], KEYS[6]}) do"
    assert source.count(old) == 2, f"requeue.lua: expected {old!r} twice"
    return {
        "requeue": source.replace(old, "redis.call('DEL', KEYS[7])\n  for _, list in ipairs({KEYS[6]}) do")
    }


def settle_before_publish(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """The decision is dropped from Redis before its outcome is committed to Kafka."""
    shipped = Publish._commit

    async def commit(publish: Publish, fresh: Mapping[str, Any], finished: Mapping[str, int]) -> None:
        entries = [(ending.entry, ending.job_to_delete) for ending in fresh.values()]
        await publish._store.settle(publish._positions, entries)
        await shipped(publish, fresh, finished)

    patch.setattr(Publish, "_commit", commit)
    return {}


def finished_without_outcome(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """The *finished* mark is committed as far as was read, as a plain consumer does."""
    patch.setattr(SourceProgress, "finished", property(lambda progress: progress.next_read))
    return {}


def recovery_forgets_closing(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """A new leader counts what is decided and not published as finished."""
    shipped = StoreView.ledger

    async def ledger(view: StoreView) -> StoredLedger:
        return replace(await shipped(view), closing_refs=[])

    patch.setattr(StoreView, "ledger", ledger)
    return {}


def identities_lost_with_redis(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """After a loss of Redis nobody remembers whose (tenant, id) was whose."""

    async def remember(recovery: recover.Recovery, heads: object) -> None:
        """Remember nothing."""

    patch.setattr(recover.Recovery, "_remember", remember)
    return {}


def outcome_outside_the_transaction(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Outcomes are sent by a producer of their own, which no epoch fences; then the marks are committed."""
    shipped = OutcomeLog.publish

    async def send(log: OutcomeLog, records: Sequence[Publication]) -> dict[int, int]:
        plain: Any = log._kafka.producer(acks="all", enable_idempotence=True)
        await plain.start()
        after: dict[int, int] = {}
        for record in records:
            if record.outcome:
                written = await plain.send_and_wait(log._names.outcomes, record.outcome, key=record.key)
                after[written.partition] = written.offset + 1
        await plain.stop()
        return after

    async def publish(
        log: OutcomeLog, records: Sequence[Publication], finished: Mapping[str, int], note: CommitNote
    ) -> dict[int, int]:
        try:
            after = await send(log, records)
        except NO_ANSWER as error:
            raise LogUnavailable(repr(error)) from error
        await shipped(log, [], finished, note)
        return after

    patch.setattr(OutcomeLog, "publish", publish)
    return {}


def rewind_overlooked(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """A Redis that went back in time passes for intact as long as it is the same data set."""

    def is_intact(stored: tuple[str, int], finished: Iterable[Finished], _: object) -> bool:
        return any(mark.note.generation == stored[0] for mark in finished)

    patch.setattr(recover, "_is_intact", is_intact)
    return {}


def deadlines_by_the_own_clock(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """An agent judges deadlines by its host's clock, whatever Redis's says."""

    class DeafClock(ServerClock):
        """Learns nothing."""

        def heard(self, server_ms: int, asked_s: float) -> None:
            """Learn nothing."""

    patch.setattr("workers_agent.app.ServerClock", DeafClock)
    return {}


def leader_by_the_own_clock(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """A leader judges deadlines by its host's clock, whatever Redis's says."""

    def heard(dispatcher: Dispatcher, server_ms: int, asked_s: float) -> None:
        """Learn nothing."""

    patch.setattr(Dispatcher, "_heard", heard)
    return {}


FAULTS: dict[Plant, tuple[str, ...]] = {
    claim_drops_what_has_no_job: ("spoil_jobs",),
    retry_believes_in_a_job: ("spoil_jobs",),
    outcome_outside_the_transaction: ("strike_between_effects", "freeze_dispatcher"),
    rewind_overlooked: ("rewind_redis", "kill_dispatcher"),
    deadlines_by_the_own_clock: ("jump_clock",),
    leader_by_the_own_clock: ("jump_clock",),
}
"""Kinds of fault for bugs that bite in a moment which few seeds of all kinds hit."""

BUGS: dict[Plant, int] = {
    no_epoch_check: 41,
    commit_before_assign: 2,
    assign_not_idempotent: 125,
    claim_leaves_the_delivery: 0,
    claim_drops_what_has_no_job: 1,
    retry_believes_in_a_job: 1,
    claim_when_fenced: 4,
    report_when_fenced: 2,
    complete_without_attempt: 2,
    fence_forgets_the_delivery: 79,
    settle_before_publish: 0,
    outcome_outside_the_transaction: 33,
    rewind_overlooked: 13,
    finished_without_outcome: 0,
    recovery_forgets_closing: 1,
    identities_lost_with_redis: 9,
    deadlines_by_the_own_clock: 1,
    leader_by_the_own_clock: 9,
}
"""Each with the first seed that caught it when this was written: where a test begins to look."""
