"""Canaries: passwords, keys, prompts and answers go through a stack of real processes, where much goes wrong.

Afterwards no log, no page and no output of `flexlb config` or `doctor` holds any of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from dispatcher.backends.access import KafkaAccess
from dispatcher.backends.connect import KafkaClients, connect_kafka, connect_redis
from dispatcher.backends.topics import create_topics
from dispatcher.frontend.request_headers import DEADLINE
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.stack import LocalStack, Member, StackSettings
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Lane
from tests.e2e.test_cli import flexlb
from tests.support.servers import give_up, why_no_kafka
from tests.support.wait import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

MARK = "canary"
"""Each secret begins so: whoever finds it in a log names the leak by the rest."""
PROMPT, ANSWER, TOOL, SALT = (f"{MARK}-{what}" for what in ("prompt", "answer", "tool-argument", "salt"))
SESSION, API_KEY, WRONG_KEY = f"{MARK}-session", f"{MARK}-api-key", f"{MARK}-wrong-key"
REDIS_PASSWORD, KAFKA_PASSWORD = f"{MARK}-redis-password", f"{MARK}-kafka-password"
USER = "flexlb"
KAFKA = KafkaAccess(protocol="SASL_PLAINTEXT", user=USER, password=KAFKA_PASSWORD)


class SecuredStack(LocalStack):
    """Its Kafka wants a login, which its processes have from their environment."""

    async def _create_topics(self) -> None:
        await create_topics(connect_kafka(self.kafka, KAFKA), self.names, partitions=2, replication_factor=1)


class EchoingEngine:
    """An engine that repeats what it was asked in all that it says; what it does stands in the prompt."""

    def __init__(self) -> None:
        self.held = 0
        self.go_on = asyncio.Event()
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer as the prompt says."""
        body = await request.text()
        for status in (400, 500, 503):
            if f"status {status}" in body:
                return web.json_response({"error": {"message": f"can't do {body}"}}, status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if "in mid-stream" in body:
            await self._say(response, {"error": {"message": f"died of {body}"}})
            return response
        if "garbage" in body:
            await response.write(f"data: {body[1:]}\n\n".encode())
            return response
        chat = "chat" in request.path
        first: dict[str, Any] = {"index": 0}
        if chat:
            call = {"index": 0, "function": {"name": "f", "arguments": json.dumps({"x": TOOL})}}
            first["delta"] = {"content": ANSWER, "tool_calls": [call]}
        else:
            first["text"] = ANSWER
        await self._say(response, {"choices": [first]})
        if "hold" in body:
            self.held += 1
            await self.go_on.wait()
        last = {"index": 0, "finish_reason": "stop", ("delta" if chat else "text"): {} if chat else ""}
        await self._say(response, {"choices": [last]})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _say(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[EchoingEngine]:
        """Serve."""
        app = web.Application()
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        app.router.add_get("/health", _ok)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await runner.cleanup()


async def _ok(_: web.Request) -> web.Response:
    return web.Response()


@asynccontextmanager
async def secured_servers(folder: Path) -> AsyncIterator[tuple[ApacheKafka, ValkeyServer]]:
    """A Kafka and a Valkey that want logins."""
    module = "org.apache.kafka.common.security.plain.PlainLoginModule"
    users = f'user_broker="b" user_{USER}="{KAFKA_PASSWORD}"'
    options = {
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
            f'{module} required username="broker" password="b" {users};'
        ),
    }
    broker = ApacheKafka(folder / "kafka", protocol="SASL_PLAINTEXT", options=options)
    async with broker, ValkeyServer(folder / "valkey") as valkey:
        client = connect_redis(valkey.url)
        try:
            user = ("on", f">{REDIS_PASSWORD}", "allkeys", "allchannels", "+@all")
            await client.execute_command("ACL", "SETUSER", USER, *user)
        finally:
            await client.aclose()
        yield broker, valkey


async def send_raw(url: str, lines: bytes) -> bytes:
    """Bytes that are no good HTTP; the answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(lines)
    await writer.drain()
    try:
        async with asyncio.timeout(10):
            return await reader.read(2000)
    finally:
        writer.close()


async def ask_everything(stack: LocalStack, http: aiohttp.ClientSession) -> dict[int, int]:
    """Requests of every kind over HTTP; how often each status came."""
    frontend = stack.frontends[0].url
    statuses: dict[int, int] = {}

    async def ask(path: str, body: Any, *, key: str = API_KEY, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
            DEADLINE: "6000",
            **headers,
        }
        async with http.post(f"{frontend}{path}", data=data, headers=named) as response:
            await response.read()
            statuses[response.status] = statuses.get(response.status, 0) + 1

    secrets = {"cache_salt": SALT, "session": SESSION, "user": SESSION}
    completion = {"model": "sim", "prompt": PROMPT, "max_tokens": 4, **secrets}
    tool = {"type": "function", "function": {"name": "f", "description": TOOL, "parameters": {}}}
    chat = {
        "model": "sim",
        "messages": [{"role": "system", "content": SALT}, {"role": "user", "content": PROMPT}],
        "tools": [tool],
        **secrets,
    }
    await asyncio.gather(
        *(ask("/v1/completions", {**completion, "stream": stream}) for stream in (True, False)),
        *(ask("/v1/chat/completions", {**chat, "stream": stream}) for stream in (True, False)),
        *(
            ask("/v1/completions", {**completion, "prompt": f"{PROMPT} {fault}"})
            for fault in ("status 400", "status 500", "in mid-stream", "garbage")
        ),
        ask("/v1/completions", completion, key=WRONG_KEY),
        ask("/v1/completions", {**completion, "max_tokens": PROMPT}),
        ask("/v1/completions", {**completion, "model": PROMPT}),
        ask("/v1/chat/completions", {**chat, "messages": PROMPT}),
        ask("/v1/chat/completions", {**chat, PROMPT: PROMPT}),
        ask("/v1/completions", f'{{"prompt": "{PROMPT}'.encode()),
        ask("/v1/completions", f'{{"model": "sim", "prompt": "{PROMPT}\\ud800"}}'.encode()),
        ask("/v1/completions", PROMPT.encode("utf-16")),
        ask("/v1/completions", completion, **{"X-FlexLB-Priority": PROMPT}),
        ask("/v1/completions", completion, **{"X-FlexLB-Lane": PROMPT}),
        ask(f"/v1/{PROMPT}", completion),
        ask(f"/v1/completions?{PROMPT}={API_KEY}", completion),
    )
    bad = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthoriza tion: Bearer {API_KEY}\r\n\r\n",
        f"POST /v1/completions HTTP/9.{PROMPT}\r\n\r\n",
        f"{PROMPT}\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {PROMPT}\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {API_KEY}{'x' * 20_000}\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{PROMPT}\r\n",
    )
    for lines in bad:
        for member in (stack.frontends[0], stack.dispatchers[0]):
            assert b" 200 " not in await send_raw(member.url, lines.encode())
    return statuses


async def append_poison(clients: KafkaClients, stack: LocalStack) -> int:
    """Records that are refused; how many."""
    names = stack.names
    producer = clients.producer()
    await producer.start()
    good = {"id": "p", "model": "sim", "endpoint": "/v1/completions", "body": {"prompt": PROMPT}}
    poison: list[bytes] = [
        PROMPT.encode(),
        f'{{"id": "p1", "body": {{"prompt": "{PROMPT}"'.encode(),
        json.dumps({**good, "id": "p2", "endpoint": PROMPT}).encode(),
        json.dumps({**good, "id": "p3", "priority": PROMPT}).encode(),
        json.dumps({**good, "id": "p4", "body": PROMPT}).encode(),
        json.dumps({**good, "id": "p5", "cache_salt": [SALT], "session": {"x": SESSION}}).encode(),
        json.dumps({**good, "id": "p6", "tokens": {"count": PROMPT}}).encode(),
        json.dumps({**good, "id": "p7", "reply_to": {"topic": PROMPT}}).encode(),
        json.dumps({**good, "id": "p8", "v": 99, "body": {"prompt": PROMPT}}).encode(),
        f'{{"id": "p9", "{PROMPT}'.encode() + b"\xff\xfe",
    ]
    try:
        for value in poison:
            await producer.send_and_wait(
                names.requests(Lane.INTERACTIVE), value, headers=[("traceparent", PROMPT.encode())]
            )
        for value in (PROMPT.encode(), json.dumps({"id": [PROMPT]}).encode()):
            await producer.send_and_wait(names.cancels, value)
    finally:
        await producer.stop()
    return len(poison)


def logs_in(folder: Path) -> list[Path]:
    """Whatever anybody logged; Kafka's own data are called so too."""
    return [path for path in folder.rglob("*.log") if "data" not in path.parts]


def log_lines(member: Member) -> str:
    return member.log_path.read_text(errors="replace")


async def test_no_secret_is_in_any_log_page_or_printed_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := why_no_kafka()) is not None:
        give_up(reason)
    keys = tmp_path / "keys"
    keys.write_text(f"{API_KEY}:acme\n")
    environment = {
        "FLEXLB_LOG_LEVEL": "DEBUG",
        "FLEXLB_ISOLATE_TENANTS": "true",
        "FLEXLB_API_KEYS_FILE": str(keys),
        "FLEXLB_REDIS_USER": USER,
        "FLEXLB_REDIS_PASSWORD": REDIS_PASSWORD,
        "FLEXLB_KAFKA_PROTOCOL": "SASL_PLAINTEXT",
        "FLEXLB_KAFKA_USER": USER,
        "FLEXLB_KAFKA_PASSWORD": KAFKA_PASSWORD,
        "FLEXLB_MAX_RECORD_BYTES": str(1 << 20),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: dict[str, str] = {}
    async with (
        EchoingEngine().serving() as engine,
        secured_servers(tmp_path) as (broker, valkey),
        aiohttp.ClientSession() as http,
    ):
        settings = StackSettings(
            nodes=2,
            redis=valkey.url,
            kafka=broker.bootstrap,
            engines=(engine.url,),
            frontend_port=0,
            agent_flags=("--loras", ""),
        )
        async with SecuredStack(settings, folder=tmp_path / "stack") as stack:
            statuses = await ask_everything(stack, http)
            assert statuses[200] >= 4
            assert statuses[401] == 1
            assert statuses.keys() & {500, 502, 504}
            poison = await append_poison(connect_kafka(broker.bootstrap, KAFKA), stack)

            async def is_refused() -> bool:
                lines = "".join(map(log_lines, stack.dispatchers))
                return lines.count('"request refused"') >= poison

            await wait_until(is_refused, "the poison being refused")
            held = asyncio.create_task(
                http.post(
                    f"{stack.frontends[0].url}/v1/completions",
                    json={"model": "sim", "prompt": f"{PROMPT} hold", "stream": True},
                    headers={"Authorization": f"Bearer {API_KEY}"},
                )
            )
            await wait_until(lambda: engine.held == 1, "an answer that has begun")
            running = [json.loads(await page(http, agent, "/health"))["running"] for agent in stack.agents]
            await stack.agents[running.index(1)].kill()
            await wait_until(lambda: engine.held == 2, "it running elsewhere", timeout_s=30)
            engine.go_on.set()
            async with await held as answered:
                assert ANSWER in await answered.text()
            for member in stack.members:
                if member.is_running:
                    for path in ("/metrics", "/health"):
                        said[f"{member.name}{path}"] = await page(http, member, path)
            servers = ("--redis", stack.redis, "--kafka", stack.kafka)
            await asyncio.gather(
                *(
                    run_command(said, *words)
                    for words in (
                        ("config", "-v"),
                        ("config", "--json"),
                        ("doctor", *servers),
                        ("nodes", *servers),
                    )
                )
            )
        said |= {str(log.relative_to(tmp_path)): log.read_text(errors="replace") for log in logs_in(tmp_path)}
        told = {member.name: log_lines(member) for member in stack.members}
        assert '"level": "debug"' in "".join(told.values()), "the level is DEBUG"
        said |= told
    leaks = [
        f"{where}: {line[max(0, line.find(MARK) - 300) : line.find(MARK) + 100]}"
        for where, text in said.items()
        for line in text.splitlines()
        if MARK in line
    ]
    assert not leaks, "\n".join(leaks)
    assert '"attempt failed"' in "".join(said[member.name] for member in stack.agents)
    assert '"attempt failed"' in "".join(said[member.name] for member in stack.dispatchers)


async def run_command(said: dict[str, str], *words: str) -> None:
    """Note what a command prints."""
    code, out, err = await flexlb(*words)
    assert "Traceback" not in err, err
    said[f"flexlb {words[0]} {words[1]}"] = f"{code}\n{out}{err}"


async def page(http: aiohttp.ClientSession, member: Member, path: str) -> str:
    """What a page says."""
    async with http.get(f"{member.url}{path}") as response:
        return await response.text()
