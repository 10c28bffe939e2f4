"""`quick_commands` and fakeredis give the same answers, leave the same data and touch the same keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.sim import redis as sim_redis
from tests.support.sim.quick_commands import QUICK, Slow

BEGUN_S = 1_800_000_000.25

KEYS = [b"string", b"hash", b"list", b"zset", b"set", b"stream", b"other"]
WORDS = [b"a", b"b", b"", b"0", b"-1", b"7", b"007", b"1.5", b"-2.5", b"inf", b"1e3", b"\xff\x00"]
NUMBERS = [b"0", b"1", b"2", b"-1", b"-2", b"5000", b"x", b"99999999999999999999"]
IDS = [
    b"-",
    b"+",
    b"0-0",
    b"1800000000250-0",
    b"(1800000000250-0",
    b"1800000000250",
    b"$",
    b"x",
    b"1800000001000-1",
]
OPTIONS = [b"PX", b"NX", b"EX", b"KEEPTTL", b"MAXLEN", b"~", b"=", b"*", b"COUNT", b"WITHSCORES", b"px"]

key = st.sampled_from(KEYS)
word = st.sampled_from(WORDS)
number = st.sampled_from(NUMBERS)
id = st.sampled_from(IDS)
anything = st.one_of(key, word, number, id, st.sampled_from(OPTIONS))


def command(name: str, *arguments: st.SearchStrategy[bytes] | bytes) -> st.SearchStrategy[list[bytes]]:
    parts = [st.just(part) if isinstance(part, bytes) else part for part in arguments]
    return st.tuples(*parts).map(lambda found: [name.encode(), *found])


usual = st.one_of(
    command("GET", key),
    command("SET", key, word),
    command("SET", key, word, b"PX", number),
    command("INCR", key),
    command("EXISTS", key),
    command("DEL", key),
    command("DEL", key, key),
    command("EXPIRE", key, number),
    command("PEXPIRE", key, number),
    command("PTTL", key),
    command("TIME"),
    command("HGET", key, word),
    command("HMGET", key, word, word),
    command("HSET", key, word, word),
    command("HSET", key, word, word, word, word),
    command("HINCRBY", key, word, number),
    command("HDEL", key, word),
    command("HPEXPIRE", key, number, b"FIELDS", b"1", word),
    command("LLEN", key),
    command("LRANGE", key, number, number),
    command("RPUSH", key, word),
    command("RPUSH", key, word, word),
    command("LPOP", key),
    command("LPOP", key, number),
    command("ZSCORE", key, word),
    command("ZADD", key, number, word),
    command("ZADD", key, word, word),
    command("ZREM", key, word),
    command("SADD", key, word),
    command("SREM", key, word),
    command("XADD", key, b"*", word, word),
    command("XADD", key, b"MAXLEN", b"~", number, b"*", word, word),
    command("XADD", key, b"MAXLEN", number, b"*", word, word, word, word),
    command("XDEL", key, id),
    command("XRANGE", key, id, id),
    command("XRANGE", key, id, id, b"COUNT", number),
    command("XREAD", b"STREAMS", key, id),
    command("XREAD", b"COUNT", number, b"STREAMS", key, id),
    command("XREAD", b"BLOCK", number, b"COUNT", number, b"STREAMS", key, id),
)
unusual = st.tuples(st.sampled_from([*QUICK, b"XREAD"]), st.lists(anything, max_size=6)).map(
    lambda found: [found[0], *found[1]]
)
steps = st.lists(st.tuples(st.one_of(usual, unusual), st.sampled_from([0.0, 0.0, 0.001, 4.0])), max_size=40)


def server(*, quick: bool) -> Any:
    class Plain(sim_redis._Socket):
        def _quickly(self, fields: list[bytes]) -> Any:
            raise Slow

    state = sim_redis._State()
    return (sim_redis._Socket if quick else Plain)(state)


def answer_of(socket: Any, fields: list[bytes], now_s: float) -> Any:
    """What a command is answered, one that waits said in words."""
    try:
        answer = socket.execute(fields, now_s)
    except (AttributeError, IndexError) as error:  # fakeredis trips, as over XREAD of what is no stream
        return repr(error)
    if isinstance(answer, sim_redis._Blocked):
        return "waits", answer.timeout_s, answer.retry()
    return repr(answer) if isinstance(answer, Exception) else answer


def content(socket: Any) -> Any:
    """All that a server holds, in its order, and the keys touched since it was asked last."""
    found = []
    database = socket._server.dbs[0]
    for name, item in database._dict.items():
        value = item.value
        held = dict(vars(value)) if hasattr(value, "__dict__") else value
        if isinstance(held, dict):
            held = {name: list(part) if name == "_byscore" else part for name, part in held.items()}
        found.append((name, type(value).__name__, held, item.expireat))
    touched = list(socket._server.touched)
    socket._server.touched.clear()
    return found, touched


@given(steps)
def test_quick_commands_do_what_fakeredis_does(steps: Sequence[tuple[list[bytes], float]]) -> None:
    quick, plain = server(quick=True), server(quick=False)
    now_s = BEGUN_S
    for fields, wait_s in steps:
        now_s += wait_s
        assert answer_of(quick, fields, now_s) == answer_of(plain, fields, now_s), fields
        assert content(quick) == content(plain), fields


@pytest.mark.parametrize(
    "fields",
    [
        [b"SET", b"k", b"v", b"PX", b"100"],
        [b"HSET", b"k", b"f", b"v"],
        [b"HMGET", b"k", b"f"],
        [b"XADD", b"k", b"MAXLEN", b"~", b"20000", b"*", b"f", b"v"],
        [b"XREAD", b"BLOCK", b"100", b"COUNT", b"1000", b"STREAMS", b"k", b"0-0"],
        [b"ZADD", b"k", b"1800000004000", b"m"],
        [b"LRANGE", b"k", b"0", b"-1"],
        [b"PTTL", b"k"],
    ],
    ids=lambda fields: fields[0].decode(),
)
def test_what_we_send_is_done_quickly(fields: list[bytes]) -> None:
    socket = server(quick=True)
    socket._server.dbs[0].time = BEGUN_S
    socket._quickly(fields)
