"""Every HTTP endpoint: whatever comes, an answer, none that says the service broke; a good request after it.

The frontend stands on a simulated log whose other side answers everything; the page of metrics and health is
the dispatcher's and the agent's; the engine simulator is as it ships.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from dispatcher.frontend.api_keys import ApiKeys
from dispatcher.frontend.app import Frontend
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.protocol import codec
from dispatcher.protocol.codec import MalformedRecord
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import serve_metrics
from tests.contract.test_client import OtherSide, completed
from tests.support.hostile import BOMB, SCALARS, any_value, changed, damaged
from tests.support.http_probe import Probed, probed
from tests.support.sim.kafka import SimKafka
from tests.support.sim.loop import OUTSIDE, START_EPOCH_S, VirtualLoop
from tests.support.sim.network import CALM, Network
from workers_agent.simulator.server import Simulator, SimulatorSettings

CASES = 10_000 if os.environ.get("FLEXLB_TEST_PROFILE") == "long" else 250
"""Of each service."""
MODEL = "m"
KEY = "key-1"
MAX_BODY_BYTES = 64 << 10
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}
COMPLETION = {"model": MODEL, "prompt": "hello", "max_tokens": 3, "n": 1}
FAULTS = {"fail_rate": 0.5, "stall_rate": 0.0, "slow_rate": 0.1, "slow_factor": 1.5, "step_factor": 1.0}
RECORDS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/tokenize": {"prompt": "a b"},
    "/detokenize": {"tokens": [1, 2]},
    "/sim/faults": FAULTS,
}
FRONTEND = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/m", "/health", "/metrics")
PATHS = {
    "frontend": FRONTEND,
    "frontend with keys": FRONTEND,
    "page": ("/metrics", "/health"),
    "simulator": (*FRONTEND, "/version", "/tokenize", "/detokenize", "/reset_prefix_cache", "/sim/faults"),
}
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "PROPFIND", "get", "X" * 300)
TARGETS = (
    b"*",
    b"//",
    b"/..//../v1/completions",
    b"http://other:99999/v1/models",
    b"/v1/models/%ff%fe",
    b"/v1/models/" + b"x" * 5000,
    b"/v1/models/%00",
    b"/v1/models/%F0%9F",
    b"/v1/models/\xff\xfe",
    b"/v1/completions?" + b"a=1&" * 500,
    b"/%",
    b"/v1/completions/",
    b"/V1/COMPLETIONS",
    b"/x" * 6000,
)
VALUES = (
    b"",
    b" ",
    b"0",
    b"-1",
    b"1e9",
    b"9" * 400,
    b"\xff\xfe",
    b"\xed\xa0\x80",
    "ü𝕏".encode(),
    b"a\tb",
    b"x" * 7000,
    b"true",
    b"batch",
    b"{}",
    b"%s%n",
    b"'; DROP",
    b"\x01",
    b"a\x00b",
)
CHOICES: dict[bytes, tuple[bytes, ...]] = {
    b"Content-Type": (
        b"application/json",
        b"application/json; charset=bogus",
        b"text/html; charset=utf-16",
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"application/x-www-form-urlencoded",
        b"; ; =",
    ),
    b"Content-Encoding": (b"gzip", b"deflate", b"br", b"zstd", b"identity", b"bogus", b"gzip, gzip"),
    b"Transfer-Encoding": (b"chunked", b"gzip", b"identity", b"chunked, chunked"),
    b"Content-Length": (b"0", b"5", b"-1", b"1e3", b"0x10", b"9" * 30, b"+4"),
    b"Expect": (b"100-continue", b"bogus"),
    b"Connection": (b"close", b"keep-alive", b"upgrade", b"bogus"),
    b"Upgrade": (b"websocket", b"h2c", b"bogus"),
    b"Authorization": (b"Bearer key-1", b"Bearer", b"Bearer \xff", b"Basic eDp5", b"Bearer " + b"k" * 5000),
    b"X-Request-Id": (b"mine", b"a b", b"../..", b"chatcmpl-1"),
    b"X-FlexLB-Priority": (b"50", b"0", b"101", b"1.5"),
    b"X-FlexLB-Deadline-Ms": (b"60000", b"1", b"0", b"99999999999999"),
    b"X-FlexLB-TTFT-SLO-Ms": (b"100", b"x"),
    b"X-FlexLB-Lane": (b"batch", b"interactive", b"fast"),
    b"X-FlexLB-Detached": (b"true", b"maybe"),
    b"traceparent": (b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", b"00"),
    b"Accept": (b"text/html", b"*/*", b"bogus"),
    b"Accept-Encoding": (b"gzip", b"bogus;q=9"),
    b"Range": (b"bytes=0-0",),
    b"Cookie": (b"a=b; ;;=", b"\xff"),
    b"Host": (b"", b"a b", b"[::1", b"x" * 300),
    b"X-\xff": (b"1",),
    b"No value": (b"1",),
    b"": (b"1",),
}


class _WallLoop(asyncio.SelectorEventLoop):
    """Real time and real sockets, with the two things more that the simulation asks of its loop."""

    def epoch_s(self) -> float:
        return START_EPOCH_S + self.time()

    def send_later(self, delay: float, callback: Callable[..., object], *args: object) -> None:
        self.call_later(delay, callback, *args, context=OUTSIDE)


class Obliging(OtherSide):
    """Answers every request."""

    async def run(self) -> None:
        while True:
            record = await self._consumer.getone()
            with suppress(MalformedRecord):
                if record.topic != self.names.cancels:
                    request = codec.requests.decode(record.value)
                    lane = "b" if record.topic.endswith("batch") else "i"
                    ref = f"{lane}{record.partition}_{record.offset}"
                    await self.publish(completed(request.id, ref, tenant=request.tenant))


@asynccontextmanager
async def frontend(pool: str, keys: ApiKeys | None) -> AsyncIterator[int]:
    """A frontend whose every request is answered; its port."""
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    network = Network(Random(1), loop, CALM)
    kafka = SimKafka(network).clients(network.process("frontend"))
    side = Obliging(kafka, pool)
    await side.start()
    answering = asyncio.create_task(side.run())
    limits = FrontendSettings(
        port=0,
        pool=pool,
        models=MODEL,
        max_body_bytes=MAX_BODY_BYTES,
        body_timeout_s=0.2,
        default_deadline_s=2,
        outcome_grace_s=1,
    )
    try:
        async with Frontend(
            limits, kafka=kafka, redis=None, keys=keys, registry=CollectorRegistry(), log=Log()
        ) as one:
            yield one.port
    finally:
        answering.cancel()
        await asyncio.wait([answering])
        await side.stop()


@asynccontextmanager
async def services() -> AsyncIterator[dict[str, int]]:
    """All of them; their ports."""
    async with AsyncExitStack() as stack:
        open_port = await stack.enter_async_context(frontend("p", None))
        keyed_port = await stack.enter_async_context(frontend("k", ApiKeys([(KEY, "acme")])))
        page, page_port = await serve_metrics(CollectorRegistry(), "127.0.0.1", 0, lambda: {"ok": True})
        stack.push_async_callback(page.cleanup)
        simulator = Simulator(SimulatorSettings(model=MODEL, time_scale=0.0), crash=lambda: None)
        url = await simulator.start()
        stack.push_async_callback(simulator.close)
        yield {
            "frontend": open_port,
            "frontend with keys": keyed_port,
            "page": page_port,
            "simulator": int(url.rpartition(":")[2]),
        }


@pytest.fixture(scope="module")
def running() -> Iterator[Probed]:
    """All services."""
    with probed(services, _WallLoop) as found:
        yield found


def body_of(rng: Random, path: str) -> bytes:
    """A body for a path, good or not."""
    record = RECORDS.get(path, COMPLETION)
    draw = rng.random()
    if draw < 0.15:
        return json.dumps(record).encode()
    if draw < 0.45:
        return changed(rng, record)
    if draw < 0.7:
        return damaged(rng, json.dumps(record).encode())
    if draw < 0.8:
        return json.dumps(any_value(rng)).encode()
    if draw < 0.85:
        name = rng.choice(list(record))
        return json.dumps({**record, name: rng.choice(SCALARS)}).encode()
    if draw < 0.95:
        return rng.randbytes(rng.randrange(200))
    large = (
        BOMB,
        b'{"model":"m","prompt":"' + b"x" * (2 * MAX_BODY_BYTES) + b'"}',
        b'{"model":"m","prompt":[' + b"9" * 30_000 + b"]}",
        b'{"model":"m","prompt":"\xff\xfe"}',
        b"[" * 60_000,
        json.dumps(record).encode("utf-16"),
        b"",
    )
    return rng.choice(large)


def chunked(rng: Random, body: bytes) -> bytes:
    """A body in chunks, of which one may be wrong."""
    half = len(body) // 2
    parts = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:]) if part]
    whole = b"".join(parts) + b"0\r\n\r\n"
    return whole if rng.random() < 0.6 else b"zz\r\n" + whole


def request_of(rng: Random, service: str) -> tuple[bytes, str, bool]:
    """A request as bytes, its method, and whether it is whole, so that an answer is due."""
    path = rng.choice(PATHS[service])
    method = rng.choice(METHODS) if rng.random() < 0.25 else "POST" if path in RECORDS else "GET"
    target = rng.choice(TARGETS) if rng.random() < 0.15 else path.encode()
    body = body_of(rng, path) if method != "GET" or rng.random() < 0.2 else b""
    headers: list[tuple[bytes, bytes]] = [(b"Host", b"x")]
    if service == "frontend with keys" and rng.random() < 0.8:
        headers.append((b"Authorization", b"Bearer " + KEY.encode()))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        name = rng.choice(list(CHOICES))
        headers.append((name, rng.choice(CHOICES[name] if rng.random() < 0.7 else VALUES)))
    draw = rng.random()
    if draw < 0.1:
        headers.append((b"Transfer-Encoding", b"chunked"))
        body = chunked(rng, body)
    elif draw < 0.2:
        headers.append((b"Content-Encoding", rng.choice((b"gzip", b"deflate"))))
        squeezed = gzip.compress(body, mtime=0) if rng.random() < 0.5 else zlib.compress(body)
        body = damaged(rng, squeezed) if rng.random() < 0.6 else squeezed
    elif draw < 0.22:
        headers.append((b"Content-Encoding", b"gzip"))
        body = gzip.compress(b" " * (20 << 20), compresslevel=9, mtime=0)
    if not any(name in (b"Content-Length", b"Transfer-Encoding") for name, _ in headers):
        headers.append((b"Content-Length", str(len(body)).encode()))
    version = b"HTTP/1.1" if rng.random() < 0.95 else rng.choice((b"HTTP/1.0", b"HTTP/9.9", b"HTTP/2.0", b""))
    lines = [b"%s %s %s" % (method.encode(), target, version), *(b"%s: %s" % pair for pair in headers)]
    raw = b"\r\n".join(lines) + b"\r\n\r\n" + body
    if rng.random() < 0.05:
        return raw[: rng.randrange(len(raw))], method, False
    if rng.random() < 0.05:
        return damaged(rng, raw), method, False
    announced = [value for name, value in headers if name in (b"Content-Length", b"Transfer-Encoding")]
    return raw, method, announced == [str(len(body)).encode()]


def is_well(running: Probed, service: str) -> None:
    """A good request is answered."""
    if service == "page":
        assert running.ask(service, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").body == b'{"ok": true}'
        return
    if service == "simulator":
        # What was wished of it lasts: it is to answer, not to fail on purpose.
        assert running.ask(service, post("/sim/faults", b"{}"), method="POST").status == 200
    answer = running.ask(service, post("/v1/completions", json.dumps(COMPLETION).encode()), method="POST")
    assert answer.status == 200, answer
    assert json.loads(answer.body)["choices"]


def post(path: str, body: bytes) -> bytes:
    """A good request."""
    headers = (
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {KEY}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*headers, "", "")).encode() + body


FOUND = {
    "an Expect that is no text": (b"Expect: \xed\xa0\x80", 417),
    "a body that is no gzip": (b"Content-Encoding: gzip", 400),
    "a body in no chunks": (b"Transfer-Encoding: chunked", 400),
}


@pytest.mark.parametrize("service", ["frontend", "frontend with keys", "simulator"])
@pytest.mark.parametrize("name", list(FOUND))
def test_what_broke_a_service_once_is_refused(running: Probed, service: str, name: str) -> None:
    header, status = FOUND[name]
    raw = post("/v1/completions", b"none of it").replace(b"Host: x", b"Host: x\r\n" + header)
    if b"Transfer" in header:
        raw = raw.replace(b"Content-Length: 10\r\n", b"")
    assert running.ask(service, raw, method="POST").status == status
    is_well(running, service)
    assert not running.complaints


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("service", list(PATHS))
@settings(max_examples=CASES, derandomize=CASES < 1000)
@given(seed=st.integers(min_value=0, max_value=2**64 - 1))
def test_any_request_gets_an_answer_and_the_next_one_is_served(
    running: Probed, service: str, seed: int
) -> None:
    rng = Random(seed)
    raw, method, is_whole = request_of(rng, service)
    answer = running.ask(service, raw, method=method, whole=is_whole)
    if answer.status >= 500:
        on_purpose = service == "simulator" and b"on purpose" in answer.body
        assert on_purpose or answer.status in {501, 504, 505}, answer
    if rng.random() < 0.1 or service == "simulator":
        is_well(running, service)
    found, running.complaints[:] = list(running.complaints), []
    assert not found
