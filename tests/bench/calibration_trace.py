"""The measured runs that the engine model is held against, read from InferenceX's per-request records.

A request's cached tokens are `theoretical_cache_hit_blocks`: what of its prompt was sent before in the same
run. `cache_hit_blocks` is no measurement: it also counts turns that the load generator skipped, which the
engine never saw. Whoever fits or replays a run takes its requests from here.
"""

from __future__ import annotations

import csv
import gzip
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

BLOCK_TOKENS = 64
SERVED_PER_RECORDED = 1.06
"""Prompt tokens that the engine counted for each one in the trace, which another tokeniser counted.

The engines' own counters say 1.045 to 1.063 for first turns, and up to 1.11 with the replies of later ones.
"""
REPLY_SHARE = 0.7
"""A later turn adds at least the reply before it, which the trace does not count: what of its tokens is no
reasoning. In the engines' counters 1,240 to 1,690 tokens are new where the trace has 190 to 830.
"""
SILENCE_S = 60.0
"""The load generator stopped listening for minutes at a time; with two requests in flight, more is heard."""
PAUSE_S = 10_000.0
REFUSED_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One request: tokens as the engine counts them, and seconds since its run began.

    `family` is the user whose conversation it belongs to; sub-agents belong to who started them.
    """

    user: str
    family: str
    prompt: int
    cached: int
    output: int
    sent_s: float
    first_s: float
    ended_s: float
    succeeded: bool

    @property
    def uncached(self) -> int:
        """Prompt tokens that nobody sent before; the last one is always computed."""
        return max(1, self.prompt - self.cached)

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first_s - self.sent_s

    @property
    def itl_s(self) -> float:
        """Mean seconds between tokens."""
        return (self.ended_s - self.first_s) / max(1, self.output - 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the load generator against one engine; `requests` in the order they were sent.

    What ended after `heard_s` is not trusted: from there on the load generator lost minutes.
    """

    tp: str
    users: int
    offload: bool
    requests: tuple[Measured, ...]
    heard_s: float

    @property
    def conversation_tokens(self) -> int:
        """Tokens that the KV cache would hold if it forgot nothing: the longest prompt of each user."""
        longest: dict[str, int] = defaultdict(int)
        for one in self.requests:
            longest[one.user] = max(longest[one.user], one.prompt)
        return sum(longest.values())

    def finished(self) -> list[Measured]:
        """Requests whose whole answer was heard."""
        return [one for one in self.requests if one.succeeded and one.ended_s <= self.heard_s]

    def begun(self) -> list[Measured]:
        """Requests whose first token was heard."""
        return [one for one in self.requests if one.succeeded and one.first_s <= self.heard_s]


def read(path: Path) -> list[Run]:
    """The runs of the trace, smallest first."""
    by_setting: dict[tuple[str, int, bool], list[dict[str, str]]] = defaultdict(list)
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            by_setting[row["tp"], int(row["conc"]), row["offload"] == "on"].append(row)
    runs = [
        _run(setting, rows)
        for setting, together in sorted(by_setting.items())
        for rows in _apart(sorted(together, key=lambda row: float(row["request_start_time"])))
    ]
    return [replace(run, requests=with_unrecorded(run, runs)) for run in runs]


def with_unrecorded(run: Run, runs: Sequence[Run]) -> tuple[Measured, ...]:
    """Add what was in flight without an end when the run was stopped: only answers that ended have a record.

    Each run starts with the same users in the same order, so the first request of one that is missing is
    known from the run that is nearest in size.
    """
    recorded = {one.user for one in run.requests}
    stopped_s = max(one.ended_s for one in run.requests)
    added = []
    for number in range(1, run.users + 1):
        user = f"User-{number:03}"
        others = sorted(
            (other for other in runs if other.users >= number and other is not run),
            key=lambda other: (other.tp != run.tp, abs(other.users - run.users)),
        )
        first = next((one for other in others for one in other.requests if one.user == user), None)
        if user not in recorded and first is not None:
            added.append(replace(first, output=0, first_s=stopped_s, ended_s=stopped_s, succeeded=False))
    return tuple(sorted((*run.requests, *added), key=lambda one: one.sent_s))


def _apart(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Rows of runs that were hours apart."""
    runs = [[rows[0]]]
    for before, row in itertools.pairwise(rows):
        if float(row["request_start_time"]) - float(before["request_start_time"]) > PAUSE_S:
            runs.append([])
        runs[-1].append(row)
    return runs


def _run(setting: tuple[str, int, bool], rows: list[dict[str, str]]) -> Run:
    tp, users, offload = setting
    began_s = float(rows[0]["request_start_time"])
    requests = []
    replies: dict[str, float] = defaultdict(float)
    for row in rows:
        one = _measured(row, began_s, replies[row["user_id"]])
        replies[one.user] = one.output * REPLY_SHARE
        if one.succeeded or one.ended_s - one.sent_s > REFUSED_S:
            requests.append(one)
    return Run(tp=tp, users=users, offload=offload, requests=tuple(requests), heard_s=heard_until(requests))


def _measured(row: dict[str, str], began_s: float, reply: float) -> Measured:
    recorded = int(row["input_tokens"]) * SERVED_PER_RECORDED
    cached = int(row["theoretical_cache_hit_blocks"]) * BLOCK_TOKENS * SERVED_PER_RECORDED
    new = max(1.0, recorded - cached, reply if cached else 0.0)
    return Measured(
        user=row["user_id"],
        family=row["user_id"].split("-SA")[0],
        prompt=round(cached + new),
        cached=round(cached),
        output=int(row["output_tokens_actual"]),
        sent_s=float(row["request_start_time"]) - began_s,
        first_s=float(row["prefill_complete_time"]) - began_s,
        ended_s=float(row["request_complete_time"]) - began_s,
        succeeded=row["success"] == "True",
    )


def heard_until(requests: Sequence[Measured]) -> float:
    """When the load generator last heard something before its first long silence with two in flight."""
    events = sorted(
        event
        for one in requests
        for event in (
            (one.sent_s, 1, False),
            (one.first_s if one.succeeded else one.ended_s, 0, True),
            (one.ended_s, -1, True),
        )
    )
    heard_s, in_flight = events[0][0], 0
    for at_s, change, is_heard in events:
        if in_flight < 2:
            heard_s = at_s
        elif at_s - heard_s > SILENCE_S:
            return heard_s
        elif is_heard:
            heard_s = at_s
        in_flight += change
    return events[-1][0]
