"""The commands that our scripts and clients use most, in their usual shapes, on fakeredis's own data.

fakeredis decodes, wraps, checks and writes back the same way for each of its 500 commands; that is most of
what a simulated Redis costs. A function here does what fakeredis does for one command with the arguments
that we send, and raises `Slow` *before it changes anything* for all else: other options, other types,
expired keys, errors.
`tests/simulation/test_quick_commands.py` holds both to the same answers, data and touched keys.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from fakeredis._core._database import Database, Item
from fakeredis._helpers import OK
from fakeredis.model import ExpiringMembersSet, Hash, StreamEntryKey, XStream, ZSet

Arguments = Sequence[bytes]
Quick = Callable[[Database, Arguments], Any]

LONGEST_INTEGER = 18
"""Digits of an integer that surely fits in 64 bits."""


class Slow(Exception):
    """Not one of the usual shapes: fakeredis is to do it."""


def _found(db: Database, key: bytes, kind: type) -> Any:
    """The value of `key`, None without one."""
    item = db._dict.get(key)
    if item is None:
        return None
    if type(item.value) is not kind or (item.expireat is not None and item.expireat < db.time):
        raise Slow
    return item.value


def _item(db: Database, key: bytes) -> Any:
    """The item of `key`, whatever its type, None without one."""
    item = db._dict.get(key)
    if item is not None and item.expireat is not None and item.expireat < db.time:
        raise Slow
    return item


def _hash(db: Database, key: bytes) -> dict[bytes, bytes] | None:
    """The fields of a hash, none of which expires by itself."""
    found = _found(db, key, Hash)
    if found is None:
        return None
    if found._expiry_heap or found._expirations:
        raise Slow
    fields: dict[bytes, bytes] = found._values
    return fields


def _put(db: Database, key: bytes, value: Any) -> None:
    """Make a key that does not exist yet."""
    db.notify_watch(key)
    db._dict[key] = Item(value)


@functools.lru_cache(maxsize=4096)
def _integer(text: bytes) -> int:
    """An integer as Redis writes it."""
    digits = text[1:] if text[:1] == b"-" else text
    if not digits.isdigit() or len(digits) > LONGEST_INTEGER or (digits[:1] == b"0" and text != b"0"):
        raise Slow
    return int(text)


def _score(text: bytes) -> float:
    """A score without exponents, infinities and their like."""
    if not text.replace(b".", b"", 1).isdigit() or len(text) > LONGEST_INTEGER:
        raise Slow
    return float(text)


def _get(db: Database, arguments: Arguments) -> Any:
    (key,) = arguments
    return _found(db, key, bytes)


def _set(db: Database, arguments: Arguments) -> Any:
    expireat = None
    if len(arguments) == 4 and arguments[2] == b"PX":
        milliseconds = _integer(arguments[3])
        if milliseconds <= 0:
            raise Slow
        expireat = db.time + milliseconds / 1000.0
    elif len(arguments) != 2:
        raise Slow
    key, value = arguments[0], arguments[1]
    item = _item(db, key)
    db.notify_watch(key)
    if item is None:
        item = db._dict[key] = Item(None)
    item.value, item.expireat = value, expireat
    db.schedule_expiry(key, expireat)
    return OK


def _incr(db: Database, arguments: Arguments) -> Any:
    (key,) = arguments
    value = _found(db, key, bytes)
    number = _integer(b"0" if value is None else value) + 1
    if value is None:
        _put(db, key, b"%d" % number)
    else:
        db.notify_watch(key)
        db._dict[key].value = b"%d" % number
    return number


def _exists(db: Database, arguments: Arguments) -> Any:
    (key,) = arguments
    item = _item(db, key)
    return 0 if item is None or (type(item.value) is not bytes and not item.value) else 1


def _del(db: Database, arguments: Arguments) -> Any:
    items = {key: _item(db, key) for key in arguments}
    if len(items) < len(arguments):
        raise Slow
    count = 0
    for key, item in items.items():
        if item is not None and (type(item.value) is bytes or item.value):
            db.notify_watch(key)
            del db._dict[key]
            count += 1
    return count


def _expire_in(db: Database, arguments: Arguments, per_s: float) -> Any:
    key, time = arguments
    wait = _integer(time)
    item = _item(db, key)
    if item is None:
        return 0
    if type(item.value) is not bytes and not item.value:
        raise Slow
    db.notify_watch(key)
    item.expireat = db.time + wait / per_s
    db.schedule_expiry(key, item.expireat)
    return 1


def _expire(db: Database, arguments: Arguments) -> Any:
    return _expire_in(db, arguments, 1.0)


def _pexpire(db: Database, arguments: Arguments) -> Any:
    return _expire_in(db, arguments, 1000.0)


def _pttl(db: Database, arguments: Arguments) -> Any:
    (key,) = arguments
    item = _item(db, key)
    if item is None or (type(item.value) is not bytes and not item.value):
        return -2
    return -1 if item.expireat is None else round((item.expireat - db.time) * 1000.0)


def _time(db: Database, arguments: Arguments) -> Any:
    if arguments:
        raise Slow
    seconds, microseconds = divmod(round(db.time * 1_000_000), 1_000_000)
    return [b"%d" % seconds, b"%d" % microseconds]


# Hashes


def _hget(db: Database, arguments: Arguments) -> Any:
    key, field = arguments
    fields = _hash(db, key)
    return None if fields is None else fields.get(field)


def _hmget(db: Database, arguments: Arguments) -> Any:
    if len(arguments) < 2:
        raise Slow
    fields = _hash(db, arguments[0])
    if fields is None:
        return [None] * (len(arguments) - 1)
    get = fields.get
    return [get(field) for field in arguments[1:]]


def _hset(db: Database, arguments: Arguments) -> Any:
    if len(arguments) < 3 or len(arguments) % 2 == 0:
        raise Slow
    key = arguments[0]
    fields = _hash(db, key)
    if fields is None:
        made = Hash()
        fields = made._values
        _put(db, key, made)
    else:
        db.notify_watch(key)
    before = len(fields)
    fields.update(zip(arguments[1::2], arguments[2::2], strict=True))
    return len(fields) - before


def _hincrby(db: Database, arguments: Arguments) -> Any:
    key, field, amount = arguments
    fields = _hash(db, key)
    number = _integer(b"0" if fields is None else fields.get(field, b"0")) + _integer(amount)
    if fields is None:
        made = Hash()
        fields = made._values
        _put(db, key, made)
    else:
        db.notify_watch(key)
    fields[field] = b"%d" % number
    return number


# Lists


def _llen(db: Database, arguments: Arguments) -> Any:
    (key,) = arguments
    return len(_found(db, key, list) or ())


def _lrange(db: Database, arguments: Arguments) -> Any:
    key, first, last = arguments
    begin, end = _integer(first), _integer(last)
    if begin < 0 or end < -1:
        raise Slow
    found = _found(db, key, list)
    return [] if found is None else found[begin : len(found) if end == -1 else end + 1]


def _rpush(db: Database, arguments: Arguments) -> Any:
    if len(arguments) < 2:
        raise Slow
    key = arguments[0]
    found = _found(db, key, list)
    if found is None:
        found = []
        _put(db, key, found)
    else:
        db.notify_watch(key)
    found.extend(arguments[1:])
    return len(found)


def _lpop(db: Database, arguments: Arguments) -> Any:
    if _found(db, arguments[0], list) is not None:
        raise Slow
    if len(arguments) == 2:
        _integer(arguments[1])
        if arguments[1][:1] == b"-":
            raise Slow
    elif len(arguments) != 1:
        raise Slow
    return None


# Sorted sets


def _zscore(db: Database, arguments: Arguments) -> Any:
    key, member = arguments
    found = _found(db, key, ZSet)
    score = None if found is None else found._bylex.get(member)
    if score is None:
        return None
    if not isfinite(score):
        raise Slow
    return b"%.17g" % score


def _zadd(db: Database, arguments: Arguments) -> Any:
    key, text, member = arguments
    score = 0.0 + _score(text)
    found = _found(db, key, ZSet)
    if found is None:
        found = ZSet()
        found.add(member, score)
        _put(db, key, found)
        return 1
    is_new = member not in found._bylex
    if found.add(member, score):
        db.notify_watch(key)
    return int(is_new)


def _zrem(db: Database, arguments: Arguments) -> Any:
    key, member = arguments
    found = _found(db, key, ZSet)
    if found is None or member not in found._bylex:
        return 0
    db.notify_watch(key)
    found.discard(member)
    if not found._bylex:
        del db._dict[key]
    return 1


# Sets


def _sadd(db: Database, arguments: Arguments) -> Any:
    key, member = arguments
    found = _found(db, key, ExpiringMembersSet)
    if found is None:
        found = ExpiringMembersSet()
        _put(db, key, found)
    elif found._may_expire:
        raise Slow
    else:
        db.notify_watch(key)
    before = len(found._values)
    found.add(member)
    return len(found._values) - before


# Streams


@functools.lru_cache(maxsize=4096)
def _stream_id(text: bytes) -> StreamEntryKey:
    milliseconds, dash, sequence = text.partition(b"-")
    if not dash:
        raise Slow
    return StreamEntryKey(_integer(milliseconds), _integer(sequence))


def _xadd(db: Database, arguments: Arguments) -> Any:
    at, most = 1, None
    if len(arguments) > 4 and arguments[1] == b"MAXLEN":
        at = 3 if arguments[2] in {b"~", b"="} else 2
        most = _integer(arguments[at])
        at += 1
    if len(arguments) < at + 3 or arguments[at] != b"*" or (len(arguments) - at) % 2 == 0:
        raise Slow
    key = arguments[0]
    found = _found(db, key, XStream)
    stream = XStream() if found is None else found
    if most is not None and not 0 < len(stream._ids) + 1 <= most:
        raise Slow
    id = stream.next_id(None)
    if id is None:
        raise Slow
    stream.add(arguments[at + 1 :], id)
    if found is None:
        _put(db, key, stream)
    else:
        db.notify_watch(key)
    return b"%d-%d" % id


def _xdel(db: Database, arguments: Arguments) -> Any:
    key, text = arguments
    found = _found(db, key, XStream)
    id = _stream_id(text)
    if found is None or id not in found._values_dict:
        return 0
    found._delete_at(bisect_left(found._ids, id))
    return 1


def _entries(stream: XStream, ids: Sequence[StreamEntryKey]) -> list[Any]:
    values = stream._values_dict
    return [[b"%d-%d" % id, list(values[id])] for id in ids]


def _xrange(db: Database, arguments: Arguments) -> Any:
    count = None
    if len(arguments) == 5 and arguments[3] == b"COUNT":
        count = _integer(arguments[4])
    elif len(arguments) != 3:
        raise Slow
    if count is not None and count < 0:
        raise Slow
    begin, end = arguments[1], arguments[2]
    first = last = None
    if begin != b"-":
        first = _stream_id(begin.removeprefix(b"("))
    if end != b"+":
        last = _stream_id(end)
    stream = _found(db, arguments[0], XStream)
    if stream is None:
        return []
    ids = stream._ids
    low = 0
    if first is not None:
        low = bisect_right(ids, first) if begin[:1] == b"(" else bisect_left(ids, first)
    high = len(ids) if last is None else bisect_right(ids, last)
    return _entries(stream, ids[low : high if count is None else min(high, low + count)])


def read_after(db: Database, key: bytes, id: StreamEntryKey, count: int | None) -> Any:
    """What XREAD finds in one stream, None when nothing."""
    stream = _found(db, key, XStream)
    if stream is None:
        return None
    ids = stream._ids
    low = bisect_right(ids, id)
    if low == len(ids):
        return None
    return [[key, _entries(stream, ids[low : low + count] if count else ids[low:])]]


def reading(arguments: Arguments) -> tuple[bytes, StreamEntryKey, int | None, float | None]:
    """What XREAD is to read of one stream: its key, after which id, how much; seconds to wait for it."""
    at = 0
    count = block_s = None
    while at + 1 < len(arguments) and arguments[at] != b"STREAMS":
        if arguments[at] == b"COUNT":
            count = _integer(arguments[at + 1])
        elif arguments[at] == b"BLOCK":
            block_s = _integer(arguments[at + 1]) / 1000.0
        else:
            raise Slow
        at += 2
    if (
        len(arguments) != at + 3
        or (count is not None and count <= 0)
        or (block_s is not None and block_s < 0)
    ):
        raise Slow
    return arguments[at + 1], _stream_id(arguments[at + 2]), count, block_s


QUICK: dict[bytes, tuple[Quick, int, int]] = {
    b"GET": (_get, 1, 1),
    b"SET": (_set, 2, 4),
    b"INCR": (_incr, 1, 1),
    b"EXISTS": (_exists, 1, 1),
    b"DEL": (_del, 1, 99),
    b"EXPIRE": (_expire, 2, 2),
    b"PEXPIRE": (_pexpire, 2, 2),
    b"PTTL": (_pttl, 1, 1),
    b"TIME": (_time, 0, 0),
    b"HGET": (_hget, 2, 2),
    b"HMGET": (_hmget, 2, 99),
    b"HSET": (_hset, 3, 99),
    b"HINCRBY": (_hincrby, 3, 3),
    b"LLEN": (_llen, 1, 1),
    b"LRANGE": (_lrange, 3, 3),
    b"RPUSH": (_rpush, 2, 99),
    b"LPOP": (_lpop, 1, 2),
    b"ZSCORE": (_zscore, 2, 2),
    b"ZADD": (_zadd, 3, 3),
    b"ZREM": (_zrem, 2, 2),
    b"SADD": (_sadd, 2, 2),
    b"XADD": (_xadd, 4, 99),
    b"XDEL": (_xdel, 2, 2),
    b"XRANGE": (_xrange, 3, 5),
}
"""By name, each with the least and the most arguments that it knows."""
