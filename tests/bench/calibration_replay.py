"""Measured runs, sent again through the engine model in virtual time, as the load generator sent them.

It is a closed loop: a user's next request follows the modelled end of what it followed when it was measured,
after the same pause. A request begins with the tokens of an earlier one of its user, as many as it had in
common with it; the rest is new. Requests without an ending load the engine until the measured one gave them
up. An engine that has just started compiles kernels during its first prompt, which the model doesn't know: it
is held back until then.
"""

from __future__ import annotations

import heapq
import statistics
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dispatcher.simulation.engine import EngineModel
from dispatcher.simulation.profile import Profile
from tests.bench.calibration_trace import Measured, Run

LONGEST_WAIT_S = 660.0
"""The load generator gave up waiting after 600 s: what it held for longer was answered without end."""
SHORTEST_COMPILATION_S = 2.0
LONGEST_TOKENS = 163_840
"""`max_model_len` of the measured engines; the load generator set no other limit."""


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """What the model made of a request; seconds since the run began, None when it was not reached."""

    sent_s: float
    first_s: float
    ended_s: float | None
    cached: int

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first_s - self.sent_s


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A run as modelled; `requests` by their place in the run."""

    requests: dict[int, Modelled]
    preemptions: int
    hit_share: float


def replay(run: Run, profile: Profile) -> Replay:
    """Send a run's requests to an engine of this profile until all that was heard of is done."""
    loop = _Loop(run, profile)
    loop.run()
    return Replay(
        requests=loop.modelled(),
        preemptions=loop.engine.preemptions,
        hit_share=loop.engine.prefix_hit_tokens / max(1, loop.engine.prefix_queried_tokens),
    )


def prompts(requests: Sequence[Measured]) -> list[array[int]]:
    """Token ids of each prompt: what it shares with an earlier one of its user, then tokens of its own."""
    unused = 0
    earlier: dict[str, list[array[int]]] = defaultdict(list)
    made = []
    for one in requests:
        own = earlier[one.user]
        shared = next((prompt for prompt in reversed(own) if len(prompt) >= one.cached), array("I"))
        if not shared and one.cached and own:
            shared = max(own, key=len)
        prompt = shared[: min(one.cached, len(shared))]
        fresh = one.prompt - len(prompt)
        prompt.extend(range(unused, unused + fresh))
        unused += fresh
        own.append(prompt)
        made.append(prompt)
    return made


def predecessors(requests: Sequence[Measured]) -> list[int | None]:
    """For each request the one of its family that ended last before it was sent: its user waited for that."""
    found: list[int | None] = []
    for place, one in enumerate(requests):
        before = [
            other
            for other in range(place)
            if requests[other].family == one.family and requests[other].ended_s <= one.sent_s
        ]
        found.append(max(before, key=lambda other: requests[other].ended_s) if before else None)
    return found


class _Loop:
    """One replay. The heap holds what is going to happen: a request is sent, arrives, or is given up."""

    def __init__(self, run: Run, profile: Profile) -> None:
        # What was sent after the last trusted moment has no part in what came before it.
        self._requests = [one for one in run.requests if one.sent_s <= run.heard_s]
        self._wanted = {
            place for place, one in enumerate(self._requests) if one.succeeded and one.first_s <= run.heard_s
        }
        self._prompts = prompts(self._requests)
        self._request_s = profile.request_s
        self._opens_s = _opens_s(self._requests, profile)
        self._typical_output = round(
            statistics.median(one.output for one in self._requests if one.succeeded and one.output > 1)
        )
        self._followers: dict[int, list[int]] = defaultdict(list)
        self._events: list[tuple[float, int, bool]] = []
        for place, before in enumerate(predecessors(self._requests)):
            if before is None:
                heapq.heappush(self._events, (self._requests[place].sent_s + self._request_s, place, True))
            else:
                self._followers[before].append(place)
        self._sent: dict[int, float] = {}
        self._first: dict[int, float] = {}
        self._ended: dict[int, float] = {}
        self._cached: dict[int, int] = {}
        self.engine = EngineModel(profile)

    def run(self) -> None:
        """Go from event to step, whichever is next."""
        engine = self.engine
        while self._wanted and (self._events or engine.due is not None):
            if engine.due is None or (self._events and self._events[0][0] <= engine.due):
                at_s = max(self._events[0][0], self._opens_s)
                while self._events and self._events[0][0] <= at_s:
                    self._happen(*heapq.heappop(self._events))
                if engine.due is None:
                    engine.step(at_s)
                continue
            at_s = engine.due
            for made in engine.step(at_s):
                if made.is_first:
                    self._first[made.key] = at_s
                    self._cached[made.key] = made.cached_tokens
                if made.is_last:
                    self._end(made.key, at_s)

    def modelled(self) -> dict[int, Modelled]:
        """What became of the requests that got a first token."""
        return {
            place: Modelled(
                sent_s=self._sent[place],
                first_s=first_s,
                ended_s=self._ended.get(place),
                cached=self._cached[place],
            )
            for place, first_s in self._first.items()
        }

    def _happen(self, at_s: float, place: int, arrives: bool) -> None:
        one = self._requests[place]
        if not arrives:
            if place not in self._ended:
                self.engine.abort(place)
                self._end(place, at_s)
            return
        self._sent[place] = at_s - self._request_s
        prompt = self._prompts[place]
        self.engine.submit(place, prompt, self._output(one), output=_unshared)
        if not one.succeeded:
            heapq.heappush(self._events, (self._sent[place] + one.ended_s - one.sent_s, place, False))

    def _output(self, one: Measured) -> int:
        if one.succeeded:
            return max(1, one.output)
        if one.ended_s - one.sent_s > LONGEST_WAIT_S:
            return LONGEST_TOKENS - one.prompt
        return self._typical_output

    def _end(self, place: int, at_s: float) -> None:
        self._ended[place] = at_s
        self._wanted.discard(place)
        for follower in self._followers[place]:
            pause_s = self._requests[follower].sent_s - self._requests[place].ended_s
            heapq.heappush(self._events, (at_s + pause_s + self._request_s, follower, True))


def _unshared(place: int) -> int:
    """A token of an answer. No prompt has it: engines drop the reasoning that answers begin with."""
    return 0xFFFF_FFFF - place


def _opens_s(requests: Sequence[Measured], profile: Profile) -> float:
    """When the engine was ready for its first prompt."""
    first = min((one for one in requests if one.succeeded), key=lambda one: one.first_s)
    alone = EngineModel(profile)
    alone.submit(0, array("I", range(first.uncached)), 1, output=_unshared)
    alone.step(0.0)
    lasted_s = 0.0
    while alone.due is not None:
        lasted_s = alone.due
        alone.step(lasted_s)
    ready_s = first.first_s - lasted_s
    return ready_s if ready_s - first.sent_s > SHORTEST_COMPILATION_S else 0.0


def pairs(run: Run, modelled: Replay) -> Iterator[tuple[Measured, Modelled]]:
    """Measured and modelled side by side, but for the first request, in which kernels were compiled."""
    first = min((one for one in run.requests if one.succeeded), key=lambda one: one.first_s)
    for place, one in enumerate(run.requests):
        if one is not first and one.succeeded and one.first_s <= run.heard_s and place in modelled.requests:
            yield one, modelled.requests[place]
