"""An event loop whose time is virtual: when nothing is ready, time jumps to the next timer.

Simulated processes call production code that waits, sleeps and times out; here an hour of that costs
what its callbacks cost. Two runs of the same program take the same steps: tasks hash by the order in
which they first are, so that sets of them (in `TaskGroup` and `asyncio.wait`) iterate alike. Futures are
asyncio's own, which its tasks wait for without a detour: don't iterate over sets of them.

A callback belongs to the `Scope` that was current when it was scheduled. While a scope is held, none
of its callbacks runs, which is what SIGSTOP does to a process.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Coroutine, Iterable, Mapping
from contextvars import Context, ContextVar, copy_context
from typing import Any, NoReturn, TypeVar

from dispatcher.backends.clock import Clock

T = TypeVar("T")

START_EPOCH_S = 1_800_000_000.0
MAX_ITERATIONS = 20_000_000
MAX_ITERATIONS_WITHOUT_WAITING = 100_000
ITERATIONS_AT_ONE_MOMENT = 100
"""After so many, each takes a microsecond: who waits for less than floats can tell would wait for ever."""
SHUTDOWN_ITERATIONS = 100_000
RESOLUTION_S = 1e-9


class Deadlock(RuntimeError):
    """Nothing is ready and nothing is scheduled: every task waits for another."""


class Runaway(RuntimeError):
    """The loop went round more often than a healthy simulation does."""


class Scope:
    """The tasks of one simulated process, and its callbacks while they are held back."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self.held: list[_Handle] | None = None

    def context(self) -> Context:
        """A copy of the current context in which callbacks and tasks belong to this scope."""
        context = copy_context()
        context.run(SCOPE.set, self)
        return context

    def hold(self, loop: VirtualLoop) -> None:
        """Run none of this scope's callbacks until released."""
        if self.held is None:
            self.held = []
            loop.scopes_held += 1

    def release(self, loop: VirtualLoop) -> None:
        """Run what was held back, in order, then go on."""
        if self.held is not None:
            held, self.held = self.held, None
            loop.scopes_held -= 1
            loop.resume(held)


SCOPE: ContextVar[Scope | None] = ContextVar("scope", default=None)
OUTSIDE = Context()
"""The context of what belongs to no process: servers and the network."""


class _Handle(list[Any]):
    """A callback: its moment in loop time, the number of its making, context, function and arguments.

    One moment's callbacks run by number; as a list it is made, compared and taken apart by the interpreter.
    """

    __slots__ = ()

    def cancel(self) -> None:
        """Don't run it."""
        self[3] = self[4] = None

    def cancelled(self) -> bool:
        """Whether it is not to run."""
        return self[3] is None

    def when(self) -> float:
        """Its moment."""
        return float(self[0])


_order = itertools.count()


class _Task(asyncio.Task[T]):
    place = -1

    def __hash__(self) -> int:
        if self.place < 0:
            self.place = next(_order)
        return self.place


class _NoFiles(selectors.BaseSelector):
    """There are none."""

    def select(self, timeout: float | None = None) -> list[Any]:
        raise RuntimeError("the virtual loop waits for nothing but its own timers")

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        raise RuntimeError(f"real I/O in virtual time: {fileobj!r}; use the simulated network")

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        raise KeyError(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self, *, start_epoch_s: float = START_EPOCH_S, max_iterations: int = MAX_ITERATIONS) -> None:
        self._now = 0.0
        self._start_epoch_s = start_epoch_s
        self._iterations_left = max_iterations
        self._max_iterations = max_iterations
        self._without_waiting = 0
        self._task_names = itertools.count(1)
        global _order
        _order = itertools.count()
        super().__init__(_NoFiles())
        self._timers: list[list[Any]] = []
        self._made = 0
        self.scopes_held = 0

    def time(self) -> float:
        """Seconds since the simulation began."""
        return self._now

    def epoch_s(self) -> float:
        """Seconds since 1970."""
        return self._start_epoch_s + self._now

    get_debug = bool
    """Never: asked for each future, so it costs no frame of Python's."""

    def describe_tasks(self) -> str:
        """The pending tasks and where each waits."""
        lines = []
        for task in sorted(asyncio.all_tasks(self), key=hash):
            frames = task.get_stack(limit=1)
            where = f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "not started"
            lines.append(f"{task.get_name()} ({where})")
        return f"Pending tasks: {', '.join(lines) or 'none'}"

    def resume(self, handles: Iterable[_Handle]) -> None:
        """Run handles that were held back."""
        self._ready.extend(handles)  # type: ignore[attr-defined]

    # What asyncio's own loop does, with our handles, tasks, futures and timers.

    def _run_once(self) -> None:
        """Go round until the loop is stopped; asyncio's goes round once."""
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        take, put, pop = ready.popleft, ready.append, heapq.heappop
        while True:
            self._iterations_left -= 1
            if self._iterations_left < 0:
                self._iterations_left = SHUTDOWN_ITERATIONS
                raise Runaway(
                    f"{self._max_iterations} loop iterations at {self._now:.3f} s: expected the simulation "
                    f"to be over; shorten it or raise max_iterations. {self.describe_tasks()}"
                )
            self._without_waiting += 1
            if not ready and not self._stopping:  # type: ignore[attr-defined]
                while timers and timers[0][3] is None:
                    pop(timers)
                if not timers:
                    self._tell_deadlock()
                if timers[0][0] > self._now:  # time jumps to the next timer
                    self._now = timers[0][0]
                    self._without_waiting = 0
            if self._without_waiting > ITERATIONS_AT_ONE_MOMENT:
                self._creep()
            end = self._now + RESOLUTION_S
            while timers and timers[0][0] < end:
                put(pop(timers))
            for _ in range(len(ready)):
                handle = take()
                _, _, context, callback, arguments = handle
                if callback is None:
                    continue
                if self.scopes_held:
                    scope = context.get(SCOPE)
                    if scope is not None and scope.held is not None:
                        scope.held.append(handle)
                        continue
                try:
                    context.run(callback, *arguments)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self.call_exception_handler(
                        {
                            "message": f"Exception in callback {callback!r}",
                            "exception": error,
                            "handle": handle,
                        }
                    )
            if self._stopping:  # type: ignore[attr-defined]
                return

    def _tell_deadlock(self) -> NoReturn:
        raise Deadlock(
            f"nothing ready and nothing scheduled at {self._now:.3f} s: expected at least one timer; "
            f"something waits for an event that nobody sends. {self.describe_tasks()}"
        )

    def _creep(self) -> None:
        """Go round at what was the same moment for long."""
        self._now += 1e-6
        if self._without_waiting > MAX_ITERATIONS_WITHOUT_WAITING:
            self._without_waiting = 0
            raise Runaway(
                f"{MAX_ITERATIONS_WITHOUT_WAITING} loop iterations in a row without waiting, "
                f"at {self._now:.3f} s: a task spins. {self.describe_tasks()}"
            )

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> _Handle:
        """Schedule `callback` for the next iteration."""
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        handle = _Handle((0.0, 0, copy_context() if context is None else context, callback, args))
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> _Handle:
        """Schedule `callback` in `delay` seconds."""
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        self._made += 1
        scope = copy_context() if context is None else context
        timer = _Handle((self._now + delay, self._made, scope, callback, args))
        heapq.heappush(self._timers, timer)
        return timer

    def send_later(self, delay: float, callback: Any, *args: Any) -> None:
        """`call_later` outside every process, of what nobody calls off."""
        self._made += 1
        heapq.heappush(self._timers, [self._now + delay, self._made, OUTSIDE, callback, args])

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> _Handle:
        """Schedule `callback` at loop time `when`; those of one moment run in the order they were made."""
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        self._made += 1
        timer = _Handle((when, self._made, copy_context() if context is None else context, callback, args))
        heapq.heappush(self._timers, timer)
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        """A future."""
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Any, *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        """A task that hashes by age and belongs to the current scope."""
        self._check_closed()  # type: ignore[attr-defined]
        task: _Task[Any] = _Task(
            coro, loop=self, name=name or f"task-{next(self._task_names)}", context=context
        )
        scope = SCOPE.get() if context is None else context.get(SCOPE)
        if scope is not None:
            scope.tasks.add(task)
            task.add_done_callback(scope.tasks.discard)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        """Call `func` at once: threads have no place in virtual time."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _make_self_pipe(self) -> None:
        self._ssock = self._csock = None
        self._internal_fds = 0

    def _close_self_pipe(self) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def run(
    main: Coroutine[Any, Any, T],
    *,
    start_epoch_s: float = START_EPOCH_S,
    max_iterations: int = MAX_ITERATIONS,
) -> T:
    """Run `main` to its end in virtual time.

    Raises:
        Deadlock: every task waits and no timer is set; names the tasks.
        Runaway: more than `max_iterations`, or a task spins.
    """

    def new_loop() -> VirtualLoop:
        return VirtualLoop(start_epoch_s=start_epoch_s, max_iterations=max_iterations)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)


def current() -> VirtualLoop:
    """The running loop, which must be a virtual one."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualLoop):
        raise RuntimeError(f"expected to run in virtual time, seen {type(loop).__name__}; use sim.loop.run")
    return loop


def monotonic() -> float:
    """The running loop's time."""
    return current().time()


def epoch_s() -> float:
    """The running loop's seconds since 1970."""
    return current().epoch_s()


def clock() -> Clock:
    """Virtual time as services take it."""
    return Clock(monotonic=monotonic, epoch_s=epoch_s)
