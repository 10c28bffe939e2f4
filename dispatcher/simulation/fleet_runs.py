"""Many runs of one fleet: every policy, rate and seed asked for, on one core or several, and sweeps.

Each run depends on its policy, rate and seed alone, so that neither the number of processes nor the order in
which runs end changes a figure but the wall time.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dispatcher.simulation.conditions import Conditions
from dispatcher.simulation.fleet import FleetSimulation, Router, coarse
from dispatcher.simulation.fleet_report import Run, run_of, told_nodes
from dispatcher.simulation.fleet_workload import FleetWorkload, Turn
from dispatcher.simulation.goodput import Objectives
from dispatcher.simulation.jumping_engine import JumpingEngine
from dispatcher.simulation.knee import search
from dispatcher.simulation.named_router import router_of
from dispatcher.simulation.profile import Profile
from dispatcher.telemetry.live_line import LiveLine

NOTHING_AMISS = Conditions()


class Task(NamedTuple):
    """One run."""

    policy: str
    rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Fleets:
    """What all runs have in common. `workloads` is by seed: the same for all where arrivals are recorded.

    Of `nodes` the last `decode` are decode nodes and the others prefill nodes; 0 where all do both.
    """

    workloads: Mapping[int, FleetWorkload]
    trace: str
    profile: Profile
    nodes: int
    objectives: Objectives
    decode: int = 0
    conditions: Conditions = NOTHING_AMISS

    @property
    def title(self) -> str:
        """What was simulated, in a line."""
        requests = next(iter(self.workloads.values())).requests
        fleet = f"{told_nodes(self.nodes, self.decode)} x {self.profile.name}"
        amiss = f"; {self.conditions}" if str(self.conditions) else ""
        return f"{self.trace}: {requests} requests, {fleet}{amiss}\ngood: {self.objectives}"

    def run(self, task: Task, router: Router | None = None) -> Run:
        """Simulate one policy at one rate, by a `router` of that policy or a new one."""
        workload = self.workloads[task.seed]
        profile = coarse(self.profile, workload.block_tokens)
        result = FleetSimulation(
            workload,
            router if router is not None else router_of(task.policy)(),
            nodes=self.nodes,
            decode=self.decode,
            profile=profile,
            rate=task.rate,
            seed=task.seed,
            conditions=self.conditions,
        ).run()
        return run_of(
            result,
            policy=task.policy,
            trace=self.trace,
            profile=profile,
            rate=task.rate,
            per_s=task.rate * workload.per_s,
            nodes=self.nodes,
            decode=self.decode,
            seed=task.seed,
            objectives=self.objectives,
            conditions=self.conditions,
        )

    def carried(self, seed: int) -> float:
        """The rate that nominal engines carry when requests are dealt out in turn and none is ever idle."""
        workload = self.workloads[seed]
        profile = coarse(self.profile, workload.block_tokens)
        turns = [turn for session in workload.sessions for turn in session]
        if self.decode:
            busy_s = max(
                _busy_s(
                    [replace(turn, output_tokens=1) for turn in turns], self.nodes - self.decode, profile
                ),
                _busy_s(turns, self.decode, profile, are_remote=True),
            )
        else:
            busy_s = _busy_s(turns, self.nodes, profile)
        return len(turns) / busy_s / workload.per_s


def _busy_s(turns: Sequence[Turn], nodes: int, profile: Profile, *, are_remote: bool = False) -> float:
    """How long nodes are busy with turns that are dealt out to them, of which all are there from the start.

    Args:
        are_remote: the prompts come from elsewhere, at once.
    """
    engines = [JumpingEngine(profile) for _ in range(nodes)]
    for number, turn in enumerate(turns):
        engines[number % nodes].submit(
            number, turn.prompt_tokens, turn.output_tokens, turn.blocks, 0.0, is_remote=are_remote
        )
    for engine in engines:
        now_s = 0.0
        while engine.pulls or engine.due is not None:
            for number, _ in engine.take_pulls():
                engine.pulled(number, now_s)
            if engine.due is not None:
                now_s = engine.due
                engine.advance()
            engine.stored.clear()
            engine.cache.events.clear()
    return sum(engine.busy_s for engine in engines) / nodes


@dataclass(kw_only=True)
class Progress:
    """A line on a terminal that says how far the runs are; nothing anywhere else."""

    line: LiveLine = field(default_factory=LiveLine)
    done: int = 0
    _began_s: float = field(default_factory=time.monotonic)

    def expect(self, task: Task) -> None:
        """Name the run that is waited for."""
        passed_s = time.monotonic() - self._began_s
        self.line.show(
            f"{self.done} runs in {passed_s:.0f} s; {task.policy} at {task.rate:g}, seed {task.seed}"
        )

    def end(self) -> None:
        """Leave no trace."""
        self.line.clear()


class Runner:
    """Runs tasks, in their order or `jobs` at a time; made by `running`."""

    def __init__(self, fleets: Fleets, pool: ProcessPoolExecutor | None, progress: Progress) -> None:
        self.fleets = fleets
        self.progress = progress
        self._pool = pool

    def run(self, tasks: Sequence[Task]) -> list[Run]:
        """Simulate all; results in the order of the tasks."""
        made = map(self.fleets.run, tasks) if self._pool is None else self._pool.map(_run, tasks)
        runs = []
        for task in tasks:
            self.progress.expect(task)
            runs.append(next(made))
            self.progress.done += 1
        return runs

    def sweep(self, policies: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        """Simulate each policy at the rates that its knee is found by: where its seeds' mean crosses."""
        carried = self.fleets.carried(seeds[0])
        runs: dict[str, list[Run]] = {policy: [] for policy in policies}
        searches: dict[str, Generator[float, float, None]] = {policy: search(carried) for policy in runs}
        rates = {policy: next(one) for policy, one in searches.items()}
        while rates:
            made = self.run([Task(policy, rate, seed) for policy, rate in rates.items() for seed in seeds])
            asked, rates = rates, {}
            for place, policy in enumerate(asked):
                of_policy = made[place * len(seeds) : (place + 1) * len(seeds)]
                runs[policy] += of_policy
                try:
                    rates[policy] = searches[policy].send(
                        sum(run.slo_attainment for run in of_policy) / len(seeds)
                    )
                except StopIteration:
                    continue
        return [run for of_policy in runs.values() for run in sorted(of_policy, key=lambda run: run.rate)]


@contextmanager
def running(fleets: Fleets, *, jobs: int = 1, progress: Progress | None = None) -> Iterator[Runner]:
    """Give what runs tasks of these fleets in `jobs` processes."""
    progress = progress if progress is not None else Progress()
    try:
        if jobs == 1:
            yield Runner(fleets, None, progress)
        else:
            with ProcessPoolExecutor(jobs, initializer=_begin, initargs=(fleets,)) as pool:
                yield Runner(fleets, pool, progress)
    finally:
        progress.end()


_fleets: Fleets
"""Of a process that runs tasks: a trace is too large to be sent with each."""


def _begin(fleets: Fleets) -> None:
    global _fleets
    _fleets = fleets


def _run(task: Task) -> Run:
    return _fleets.run(task)
