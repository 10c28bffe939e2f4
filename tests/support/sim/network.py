"""Simulated processes and the network between them and the servers, all chance from one `Random`.

A client's call is: request on its way -> one atomic effect at the server -> answer on its way. The
request and the answer travel outside the process: what it sent before it froze still takes effect,
and the answer waits for it to wake. Calls to servers of one name may be delayed, reordered (each has a
connection of its own), cut before or after the effect, refused while the server is down, kept
while it is frozen, and held up or refused where the network between one process and one server is cut.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

from dispatcher.backends.clock import Clock
from tests.support.sim.loop import OUTSIDE, Scope, VirtualLoop


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What the network does to a message; shares are probabilities per message.

    `cut_share` is per call: half of the cuts come before the effect, half after it.
    `sent_survives_kill` is the chance that a request on its way still arrives after its sender was
    killed, as bytes in a socket's buffer do.
    """

    usual_s: tuple[float, float] = (0.0001, 0.001)
    slow_s: tuple[float, float] = (0.001, 0.05)
    slow_share: float = 0.02
    stall_s: float = 1.0
    stall_share: float = 0.0
    cut_share: float = 0.0
    sent_survives_kill: float = 0.0


CALM = Profile()
ROUGH = Profile(slow_share=0.05, stall_share=0.001, cut_share=0.01)


class _Window:
    """A fault that lasts a while; overlapping ones end with the last."""

    def __init__(self, loop: VirtualLoop, end: Callable[[], None]) -> None:
        self._loop = loop
        self._end = end
        self._until_s = 0.0

    def extend(self, seconds: float | None) -> None:
        """Last at least `seconds` from now, or until closed by hand."""
        if seconds is None:
            self._until_s = float("inf")
            return
        self._until_s = max(self._until_s, self._loop.time() + seconds)
        self._loop.call_at(self._until_s, self._over, context=OUTSIDE)

    def close(self) -> None:
        """It is over; what was scheduled means nothing any more."""
        self._until_s = 0.0

    def _over(self) -> None:
        if 0.0 < self._until_s <= self._loop.time() + 1e-9:
            self._end()


class Process:
    """One simulated OS process: whatever is spawned in it lives, freezes and dies with it."""

    def __init__(self, name: str, loop: VirtualLoop, *, clock_skew_s: float = 0.0) -> None:
        self.name = name
        self.is_alive = True
        self.is_frozen = False
        """Between `freeze` and `thaw`."""
        self.failures: list[BaseException] = []
        """What its spawned tasks died of; empty for a healthy program."""
        self.clock_skew_s = clock_skew_s
        """By how much its wall clock is ahead; may jump while it runs."""
        self.clock = Clock(monotonic=loop.time, epoch_s=lambda: loop.epoch_s() + self.clock_skew_s)
        self._loop = loop
        self._scope = Scope()
        self.context = self._scope.context()
        """Of callbacks that belong to the process and to none of its tasks."""
        self._awake = asyncio.Event()
        self._awake.set()
        self._calls: dict[Call, None] = {}
        self._frozen = _Window(loop, self.thaw)

    def spawn(self, coro: Coroutine[Any, Any, Any], *, name: str = "") -> asyncio.Task[Any]:
        """Start `coro` inside the process; tasks that it makes belong to the process too."""
        if not self.is_alive:
            coro.close()
            raise RuntimeError(f"process {self.name}: expected it alive to spawn a task, seen it killed")
        task = self._loop.create_task(
            coro,
            name=f"{self.name}/{name or getattr(coro, '__qualname__', 'task')}",
            context=self._scope.context(),
        )
        task.add_done_callback(self._ended, context=OUTSIDE)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and self.is_alive:
            self.failures.append(error)

    async def running(self) -> None:
        """Wait while frozen.

        Raises:
            CancelledError: the process is dead. Not a class of our own: `TaskGroup` knows only this one.
        """
        while self.is_alive and self.is_frozen:
            await self._awake.wait()
        if not self.is_alive:
            raise asyncio.CancelledError(f"process {self.name} was killed")

    def kill(self) -> None:
        """kill -9: every task is cancelled, and nothing that they still send leaves the process."""
        self.is_alive = False
        self.thaw()
        for task in sorted(self._scope.tasks, key=hash):
            task.cancel()
        for call in list(self._calls):
            call.leave()

    def freeze(self, seconds: float | None = None) -> None:
        """SIGSTOP: none of its callbacks runs, what it sent goes its way. SIGCONT after `seconds`."""
        if self.is_alive:
            self._frozen.extend(seconds)
            self.is_frozen = True
            self._awake.clear()
            self._scope.hold(self._loop)

    def thaw(self) -> None:
        """SIGCONT."""
        self._frozen.close()
        self.is_frozen = False
        self._awake.set()
        self._scope.release(self._loop)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    until_s: float
    refuses: bool


class Server:
    """The outside of a server: whether it answers, and the connections that wait in it.

    `refused` and `timed_out` make the errors that its client library raises.
    """

    def __init__(
        self,
        name: str,
        loop: VirtualLoop,
        *,
        refused: Callable[[str], Exception],
        timed_out: Callable[[str], Exception],
    ) -> None:
        self.name = name
        self.refused = refused
        self.timed_out = timed_out
        self.is_up = True
        self.incarnation = 0
        self._loop = loop
        self.is_running = True
        self._later: list[Callable[[], None]] | None = None
        self._waiting: dict[Call, None] = {}
        self._down = _Window(loop, self.up)
        self._frozen = _Window(loop, self.thaw)

    def down(self, seconds: float | None = None) -> None:
        """Refuse everything from now on; open connections break. Up again after `seconds`, if given."""
        self.is_up = False
        self.incarnation += 1
        self.thaw()
        for call in list(self._waiting):
            call.break_off(f"{self.name}: connection reset")
        self._down.extend(seconds)

    def up(self) -> None:
        """Answer again."""
        self._down.close()
        self.is_up = True

    def freeze(self, seconds: float | None = None) -> None:
        """Keep what arrives and do nothing; go on after `seconds`, if given."""
        if self._later is None:
            self._later = []
            self.is_running = False
        self._frozen.extend(seconds)

    def thaw(self) -> None:
        """Do what was kept, in order."""
        self._frozen.close()
        later, self._later = self._later or [], None
        self.is_running = True
        for step in later:
            step()

    def when_running(self, step: Callable[[], None]) -> None:
        """Do `step` now, or at the thaw."""
        if self._later is None:
            step()
        else:
            self._later.append(step)


class _Patience:
    """The calls that are given up after the same time without an answer, the longest waiting first.

    One timer for all of them: most calls are answered long before.
    """

    def __init__(self, loop: VirtualLoop, timeout_s: float) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._calls: deque[tuple[float, Call]] = deque()
        self._is_timed = False

    def add(self, call: Call) -> None:
        """Give `call` up when the time is over."""
        calls = self._calls
        while calls and calls[0][1].answer.done():
            calls.popleft()
        calls.append((self._loop.time() + self._timeout_s, call))
        if not self._is_timed:
            self._wait()

    def _wait(self) -> None:
        self._is_timed = True
        self._loop.call_at(self._calls[0][0], self._over, context=OUTSIDE)

    def _over(self) -> None:
        self._is_timed = False
        calls, now_s = self._calls, self._loop.time()
        while calls and (calls[0][1].answer.done() or calls[0][0] <= now_s):
            call = calls.popleft()[1]
            if not call.answer.done():
                # Its own: a frozen process finds that out when it goes on.
                self._loop.call_soon(call.time_out, context=call.process.context)
        if calls:
            self._wait()


class Call:
    """One call on its way; made by `Network.call`."""

    __slots__ = (
        *("network", "process", "server", "effect", "label", "incarnation"),
        *("loses_request", "loses_answer", "answer", "_wait"),
    )

    def __init__(
        self, network: Network, process: Process, server: Server, effect: Callable[[], Any], label: object
    ) -> None:
        self.network = network
        self.process = process
        self.server = server
        self.effect = effect
        self.label = label
        self.incarnation = server.incarnation
        self.loses_request = False
        self.loses_answer = False
        self.answer: asyncio.Future[Any] = network.loop.create_future()
        self._wait: asyncio.Future[Any] | None = None

    def arrive(self) -> None:
        """The request reaches the server."""
        network = self.network
        cut = network.cut_of(self) if network.cuts else None
        if not self.process.is_alive and not network.survives_kill():
            network.note(self, "lost with its sender")
        elif cut is not None:
            self._stopped(cut, self.arrive)
        elif self.loses_request:
            self.break_off(f"{self.server.name}: connection cut")
        elif self.server.is_running:
            self._take_effect()
        else:
            self.server.when_running(self._take_effect)

    def _stopped(self, cut: _Cut, step: Callable[..., None], *arguments: Any) -> None:
        """The network is cut: connections break, or the bytes are sent again until they get through."""
        if cut.refuses:
            self._finish(None, self.server.refused(f"{self.server.name}: no route"))
            if self._wait is not None:
                self._wait.cancel()
            return
        self.network.note(self, "held up")
        delay_s = cut.until_s - self.network.loop.time() + self.network.delay_s()
        self.network.loop.send_later(delay_s, step, *arguments)

    def _take_effect(self) -> None:
        if not self.server.is_up or self.incarnation != self.server.incarnation:
            self.break_off(f"{self.server.name}: connection refused")
            return
        network = self.network
        if network.is_traced:
            network.note(self, "effect")
        try:
            result = self.effect()
        except Exception as error:
            self._reply(None, error)
            return
        if network.traps:
            network.spring(self)
        if isinstance(result, asyncio.Future):
            self._wait = result
            self.server._waiting[self] = None
            result.add_done_callback(self._waited, context=OUTSIDE)
            if self.answer.done():
                self.leave()
        else:
            self._reply(result, None)

    def _waited(self, future: asyncio.Future[Any]) -> None:
        self.server._waiting.pop(self, None)
        if not future.cancelled():
            error = future.exception()
            self._reply(None if error else future.result(), error)

    def _reply(self, result: Any, error: BaseException | None) -> None:
        if self.loses_answer:
            self.break_off(f"{self.server.name}: connection cut")
        else:
            network = self.network
            network.loop.send_later(network.delay_s(), self._finish, result, error)

    def break_off(self, why: str) -> None:
        """The connection broke: the caller learns that, and no more."""
        if self._wait is not None:
            self._wait.cancel()
        self.network.later(self._finish, None, self.server.refused(why))

    def _finish(self, result: Any, error: BaseException | None) -> None:
        if self.answer.done():
            return
        network = self.network
        cut = network.cut_of(self) if network.cuts else None
        if cut is not None and not cut.refuses:
            self._stopped(cut, self._finish, result, error)
            return
        if network.is_traced:
            network.note(self, "answer" if error is None else f"error {error}")
        if error is None:
            self.answer.set_result(result)
        else:
            self.answer.set_exception(error)

    def time_out(self) -> None:
        """The caller's patience ends; the effect may still come."""
        if not self.answer.done():
            self.network.note(self, "timeout")
            self.answer.set_exception(self.server.timed_out(f"{self.server.name}: {self.label}: no answer"))

    def leave(self) -> None:
        """The caller is gone: the server learns it one leg later and forgets what waits there."""
        if not self.answer.cancel() and not self.answer.cancelled():
            self.answer.exception()
        if self._wait is not None and not self._wait.done():
            self.network.later(self._wait.cancel)


class Network:
    """Carries calls. One per simulation; every delay and cut comes from `rng`."""

    def __init__(
        self,
        rng: Random,
        loop: VirtualLoop,
        profile: Profile = CALM,
        *,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.rng = rng
        self.loop = loop
        self.profile = profile
        self._trace = trace
        self.is_traced = trace is not None
        self.cuts: dict[tuple[str, str], _Cut] = {}
        self.traps: dict[tuple[str, str], tuple[int, Callable[[], None]]] = {}
        self._lag_until_s = 0.0
        self._lag_s = 0.0
        self._patience: dict[float, _Patience] = {}

    def cut(self, process: str, server: str, seconds: float, *, refuses: bool) -> None:
        """Let nothing pass between one process and one server; everything else goes on.

        Args:
            process, server: by name; a process that is started again under the name is cut off too.
            refuses: connections break at once; else what is sent arrives when the cut is over, its sender
                perhaps having given up and sent it again.
        """
        self.cuts[process, server] = _Cut(until_s=self.loop.time() + seconds, refuses=refuses)

    def cut_of(self, call: Call) -> _Cut | None:
        """What keeps this call's messages from passing now."""
        key = call.process.name, call.server.name
        cut = self.cuts.get(key)
        if cut is not None and cut.until_s <= self.loop.time():
            del self.cuts[key]
            return None
        return cut

    def trap(self, process: str, server: str, effects: int, spring: Callable[[], None]) -> None:
        """Call `spring` after so many more effects of a process at a server, the last not heard of yet."""
        self.traps[process, server] = effects, spring

    def spring(self, call: Call) -> None:
        """Count one effect."""
        key = call.process.name, call.server.name
        if key not in self.traps:
            return
        effects, spring = self.traps[key]
        if effects > 1:
            self.traps[key] = effects - 1, spring
        else:
            del self.traps[key]
            self.loop.call_soon(spring, context=OUTSIDE)

    def lag(self, lag_s: float, seconds: float) -> None:
        """Have every message take up to `lag_s` longer for a while."""
        self._lag_s, self._lag_until_s = lag_s, self.loop.time() + seconds

    def process(self, name: str, *, clock_skew_s: float = 0.0) -> Process:
        """A new process."""
        return Process(name, self.loop, clock_skew_s=clock_skew_s)

    async def call(
        self,
        process: Process,
        server: Server,
        effect: Callable[[], Any],
        *,
        label: object,
        timeout_s: float | None = None,
    ) -> Any:
        """Have `effect` called once at the server and return its answer.

        Args:
            label: what it is called in the trace and in errors, made text only there.

        An effect that returns a future makes the caller wait in the server until it is set; the
        future is cancelled when the caller leaves. What an effect raises is its answer.

        Raises:
            server.refused: the connection broke; the effect may have happened or not.
            server.timed_out: no answer within `timeout_s`; the same, and it may still come.
            CancelledError: the process is dead.
        """
        if process.is_frozen or not process.is_alive:
            await process.running()
        call = Call(self, process, server, effect, label)
        profile = self.profile
        if profile.cut_share and self.rng.random() < profile.cut_share:
            call.loses_request = self.rng.random() < 0.5
            call.loses_answer = not call.loses_request
        process._calls[call] = None
        self.loop.send_later(self.delay_s(), call.arrive)
        if timeout_s is not None:
            patience = self._patience.get(timeout_s)
            if patience is None:
                patience = self._patience[timeout_s] = _Patience(self.loop, timeout_s)
            patience.add(call)
        is_answered = False
        try:
            answer = await call.answer
            is_answered = True
            return answer
        finally:
            del process._calls[call]
            if not is_answered:
                call.leave()
            del call  # an error's traceback would keep what keeps the error
            if process.is_frozen or not process.is_alive:
                await process.running()

    def later(self, step: Callable[..., Any], *arguments: Any) -> None:
        """Do `step` after one leg, outside every process."""
        self.loop.send_later(self.delay_s(), step, *arguments)

    def delay_s(self) -> float:
        """How long one message takes."""
        rng, profile = self.rng, self.profile
        if self._lag_until_s and self.loop.time() < self._lag_until_s:
            return rng.uniform(self._lag_s / 4, self._lag_s)
        draw = rng.random()
        if draw < profile.stall_share:
            return profile.stall_s
        is_slow = draw < profile.stall_share + profile.slow_share
        least, most = profile.slow_s if is_slow else profile.usual_s
        return least + (most - least) * rng.random()

    def survives_kill(self) -> bool:
        """Whether a message of a dead process arrives."""
        share = self.profile.sent_survives_kill
        return share > 0 and self.rng.random() < share

    def note(self, call: Call, event: str) -> None:
        """Write a line of the trace."""
        if self._trace is not None:
            self._trace(
                f"{self.loop.time():.6f} {call.process.name} {call.server.name} {call.label}: {event}"
            )
