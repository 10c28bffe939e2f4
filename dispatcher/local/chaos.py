"""`flexlb chaos`: a whole stack under a steady load, broken by seeded faults, then audited.

The load is open loop: a request is sent when its time has come, whatever became of earlier ones. The faults
are planned before the first request; afterwards every answer is waited for, and the raw topics are audited.
Exit code 0 only when the audit finds nothing and every outcome reached the sender.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Set
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.audit import AuditResult, audit
from dispatcher.audit import as_text as audit_text
from dispatcher.client.client import Client
from dispatcher.errors import LogUnavailable, SettingsError
from dispatcher.local.chaos_faults import PATIENCE_MS, Chaos
from dispatcher.local.chaos_report import (
    DoneFault,
    Increments,
    Sent,
    as_text,
    chaos_report,
    is_clean,
    lateness_p99_s,
)
from dispatcher.local.chaos_schedule import (
    KAFKA_NETWORK,
    NETWORK,
    SLOW_DISKS,
    STANDBY,
    FaultKind,
    PlannedFault,
    plan_faults,
)
from dispatcher.local.embedded_kafka import EmbeddedKafka
from dispatcher.local.redis_network import RedisNetwork
from dispatcher.local.slow_disk import why_no_slow_disk
from dispatcher.local.stack import LocalServers, LocalStack, Member, StackSettings
from dispatcher.telemetry.live_line import LiveLine, say

PATIENCE_S = 60.0
"""After the last request answers are waited for until none came for so long: a backlog is no loss."""
SETTLE_S = 20.0
LATE_S = 0.25
RESEND_PAUSE_S = 0.2
RECOVERY_S = 20.0
"""How long the next fault waits for service to be back after the last."""
POLL_S = 0.05
SHOW_EVERY_S = 0.5
LOOK_EVERY_S = 2.0
NEEDS_APACHE = KAFKA_NETWORK | {FaultKind.KILL_KAFKA, FaultKind.SLOW_DISK_KAFKA}
RESUMED_TOKENS = "flexlb_agent_resumed_tokens"
SHORT_TOKENS = (4, 32)
ENDPOINT = "/v1/completions"
AGENT_FLAGS = ("--inter-token-timeout-s", "3", "--first-token-timeout-s", "15")
"""An engine that fell silent is given up soon: a run of minutes can't wait for the default 30 s each time."""

DESCRIPTION = """\
Break a whole stack on this machine under a steady open-loop load, by faults that a seed chooses, then audit.

Real processes: Apache Kafka where it can run, Valkey, dispatchers, agents and simulated engines. The seed
decides which fault strikes when, for how long and whom; who leads at that moment is the run's own. Every kind
chosen comes up equally often; they overlap unless --one-at-a-time is given. Afterwards every answer is waited
for, and the raw topics are audited. Exit code: 0 nothing lost, nothing duplicated; 1 otherwise; 2 wrong use.

Gap: the longest time after a fault without any outcome while requests waited, as their sender saw it.
"""
KINDS = textwrap.indent(textwrap.fill(", ".join(FaultKind), 100, break_on_hyphens=False), "  ")
EPILOG = f"""\
kinds of fault:
  kill-*         kill -9, started again after a moment; Redis and Kafka keep their data
  freeze-*       SIGSTOP, thawed after a few seconds: longer than its TTL for a leader or an agent
  restart-*      SIGTERM, drained, started again, as in a rolling update
  stall-, fail-, slow-, crash-engine   answers fall silent, fail, take 20 times as long, or kill it half-way
  lose-redis     kill -9, and all its data is deleted
  refuse-redis   every connection closed, new ones refused
  failover-redis   kill -9; Sentinels promote the replica, which misses the last writes every other time
  slow-disk-*    each write to the append-only file, or to a topic's segment, takes long; needs strace
  cut-*, slow-*  the network between an agent or dispatcher and Redis is silent, or adds 0.1 s each way
{KINDS}
  cut-kafka, slow-kafka    the same between everybody and Kafka, with 0.15 to 0.5 s each way
  It breaks its own stack only: it can't be pointed at an existing cluster.

examples:
  flexlb chaos --seed 1 --minutes 5
  flexlb chaos --seed 7 --minutes 2 --rate 40 --nodes 3 --faults kill-leader,freeze-leader,cut-dispatcher
  flexlb chaos --seed 1 --minutes 4 --one-at-a-time --json report.json --folder logs
"""


def configure_chaos(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb chaos`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("--seed", type=_seed, required=True, help="of faults and load; the same seed plans the same run")
    add("--minutes", type=_minutes, required=True, help="how long the load lasts")
    add(
        "--rate", type=_rate, default=200.0, help="requests per second (default 200; lower on small machines)"
    )
    add("--nodes", type=_count, default=8, help="engines, each with an agent (default 8)")
    add("--dispatchers", type=_count, default=3, help="one leads, the others stand by (default 3)")
    add("--faults", type=_kinds, metavar="KIND,...", help="kinds of fault to choose from (default: all)")
    add(
        "--one-at-a-time",
        dest="overlap",
        action="store_false",
        help="wait for service to be back before the next fault, so that each gap has one cause",
    )
    add(
        "--kafka",
        choices=("auto", "apache", "embedded"),
        default="auto",
        help="which broker (default: Apache Kafka where it can run; the embedded one is never killed)",
    )
    add("--folder", type=Path, help="keep data and logs here (default: a temporary folder)")
    add("--json", type=Path, metavar="FILE", help="leave the report here")


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, seen {text}")
    return value


def _minutes(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 1440:
        raise argparse.ArgumentTypeError(f"expected 0.1 to 1440, seen {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 5000:
        raise argparse.ArgumentTypeError(f"expected 0.1 to 5000, seen {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"expected 1 to 64, seen {text}")
    return value


def _kinds(text: str) -> list[FaultKind]:
    kinds = []
    for word in text.split(","):
        try:
            kinds.append(FaultKind(word.strip()))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(FaultKind)}; seen {word[:40]!r}"
            ) from None
    return kinds


async def run_chaos(options: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    current = asyncio.current_task()
    assert current is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)
    try:
        return await _chaos(options)
    except asyncio.CancelledError:
        say("stopped")
        return 130


async def _chaos(options: argparse.Namespace) -> int:
    seconds = options.minutes * 60
    chosen = await _chosen(options)
    plan_faults(
        options.seed, seconds, sorted(chosen), overlap=options.overlap
    )  # long enough, before any start
    base = StackSettings(
        nodes=options.nodes,
        dispatchers=options.dispatchers,
        broker=options.kafka,
        redis_replica=FaultKind.FAILOVER_REDIS in chosen,
        kafka_proxy=bool(KAFKA_NETWORK & chosen),
        agent_flags=AGENT_FLAGS,
        dispatcher_flags=("--seed", str(options.seed + 1)),
    )
    async with AsyncExitStack() as cleanup:
        folder = options.folder or Path(cleanup.enter_context(_temporary_folder()))
        servers = await cleanup.enter_async_context(LocalServers(base, folder, tell=say))
        kinds = _possible(options, chosen, servers)
        planned = plan_faults(options.seed, seconds, kinds, overlap=options.overlap)
        if servers.replicated is not None:
            await servers.replicated.wait_before_vote(PATIENCE_MS)
        networks: dict[str, RedisNetwork] = {}
        if NETWORK & set(kinds):
            networks = await cleanup.enter_async_context(_networks(servers, base))
        urls = {name: network.url for name, network in networks.items()}
        settings = replace(base, redis_urls=urls)
        stack = await cleanup.enter_async_context(
            LocalStack(settings, folder=folder, servers=servers, tell=say)
        )
        say(f"the stack is up; {len(planned)} faults in {seconds:.0f} s at {options.rate:g} requests/s")
        run = _Run(stack, networks, planned, options)
        await run.go(seconds)
        say("auditing the raw topics")
        found = await audit(stack.kafka, settings.pool, settle_s=SETTLE_S)
    return _conclude(options, run, found)


def _conclude(options: argparse.Namespace, run: _Run, found: AuditResult) -> int:
    report = chaos_report(
        found,
        run.faults,
        run.sent,
        run.until_s,
        resumed_tokens=run.resumed_tokens,
        seed=options.seed,
        minutes=options.minutes,
        rate=options.rate,
        nodes=options.nodes,
        dispatchers=options.dispatchers,
        overlap=options.overlap,
        machine=machine(),
    )
    print(as_text(report))
    if found.findings:
        print(audit_text(replace(found, reexecuted=[])))
    if (late_s := lateness_p99_s(run.sent)) > LATE_S:
        say(f"the sender itself fell behind (p99 {late_s:.1f} s), so gaps are partly its own: lower --rate")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    say("clean: nothing lost, one answer each" if is_clean(report) else "NOT clean, see above")
    return 0 if is_clean(report) else 1


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="flexlb-", ignore_cleanup_errors=True)


async def _chosen(options: argparse.Namespace) -> set[FaultKind]:
    """The kinds chosen, without those that this machine can't do; nothing is started yet.

    Raises:
        SettingsError: one of those was asked for by name.
    """
    kinds = set(options.faults or FaultKind)
    if options.dispatchers < 2:
        if STANDBY & set(options.faults or ()):
            raise SettingsError("--dispatchers: expected at least 2 for faults of a standby, seen 1")
        kinds -= STANDBY
    if kinds & SLOW_DISKS and (why := await why_no_slow_disk()):
        kinds = _without(options, kinds, SLOW_DISKS, "the right to trace by strace", why)
    return kinds


def _possible(options: argparse.Namespace, chosen: set[FaultKind], servers: LocalServers) -> list[FaultKind]:
    """The kinds chosen, without those that prove nothing with this broker."""
    if isinstance(servers.broker, EmbeddedKafka):
        why = "the embedded broker keeps no data and hands out its own address"
        chosen = _without(options, chosen, NEEDS_APACHE, "Apache Kafka", why)
    return sorted(chosen)


def _without(
    options: argparse.Namespace,
    kinds: set[FaultKind],
    unfit: frozenset[FaultKind],
    expected: str,
    why: str,
) -> set[FaultKind]:
    """Leave out what lacks something here, and tell.

    Raises:
        SettingsError: it was asked for by name.
    """
    if not kinds & unfit:
        return kinds
    names = ", ".join(sorted(kinds & unfit))
    if options.faults:
        raise SettingsError(f"--faults: {names}: expected {expected}, seen none: {why}")
    say(f"without {names}: {why}")
    return kinds - unfit


@asynccontextmanager
async def _networks(servers: LocalServers, settings: StackSettings) -> AsyncIterator[dict[str, RedisNetwork]]:
    """A network to Redis for each dispatcher and agent."""
    redis = servers.replicated or servers.valkey
    assert redis is not None
    names = [f"dispatcher-{number}" for number in range(1, settings.dispatchers + 1)]
    names += [f"agent-{number}" for number in range(1, settings.nodes + 1)]
    async with AsyncExitStack() as cleanup:
        yield {name: await cleanup.enter_async_context(RedisNetwork(redis)) for name in names}


class _Run:
    """One run: the load, the faults, and what came of both."""

    def __init__(
        self,
        stack: LocalStack,
        networks: dict[str, RedisNetwork],
        planned: list[PlannedFault],
        options: argparse.Namespace,
    ) -> None:
        self.sent: list[Sent] = []
        self.faults: list[DoneFault] = []
        self.until_s = 0.0
        self._resumed = Increments()
        self._stack = stack
        self._planned = planned
        self._overlap: bool = options.overlap
        self._rate: float = options.rate
        self._rng = random.Random(options.seed)
        self._chaos = Chaos(stack, networks, tell=say, struck=self.faults.append)
        self._answered = 0
        self._served_s = 0.0
        self._last_tell_s = 0.0

    @property
    def resumed_tokens(self) -> int:
        """Tokens of earlier attempts that later ones went on from, as agents count them."""
        return round(self._resumed.total)

    async def go(self, seconds: float) -> None:
        """Load and break for `seconds`, then wait for what is unanswered."""
        async with Client(self._stack.kafka, self._stack.settings.pool) as client:
            async with asyncio.TaskGroup() as group:
                aside = [group.create_task(self._show(seconds)), group.create_task(self._watch_agents())]
                breaking = group.create_task(self._break())
                waiting = await self._load(client, seconds, breaking)
                await breaking
                missing = await until_silent(waiting, PATIENCE_S)
                for task in missing:
                    task.cancel()
                await asyncio.gather(*missing, return_exceptions=True)
                for task in aside:
                    task.cancel()
        self.until_s = time.monotonic()
        if sys.stderr.isatty():
            print(file=sys.stderr)

    async def _break(self) -> None:
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in self._planned:
                await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
                if self._overlap:
                    group.create_task(self._chaos.do(fault))
                else:
                    await self._chaos.do(fault)
                    await self._serves_again(time.monotonic())

    async def _serves_again(self, mended_s: float) -> None:
        """Wait a while until a request sent since is answered: the next fault is to find a working stack.

        Any outcome would not do: some were published before the fault, and are only read after it.
        """
        until_s = mended_s + RECOVERY_S
        while self._served_s < mended_s and time.monotonic() < until_s:  # noqa: ASYNC110 - one waits at most
            await asyncio.sleep(POLL_S)

    async def _load(
        self, client: Client, seconds: float, breaking: asyncio.Task[None]
    ) -> set[asyncio.Task[None]]:
        """Send at the planned times, and on until the last fault is mended if that comes later.

        Returns:
            What waits for an answer.
        """
        waiting: set[asyncio.Task[None]] = set()
        began_s = time.monotonic()
        planned = round(seconds * self._rate)
        try:
            for number in itertools.takewhile(
                lambda n: n < planned or not breaking.done(), itertools.count()
            ):
                at_s = began_s + number / self._rate
                await asyncio.sleep(max(0.0, at_s - time.monotonic()))
                now_s = time.monotonic()
                sent = Sent(submitted_s=now_s, late_s=now_s - at_s)
                self.sent.append(sent)
                prompt = f"request {number}: " + "word " * self._rng.randint(4, 64)
                body = {"prompt": prompt, "max_tokens": self._rng.randint(*SHORT_TOKENS)}
                task = asyncio.create_task(self._ask(client, f"chaos-{number}", body, sent))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
        except BaseException:
            for task in list(waiting):
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            raise
        return waiting

    async def _ask(self, client: Client, id: str, body: dict[str, Any], sent: Sent) -> None:
        while True:
            try:
                await client.submit(self._stack.settings.model, ENDPOINT, body, id=id)
                break
            except LogUnavailable:
                await asyncio.sleep(RESEND_PAUSE_S)  # the same id again is the same request
        outcome = await client.outcome(id)
        progress = client.progress(id)
        sent.ended_s = progress.ended_s or time.monotonic()
        self._served_s = max(self._served_s, sent.submitted_s)
        sent.kind, sent.attempts = outcome.kind, progress.attempts
        self._answered += 1

    async def _watch_agents(self) -> None:
        """Read each agent's counter of resumed tokens, often enough to miss little of one that is killed."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LOOK_EVERY_S)) as session:
            while True:
                await asyncio.gather(*(self._look(session, agent) for agent in self._stack.agents))
                await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, session: aiohttp.ClientSession, agent: Member) -> None:
        try:
            async with session.get(f"{agent.url}/metrics") as response:
                families = list(text_string_to_metric_families(await response.text()))
        except (aiohttp.ClientError, OSError, TimeoutError):
            return  # killed or frozen just now
        for family in families:
            if family.name == RESUMED_TOKENS:
                told = [one.value for one in family.samples if one.name == f"{RESUMED_TOKENS}_total"]
                self._resumed.see(agent.name, sum(told))

    async def _show(self, seconds: float) -> None:
        """A live line on terminals; elsewhere the faults' own lines, and one per ten seconds."""
        began_s, live = time.monotonic(), LiveLine()
        while True:
            line = (
                f"{time.monotonic() - began_s:.0f} of {seconds:.0f} s: {len(self.sent)} sent, "
                f"{len(self.sent) - self._answered} waiting, "
                f"{len(self.faults)} of {len(self._planned)} faults"
            )
            if live.is_live:
                live.show(line)
            elif time.monotonic() - self._last_tell_s > 10:
                self._last_tell_s = time.monotonic()
                say(line)
            await asyncio.sleep(SHOW_EVERY_S)


async def until_silent(waiting: Set[asyncio.Task[None]], silence_s: float) -> set[asyncio.Task[None]]:
    """Wait for tasks until none ended for so long; returns those that did not."""
    left = set(waiting)
    done = left
    while left and done:
        done, left = await asyncio.wait(left, timeout=silence_s)
    return left


def machine() -> str:
    """This machine in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )
