"""The model in time: one task steps it when its steps are due and hands tokens to the replies that wait.

It owns the modelled clock (wall seconds over `time_scale`; 0 waits for nothing), what `/metrics` observes,
and when KV events are told. Tokens that a reply has not taken yet are given to it together.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable

from dispatcher.simulation.engine import EngineModel, Made, Pull
from dispatcher.simulation.kv_cache import CacheEvent
from dispatcher.simulation.tokens import Answer
from workers_agent.simulator.engine_metrics import EngineMetrics
from workers_agent.simulator.wire import Ask, Refusal, usage_of


class Reply:
    """What one request is still owed. `at_s` is the modelled time of the newest token."""

    def __init__(self, ask: Ask, first_key: int, began_s: float) -> None:
        self.ask = ask
        self.keys = range(first_key, first_key + ask.sequences)
        self.ids: list[list[int]] = [[] for _ in self.keys]
        self.tokens = 0
        self.cached_tokens = 0
        self.began_s = began_s
        self.at_s = began_s
        self._prompt_tokens = sum(map(len, ask.prompts))
        self._last_s = [began_s] * ask.sequences
        self._made: list[Made] = []
        self._ready = asyncio.Event()
        self._refusal: Refusal | None = None

    def give(self, one: Made, at_s: float) -> float:
        """Hand over a token; returns when its sequence got the one before, or began."""
        index = one.key - self.keys.start
        before_s, self._last_s[index], self.at_s = self._last_s[index], at_s, at_s
        self._made.append(one)
        self._ready.set()
        return before_s

    def fail(self, refusal: Refusal) -> None:
        """End it: its prompt, computed elsewhere, could not be had."""
        self._refusal = refusal
        self._ready.set()

    async def next(self) -> list[bytes]:
        """Wait for tokens; return them as choices of a chunk, one for each sequence that has some.

        Raises:
            Refusal: there will be none.
        """
        if not self._made:
            self._ready.clear()
            if self._refusal is None:
                await self._ready.wait()
            if self._refusal is not None:
                raise self._refusal
        made, self._made = self._made, []
        self.tokens += len(made)
        if len(made) > 1 and len(self.keys) > 1:
            made.sort(key=lambda one: one.key)
        choices = []
        for key, some in itertools.groupby(made, lambda one: one.key):
            index = key - self.keys.start
            its = list(some)
            ids = [one.token_id for one in its]
            self.ids[index] += ids
            if its[0].is_first and index % self.ask.n == 0:
                self.cached_tokens += its[0].cached_tokens
            choices.append(self.ask.choice(index, ids, is_first=its[0].is_first, is_last=its[-1].is_last))
        return choices

    def usage(self) -> dict[str, object]:
        """Count the tokens so far."""
        return usage_of(self._prompt_tokens, self.tokens, self.cached_tokens)


class Driver:
    """One engine's time.

    Args:
        tell: gets what happened to the cache.
        step_factor: how many times as long as modelled a step takes just now.
        pull: brings so many tokens of a prompt from the engine that computed it; Refusal when it can't.
    """

    def __init__(
        self,
        engine: EngineModel,
        metrics: EngineMetrics,
        time_scale: float,
        *,
        tell: Callable[[Iterable[CacheEvent]], None],
        step_factor: Callable[[], float],
        pull: Callable[[Ask, int], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._scale = time_scale
        self._tell = tell
        self._step_factor = step_factor
        self._pull = pull
        self._pulls: set[asyncio.Task[None]] = set()
        self._now_s = 0.0
        self._next_key = 0
        self._replies: dict[int, Reply] = {}
        self._queued: dict[int, tuple[int, float]] = {}
        self._admitted_tokens = 0
        self._arrived = asyncio.Event()

    @property
    def clock_s(self) -> float:
        """The modelled time."""
        return asyncio.get_running_loop().time() / self._scale if self._scale else self._now_s

    def submit(self, ask: Ask, began_s: float) -> Reply:
        """Queue every sequence of a request that came at `began_s`."""
        is_remote = ask.kv_transfer.do_remote_prefill
        reply = Reply(ask, self._next_key, began_s)
        self._next_key += ask.sequences
        queued_s = self.clock_s
        keys = iter(reply.keys)
        for prompt in ask.prompts:
            for choice, key in enumerate(itertools.islice(keys, ask.n)):
                self._engine.submit(
                    key,
                    prompt,
                    ask.max_tokens,
                    output=Answer(prompt, choice).token_id,
                    salt=ask.salt,
                    keeps=ask.kv_transfer.do_remote_decode,
                    is_remote=is_remote,
                )
                self._replies[key] = reply
                if not is_remote:
                    self._queued[key] = len(prompt), queued_s
        self._arrived.set()
        return reply

    def release(self, key: int) -> None:
        """Free the blocks that a sequence kept."""
        self._engine.release(key)
        self._arrived.set()

    def _begin_pulls(self) -> None:
        for pull in self._engine.take_pulls():
            task = asyncio.create_task(self._do_pull(pull))
            self._pulls.add(task)
            task.add_done_callback(self._pulls.discard)

    async def _do_pull(self, pull: Pull) -> None:
        """Have a prompt brought here; one that can't be had ends its reply."""
        reply = self._replies.get(pull.key)
        if reply is None:
            return
        try:
            await self._pull(reply.ask, pull.tokens)
        except Refusal as refusal:
            self._engine.abort(pull.key)
            reply.fail(refusal)
        else:
            self._engine.pulled(pull.key)
        self._arrived.set()

    def leave(self, reply: Reply) -> None:
        """Forget a reply; what is not finished of it is aborted."""
        for key in reply.keys:
            del self._replies[key]
            self._queued.pop(key, None)
            self._engine.abort(key)

    def wall_s(self, modelled_s: float) -> float:
        """So many modelled seconds on the wall; those of an engine that waits for nothing are as long."""
        return modelled_s * (self._scale or 1.0)

    async def wait(self, modelled_s: float) -> None:
        """Wait so many modelled seconds."""
        await self.wait_until(self.clock_s + modelled_s)

    def reset_cache(self) -> bool:
        """Forget every cached block; False while sequences hold some."""
        done = self._engine.reset_cache()
        self._tell_cache()
        return done

    async def wait_until(self, modelled_s: float) -> None:
        """Wait for a modelled time."""
        if self._scale:
            await asyncio.sleep(max(0.0, modelled_s * self._scale - asyncio.get_running_loop().time()))

    async def run(self) -> None:
        """Step the model until cancelled."""
        engine = self._engine
        while True:
            self._now_s = self.clock_s if self._scale or engine.due is None else engine.due
            self._catch_up()
            self._tell_cache()
            self._begin_pulls()
            if engine.due is None:
                self._arrived.clear()
                await self._arrived.wait()
            elif self._scale:
                await self.wait_until(engine.due)
            else:
                await asyncio.sleep(0)

    def _catch_up(self) -> None:
        """End every step that is due by now, one by one, and begin the next."""
        engine = self._engine
        while engine.due is None or engine.due <= self._now_s:
            at_s = self._now_s if engine.due is None else engine.due
            for one in engine.step(at_s):
                self._hand_out(one, at_s)
            self._note_admitted(at_s)
            if engine.due is None:
                return
            longer_s = (engine.due - at_s) * (self._step_factor() - 1)
            engine.due += longer_s
            engine.busy_s += longer_s

    def _hand_out(self, one: Made, at_s: float) -> None:
        metrics = self._metrics
        reply = self._replies[one.key]
        before_s = reply.give(one, at_s)
        (metrics.ttft_s if one.is_first else metrics.itl_s).observe(max(0.0, at_s - before_s))
        if one.is_last:
            metrics.e2e_s.observe(max(0.0, at_s - reply.began_s))
            metrics.finished.inc()

    def _note_admitted(self, at_s: float) -> None:
        """Observe how long those waited that got a slot."""
        # The model admits in order and counts the prompt tokens of each when it does.
        while self._admitted_tokens < self._engine.prompt_tokens:
            key = next(iter(self._queued))
            prompt_tokens, queued_s = self._queued.pop(key)
            self._admitted_tokens += prompt_tokens
            self._metrics.queue_s.observe(max(0.0, at_s - queued_s))

    def _tell_cache(self) -> None:
        events = self._engine.take_events()
        if events:
            self._tell(events)
