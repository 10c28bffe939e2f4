"""The simulated engine over HTTP, as vLLM shows itself: OpenAI endpoints, `/metrics`, KV events.

`driver.py` makes the tokens; here requests are admitted, answered and, on purpose, failed. Closing a
connection aborts its sequences.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client import generate_latest

from dispatcher.simulation.engine import EngineModel
from dispatcher.simulation.handover import HOP_S, LINK_BYTES_PER_S
from dispatcher.simulation.kv_cache import CacheEvent
from dispatcher.simulation.profile import Profile
from dispatcher.simulation.profiles import PROFILES
from dispatcher.telemetry.http import guard_expectations
from workers_agent.simulator import kv_transfer
from workers_agent.simulator.driver import Driver, Reply
from workers_agent.simulator.engine_metrics import EngineMetrics
from workers_agent.simulator.faults import Fault, FaultPlan, Faults, kill_myself
from workers_agent.simulator.kv_events import KVEventPublisher
from workers_agent.simulator.kv_transfer import Lender, borrow
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
    read_detokenise,
    read_tokenise,
)

SHUTDOWN_S = 0.01
"""How long running answers are waited for at the end; aiohttp takes 0 for ever."""
VERSION = "flexlb-engine-sim"


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


class Simulator:
    """One simulated engine."""

    def __init__(self, settings: SimulatorSettings, *, crash: Callable[[], None] = kill_myself) -> None:
        self.settings = settings
        self.engine = EngineModel(settings.profile)
        self.kv: KVEventPublisher | None = None
        self._metrics = EngineMetrics(self.engine, settings.model, settings.time_scale)
        self._faults = FaultPlan(settings.faults, settings.seed)
        self._driver = Driver(
            self.engine,
            self._metrics,
            settings.time_scale,
            tell=self._publish,
            step_factor=lambda: self._faults.faults.step_factor,
            pull=self._pull,
        )
        self._crash = crash
        self._requests = 0
        self._started_s = int(time.time())
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._address = ("127.0.0.1", 0)
        self._session: aiohttp.ClientSession | None = None
        self.lender = Lender(uuid.uuid4().hex, self._driver.release, self._driver.wall_s)

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Serve; return the base address.

        Raises:
            OSError: an address can't be used.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        add = app.router
        add.add_post(COMPLETIONS_PATH, self._answer)
        add.add_post(CHAT_PATH, self._answer)
        add.add_get("/v1/models", self._models)
        add.add_get("/health", self._health)
        add.add_get("/version", self._version)
        add.add_get("/metrics", self._show_metrics)
        add.add_post("/tokenize", self._tokenise)
        add.add_post("/detokenize", self._detokenise)
        add.add_post("/reset_prefix_cache", self._reset)
        add.add_post("/sim/faults", self._set_faults)
        add.add_get(kv_transfer.PATH, self._lend)
        add.add_delete(kv_transfer.PATH, self._take_back)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        guard_expectations(runner.server)
        try:
            self.kv = self._publisher()
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise OSError(error.errno, f"{host}:{port}: {os.strerror(error.errno or 0)}") from None
        except OSError:
            await runner.cleanup()
            if self.kv is not None:
                self.kv.close()
            raise
        self._runner = runner
        # What listens on every address is reached by its name.
        reached = socket.gethostname() if host in {"0.0.0.0", "::"} else host
        self._address = (f"[{reached}]" if ":" in reached else reached, runner.addresses[0][1])
        self._session = aiohttp.ClientSession()
        self._tasks = [asyncio.create_task(self._driver.run())]
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
        self.lender.close()
        if self._session is not None:
            await self._session.close()
        if self.kv is not None:
            self.kv.close()

    def _publisher(self) -> KVEventPublisher | None:
        settings = self.settings
        if not settings.kv_events:
            return None
        return KVEventPublisher(
            settings.kv_events,
            replay=settings.kv_replay,
            topic=settings.kv_topic,
            encoding=settings.kv_encoding,
            block_tokens=settings.profile.block_tokens,
            drop_share=settings.kv_drop_share,
            rng=random.Random(settings.seed),
        )

    def _publish(self, events: Iterable[CacheEvent]) -> None:
        if self.kv is not None:
            self.kv.publish(events)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def _show_metrics(self, _: web.Request) -> web.Response:
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, content_type="text/plain", charset="utf-8")

    async def _models(self, _: web.Request) -> web.Response:
        model = {
            "id": self.settings.model,
            "object": "model",
            "created": self._started_s,
            "owned_by": "flexlb",
            "max_model_len": self._longest,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _tokenise(self, request: web.Request) -> web.Response:
        try:
            ids = read_tokenise(await _body_of(request)).tolist()
        except Refusal as refusal:
            return _refuse(refusal)
        return web.json_response({"count": len(ids), "max_model_len": self._longest, "tokens": ids})

    async def _detokenise(self, request: web.Request) -> web.Response:
        try:
            return web.json_response({"prompt": read_detokenise(await _body_of(request))})
        except Refusal as refusal:
            return _refuse(refusal)

    async def _reset(self, _: web.Request) -> web.Response:
        return web.json_response({"success": self._driver.reset_cache()})

    async def _set_faults(self, request: web.Request) -> web.Response:
        try:
            faults = msgspec.json.decode(await _body_of(request), type=Faults)
        except (ValueError, RecursionError) as error:
            return _refuse(Refusal(400, "BadRequestError", f"faults: {error}"))
        except Refusal as refusal:
            return _refuse(refusal)
        self._faults.change(faults)
        return web.Response(body=msgspec.json.encode(faults), content_type="application/json")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._requests += 1
        began_s = self._driver.clock_s
        try:
            ask = read_ask(
                await _body_of(request),
                is_chat=request.path == CHAT_PATH,
                id=request.headers.get("X-Request-Id") or str(self._requests),
            )
            self._admit(ask)
            self._check_transfer(ask)
            fault = self._faults.draw()
            if fault is Fault.REFUSE:
                raise Refusal(500, "InternalServerError", "failed on purpose, as --fail-rate asks")
        except Refusal as refusal:
            return _refuse(refusal)
        if self.settings.profile.request_s:
            await self._driver.wait_until(began_s + self.settings.profile.request_s)
        reply = self._driver.submit(ask, began_s)
        try:
            if ask.stream:
                return await self._stream(request, reply, fault)
            return await self._whole(request, reply, fault)
        except ConnectionError:
            raise asyncio.CancelledError("the client left") from None
        finally:
            self._driver.leave(reply)

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

    def _check_transfer(self, ask: Ask) -> None:
        transfer = ask.kv_transfer
        if (transfer.do_remote_decode or transfer.do_remote_prefill) and ask.sequences != 1:
            raise Refusal(400, "BadRequestError", "kv_transfer_params: expected one prompt and one choice")
        if transfer.do_remote_prefill and not (
            transfer.remote_host and transfer.remote_port and transfer.remote_request_id
        ):
            raise Refusal(
                400, "BadRequestError", "do_remote_prefill: expected remote_host, _port and _request_id"
            )
        if transfer.do_remote_decode and (ask.stream or ask.max_tokens != 1):
            raise Refusal(400, "BadRequestError", "do_remote_decode: expected one token, not streamed")

    async def _stream(self, request: web.Request, reply: Reply, fault: Fault) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        ask = reply.ask
        while reply.tokens < ask.tokens:
            is_first = not reply.tokens
            died = Refusal(500, "InternalServerError", "engine died on purpose, as --fail-rate asks")
            try:
                choices = await self._next(request, reply, fault)
            except Refusal as refusal:
                died, choices = refusal, None
            if choices is None:
                await response.write(event_of(msgspec.json.encode(error_of(died))) + DONE)
                return response
            usage = reply.usage() if ask.continuous_usage else None
            await response.write(event_of(ask.frame(choices, usage, is_first=is_first)))
        if ask.include_usage:
            await response.write(event_of(ask.frame((), reply.usage())))
        await response.write(DONE)
        return response

    async def _whole(self, request: web.Request, reply: Reply, fault: Fault) -> web.Response:
        ask = reply.ask
        while reply.tokens < ask.tokens:
            try:
                if await self._next(request, reply, fault) is None:
                    await _break_off(request, Fault.CUT)
            except Refusal as refusal:
                return _refuse(refusal)
        choices = [ask.choice(index, ids, is_first=True, is_last=True) for index, ids in enumerate(reply.ids)]
        body = ask.frame(choices, reply.usage(), is_first=True, kv_transfer=self._lent(reply))
        return web.Response(body=body, content_type="application/json")

    def _lent(self, reply: Reply) -> dict[str, Any] | None:
        """What a finished prompt is lent with, when that was asked for."""
        ask = reply.ask
        if not ask.kv_transfer.do_remote_decode:
            return None
        block = self.settings.profile.block_tokens
        return self.lender.lend(ask.id, reply.keys[0], len(ask.prompts[0]), *self._address, block)

    async def _pull(self, ask: Ask, tokens: int) -> None:
        assert self._session is not None
        seconds = HOP_S + tokens * self.settings.profile.kv_token_bytes / LINK_BYTES_PER_S
        await borrow(self._session, ask.kv_transfer, self._driver.wait, len(ask.prompts[0]), seconds)

    async def _lend(self, request: web.Request) -> web.Response:
        asked = request.query
        tokens = self.lender.tokens_of(asked.get("engine", ""), asked.get("request", ""))
        if tokens is None:
            return _refuse(Refusal(404, "NotFoundError", "no such blocks are lent"))
        return web.json_response({"tokens": tokens})

    async def _take_back(self, request: web.Request) -> web.Response:
        asked = request.query
        if self.lender.tokens_of(asked.get("engine", ""), asked.get("request", "")) is not None:
            self.lender.give_back(asked["request"])
        return web.Response()

    async def _next(self, request: web.Request, reply: Reply, fault: Fault) -> list[bytes] | None:
        """The next choices, as far as the fault lets them come; None when an error is to be reported."""
        if fault is Fault.NONE:
            return await reply.next()
        if fault is Fault.SLOW:
            choices = await reply.next()
            late_s = (reply.at_s - reply.began_s) * self._faults.faults.slow_factor
            await self._driver.wait_until(reply.began_s + late_s)
            return choices
        if reply.tokens < reply.ask.tokens // 2:
            return await reply.next()
        if fault is Fault.CRASH:
            self._crash()
        if fault is not Fault.DIE:
            await _break_off(request, fault)
        return None


async def _body_of(request: web.Request) -> bytes:
    """A request's body.

    Raises:
        Refusal: 400, it is not what its headers say.
    """
    try:
        return await request.read()
    except web.RequestPayloadError as error:
        raise Refusal(400, "BadRequestError", f"body: {error.__cause__ or error}") from None


def _refuse(refusal: Refusal) -> web.Response:
    return web.json_response(error_of(refusal), status=refusal.status)


async def _break_off(request: web.Request, fault: Fault) -> None:
    """Fall silent until the client leaves, or cut the connection."""
    if fault is not Fault.STALL and request.transport is not None:
        request.transport.abort()
    await asyncio.Event().wait()
