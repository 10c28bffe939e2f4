"""The frontend: an HTTP server whose every request is a record, and every answer an outcome.

It holds no state that another frontend would need: any number of them serve one pool. What it holds is
bounded: requests in flight, bytes of bodies, time. A request whose client leaves is cancelled.

A client of the SDK belongs to one tenant, so there is one for each tenant of the keys, made at the start.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from types import TracebackType

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.scripts import Redis
from dispatcher.backends.store_view import StoreView
from dispatcher.backends.topics import partition_counts
from dispatcher.client import Client
from dispatcher.errors import LogUnavailable
from dispatcher.frontend.api_keys import ApiKeys
from dispatcher.frontend.exchange import RESTARTED, STOPPING, Exchange, Question, problem_response
from dispatcher.frontend.header_watch import HeaderWatch
from dispatcher.frontend.listener import Listener
from dispatcher.frontend.metrics import FrontendMetrics
from dispatcher.frontend.models import Models
from dispatcher.frontend.openai import Ask, model_of, models_of, read_ask
from dispatcher.frontend.problem import CLIENT_LEFT, Problem, Refused, refused
from dispatcher.frontend.prompt_tokens import tokens_of
from dispatcher.frontend.request_headers import read_headers, request_id_of
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.request import Endpoint
from dispatcher.protocol.tenant_salt import effective_salt
from dispatcher.telemetry.http import guard_expectations
from dispatcher.telemetry.logging import Log

HEALTH_CACHED_S = 2.0
HEALTH_TIMEOUT_S = 3.0
CANCEL_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 75.0
CLOSE_S = 1.0
LINGER_S = 0.5
"""How long a request may be on its way over a connection that was accepted before a stop."""
REMEMBERED_IDS = 100_000
"""Ids given by clients that are remembered, so that one used again gets an end of its own."""

_COUNT = re.compile(r"[0-9]+")
_Serve = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Frontend:
    """One frontend. Use it as `async with Frontend(...) as frontend`; it serves inside the block."""

    def __init__(
        self,
        settings: FrontendSettings,
        *,
        kafka: KafkaClients,
        redis: Redis | None,
        keys: ApiKeys | None,
        registry: CollectorRegistry,
        log: Log,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = FrontendMetrics(registry)
        self.port = 0
        self._settings = settings
        self._kafka = kafka
        self._names = Names(settings.pool)
        self._view = StoreView(redis, self._names) if redis is not None else None
        self._models = Models(self._view, settings.model_names, monotonic=monotonic)
        self._keys = keys
        self._registry = registry
        self._log = log
        self._new_id = new_id
        self._monotonic = monotonic
        self._started_s = int(time.time())
        self._clients: dict[str, Client] = {}
        self._exchanges: set[Exchange] = set()
        self._in_flight = 0
        self._held_bytes = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False
        self._is_over = False
        self._seen_ids: dict[tuple[str, str], None] = {}
        self._kafka_works: tuple[float, bool] = (float("-inf"), False)
        self._asking = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._cancels: asyncio.TaskGroup | None = None

    async def __aenter__(self) -> Frontend:
        """Connect and serve.

        Raises:
            LogUnavailable: Kafka did not answer, or the pool's topics do not exist.
            OSError: the port is in use.
        """
        try:
            if self._view is not None:
                self._stack.push_async_callback(self._view.close)
            for tenant in self._keys.tenants if self._keys is not None else ("",):
                client = Client(
                    self._kafka,
                    self._settings.pool,
                    tenant,
                    most_unfinished=2 * self._settings.max_in_flight,
                    lease_ttl_s=self._settings.lease_ttl_s or None,
                    monotonic=self._monotonic,
                )
                self._clients[tenant] = await self._stack.enter_async_context(client)
            self._cancels = await self._stack.enter_async_context(asyncio.TaskGroup())
            await self._listen()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def _listen(self) -> None:
        app = web.Application(
            client_max_size=self._settings.max_body_bytes, middlewares=[self._tell_problems]
        )
        for endpoint in Endpoint:
            app.router.add_post(endpoint.value, self._answer)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/models/{id:.+}", self._one_model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        app.on_response_prepare.append(self._say_goodbye)
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=CLOSE_S,
            keepalive_timeout=KEEP_ALIVE_S,
        )
        await runner.setup()
        guard_expectations(runner.server)
        self._stack.push_async_callback(runner.cleanup)
        assert runner.server is not None, "a runner has its server once it is set up"
        self._headers = HeaderWatch(runner.server, self._settings.header_timeout_s)
        self._listener = Listener(self._headers)
        self.port = await self._listener.start(self._settings.host, self._settings.port)
        self._stack.push_async_callback(self._listener.stop)

    async def drain(self, grace_s: float) -> None:
        """Take no more connections, answer what comes over those there are, and end what still runs
        after the grace.

        Whoever connects is refused, and may ask elsewhere; who is connected gets an answer and the end of
        the connection with it.
        """
        self._is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._listener.stop()
                await asyncio.sleep(LINGER_S)
                await self._is_idle.wait()
        except TimeoutError:
            self._log.warning("requests cut off", count=len(self._exchanges))
        self._is_over = True
        for exchange in list(self._exchanges):
            exchange.stop()
        try:
            async with asyncio.timeout(2 * CLOSE_S):
                await self._is_idle.wait()
        except TimeoutError:
            self._log.warning("requests left", count=self._in_flight)

    @web.middleware
    async def _tell_problems(self, request: web.Request, handler: _Serve) -> web.StreamResponse:
        """Answer whatever goes wrong before an answer has begun in OpenAI's form."""
        shown_id = request_id_of(request.headers)
        self._headers.begin(request.protocol)
        try:
            return await handler(request)
        except Refused as refusal:
            return problem_response(refusal.problem, shown_id)
        except web.HTTPRequestEntityTooLarge:
            message = f"body: expected at most {self._settings.max_body_bytes} bytes, seen more; shorten it"
            return problem_response(Problem(status=413, code="too_large", message=message), shown_id)
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: {error.reason}"
            return problem_response(Problem(status=error.status, message=message), shown_id)
        finally:
            self._headers.end(request.protocol)

    async def _say_goodbye(self, _: web.Request, response: web.StreamResponse) -> None:
        """Let a connection end with its answer while stopping."""
        if self._is_draining:
            response.force_close()
            response.headers["Connection"] = "close"  # its headers are made already

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one request, and count and log how that went."""
        endpoint = Endpoint(request.path)
        began_s = self._monotonic()
        status, code, id = CLIENT_LEFT, None, ""
        try:
            with self._place(), self._hold(request) as held:
                client, question = await self._read(request, endpoint)
                id = question.id
                response, problem = await self._run(request, client, question, held, began_s)
                status, code = (problem.status, problem.code) if problem is not None else (200, None)
                return response
        except Refused as refusal:
            status, code = refusal.problem.status, refusal.problem.code
            raise
        except web.HTTPException as error:
            status = error.status
            raise
        finally:
            self.metrics.requests.labels(endpoint.value, f"{status // 100}xx").inc()
            duration_ms = round((self._monotonic() - began_s) * 1000)
            self._log.info(
                "request", id=id, endpoint=endpoint.value, status=status, code=code, duration_ms=duration_ms
            )

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Hold one of the places for requests in flight.

        Raises:
            Refused: 503 when the grace of a stop is over, 429 when all are taken.
        """
        if self._is_over:
            raise Refused(STOPPING)
        if self._in_flight >= self._settings.max_in_flight:
            raise refused(
                429,
                f"expected at most {self._settings.max_in_flight} requests in flight, seen one more: ask "
                "again a little later",
                code="too_many_requests",
            )
        self._in_flight += 1
        self._is_idle.clear()
        self.metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)
            if not self._in_flight:
                self._is_idle.set()

    @contextmanager
    def _hold(self, request: web.Request) -> Iterator[Callable[[], None]]:
        """Count the bytes of a body that is about to come; yields what is to be called once Kafka has it.

        Raises:
            Refused: 413 when it says itself that it is too large, 429 when too many bytes are held.
        """
        settings = self._settings
        told = request.headers.get("Content-Length", "")
        # A compressed body is larger than it says.
        is_told = "Content-Encoding" not in request.headers and _COUNT.fullmatch(told) is not None
        expected = int(told) if is_told else settings.max_body_bytes
        if expected > settings.max_body_bytes:
            raise web.HTTPRequestEntityTooLarge(settings.max_body_bytes, expected)
        if self._held_bytes + expected > settings.max_held_bytes:
            raise refused(
                429,
                f"expected at most {settings.max_held_bytes} bytes of bodies at once, seen more: ask again a "
                "little later",
                code="too_many_bytes",
            )
        with ExitStack() as stack:
            self._count_held(expected)
            stack.callback(self._count_held, -expected)
            yield stack.close

    def _count_held(self, more: int) -> None:
        self._held_bytes += more
        self.metrics.held_bytes.set(self._held_bytes)

    async def _read(self, request: web.Request, endpoint: Endpoint) -> tuple[Client, Question]:
        """Read a request whole.

        Raises:
            Refused: 400, 401 or 408; what is wrong with it.
        """
        tenant = self._tenant_of(request)
        headers = read_headers(request.headers)
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                body = await request.read()
        except TimeoutError:
            raise refused(
                408, f"body: expected it within {self._settings.body_timeout_s:g} s, seen a part"
            ) from None
        except web.RequestPayloadError:
            raise refused(
                400, "body: expected it as Content-Encoding and Transfer-Encoding say, seen something else"
            ) from None
        ask = read_ask(endpoint, body)
        model = ask.model or await self._only_model()
        id = self._id_for(tenant, headers.request_id)
        question = Question(
            id=id,
            shown_id=headers.request_id or id,
            ask=ask,
            model=model,
            headers=headers,
            deadline_ms=headers.deadline_ms or int(self._settings.default_deadline_s * 1000),
            tokens=tokens_of(ask, model, self._settings.block_size, salt=self._salt_of(ask, tenant)),
        )
        return self._clients[tenant], question

    def _salt_of(self, ask: Ask, tenant: str) -> str:
        return effective_salt(tenant, ask.cache_salt or "", isolate=self._settings.isolate_tenants)

    def _tenant_of(self, request: web.Request) -> str:
        if self._keys is None:
            return ""
        return self._keys.tenant_of(request.headers.get("Authorization", ""))

    async def _only_model(self) -> str:
        """The model of a body that names none, which the engine would take for its own."""
        names = await self._models.names()
        if len(names) == 1:
            return names[0]
        expected = f"one of {', '.join(names)[:400]}" if names else "a name"
        raise refused(400, f"model: expected {expected}, seen none", code="model_missing", param="model")

    def _id_for(self, tenant: str, given: str) -> str:
        """The id of a request: the one given, with an end of its own when it was given before.

        A record of an id that was answered already gets no second outcome: its client would wait in vain.
        """
        if not given:
            return self._new_id()
        if (tenant, given) in self._seen_ids:
            return f"{given}.{self._new_id()[:16]}"
        self._seen_ids[(tenant, given)] = None
        if len(self._seen_ids) > REMEMBERED_IDS:
            del self._seen_ids[next(iter(self._seen_ids))]
        return given

    async def _run(
        self,
        request: web.Request,
        client: Client,
        question: Question,
        submitted: Callable[[], None],
        began_s: float,
    ) -> tuple[web.StreamResponse, Problem | None]:
        ttft_s = self.metrics.ttft_s.labels(question.ask.endpoint.value)
        exchange = Exchange(
            request,
            question,
            client,
            patience_s=question.deadline_ms / 1000 + self._settings.outcome_grace_s,
            submitted=submitted,
            first_token=lambda at_s: ttft_s.observe(at_s - began_s),
            log=self._log,
            monotonic=self._monotonic,
        )
        self._exchanges.add(exchange)
        try:
            response, problem = await exchange.run()
        except (asyncio.CancelledError, ConnectionError):
            self.metrics.disconnects.inc()
            raise asyncio.CancelledError("the client left") from None
        finally:
            self._exchanges.discard(exchange)
            client.forget(question.id)
            if exchange.is_to_be_cancelled and self._cancels is not None:
                self._cancels.create_task(self._cancel(client, question.id))
        if problem is RESTARTED:
            self.metrics.broken_streams.inc()
        return response, problem

    async def _cancel(self, client: Client, id: str) -> None:
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                await client.cancel(id)
        except (LogUnavailable, TimeoutError) as error:
            self._log.warning("cancel not sent", id=id, error=str(error))

    async def _list_models(self, request: web.Request) -> web.Response:
        self._tenant_of(request)
        body = models_of(await self._models.names(), self._started_s)
        return web.Response(body=body, content_type="application/json")

    async def _one_model(self, request: web.Request) -> web.Response:
        self._tenant_of(request)
        wanted, names = request.match_info["id"], await self._models.names()
        if wanted not in names:
            message = f"model: expected one of {', '.join(names)[:400] or 'none'}, seen {wanted[:256]!r}"
            raise refused(404, message, code="model_not_found", param="model")
        return web.Response(body=model_of(wanted, self._started_s), content_type="application/json")

    async def _health(self, _: web.Request) -> web.Response:
        works = await self._does_kafka_work()
        state = {
            "ok": works and not self._is_draining,
            "kafka": works,
            "stopping": self._is_draining,
            "in_flight": self._in_flight,
        }
        return web.json_response(state, status=200 if state["ok"] else 503)

    async def _does_kafka_work(self) -> bool:
        """Whether Kafka tells of the pool's topics; asked for at most every two seconds."""
        async with self._asking:
            if self._monotonic() - self._kafka_works[0] >= HEALTH_CACHED_S:
                try:
                    async with asyncio.timeout(HEALTH_TIMEOUT_S):
                        await partition_counts(self._kafka, [self._names.requests(Lane.INTERACTIVE)])
                    works = True
                except (LogUnavailable, TimeoutError):
                    works = False
                self._kafka_works = (self._monotonic(), works)
            return self._kafka_works[1]

    async def _show_metrics(self, _: web.Request) -> web.Response:
        body = generate_latest(self._registry)
        return web.Response(body=body, content_type="text/plain", charset="utf-8")
