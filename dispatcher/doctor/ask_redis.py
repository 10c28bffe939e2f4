"""Ask a Redis or Valkey for the facts that findings need."""

from __future__ import annotations

import time

import msgspec
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from dispatcher.backends.scripts import Redis, translate
from dispatcher.backends.store_view import StoredNode, StoreView
from dispatcher.doctor.ask_kafka import reading
from dispatcher.doctor.facts import ClockReading, NodeFacts, PoolFacts, RedisFacts
from dispatcher.errors import StoreUnavailable
from dispatcher.protocol.names import Names
from dispatcher.protocol.node import NodeIdentity

CLOCK_LOOKS = 3
MIN_REPLICAS = "min-replicas-to-write"
OURS, RQS = "flexlb:{pool}:doctor", "rq:job:{pool}--doctor"
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("DEL", OURS),
    ("EVAL", "return 1", "1", OURS),
    ("EVALSHA", "0" * 40, "1", OURS),
    ("EXISTS", OURS),
    ("GET", OURS),
    ("HDEL", OURS, "f"),
    ("HGET", OURS, "f"),
    ("HGETALL", OURS),
    ("HINCRBY", OURS, "f", "1"),
    ("HMGET", OURS, "f"),
    ("HSET", RQS, "f", "v"),
    ("INCR", OURS),
    ("LRANGE", RQS, "0", "1"),
    ("LREM", RQS, "0", "v"),
    ("MULTI",),
    ("EXEC",),
    ("PERSIST", OURS),
    ("PEXPIRE", OURS, "1"),
    ("PING",),
    ("PTTL", OURS),
    ("RENAME", OURS, RQS),
    ("RPUSH", RQS, "v"),
    ("SADD", RQS, "v"),
    ("SET", OURS, "v"),
    ("SMEMBERS", OURS),
    ("SREM", RQS, "v"),
    ("TIME",),
    ("XADD", OURS, "*", "f", "v"),
    ("XDEL", OURS, "1-1"),
    ("XRANGE", OURS, "-", "+"),
    ("XREAD", "STREAMS", OURS, "0"),
    ("XREVRANGE", OURS, "+", "-"),
    ("ZADD", RQS, "1", "v"),
    ("ZRANGE", OURS, "0", "1"),
    ("ZRANGEBYSCORE", OURS, "0", "1"),
    ("ZREM", RQS, "v"),
    ("ZREMRANGEBYSCORE", OURS, "0", "1"),
    ("ZSCORE", OURS, "v"),
)
"""What a dispatcher calls, itself or inside its scripts, on keys of the kinds it has."""


async def ask_redis(client: Redis, names: Names) -> RedisFacts:
    """Gather facts of a server.

    Raises:
        StoreUnavailable: it did not answer, or refuses this user altogether.
    """
    try:
        user, denied = await _denied(client, names)
        return RedisFacts(
            info=await _info(client),
            appendfsync=await _configured(client, "appendfsync"),
            min_replicas=int(found) if (found := await _configured(client, MIN_REPLICAS)) else None,
            user=user,
            denied=denied,
            clock=await _clock(client),
        )
    except RedisError as error:
        raise StoreUnavailable(f"Redis did not answer: {error or type(error).__name__}") from error
    except (OSError, EOFError) as error:
        raise StoreUnavailable(f"Redis did not answer: {error}") from error


async def _info(client: Redis) -> dict[str, object] | None:
    try:
        info: dict[str, object] = await client.info()
    except NoPermissionError:
        return None
    return info


async def _configured(client: Redis, name: str) -> str | None:
    # Providers rename CONFIG or refuse it.
    try:
        found = await client.config_get(name)
    except ResponseError:
        return None
    return _text(found.get(name, found.get(name.encode())))


async def _clock(client: Redis) -> ClockReading | None:
    best: ClockReading | None = None
    for _ in range(CLOCK_LOOKS):
        asked_s = time.time()
        try:
            seconds, micros = await client.time()
        except NoPermissionError:
            return None
        one = reading(asked_s, seconds + micros / 1e6, time.time())
        if best is None or one.within_s < best.within_s:
            best = one
    return best


async def _denied(client: Redis, names: Names) -> tuple[str | None, dict[str, str] | None]:
    """Whom the server takes us for, and which of our commands it would refuse us; None: it won't say."""
    try:
        user = _text(await client.execute_command("ACL", "WHOAMI"))
    except ResponseError:
        return None, None
    denied = {}
    for command, *arguments in COMMANDS:
        words = [one.format(pool=names.pool) for one in arguments]
        try:
            answer = _text(await client.execute_command("ACL", "DRYRUN", user, command, *words))
        except ResponseError:
            return user, None
        if answer is not None and answer.upper() != "OK":
            denied[command] = answer
    return user, denied


async def ask_pool(client: Redis, names: Names) -> PoolFacts:
    """Gather what Redis holds of a pool.

    Raises:
        StoreUnavailable: it did not answer.
        StoreRefused: this user may not read the pool.
    """
    view = StoreView(client, names)
    try:
        # In one step: between two reads another dispatcher may take the lock.
        pipe = client.pipeline(transaction=True)
        pipe.get(names.leader)
        pipe.get(names.epoch)
        pipe.pttl(names.leader)
        pipe.time()
        leader, epoch, ttl_ms, (seconds, _) = await pipe.execute()
    except RedisError as error:
        raise translate(error, "pool") from error
    except (OSError, EOFError) as error:
        raise StoreUnavailable(f"pool: {error}") from error
    admitted = await view.node_names()
    stored = await view.nodes(admitted)
    generation = await view.generation()
    return PoolFacts(
        prefix=names.prefix,
        leader=_text(leader) or "",
        leader_ttl_ms=int(ttl_ms),
        epoch=_text(epoch) or "",
        generation=generation[0] if generation else "",
        redis_ms=int(seconds) * 1000,
        nodes=tuple(_node(one) for one in stored),
        forgotten=tuple(sorted(set(admitted) - {one.node for one in stored})),
    )


def _node(stored: StoredNode) -> NodeFacts:
    try:
        identity = msgspec.json.decode(stored.identity, type=NodeIdentity)
    except msgspec.MsgspecError:
        identity = None
    return NodeFacts(
        node=stored.node,
        alive=stored.alive,
        is_fenced=stored.fenced == stored.incarnation,
        identity=identity,
    )


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if value is None else str(value)
