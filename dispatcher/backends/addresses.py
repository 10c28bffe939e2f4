"""Addresses of servers as settings have them, checked before anybody connects.

A setting of such a type is refused with its source and what was expected; whoever connects checks again,
for addresses that come from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_BROKER = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:/,\[\]]+)(?::(\d{1,5}))?")
_SENTINEL = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?:(?P<user>[^:@/\s]*)(?::(?P<password>[^@/\s]*))?@)?"
    r"(?P<hosts>[^@/?#\s]+)/(?P<service>[^/?#\s]+)(?:/(?P<database>\d*))?"
)
SENTINEL_PORT = 26379
_ZEROMQ = re.compile(r"tcp://(?:\*|\[[0-9a-fA-F:.]+\]|[^\s:/,\[\]*]+):(\d{1,5})")
_PASSWORD = re.compile(r"(?<=://)([^:/\s]*):([^/\s]*)@|(?<=[?&]password=)[^&\s]*")


@dataclass(frozen=True)
class Form:
    """What a text has to be, in words and as a test."""

    expected: str
    fits: Callable[[str], bool]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let pydantic ask `fits`."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, text: str) -> str:
        if not self.fits(text):
            raise ValueError(f"expected {self.expected}")
        return text


@dataclass(frozen=True, kw_only=True)
class SentinelAddress:
    """Sentinels that know where the primary called `service` is, and the login at that primary."""

    sentinels: tuple[tuple[str, int], ...]
    service: str
    database: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    has_tls: bool = False


def sentinel_address(text: str) -> SentinelAddress | None:
    """Read `redis+sentinel://[user:password@]host[:port],.../service[/database]`; None for anything else.

    With `rediss+sentinel` Sentinels and Redis alike are reached by TLS; a port left out is 26379.
    """
    found = _SENTINEL.fullmatch(text)
    if found is None:
        return None
    sentinels = []
    for one in found["hosts"].split(","):
        host = _BROKER.fullmatch(one)
        port = int(host[1] or SENTINEL_PORT) if host is not None else 0
        if not 0 < port < 65536:
            return None
        name = one.rpartition(":")[0] if host is not None and host[1] else one
        sentinels.append((name.strip("[]"), port))
    return SentinelAddress(
        sentinels=tuple(sentinels),
        service=unquote(found["service"]),
        database=int(found["database"] or 0),
        user=unquote(found["user"] or ""),
        password=unquote(found["password"] or ""),
        has_tls=found["scheme"] == "rediss",
    )


def is_redis_url(text: str) -> bool:
    """Whether a text is a URL of Redis, Valkey or of Sentinels that know one.

    A database that is no number would be taken for 0.
    """
    if sentinel_address(text) is not None:
        return True
    try:
        url = urlsplit(text)
        port_is_valid = url.port is None or url.port > 0
    except ValueError:
        return False
    if url.scheme == "unix":
        return bool(url.path)
    return (
        url.scheme in ("redis", "rediss") and port_is_valid and re.fullmatch(r"/?\d*", url.path) is not None
    )


def is_kafka_servers(text: str) -> bool:
    """Whether a text is a list of brokers, `host:port[,host:port]`; a port left out is 9092."""
    found = [_BROKER.fullmatch(one.strip()) for one in text.split(",")]
    return all(one is not None and 0 < int(one[1] or 9092) < 65536 for one in found)


def is_http_url(text: str) -> bool:
    """Whether a text is the address of an HTTP server."""
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def is_zeromq_endpoint(text: str) -> bool:
    """Whether a text is an endpoint to connect to, or with '*' for its host to bind."""
    if text.startswith("ipc://"):
        return len(text) > len("ipc://")
    found = _ZEROMQ.fullmatch(text)
    return found is not None and int(found[1]) < 65536


REDIS_URL = Form("a URL like redis://host:6379/0 or redis+sentinel://a:26379,b:26379/name/0", is_redis_url)
KAFKA_SERVERS = Form("host:port[,host:port]", is_kafka_servers)
HTTP_URL = Form("an address like http://host:8000", is_http_url)

RedisUrl = Annotated[str, REDIS_URL]
MaybeRedisUrl = Annotated[
    str, Form(f"{REDIS_URL.expected}, or nothing", lambda text: not text or is_redis_url(text))
]
KafkaServers = Annotated[str, KAFKA_SERVERS]
HttpUrl = Annotated[str, HTTP_URL]
MaybeZeroMQ = Annotated[
    str,
    Form("tcp://host:port, tcp://*:port or nothing", lambda text: not text or is_zeromq_endpoint(text)),
]


def masked(value: object) -> str:
    """A value as it may be printed: passwords in addresses become `***`."""
    return _PASSWORD.sub(lambda found: f"{found[1]}:***@" if found[2] is not None else "***", str(value))
