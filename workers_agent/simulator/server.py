"""The simulated engine over HTTP, as vLLM shows itself: OpenAI endpoints, `/health`, `/metrics`.

One task advances the model and hands tokens to the requests that wait for them; closing a connection
aborts its sequences. Which requests fail or stall, when asked for, depends only on the seed and
their order.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta, Struct
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from workers_agent.simulator.model import (
    Answer,
    EngineModel,
    Profile,
    Prompt,
    Token,
    block_hashes,
    count_tokens,
    word,
)

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
MAX_BODY_BYTES = 64 << 20
DEFAULT_MAX_TOKENS = 16
SHUTDOWN_S = 0.01
"""How long running answers are waited for at the end; aiohttp takes 0 for ever."""

PositiveInt = Annotated[int, Meta(ge=1)]


class _Part(Struct):
    type: str = "text"
    text: str = ""


class Message(Struct):
    """One message of a chat; parts that are not text are ignored."""

    role: str
    content: str | list[_Part] | None = None


class _StreamOptions(Struct):
    include_usage: bool = False


class _Body(Struct, kw_only=True):
    model: str
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = 1
    return_token_ids: bool | None = False
    cache_salt: str | None = None


class _Completions(_Body, kw_only=True):
    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]


class _Chat(_Body, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None


class _Refusal(Exception):
    """Answered with an OpenAI error object."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Fault(StrEnum):
    """What goes wrong with a request on purpose: at once, or half-way through its answer."""

    NONE = "none"
    REFUSE = "refuse"
    CUT = "cut"
    DIE = "die"
    STALL = "stall"


_FAILURES = (Fault.REFUSE, Fault.CUT, Fault.DIE)


@dataclass(frozen=True, kw_only=True)
class SimulatorSettings:
    """What a simulated engine is. `time_scale` is wall seconds per modelled second; 0 waits for nothing."""

    model: str = "sim"
    profile: Profile = field(default_factory=Profile)
    max_model_tokens: int = 131_072
    max_waiting: int = 1_024
    time_scale: float = 1.0
    fail_rate: float = 0.0
    stall_rate: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """What a body asks for, after its check."""

    is_chat: bool
    id: str
    model: str
    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int
    stream: bool
    include_usage: bool
    return_token_ids: bool
    salt: str

    @property
    def sequences(self) -> int:
        """How many choices will answer it."""
        return len(self.prompts) * self.n

    @property
    def tokens(self) -> int:
        """How many tokens they will have together."""
        return self.sequences * self.max_tokens

    def frame(self, choices: list[dict[str, object]], usage: dict[str, object] | None) -> bytes:
        """Write a chunk of a stream, or the whole answer when not streaming."""
        kind = "chat.completion" + ".chunk" * self.stream if self.is_chat else "text_completion"
        answer: dict[str, object] = {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": choices,
        }
        if usage is not None:
            answer["usage"] = usage
        return msgspec.json.encode(answer)

    def choice(self, index: int, ids: list[int], *, is_first: bool, is_last: bool) -> dict[str, object]:
        """Make one choice of a chunk, or of the whole answer when not streaming."""
        text = "".join(map(word, ids))
        choice: dict[str, object] = {"index": index, "finish_reason": "length" if is_last else None}
        if not self.is_chat:
            choice["text"] = text
        else:
            role = {"role": "assistant"} if is_first else {}
            choice["delta" if self.stream else "message"] = {**role, "content": text}
        if self.return_token_ids:
            choice["token_ids"] = ids
        return choice


class _Reply:
    """What one request is still owed: its tokens as the model makes them."""

    def __init__(self, ask: _Ask, first_key: int) -> None:
        self.ask = ask
        self.keys = range(first_key, first_key + ask.sequences)
        self.made: asyncio.Queue[Token] = asyncio.Queue()
        self.ids: list[list[int]] = [[] for _ in self.keys]
        self._answers = [Answer(prompt, choice) for prompt in ask.prompts for choice in range(ask.n)]
        self._cached_tokens = 0

    async def next(self) -> dict[str, object]:
        """Wait for the next token; return it as a choice of a chunk."""
        token = await self.made.get()
        index = token.key - self.keys.start
        ids = self.ids[index]
        ids.append(self._answers[index].token_id(len(ids)))
        if len(ids) == 1 and index % self.ask.n == 0:
            self._cached_tokens += token.cached_tokens
        return self.ask.choice(index, ids[-1:], is_first=len(ids) == 1, is_last=token.is_last)

    def usage(self) -> dict[str, object]:
        """Count the finished request's tokens."""
        prompt_tokens = sum(map(count_tokens, self.ask.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.ask.tokens,
            "total_tokens": prompt_tokens + self.ask.tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def render_chat(messages: list[Message]) -> str:
    """Make the prompt of a chat."""
    rendered = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        rendered.append(f"{message.role}: {text}\n")
    return "".join(rendered)


class Simulator:
    """One simulated engine."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.settings = settings
        self.engine = EngineModel(settings.profile)
        self._rng = random.Random(settings.seed)
        self._replies: dict[int, _Reply] = {}
        self._next_key = 0
        self._requests = 0
        self._arrived = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._advancing: asyncio.Task[None] | None = None
        self._registry = CollectorRegistry()
        labels = ["model_name"]
        registry = self._registry
        running = Gauge("vllm:num_requests_running", "Sequences in the batch", labels, registry=registry)
        waiting = Gauge("vllm:num_requests_waiting", "Sequences in the queue", labels, registry=registry)
        running.labels(settings.model).set_function(lambda: self.engine.running)
        waiting.labels(settings.model).set_function(lambda: self.engine.waiting)
        made = Counter("vllm:generation_tokens", "Tokens made", labels, registry=registry)
        self._made_tokens = made.labels(settings.model)

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Serve; return the base address.

        Raises:
            OSError: the address can't be used.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post(COMPLETIONS_PATH, self._answer)
        app.router.add_post(CHAT_PATH, self._answer)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._advancing = asyncio.create_task(self._advance())
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{runner.addresses[0][1]}"

    async def close(self) -> None:
        """Break off what runs and stop serving."""
        if self._advancing is not None:
            self._advancing.cancel()
            await asyncio.wait([self._advancing])
        if self._runner is not None:
            await self._runner.cleanup()

    async def _advance(self) -> None:
        loop = asyncio.get_running_loop()
        scale = self.settings.time_scale
        now = 0.0
        while True:
            now = loop.time() / scale if scale else self.engine.due or now
            for token in self.engine.step(now):
                self._made_tokens.inc()
                self._replies[token.key].made.put_nowait(token)
            due = self.engine.due
            if due is None:
                self._arrived.clear()
                await self._arrived.wait()
            else:
                await asyncio.sleep(max(0.0, due * scale - loop.time()) if scale else 0)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        body = generate_latest(self._registry)
        return web.Response(body=body, content_type="text/plain", charset="utf-8")

    async def _models(self, _: web.Request) -> web.Response:
        model = {
            "id": self.settings.model,
            "object": "model",
            "owned_by": "flexlb",
            "max_model_len": self.settings.max_model_tokens,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            ask = self._read(request, await request.read())
            fault = self._draw_fault()
            if fault is Fault.REFUSE:
                raise _Refusal(500, "InternalServerError", "failed on purpose, as --fail-rate asks")
        except _Refusal as refusal:
            return web.json_response(_error_of(refusal), status=refusal.status)
        reply = self._submit(ask)
        try:
            if ask.stream:
                return await self._stream(request, reply, fault)
            return await self._whole(request, reply, fault)
        finally:
            for key in reply.keys:
                del self._replies[key]
                self.engine.abort(key)

    def _read(self, request: web.Request, body: bytes) -> _Ask:
        is_chat = request.path == CHAT_PATH
        read: _Chat | _Completions
        try:
            read = (_chat if is_chat else _completions).decode(body)
            prompts = (render_chat(read.messages),) if isinstance(read, _Chat) else _prompts_of(read.prompt)
        except (ValueError, RecursionError) as error:
            raise _Refusal(400, "BadRequestError", f"body: {error}") from None
        longest = read.max_completion_tokens if isinstance(read, _Chat) else None
        self._requests += 1
        ask = _Ask(
            is_chat=is_chat,
            id=request.headers.get("X-Request-Id") or str(self._requests),
            model=read.model,
            prompts=prompts,
            n=read.n or 1,
            max_tokens=longest or read.max_tokens or DEFAULT_MAX_TOKENS,
            stream=bool(read.stream),
            include_usage=read.stream_options is not None and read.stream_options.include_usage,
            return_token_ids=bool(read.return_token_ids),
            salt=read.cache_salt or "",
        )
        self._admit(ask)
        return ask

    def _admit(self, ask: _Ask) -> None:
        settings = self.settings
        if ask.model != settings.model:
            raise _Refusal(404, "NotFoundError", f"model: expected {settings.model!r}, seen {ask.model!r}")
        longest = max(map(count_tokens, ask.prompts)) + ask.max_tokens
        if longest > settings.max_model_tokens:
            raise _Refusal(
                400,
                "BadRequestError",
                f"prompt and max_tokens: expected at most {settings.max_model_tokens} tokens, seen {longest}",
            )
        held = self.engine.running + self.engine.waiting
        if held + ask.sequences > settings.profile.max_running + settings.max_waiting:
            raise _Refusal(429, "TooManyRequests", f"{held} sequences are already held: try again later")

    def _draw_fault(self) -> Fault:
        fails, stalls = self._rng.random(), self._rng.random()
        failure = self._rng.choice(_FAILURES)
        if fails < self.settings.fail_rate:
            return failure
        return Fault.STALL if stalls < self.settings.stall_rate else Fault.NONE

    def _submit(self, ask: _Ask) -> _Reply:
        reply = _Reply(ask, self._next_key)
        self._next_key += ask.sequences
        keys = iter(reply.keys)
        for prompt in ask.prompts:
            tokens, blocks = count_tokens(prompt), block_hashes(prompt, ask.salt)
            for key in itertools.islice(keys, ask.n):
                self._replies[key] = reply
                self.engine.submit(key, prompt_tokens=tokens, output_tokens=ask.max_tokens, blocks=blocks)
        self._arrived.set()
        return reply

    async def _stream(self, request: web.Request, reply: _Reply, fault: Fault) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        for place in range(reply.ask.tokens):
            if fault is not Fault.NONE and place == reply.ask.tokens // 2:
                if fault is Fault.DIE:
                    died = _Refusal(500, "InternalServerError", "engine died on purpose, as --fail-rate asks")
                    await response.write(_event(msgspec.json.encode(_error_of(died))) + _DONE)
                    return response
                await _break_off(request, fault)
            await response.write(_event(reply.ask.frame([await reply.next()], None)))
        if reply.ask.include_usage:
            await response.write(_event(reply.ask.frame([], reply.usage())))
        await response.write(_DONE)
        return response

    async def _whole(self, request: web.Request, reply: _Reply, fault: Fault) -> web.Response:
        ask = reply.ask
        for place in range(ask.tokens):
            if fault is not Fault.NONE and place == ask.tokens // 2:
                await _break_off(request, fault)
            await reply.next()
        choices = [ask.choice(index, ids, is_first=True, is_last=True) for index, ids in enumerate(reply.ids)]
        return web.Response(body=ask.frame(choices, reply.usage()), content_type="application/json")


_DONE = b"data: [DONE]\n\n"
_chat = msgspec.json.Decoder(_Chat)
_completions = msgspec.json.Decoder(_Completions)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _error_of(refusal: _Refusal) -> dict[str, object]:
    fields = {"message": str(refusal), "type": refusal.kind, "param": None, "code": refusal.status}
    return {"error": fields}


async def _break_off(request: web.Request, fault: Fault) -> None:
    """Fall silent until the client leaves, or cut the connection."""
    if fault is not Fault.STALL and request.transport is not None:
        request.transport.abort()
    await asyncio.Event().wait()


def _prompts_of(prompt: str | list[str | int | list[int]]) -> tuple[Prompt, ...]:
    """Tell several prompts from one: a list of ids is one.

    Raises:
        ValueError: the list mixes them.
    """
    if isinstance(prompt, str):
        return (prompt,)
    ids = [part for part in prompt if isinstance(part, int)]
    if not ids:
        return tuple(part for part in prompt if not isinstance(part, int))
    if len(ids) != len(prompt):
        raise ValueError("prompt: expected a list of texts, of token ids, or of lists of them; seen a mix")
    return (ids,)
