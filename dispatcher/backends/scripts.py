"""Run our Lua scripts on Redis: by digest, reloaded when the server forgot them.

Every change of state in Redis is one of these files. Their error replies begin with a word that
becomes an exception here: DEPOSED (a leader's epoch is old), FENCED (an agent's incarnation is).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from dispatcher.errors import Deposed, Fenced, GenerationLost, StoreFull, StoreRefused, StoreUnavailable

Redis = Any
"""A `redis.asyncio.Redis` (or the simulation's): its stubs mix str and bytes, ours are bytes only."""
Argument = str | bytes | int | float


class Script:
    """One Lua file and its digest."""

    def __init__(self, name: str, source: str | None = None) -> None:
        self.name = name
        self.source = source or _shipped(name)
        self.digest = _digest(self.source)


@functools.cache
def _shipped(name: str) -> str:
    return (files("dispatcher.backends") / "lua" / f"{name}.lua").read_text()


@functools.lru_cache(maxsize=64)
def _digest(source: str) -> str:
    return hashlib.sha1(source.encode()).hexdigest()


def translate(error: RedisError, doing: str) -> Exception:
    """Our exception for one of the client library's."""
    text = str(error)
    if text.startswith("DEPOSED"):
        return Deposed(text)
    if text.startswith("REWOUND"):
        return GenerationLost(text)
    if text.startswith("FENCED"):
        return Fenced(text)
    if isinstance(error, OutOfMemoryError) or text.startswith("OOM"):
        return StoreFull(f"{doing}: Redis is at maxmemory: {text}; raise maxmemory or wait for work to end")
    if isinstance(error, AuthenticationError) or text.startswith("NOAUTH"):
        return StoreUnavailable(
            f"{doing}: Redis refused the login: {text}; set redis_user and "
            "redis_password, or name them in the address"
        )
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return StoreUnavailable(
            f"{doing}: the certificate of Redis is not trusted: {text}; set redis_ca_file to who signed it"
        )
    if "[SSL" in text:
        return StoreUnavailable(
            f"{doing}: no TLS with Redis: {text}; use redis:// for a port without, and redis_cert_file for "
            "one that wants a certificate"
        )
    if isinstance(error, ConnectionError | TimeoutError | ReadOnlyError) or text.startswith(
        (
            *("LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "TRYAGAIN", "UNBLOCKED"),
            *("NOREPLICAS", "MISCONF", "BUSY "),
        )
    ):
        return StoreUnavailable(f"{doing}: Redis did not answer: {text or type(error).__name__}")
    return StoreRefused(f"{doing}: Redis refused: {text}")


def is_wrong_type(error: object) -> bool:
    """Whether an answer says that a key holds another type than the command is for."""
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")


class ScriptRunner:
    """Runs scripts over one client; one round trip each."""

    def __init__(self, client: Redis, overrides: dict[str, str] | None = None) -> None:
        self.client = client
        self._overrides = overrides or {}
        self._scripts: dict[str, Script] = {}

    async def run(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Run `lua/<name>.lua`.

        Raises:
            Deposed, Fenced: the script refused the caller.
            StoreUnavailable: no answer; the effect may have happened, scripts are made to be repeated.
            StoreFull: at maxmemory.
        """
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = Script(name, self._overrides.get(name))
        try:
            try:
                return await self.client.evalsha(script.digest, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self.client.eval(script.source, len(keys), *keys, *arguments)
        except RedisError as error:
            if isinstance(error, ResponseError) and str(error).startswith("NOSCRIPT"):
                raise StoreUnavailable(f"{name}: the server lost the script while it was called") from error
            raise translate(error, name) from error
        except (OSError, EOFError) as error:
            raise StoreUnavailable(f"{name}: {error}") from error
