"""The simulated engine over HTTP, as vLLM shows itself: OpenAI endpoints, `/metrics`, KV events.

One task advances the model and hands tokens to the requests that wait for them; closing a connection
aborts its sequences. Which requests fail, stall, crash the process or are slow, when asked for, depends only
on the seed and their order.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta, Struct
from prometheus_client import generate_latest

from dispatcher.simulation.engine import EngineModel, Made
from dispatcher.simulation.profile import Profile
from dispatcher.simulation.profiles import PROFILES
from dispatcher.simulation.tokens import Answer, tokenise
from workers_agent.simulator.engine_metrics import EngineMetrics
from workers_agent.simulator.kv_events import KVEventPublisher
from workers_agent.simulator.wire import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    DONE,
    MAX_BODY_BYTES,
    Ask,
    Refusal,
    error_of,
    event_of,
    read_ask,
    usage_of,
)

SHUTDOWN_S = 0.01
"""How long running answers are waited for at the end; aiohttp takes 0 for ever."""
VERSION = "flexlb-engine-sim"

Share = Annotated[float, Meta(ge=0, le=1)]


class Fault(StrEnum):
    """What goes wrong with a request on purpose: at once, or half-way through its answer."""

    NONE = "none"
    REFUSE = "refuse"
    CUT = "cut"
    DIE = "die"
    STALL = "stall"
    CRASH = "crash"
    SLOW = "slow"


_FAILURES = (Fault.REFUSE, Fault.CUT, Fault.DIE)


class Faults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shares of requests that go wrong; `slow_s` is the modelled delay of each token of a slow one."""

    fail_rate: Share = 0.0
    stall_rate: Share = 0.0
    crash_rate: Share = 0.0
    slow_rate: Share = 0.0
    slow_s: Annotated[float, Meta(ge=0, le=3600)] = 0.5


@dataclass(frozen=True, kw_only=True)
class SimulatorSettings:
    """What a simulated engine is. `time_scale` is wall seconds per modelled second; 0 waits for nothing.

    `kv_events` and `kv_replay` are ZeroMQ addresses, '' for none; see `kv_events.py`.
    """

    model: str = "sim"
    profile: Profile = field(default_factory=lambda: PROFILES["test"])
    max_model_tokens: int = 131_072
    max_waiting: int = 1_024
    time_scale: float = 1.0
    faults: Faults = field(default_factory=Faults)
    seed: int = 0
    kv_events: str = ""
    kv_replay: str = ""
    kv_topic: str = ""
    kv_encoding: str = "map"
    kv_drop_share: float = 0.0


class _Reply:
    """What one request is still owed: its tokens as the model makes them."""

    def __init__(self, ask: Ask, first_key: int, began_s: float) -> None:
        self.ask = ask
        self.keys = range(first_key, first_key + ask.sequences)
        self.made: asyncio.Queue[list[Made]] = asyncio.Queue()
        self.ids: list[list[int]] = [[] for _ in self.keys]
        self.prompt_tokens = sum(map(len, ask.prompts))
        self.cached_tokens = 0
        self.began_s = began_s
        self.last_s = began_s

    @property
    def tokens(self) -> int:
        """Tokens received so far."""
        return sum(map(len, self.ids))

    async def next(self) -> list[dict[str, object]]:
        """Wait for the tokens of the next step; return them as choices of a chunk."""
        choices = []
        for made in await self.made.get():
            index = made.key - self.keys.start
            ids = self.ids[index]
            ids.append(made.token_id)
            if made.is_first and index % self.ask.n == 0:
                self.cached_tokens += made.cached_tokens
            choices.append(self.ask.choice(index, ids[-1:], is_first=made.is_first, is_last=made.is_last))
        return choices

    def usage(self) -> dict[str, object]:
        """Count the tokens so far."""
        return usage_of(self.prompt_tokens, self.tokens, self.cached_tokens)


def kill_myself() -> None:
    """Die as by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


class Simulator:
    """One simulated engine."""

    def __init__(self, settings: SimulatorSettings, *, crash: Callable[[], None] = kill_myself) -> None:
        self.settings = settings
        self.engine = EngineModel(settings.profile)
        self.faults = settings.faults
        self.kv: KVEventPublisher | None = None
        self.metrics = EngineMetrics(self.engine, settings.model, settings.time_scale)
        self._crash = crash
        self._rng = random.Random(settings.seed)
        self._replies: dict[int, _Reply] = {}
        self._next_key = 0
        self._requests = 0
        self._now_s = 0.0
        self._arrived = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Serve; return the base address.

        Raises:
            OSError: an address can't be used.
        """
        settings = self.settings
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        add = app.router
        add.add_post(COMPLETIONS_PATH, self._answer)
        add.add_post(CHAT_PATH, self._answer)
        add.add_get("/v1/models", self._models)
        add.add_get("/health", self._health)
        add.add_get("/version", self._version)
        add.add_get("/metrics", self._metrics)
        add.add_post("/tokenize", self._tokenise)
        add.add_post("/reset_prefix_cache", self._reset)
        add.add_post("/sim/faults", self._set_faults)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            if settings.kv_events:
                self.kv = KVEventPublisher(
                    settings.kv_events,
                    replay=settings.kv_replay,
                    topic=settings.kv_topic,
                    encoding=settings.kv_encoding,
                    block_tokens=settings.profile.block_tokens,
                    drop_share=settings.kv_drop_share,
                    rng=random.Random(settings.seed),
                )
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._tasks = [asyncio.create_task(self._advance())]
        if self.kv is not None:
            self._tasks.append(asyncio.create_task(self.kv.run()))
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{runner.addresses[0][1]}"

    async def close(self) -> None:
        """Break off what runs and stop serving."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._runner is not None:
            await self._runner.cleanup()
        if self.kv is not None:
            self.kv.close()

    async def _advance(self) -> None:
        loop = asyncio.get_running_loop()
        scale = self.settings.time_scale
        while True:
            self._now_s = loop.time() / scale if scale else self.engine.due or self._now_s
            self._hand_out(self.engine.step(self._now_s))
            self._tell_cache()
            due = self.engine.due
            if due is None:
                self._arrived.clear()
                await self._arrived.wait()
            else:
                await asyncio.sleep(max(0.0, due * scale - loop.time()) if scale else 0)

    def _hand_out(self, made: list[Made]) -> None:
        metrics, now_s = self.metrics, self._now_s
        by_reply: dict[_Reply, list[Made]] = {}
        for one in made:
            reply = self._replies[one.key]
            by_reply.setdefault(reply, []).append(one)
            (metrics.ttft_s if one.is_first else metrics.itl_s).observe(
                max(0.0, now_s - (reply.began_s if one.is_first else reply.last_s))
            )
            if one.is_last:
                metrics.e2e_s.observe(max(0.0, now_s - reply.began_s))
                metrics.finished.inc()
        for reply, tokens in by_reply.items():
            reply.last_s = now_s
            reply.made.put_nowait(tokens)

    def _tell_cache(self) -> None:
        events = self.engine.take_events()
        if events and self.kv is not None:
            self.kv.publish(events)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def _metrics(self, _: web.Request) -> web.Response:
        body = generate_latest(self.metrics.registry)
        return web.Response(body=body, content_type="text/plain", charset="utf-8")

    async def _models(self, _: web.Request) -> web.Response:
        model = {
            "id": self.settings.model,
            "object": "model",
            "owned_by": "flexlb",
            "max_model_len": self._longest,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _tokenise(self, request: web.Request) -> web.Response:
        try:
            text = msgspec.json.decode(await request.read(), type=dict[str, msgspec.Raw])["prompt"]
            ids = tokenise(msgspec.json.decode(text, type=str)).tolist()
        except (ValueError, KeyError) as error:
            refusal = Refusal(400, "BadRequestError", f'body: expected {{"prompt": text}}: {error}')
            return web.json_response(error_of(refusal), status=400)
        return web.json_response({"count": len(ids), "max_model_len": self._longest, "tokens": ids})

    async def _reset(self, _: web.Request) -> web.Response:
        done = self.engine.reset_cache()
        self._tell_cache()
        return web.Response(status=200 if done else 409)

    async def _set_faults(self, request: web.Request) -> web.Response:
        try:
            self.faults = msgspec.json.decode(await request.read(), type=Faults)
        except (ValueError, RecursionError) as error:
            return web.json_response(
                error_of(Refusal(400, "BadRequestError", f"faults: {error}")), status=400
            )
        return web.Response(body=msgspec.json.encode(self.faults), content_type="application/json")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._requests += 1
        try:
            ask = read_ask(
                await request.read(),
                is_chat=request.path == CHAT_PATH,
                id=request.headers.get("X-Request-Id") or str(self._requests),
            )
            self._admit(ask)
            fault = self._draw_fault()
            if fault is Fault.REFUSE:
                raise Refusal(500, "InternalServerError", "failed on purpose, as --fail-rate asks")
        except Refusal as refusal:
            return web.json_response(error_of(refusal), status=refusal.status)
        if self.settings.profile.request_s and self.settings.time_scale:
            await asyncio.sleep(self.settings.profile.request_s * self.settings.time_scale)
        reply = self._submit(ask)
        try:
            if ask.stream:
                return await self._stream(request, reply, fault)
            return await self._whole(request, reply, fault)
        finally:
            for key in reply.keys:
                del self._replies[key]
                self.engine.abort(key)

    @property
    def _longest(self) -> int:
        return min(self.settings.max_model_tokens, self.settings.profile.kv_tokens)

    def _admit(self, ask: Ask) -> None:
        settings = self.settings
        if ask.model != settings.model:
            raise Refusal(404, "NotFoundError", f"model: expected {settings.model!r}, seen {ask.model!r}")
        longest = max(map(len, ask.prompts)) + ask.max_tokens
        if longest > self._longest:
            raise Refusal(
                400,
                "BadRequestError",
                f"prompt and max_tokens: expected at most {self._longest} tokens, seen {longest}",
            )
        held = self.engine.running + self.engine.waiting
        if held + ask.sequences > settings.profile.max_running + settings.max_waiting:
            raise Refusal(429, "TooManyRequests", f"{held} sequences are already held: try again later")

    def _draw_fault(self) -> Fault:
        fails, stalls = self._rng.random(), self._rng.random()
        failure = self._rng.choice(_FAILURES)
        crashes, slows = self._rng.random(), self._rng.random()
        faults = self.faults
        if fails < faults.fail_rate:
            return failure
        if stalls < faults.stall_rate:
            return Fault.STALL
        if crashes < faults.crash_rate:
            return Fault.CRASH
        return Fault.SLOW if slows < faults.slow_rate else Fault.NONE

    def _submit(self, ask: Ask) -> _Reply:
        loop_s = asyncio.get_running_loop().time()
        scale = self.settings.time_scale
        reply = _Reply(ask, self._next_key, loop_s / scale if scale else self._now_s)
        self._next_key += ask.sequences
        keys = iter(reply.keys)
        for prompt in ask.prompts:
            for choice, key in enumerate(itertools.islice(keys, ask.n)):
                self._replies[key] = reply
                output = Answer(prompt, choice).token_id
                self.engine.submit(key, prompt, ask.max_tokens, output=output, salt=ask.salt)
        self._arrived.set()
        return reply

    async def _stream(self, request: web.Request, reply: _Reply, fault: Fault) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        ask = reply.ask
        while reply.tokens < ask.tokens:
            if fault is not Fault.NONE and await self._goes_wrong(request, reply, fault):
                died = Refusal(500, "InternalServerError", "engine died on purpose, as --fail-rate asks")
                await response.write(event_of(msgspec.json.encode(error_of(died))) + DONE)
                return response
            choices = await reply.next()
            usage = reply.usage() if ask.continuous_usage else None
            await response.write(event_of(ask.frame(choices, usage)))
        if ask.include_usage:
            await response.write(event_of(ask.frame([], reply.usage())))
        await response.write(DONE)
        return response

    async def _whole(self, request: web.Request, reply: _Reply, fault: Fault) -> web.Response:
        ask = reply.ask
        while reply.tokens < ask.tokens:
            if fault is not Fault.NONE and await self._goes_wrong(request, reply, fault):
                await _break_off(request, Fault.CUT)
            await reply.next()
        choices = [ask.choice(index, ids, is_first=True, is_last=True) for index, ids in enumerate(reply.ids)]
        return web.Response(body=ask.frame(choices, reply.usage()), content_type="application/json")

    async def _goes_wrong(self, request: web.Request, reply: _Reply, fault: Fault) -> bool:
        """Do what the fault asks for at this place of the answer; True when an error is to be reported."""
        if fault is Fault.SLOW:
            await asyncio.sleep(self.faults.slow_s * self.settings.time_scale)
            return False
        if reply.tokens < reply.ask.tokens // 2:
            return False
        if fault is Fault.CRASH:
            self._crash()
        if fault is not Fault.DIE:
            await _break_off(request, fault)
        return True


async def _break_off(request: web.Request, fault: Fault) -> None:
    """Fall silent until the client leaves, or cut the connection."""
    if fault is not Fault.STALL and request.transport is not None:
        request.transport.abort()
    await asyncio.Event().wait()
