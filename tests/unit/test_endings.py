"""The leader's own endings: many at once, each written, none of them waiting for another for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.backends.leader_lock import Lease
from dispatcher.backends.leader_store import LeaderStore
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Attempt, JobId, Names, Ref
from dispatcher.protocol.outcome import OutcomeKind, Reason
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.progress import SourceProgress
from dispatcher.services.close import BACKLOG, BATCH, LOST_S, Endings
from dispatcher.services.state import Bound, LeaderState
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics
from tests.support.wait import wait_until

CLOCK = Clock()


class ClosingRedis:
    """A Redis client whose `close` answers as `answer` says of each item's kind and identity."""

    def __init__(self, answer: Callable[[str, str], str]) -> None:
        self.places: list[str] = []
        self.written: list[tuple[str, str]] = []
        self._answer = answer

    async def evalsha(self, digest: str, keys: int, *fields: object) -> list[object]:
        """One call of close.lua."""
        await asyncio.sleep(0)
        items = [str(field) for field in fields[keys + 6 :]]
        answers = []
        for at in range(0, len(items), 11):
            ref, kind, identity = items[at + 1], items[at + 6], items[at + 9]
            self.places.append(items[at])
            answers.append(self._answer(kind, identity))
            if answers[-1] == "ok":
                self.written.append((ref, kind))
        return [1, [answer.encode() for answer in answers]]


def leader_state(clock: Clock = CLOCK) -> LeaderState:
    """A leader that has read nothing yet."""
    return LeaderState(
        names=Names(),
        fleet=Fleet(),
        index=PrefixIndex(),
        clock=clock,
        rng=random.Random(0),
        metrics=DispatcherMetrics(CollectorRegistry()),
        log=Log(),
        progress={"i0": SourceProgress(next_read=0)},
    )


async def test_repeats_of_refused_requests_do_not_hold_up_a_full_queue_of_endings() -> None:
    redis = ClosingRedis(lambda kind, identity: "dup|i0_999999|same" if identity else "ok")
    state = leader_state()
    lease = Lease("1:me", until=CLOCK.monotonic() + 3600, clock=CLOCK.monotonic)
    endings = Endings(state, LeaderStore(ScriptRunner(redis), state.names, lease))
    count = BACKLOG + 2 * BATCH

    async def refuse(offset: int) -> None:
        state.progress["i0"].read(offset)
        await endings.refuse(
            Ref.parse(f"i0_{offset}"),
            id=f"r{offset}",
            tenant="",
            fingerprint="same",
            reason=Reason.OVERLOADED,
            message="",
            appended_ms=0,
            topic="",
            record=None,
        )

    async with asyncio.TaskGroup() as group:
        writing = group.create_task(endings.run())
        for offset in range(count):
            group.create_task(refuse(offset))
        await wait_until(lambda: len(redis.written) == count, "every ending to be written")
        writing.cancel()
    assert {kind for _, kind in redis.written} == {"none"}
    assert state.progress["i0"].finished == count


async def test_a_request_counts_as_lost_only_once_all_endings_before_were_read() -> None:
    now_s = 100.0
    clock = Clock(monotonic=lambda: now_s)
    redis = ClosingRedis(lambda kind, identity: "already")
    state = leader_state(clock)
    lease = Lease("1:me", until=now_s + 3600, clock=clock.monotonic)
    endings = Endings(state, LeaderStore(ScriptRunner(redis), state.names, lease))
    ref = Ref.parse("i0_0")
    envelope = Envelope(ref=str(ref), id="r", model="m")
    job = JobId("default", "n", ref, Attempt(1, 1))
    state.bind(str(ref), Bound(envelope=envelope, job=job, failures=0, excluded=()))
    writing = asyncio.create_task(endings.run())

    async def next_place() -> str:
        asked = len(redis.places)
        await endings.carry_out()
        await wait_until(lambda: len(redis.places) > asked, "the ending to be asked for")
        return redis.places[-1]

    endings.doom(envelope, OutcomeKind.EVICTED, Reason.DEADLINE_EXCEEDED, "")
    assert await next_place() == "job"
    now_s += 2 * LOST_S
    assert await next_place() == "job", "its own ending may wait behind a transaction that takes so long"
    state.closing_read_s = now_s
    assert await next_place() == "lost"
    writing.cancel()
    await asyncio.wait([writing])
