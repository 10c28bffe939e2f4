"""Any OpenAI-compatible engine over HTTP: vLLM, SGLang, llama.cpp, the simulator.

Every request is streamed, whatever its body says. A stream is believed by its finish reasons alone:
a killed vLLM still sends `[DONE]`, a hung one still answers `/health`. What is not understood fails
the attempt with a cause; nothing is guessed. Closing a stream closes its connection, which is how
these engines are told to abort.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Raw, Struct

from dispatcher.errors import SettingsError
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.outcome import FailureCause, Usage
from dispatcher.protocol.request import Count, Endpoint
from workers_agent.engines.continuation import continuable
from workers_agent.engines.engine import EngineFailure, Piece, Prefilled
from workers_agent.engines.engine_load import EngineLoad, parse_load
from workers_agent.engines.sse import EventParser

ALIVE_TIMEOUT_S = 2.0
PROBE_TIMEOUT_S = 10.0
AFTER_FINISH_S = 5.0
"""How long the usage is waited for once each choice has finished."""
AFTER_DONE_S = 0.25
"""How long the end of the body is waited for after `[DONE]`, so that the connection can be kept."""
KEEP_ALIVE_S = 3.0
"""Below the 5 s after which uvicorn and llama.cpp close an idle connection: ours never meets a closed one."""
MAX_WHOLE_ANSWER_BYTES = 64 << 20
MAX_PAGE_BYTES = 16 << 20
"""Of what is no answer: models, metrics, token ids."""
LARGE_BODY_BYTES = 1 << 20
SHOWN_CHARS = 500

_OVERLOADED = frozenset({408, 425, 429, 503})
_BROKEN_FINISHES = frozenset({"abort", "error"})
_EMPTY = frozenset({b"null", b'""', b"[]", b"{}"})
_LIST_OF_PROMPTS = re.compile(rb'\s*\[\s*["\[]')
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class _PromptDetails(Struct):
    cached_tokens: Count | None = None


class _Usage(Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Choice(Struct):
    index: int = 0
    delta: dict[str, Raw] | None = None
    message: dict[str, Raw] | None = None
    text: str | None = None
    logprobs: Raw = Raw(b"null")
    token_ids: tuple[Count, ...] | None = None
    finish_reason: str | None = None


class _Event(Struct):
    """A chunk of a stream or a whole answer: they differ in `delta` and `message` only."""

    object: str | None = None
    message: str | None = None
    choices: tuple[_Choice, ...] | None = None
    usage: _Usage | None = None
    error: Raw = Raw(b"null")
    kv_transfer_params: Raw = Raw(b"null")


class _Model(Struct):
    id: str
    max_model_len: int | None = None
    meta: Any = None

    @property
    def longest(self) -> int:
        """Prompt and answer together; llama.cpp tells the context of one slot in `meta` instead."""
        if self.max_model_len:
            return self.max_model_len
        tokens = self.meta.get("n_ctx") if isinstance(self.meta, dict) else None
        return tokens if isinstance(tokens, int) else 0


class _Version(Struct):
    version: str = ""
    build_info: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineDescription:
    """What an engine tells of itself; 0 or '' where it does not."""

    version: str = ""
    max_model_len: int = 0
    block_size: int = 0
    kv_total_tokens: int = 0


class _Tokenised(Struct):
    tokens: tuple[Count, ...]


class _Detokenised(Struct):
    prompt: str


class _Models(Struct):
    data: tuple[_Model, ...]


_event = msgspec.json.Decoder(_Event | None)
_models = msgspec.json.Decoder(_Models)
_version = msgspec.json.Decoder(_Version)
_tokenised = msgspec.json.Decoder(_Tokenised)
_detokenised = msgspec.json.Decoder(_Detokenised)
_body = msgspec.json.Decoder(dict[str, Raw])
_content = msgspec.json.Decoder(str | None)
_count = msgspec.json.Decoder(int | None)
_elements = msgspec.json.Decoder(list[Raw])
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def streaming_body(endpoint: Endpoint, body: bytes, model: str, cache_salt: str = "") -> tuple[bytes, int]:
    """Make `body` ask for a stream with usage; return it and how many choices will answer it.

    A body that names no model gets the request's; a salt of the request's counts before the body's own. One
    that may be answered in two runs asks for token ids.
    Values are not re-encoded.

    Raises:
        EngineFailure: REFUSED, the body can't be an OpenAI body.
    """
    try:
        fields = _body.decode(body)
    except _UNREADABLE as error:
        raise EngineFailure(
            FailureCause.REFUSED, f"body: expected a JSON object, seen {len(body)} other bytes ({error})"
        ) from None
    try:
        n = _count.decode(fields.get("n", Raw(b"null")))
        prompts = _prompts(fields.get("prompt")) if endpoint is Endpoint.COMPLETIONS else 1
    except _UNREADABLE as error:
        raise EngineFailure(FailureCause.REFUSED, f"body: n or prompt: {error}") from None
    if n is not None and n < 1:
        raise EngineFailure(FailureCause.REFUSED, f"body: n: expected 1 or more, seen {n}")
    if "model" not in fields:
        fields["model"] = Raw(msgspec.json.encode(model))
    if cache_salt:
        fields["cache_salt"] = Raw(msgspec.json.encode(cache_salt))
    fields["stream"] = Raw(b"true")
    fields["stream_options"] = Raw(b'{"include_usage":true}')
    if continuable(endpoint, body) is not None:
        fields["return_token_ids"] = Raw(b"true")
    return msgspec.json.encode(fields), (n or 1) * prompts


REMOTE_DECODE = Raw(
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}'
)
"""What vLLM's NIXL connector wants of a prompt that another engine goes on from (0.33)."""


def prefill_body(endpoint: Endpoint, body: bytes, model: str, cache_salt: str = "") -> bytes | None:
    """Make `body` ask for its prompt to be computed and kept: one token, not streamed.

    None when it can't be split: it has several answers, and the blocks of a prompt are pulled once.

    Raises:
        EngineFailure: as `streaming_body`.
    """
    streamed, choices = streaming_body(endpoint, body, model, cache_salt)
    if choices != 1:
        return None
    fields = _body.decode(streamed)
    for name in ("stream_options", "return_token_ids", "min_tokens"):
        fields.pop(name, None)
    fields["stream"] = Raw(b"false")
    fields["max_tokens"] = Raw(b"1")
    if "max_completion_tokens" in fields:
        fields["max_completion_tokens"] = Raw(b"1")
    fields["kv_transfer_params"] = REMOTE_DECODE
    return msgspec.json.encode(fields)


def decode_body(body: bytes, kv_transfer_params: Raw) -> bytes:
    """Make `body` go on from a prompt that another engine computed.

    Raises:
        EngineFailure: REFUSED, the body can't be an OpenAI body.
    """
    try:
        fields = _body.decode(body)
    except _UNREADABLE as error:
        raise EngineFailure(
            FailureCause.REFUSED, f"body: expected a JSON object, seen {len(body)} other bytes ({error})"
        ) from None
    fields["kv_transfer_params"] = kv_transfer_params
    return msgspec.json.encode(fields)


def _prompts(prompt: Raw | None) -> int:
    """Count prompts: a list of texts or of lists is several, a list of token ids is one."""
    if prompt is not None and _LIST_OF_PROMPTS.match(prompt):
        return len(_elements.decode(prompt))
    return 1


class _Answer:
    """What has come of one answer, and whether it is whole."""

    def __init__(self, choices: int) -> None:
        self._choices = choices
        self._finished: set[int] = set()
        self.tokens = 0
        self.usage: Usage | None = None
        self.kv_transfer_params = Raw(b"null")
        self.is_done = False

    @property
    def is_finished(self) -> bool:
        """Whether each choice has its finish reason."""
        return len(self._finished) == self._choices

    def take(self, payload: bytes) -> Piece | None:
        """Read one event; None when it adds nothing.

        Raises:
            EngineFailure: PROTOCOL; ENGINE_ERROR when the engine reports one; TRUNCATED by an early `[DONE]`.
        """
        if self.is_done:
            return None
        if payload.strip() == b"[DONE]":
            self.require_whole()
            self.is_done = True
            return None
        try:
            # As text first: a Raw is not checked for valid UTF-8 by its decoder.
            event = _event.decode(payload.decode())
            # llama.cpp begins the answer to several prompts with a null.
            return self._piece(event) if event is not None else None
        except _UNREADABLE as error:
            raise EngineFailure(
                FailureCause.PROTOCOL,
                f"answer: expected OpenAI JSON, seen {len(payload)} other bytes ({error}) "
                f"after {self.tokens} tokens",
            ) from None

    def take_whole(self, body: bytes) -> Piece:
        """Read an answer that was not streamed.

        Raises:
            EngineFailure: as `take`; PROTOCOL also when it holds no choices.
        """
        piece = self.take(body)
        if piece is None:
            raise EngineFailure(
                FailureCause.PROTOCOL, f"answer: expected choices, seen {len(body)} bytes of JSON without any"
            )
        if self.usage is not None and self.usage.completion_tokens > 0:
            self.tokens = self.usage.completion_tokens
            piece = replace(piece, tokens=self.tokens)
        return piece

    def _piece(self, event: _Event) -> Piece | None:
        if event.object == "error" or bytes(event.error) != b"null":
            said = event.message or _shown(bytes(event.error))
            # An error is the engine's, whatever code it gives: vLLM reports its own death also as a 400.
            raise EngineFailure(
                FailureCause.ENGINE_ERROR,
                f"engine reported an error after {self.tokens} tokens",
                said=said[:SHOWN_CHARS],
            )
        if event.usage is not None:
            self.usage = _usage(event.usage)
        if bytes(event.kv_transfer_params) != b"null":
            self.kv_transfer_params = event.kv_transfer_params
        choices: list[ChoiceDelta] = []
        finish_reasons: list[tuple[int, str]] = []
        tokens = 0
        for choice in event.choices or ():
            if not 0 <= choice.index < self._choices:
                raise EngineFailure(
                    FailureCause.PROTOCOL,
                    f"answer: expected choices 0 to {self._choices - 1}, seen index {choice.index}",
                )
            delta = _delta(choice)
            if delta is not None:
                choices.append(delta)
                tokens += 1 if delta.token_ids is None else len(delta.token_ids)
            if choice.finish_reason and choice.index not in self._finished:
                self._finish(choice.index, choice.finish_reason)
                finish_reasons.append((choice.index, choice.finish_reason))
        if not choices and not finish_reasons:
            return None
        self.tokens += tokens
        return Piece(choices=tuple(choices), tokens=tokens, finish_reasons=tuple(finish_reasons))

    def _finish(self, index: int, reason: str) -> None:
        if reason in _BROKEN_FINISHES:
            raise EngineFailure(
                FailureCause.ENGINE_ERROR,
                f"engine gave up choice {index} with finish reason {reason!r}; nobody had asked it to",
            )
        self._finished.add(index)

    def require_whole(self) -> None:
        """Check that nothing is missing.

        Raises:
            EngineFailure: TRUNCATED, a choice has no finish reason.
        """
        if not self.is_finished:
            raise EngineFailure(
                FailureCause.TRUNCATED,
                f"answer ended after {self.tokens} tokens: expected a finish reason for each of "
                f"{self._choices} choices, seen {len(self._finished)}",
            )


def _delta(choice: _Choice) -> ChoiceDelta | None:
    """What a choice gained; None when nothing."""
    text = choice.text or ""
    kept: dict[str, Raw] = {}
    for fields in (choice.delta, choice.message):
        for name, value in (fields or {}).items():
            if name == "content":
                text = _content.decode(value) or ""
            elif name != "role" and bytes(value) not in _EMPTY:
                kept[name] = value
    if bytes(choice.logprobs) not in _EMPTY:
        kept["logprobs"] = choice.logprobs
    if not text and not kept and not choice.token_ids:
        return None
    deltas = (Raw(msgspec.json.encode(kept)),) if kept else ()
    return ChoiceDelta(index=choice.index, text=text, token_ids=choice.token_ids, deltas=deltas)


def _usage(usage: _Usage) -> Usage:
    details = usage.prompt_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
    )


def open_session() -> aiohttp.ClientSession:
    """Make a session without a bound on connections: how much an engine is given is decided elsewhere."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class OpenAIEngine:
    """One OpenAI-compatible engine at `base_url` (with or without a final `/v1`)."""

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float = 2,
        first_token_timeout_s: float = 600,
        inter_token_timeout_s: float = 30,
        new_session: Callable[[], aiohttp.ClientSession] = open_session,
    ) -> None:
        self._base_url = _base_url(base_url)
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s)
        self._first_token_timeout_s = first_token_timeout_s
        self._inter_token_timeout_s = inter_token_timeout_s
        self._new_session = new_session
        self._session: aiohttp.ClientSession | None = None

    async def stream(self, work: Work, body: bytes) -> AsyncGenerator[Piece, None]:
        """Run `body` at `work.endpoint`; see `Engine.stream`."""
        loop = asyncio.get_running_loop()
        body, choices = streaming_body(work.endpoint, body, work.model, work.cache_salt)
        deadline = loop.time() + self._first_token_timeout_s
        response = await self._post(work, body, deadline)
        try:
            if response.status != 200:
                raise await _refusal(response)
            answer = _Answer(choices)
            if response.content_type != "text/event-stream":
                yield answer.take_whole(await self._whole(response))
            else:
                parser = EventParser()
                while data := await _read(response, answer, deadline):
                    payloads = _parse(parser, data)
                    for payload in payloads:
                        piece = answer.take(payload)
                        if piece is not None:
                            yield piece
                    if payloads:
                        deadline = loop.time() + self._patience_s(answer)
            answer.require_whole()
            if answer.usage is not None:
                yield Piece(usage=answer.usage)
        finally:
            response.close()

    async def prefill(self, work: Work, body: bytes) -> Prefilled | None:
        """Compute the prompt of `body` for another engine; see `Engine.prefill`."""
        asked = prefill_body(work.endpoint, body, work.model, work.cache_salt)
        if asked is None:
            return None
        deadline = asyncio.get_running_loop().time() + self._first_token_timeout_s
        response = await self._post(work, asked, deadline)
        try:
            if response.status != 200:
                raise await _refusal(response)
            answer = _Answer(1)
            try:
                async with asyncio.timeout_at(deadline):
                    answer.take_whole(await self._whole(response))
            except TimeoutError:
                raise EngineFailure(
                    FailureCause.STALLED, f"{response.url}: engine fell silent while it computed a prompt"
                ) from None
            if bytes(answer.kv_transfer_params) == b"null":
                raise EngineFailure(
                    FailureCause.PROTOCOL,
                    f"{response.url}: expected kv_transfer_params from a prefill node, seen none; "
                    "start the engine with a KV connector (vLLM: --kv-transfer-config with NixlConnector)",
                )
            return Prefilled(
                kv_transfer_params=Raw(bytes(answer.kv_transfer_params)), usage=answer.usage or Usage()
            )
        finally:
            response.close()

    def _patience_s(self, answer: _Answer) -> float:
        """How long the engine may now be silent. Only events count: a proxy's comments are no progress."""
        if answer.is_done:
            return AFTER_DONE_S
        if answer.is_finished:
            return min(AFTER_FINISH_S, self._inter_token_timeout_s)
        return self._inter_token_timeout_s if answer.tokens else self._first_token_timeout_s

    async def _post(self, work: Work, body: bytes, deadline: float) -> aiohttp.ClientResponse:
        where = self._base_url + work.endpoint
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "X-Request-Id": _printable(work.id) or _printable(work.ref),
        }
        if _TRACEPARENT.fullmatch(work.traceparent):
            headers["traceparent"] = work.traceparent
        data = io.BytesIO(body) if len(body) > LARGE_BODY_BYTES else body
        try:
            async with asyncio.timeout_at(deadline):
                return await self._connections().post(
                    where, data=data, headers=headers, timeout=self._timeout, allow_redirects=False
                )
        except aiohttp.ServerTimeoutError as error:
            raise EngineFailure(
                FailureCause.CONNECT, f"{where}: no connection in time ({error})", reached=False
            ) from None
        except TimeoutError:
            raise EngineFailure(
                FailureCause.STALLED, f"{where}: no answer within {self._first_token_timeout_s} s"
            ) from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise EngineFailure(
                FailureCause.CONNECT,
                f"{where}: no answer, the connection failed ({error})",
                reached=not isinstance(error, aiohttp.ClientConnectorError),
            ) from None
        except aiohttp.ClientError as error:
            raise EngineFailure(
                FailureCause.PROTOCOL,
                f"{where}: expected an HTTP answer, seen another",
                said=str(error)[:SHOWN_CHARS],
            ) from None

    async def _whole(self, response: aiohttp.ClientResponse) -> bytes:
        """Read an answer that is no stream, within a bound."""
        if not response.content_type.endswith("json"):
            raise EngineFailure(
                FailureCause.PROTOCOL,
                f"{response.url}: expected text/event-stream or JSON, seen {response.content_type}",
            )
        body = bytearray()
        loop = asyncio.get_running_loop()
        while data := await _read(response, None, loop.time() + self._inter_token_timeout_s):
            body += data
            if len(body) > MAX_WHOLE_ANSWER_BYTES:
                raise EngineFailure(
                    FailureCause.PROTOCOL,
                    f"{response.url}: expected at most {MAX_WHOLE_ANSWER_BYTES} bytes of JSON, seen more",
                )
        return bytes(body)

    async def prompt_ids(self, work: Work, body: bytes) -> tuple[int, ...] | None:
        """Ask `/tokenize`; see `Engine.prompt_ids`."""
        fields = _body.decode(body)
        asked: dict[str, object] = {
            name: fields[name] for name in ("model", "prompt", "messages") if name in fields
        }
        try:
            data = await self._ask("/tokenize", {"model": work.model, **asked})
            return _tokenised.decode(data.decode()).tokens if data is not None else None
        except _UNREADABLE:
            return None

    async def text_of(self, work: Work, token_ids: Sequence[int]) -> str | None:
        """Ask `/detokenize`; see `Engine.text_of`."""
        try:
            data = await self._ask("/detokenize", {"model": work.model, "tokens": token_ids})
            return _detokenised.decode(data.decode()).prompt if data is not None else None
        except _UNREADABLE:
            return None

    async def _ask(self, path: str, body: dict[str, object]) -> bytes | None:
        """Post to one of the engine's own pages; None when it has no answer to that."""
        where = self._base_url + path
        try:
            async with self._connections().post(
                where,
                data=msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S),
            ) as response:
                data = await _bounded(response)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineFailure(
                FailureCause.CONNECT, f"{where}: no answer ({error!r})", reached=False
            ) from None
        if response.status in _OVERLOADED or response.status >= 500:
            raise EngineFailure(
                _cause_of(response.status),
                f"{where}: expected 200, seen {response.status}",
                said=_shown(data),
                http_status=response.status,
                reached=False,
            )
        return data if response.status == 200 else None

    async def is_alive(self) -> bool:
        """Whether `/health` answers 200, or `/v1/models` where there is no `/health`."""
        status = await self._status("/health")
        if status == 404:
            status = await self._status("/v1/models")
        return status == 200

    async def models(self) -> tuple[str, ...]:
        """Ask which models are served.

        Raises:
            EngineFailure: no answer, or none that can be read.
        """
        where = self._base_url + "/v1/models"
        try:
            async with self._connections().get(where, timeout=_whole_call()) as response:
                body = await _bounded(response)
                if response.status != 200:
                    raise EngineFailure(
                        _cause_of(response.status),
                        f"{where}: expected 200, seen {response.status}",
                        said=_shown(body),
                        http_status=response.status,
                    )
                return tuple(model.id for model in _models.decode(body.decode()).data)
        except (aiohttp.ClientError, OSError) as error:
            raise EngineFailure(FailureCause.CONNECT, f"{where}: no answer ({error!r})") from None
        except _UNREADABLE as error:
            raise EngineFailure(
                FailureCause.PROTOCOL, f"{where}: expected a list of models ({error})"
            ) from None

    async def load(self) -> EngineLoad | None:
        """Read the engine's `/metrics`; None when nothing answers, an empty load when it has no such page."""
        try:
            async with self._connections().get(
                self._base_url + "/metrics", timeout=_whole_call()
            ) as response:
                body = await _bounded(response)
                return parse_load(body) if response.status == 200 else EngineLoad()
        except (aiohttp.ClientError, OSError):
            return None

    async def describe(self) -> EngineDescription:
        """What the engine tells of itself, as far as it does."""
        found = EngineDescription()
        try:
            async with self._connections().get(
                self._base_url + "/v1/models", timeout=_whole_call()
            ) as response:
                models = _models.decode((await _bounded(response)).decode()).data
                longest = min((model.longest for model in models if model.longest), default=0)
                found = replace(found, max_model_len=longest)
            found = replace(found, version=await self._version())
        except (aiohttp.ClientError, OSError, *_UNREADABLE):
            pass
        load = await self.load()
        if load is not None:
            found = replace(found, block_size=load.block_size, kv_total_tokens=load.kv_total_tokens)
        return found

    async def _version(self) -> str:
        """What `/version` says, or llama.cpp's `/props`."""
        for path in ("/version", "/props"):
            async with self._connections().get(self._base_url + path, timeout=_whole_call()) as response:
                if response.status == 200:
                    told = _version.decode((await _bounded(response)).decode())
                    return (told.version or told.build_info)[:80]
        return ""

    async def probe(self, model: str) -> bool:
        """Ask for one token of a small request."""
        body = {"model": model, "prompt": "ping", "max_tokens": 1}
        try:
            async with self._connections().post(
                self._base_url + Endpoint.COMPLETIONS,
                json=body,
                timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S),
            ) as response:
                await _bounded(response)
                # Whatever it thinks of the request, something behind the HTTP server has answered.
                return response.status < 500 and response.status not in _OVERLOADED
        except (aiohttp.ClientError, OSError):
            return False

    async def close(self) -> None:
        """Release connections; what still streams ends as broken off."""
        if self._session is not None:
            await self._session.close()

    async def _status(self, path: str) -> int:
        try:
            async with self._connections().get(self._base_url + path, timeout=_whole_call()) as response:
                return response.status
        except (aiohttp.ClientError, OSError):
            return 0

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._new_session()
        return self._session


async def _read(response: aiohttp.ClientResponse, answer: _Answer | None, deadline: float) -> bytes:
    """Read what has come; nothing at the end, or when a finished answer breaks off.

    Raises:
        EngineFailure: STALLED or TRUNCATED.
    """
    is_finished = answer is not None and answer.is_finished
    seen = f"after {answer.tokens} tokens" if answer is not None else "in mid-answer"
    try:
        try:
            async with asyncio.timeout_at(deadline):
                return await response.content.readany()
        except TimeoutError:
            # It may have come while this process, not the engine, stood still.
            data = response.content.read_nowait()
            if data or is_finished or response.content.at_eof():
                return data
            raise EngineFailure(
                FailureCause.STALLED, f"{response.url}: engine fell silent {seen}; the stream was given up"
            ) from None
    except (aiohttp.ClientError, OSError) as error:
        if is_finished:
            return b""
        raise EngineFailure(
            FailureCause.TRUNCATED, f"{response.url}: stream broke off {seen} ({error})"
        ) from None


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """Read one of an engine's small pages whole.

    Raises:
        aiohttp.ClientPayloadError: it is above MAX_PAGE_BYTES.
    """
    body = bytearray()
    while data := await response.content.readany():
        body += data
        if len(body) > MAX_PAGE_BYTES:
            response.close()
            raise aiohttp.ClientPayloadError(f"expected at most {MAX_PAGE_BYTES} bytes, seen more")
    return bytes(body)


async def _refusal(response: aiohttp.ClientResponse) -> EngineFailure:
    """Tell what an answer other than 200 means; its body is read as far as it comes at once."""
    body = b""
    try:
        async with asyncio.timeout(ALIVE_TIMEOUT_S):
            while len(body) < 4 * SHOWN_CHARS and (data := await response.content.readany()):
                body += data
    except (TimeoutError, aiohttp.ClientError, OSError):
        pass
    status = response.status
    return EngineFailure(
        _cause_of(status),
        f"{response.url}: expected 200, seen {status}",
        said=_shown(body),
        http_status=status,
    )


def _cause_of(status: int) -> FailureCause:
    """What an HTTP status other than 200 says about the attempt."""
    if status in _OVERLOADED:
        return FailureCause.OVERLOADED
    if 400 <= status < 500:
        return FailureCause.REFUSED
    if status >= 500:
        return FailureCause.ENGINE_ERROR
    return FailureCause.PROTOCOL


def _parse(parser: EventParser, data: bytes) -> list[bytes]:
    try:
        return parser.feed(data)
    except ValueError as error:
        raise EngineFailure(FailureCause.PROTOCOL, str(error)) from None


def _base_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or re.search(r"[?#\s]", text):
        raise SettingsError(f"engine address: expected http://host:port, seen {text!r}")
    return text.rstrip("/").removesuffix("/v1")


def _printable(text: str) -> str:
    """What of `text` may stand in a header."""
    return "".join(character for character in text if " " <= character <= "~").strip()


def _whole_call() -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=ALIVE_TIMEOUT_S)


def _shown(data: bytes) -> str:
    return data[: 4 * SHOWN_CHARS].decode("utf-8", "replace")[:SHOWN_CHARS]
