"""A Redis server in virtual time: fakeredis's commands, our Lua, and a real `redis.asyncio` client on top.

The client is redis-py's own class with its transport replaced, so that arguments are encoded and
answers parsed exactly as in production (RESP2), a call without an answer times out after `timeout_s`,
and a broken one is repeated once, as `connect_redis` has it.

Time: fakeredis reads the clock as `time.time()` in several modules. Each of them gets, once, a stand-in
for `time` that gives the moment of the command being executed and is the real module at any other
moment; so TIME, expiry and stream ids are virtual, and other users of fakeredis notice nothing.

Lua: fakeredis compiles a script and collects garbage on every call. `_Scripts` keeps one runtime and
the compiled functions for all simulations of a Python process; globals are read-only, as in Redis.
What our scripts and clients ask for most is done by `quick_commands`, all else by fakeredis.
The line `#!lua flags=...`, which Lua itself can't parse, is taken off here; digests are of the whole.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from fakeredis import FakeServer
from fakeredis import _msgs as msgs
from fakeredis._commands import SUPPORTED_COMMANDS, Key, Signature
from fakeredis._core import CommandItem, Database
from fakeredis._core._database import Item
from fakeredis._helpers import NoResponse, SimpleError
from fakeredis._socket import FakeSocket
from fakeredis._socket._resp import convert_to_resp2, extract_command
from fakeredis.commands_mixins.scripting_mixin import LUA_MODULE, _convert_redis_arg
from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError, RedisError, TimeoutError

from dispatcher.backends.connect import REDIS_TIMEOUT_S
from tests.support.sim.loop import OUTSIDE
from tests.support.sim.network import Network, Process, Server
from tests.support.sim.quick_commands import QUICK, Slow, read_after, reading

HISTORY_S = 10.0
"""How far back `restart(lose_last_s=...)` can go."""


class _CommandClock:
    """Stands in for the module `time` inside fakeredis."""

    def __init__(self) -> None:
        self.at_s: float | None = None

    def time(self) -> float:
        return time.time() if self.at_s is None else self.at_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


_clock = _CommandClock()


@contextmanager
def _at(now_s: float) -> Iterator[None]:
    _clock.at_s = now_s
    try:
        yield
    finally:
        _clock.at_s = None


def _give_fakeredis_our_clock() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("fakeredis.") and getattr(module, "time", None) is time:
            module.time = _clock  # type: ignore[attr-defined]


_give_fakeredis_our_clock()


class _Blocked(NoResponse):
    """What a command returns that has to wait. `retry` gives None while there is still nothing."""

    def __init__(self, timeout_s: float, retry: Callable[[], Any], empty: Callable[[], Any]) -> None:
        self.timeout_s = timeout_s
        self.retry = retry
        self.empty = empty


class _Database(Database):
    def __init__(self, touched: dict[bytes, None]) -> None:
        super().__init__(None)
        self._touched = touched

    def notify_watch(self, key: bytes) -> None:
        self._touched[key] = None


class _State(FakeServer):
    """fakeredis's data, noting which keys a command touched."""

    def __init__(self) -> None:
        super().__init__(version=(7, 4))
        self.touched: dict[bytes, None] = {}
        self.is_full = False
        self.dbs = defaultdict(lambda: _Database(self.touched))

    def wipe(self) -> None:
        """Lose all data."""
        for database in self.dbs.values():
            database._dict.clear()
            database._expiry_heap.clear()


MOST_ON_LUAS_STACK = 1000
LARGEST_WHOLE = 10**15
"""Below it the number that Lua has is written as the integer that it is."""
_ARE_IN_LUA_TOO = frozenset((bytes, int, type(None)))


class _Special(Exception):
    """An answer of a script that fakeredis is to convert."""


class _Scripts:
    """One Lua runtime and the functions compiled in it."""

    def __init__(self) -> None:
        self.lua = LUA_MODULE.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        self.socket: Any = None
        self._digests: dict[bytes, bytes] = {}
        self._functions: dict[bytes, Any] = {}
        self._signatures: dict[bytes, tuple[str, Any]] = {}
        setup = self.lua.eval(
            """
            function(call)
              redis = {call = call}
              redis.pcall = function(...)
                local ok, answer = pcall(call, ...)
                if ok then return answer end
                return {err = tostring(answer)}
              end
              redis.error_reply = function(message) return {err = message} end
              redis.status_reply = function(message) return {ok = message} end
              redis.log = function() end
              redis.LOG_DEBUG, redis.LOG_VERBOSE, redis.LOG_NOTICE, redis.LOG_WARNING = 0, 1, 2, 3
              python, os, io, require, dofile, loadfile, package = nil
              setmetatable(_G, {
                __newindex = function(_, name) error('Attempt to modify a readonly table: ' .. name) end,
                __index = function(_, name)
                  error("Script attempted to access nonexistent global variable '" .. tostring(name) .. "'")
                end})
            end
            """
        )
        setup(self._call)
        self._run = self.lua.eval(
            """
            function(script, keys, ...)
              local all, first = {...}, {}
              for index = 1, keys do first[index] = all[index] end
              local answer = script(first, {select(keys + 1, ...)})
              if type(answer) ~= 'table' or #answer == 0 or #answer > 1000 or answer.err ~= nil
                  or answer.ok ~= nil or answer.double ~= nil or answer.map ~= nil then return answer end
              return true, unpack(answer)
            end
            """
        )
        self.flat = self.lua.eval(
            """
            function(answer)
              if answer.err ~= nil or answer.ok ~= nil or answer.double ~= nil or answer.map ~= nil
                  or #answer > 1000 then return -1 end
              return #answer, unpack(answer)
            end
            """
        )
        self._table_type = type(self.lua.table())

    def digest(self, source: bytes) -> bytes:
        """What EVALSHA calls a script."""
        found = self._digests.get(source)
        if found is None:
            found = self._digests[source] = hashlib.sha1(source).hexdigest().encode()
        return found

    def run(self, source: bytes, keys: int, arguments: Sequence[bytes]) -> Any:
        """Call a script: a tuple of True and its answer's items for most tables, else its answer."""
        function = self._functions.get(source) or self._compiled(source)
        if len(arguments) < MOST_ON_LUAS_STACK:
            return self._run(function, keys, *arguments)
        return function(self.lua.table_from(arguments[:keys]), self.lua.table_from(arguments[keys:]))

    def answer(self, value: Any) -> Any:
        """What a script returned, as the server sends it; `_Special` for an error, a status and the like."""
        kind = type(value)
        if kind is bytes or kind is int or value is None:
            return value
        if kind is float:
            return int(value)
        if kind is bool:
            return 1 if value else None
        if kind is tuple:
            items = value
        elif kind is self._table_type:
            items = self.flat(value)
            if type(items) is not tuple:
                if items == 0:
                    return []
                raise _Special
        else:
            raise _Special
        answers = []
        for item in items[1:]:
            if item is None:
                break
            answers.append(item if type(item) is bytes else self.answer(item))
        return answers

    def _compiled(self, source: bytes) -> Any:
        """The function of a script, its first line taken off when that is for the server."""
        body = source
        if body.startswith(b"#!"):
            body = b"\n" + body.partition(b"\n")[2]
        chunk = b"return function(KEYS, ARGV) " + body + b"\nend"
        function = self._functions[source] = self.lua.execute(chunk)
        return function

    def _call(self, command: bytes, *arguments: Any) -> Any:
        values: Sequence[bytes] = arguments
        for value in arguments:
            if type(value) is not bytes:
                values = [each if type(each) is bytes else _as_argument(each) for each in arguments]
                break
        socket = self.socket
        quick = QUICK.get(command)
        if quick is not None and quick[1] <= len(values) <= quick[2]:
            try:
                result = quick[0](socket._db, values)
            except Slow:
                result = self._ask(command, list(values))
        else:
            result = self._ask(command, list(values))
        kind = type(result)
        if kind is bytes or kind is int:
            return result
        if result is None:
            return False
        if kind is list and all(map(_ARE_IN_LUA_TOO.__contains__, map(type, result))):
            return self.lua.table_from([False if item is None else item for item in result])
        return socket._convert_redis_result(self.lua, result)

    def _ask(self, command: bytes, values: list[bytes]) -> Any:
        found = self._signatures.get(command)
        if found is None:
            name = command.decode().lower()
            if name not in SUPPORTED_COMMANDS:
                raise SimpleError("ERR Unknown Redis command called from script")
            signature = SUPPORTED_COMMANDS[name]
            found = self._signatures[command] = (signature.func_name, signature)
        socket = self.socket
        return socket._run_command(getattr(socket, found[0]), found[1], values, True)


_scripts = functools.cache(_Scripts)


def _as_argument(value: Any) -> bytes:
    """What a script gives a command, as Redis takes it."""
    if type(value) is int and -LARGEST_WHOLE < value < LARGEST_WHOLE:
        return b"%d" % value
    argument: bytes = _convert_redis_arg(value)
    return argument


_PLAIN = frozenset((bytes, int, type(None)))


class _Missing:
    """A command's answer where its key does not exist."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


def _converted(
    signature: Signature, arguments: list[bytes], db: Database, version: Any, items: list[CommandItem]
) -> list[Any] | _Missing:
    """`Signature.apply`: arguments as the command takes them; its keys' items are added to `items`."""
    signature.check_arity(arguments, version)
    kinds, repeat = signature.fixed, signature.repeat
    fixed = len(kinds)
    values: list[Any] = list(arguments)
    keys: list[tuple[int, Any]] = []
    for index, argument in enumerate(arguments):
        kind: Any = kinds[index] if index < fixed else repeat[(index - fixed) % len(repeat)]
        if kind is bytes:
            continue
        if type(kind) is Key:
            if kind.missing_return is not Key.UNSPECIFIED and argument not in db:
                return _Missing(kind.missing_return)
            keys.append((index, kind.type_))
        else:
            values[index] = kind.decode(argument)
    for index, wanted in keys:
        key = arguments[index]
        item = db.get(key)
        default = None
        if wanted is not None:
            if item is not None:
                if type(item.value) is not wanted:
                    raise SimpleError(msgs.WRONGTYPE_MSG)
            elif wanted is not bytes and msgs.FLAG_DO_NOT_CREATE not in signature.flags:
                default = wanted()
        values[index] = command_item = CommandItem(key, db, item, default=default)
        items.append(command_item)
    return values


class _Socket(FakeSocket):
    """fakeredis's commands, called directly; blocking ones say so instead of waiting."""

    _server: _State

    def __init__(self, state: _State) -> None:
        super().__init__(state, 0, client_class=redis.Redis, client_info={"resp": 2})

    def execute(self, fields: list[bytes], now_s: float) -> Any:
        """Run one command: its answer, an error in place of it, or `_Blocked`."""
        _clock.at_s = now_s
        try:
            for database in self._server.dbs.values():
                database.time = now_s
            try:
                return self._quickly(fields)
            except Slow:
                return self._slowly(fields)
        finally:
            _clock.at_s = None

    def _slowly(self, fields: list[bytes]) -> Any:
        """Run a command as fakeredis does."""
        name, arguments = extract_command(fields)
        try:
            if name in {"blmove", "brpoplpush"}:
                return self._move(name, arguments)
            function, signature = self._name_to_func(name)
            signature.check_arity(arguments, self.version)
            result = self._run_command(function, signature, arguments, False)
        except SimpleError as error:
            result = error
        return result if isinstance(result, _Blocked) else self._decode_result(result)

    def _quickly(self, fields: list[bytes]) -> Any:
        """Run a command in its usual shape, past fakeredis's preparations.

        Raises:
            Slow: it has another; nothing was done.
        """
        name = fields[0]
        if name == b"EVALSHA":
            script = self._server.script_cache.get(fields[1])
            if script is None or not fields[2].isdigit() or int(fields[2]) > len(fields) - 3:
                raise Slow
            try:
                return self.eval(script, int(fields[2]), *fields[3:])
            except SimpleError as error:
                return self._decode_result(error)
        if name == b"XREAD":
            return self._read_stream(fields[1:])
        quick = QUICK.get(name)
        if quick is None or not quick[1] < len(fields) <= quick[2] + 1:
            raise Slow
        result = quick[0](self._db, fields[1:])
        return result if type(result) in _PLAIN else self._decode_result(result)

    def _read_stream(self, arguments: list[bytes]) -> Any:
        key, after, count, block_s = reading(arguments)
        found = read_after(self._db, key, after, count)
        if found is not None:
            return found
        if block_s is None:
            return []

        def retry() -> Any:
            return read_after(self._db, key, after, count)

        return _Blocked(block_s, retry, lambda: None)

    def _run_command(self, func: Any, sig: Signature, args: list[bytes], from_script: bool) -> Any:
        """What fakeredis does for a server like ours: no other protocol, no notifications, nobody watches."""
        items: list[CommandItem] = []
        try:
            if from_script and msgs.FLAG_NO_SCRIPT in sig.flags:
                raise SimpleError(msgs.COMMAND_IN_SCRIPT_MSG)
            converted = _converted(sig, args, self._db, self.version, items)
            if isinstance(converted, _Missing):
                result = converted.answer
            else:
                result = func(*converted)
                if type(result) not in _PLAIN and msgs.FLAG_SKIP_CONVERT_TO_RESP2 not in sig.flags:
                    result = convert_to_resp2(result)
        except SimpleError as error:
            result = error
        for item in items:
            if item._modified or item._expireat_modified:
                item.writeback(remove_empty_val=msgs.FLAG_LEAVE_EMPTY_VAL not in sig.flags)
        if self._subkey_events:
            self._subkey_events = []
        return result

    def _move(self, name: str, arguments: list[bytes]) -> Any:
        # fakeredis answers at once when the source does not exist, so these wait here.
        function, signature = self._name_to_func(name[1:])

        def move() -> Any:
            return self._decode_result(self._run_command(function, signature, arguments[:-1], False))

        signature.check_arity(arguments[:-1], self.version)
        moved = move()
        return moved if moved is not None else _Blocked(float(arguments[-1]), move, lambda: None)

    def _blocking(
        self, timeout: float | None, func: Callable[[bool], Any], shape: Callable[[Any], Any] | None = None
    ) -> Any:
        found = func(True)
        if found is not None:
            return found if shape is None else shape(found)

        def shaped(result: Any) -> Any:
            return self._decode_result(convert_to_resp2(result if shape is None else shape(result)))

        def retry() -> Any:
            found = func(False)
            return None if found is None else shaped(found)

        return _Blocked(timeout or 0.0, retry, lambda: shaped(None))

    def eval(self, script: bytes, numkeys: int, *keys_and_args: bytes) -> Any:
        scripts = _scripts()
        self._server.script_cache[scripts.digest(script)] = script
        if self._server.is_full and b"allow-oom" not in script.partition(b"\n")[0]:
            raise SimpleError(
                "OOM allow-oom flag is not set on the script, can not run it when used memory > 'maxmemory'"
            )
        scripts.socket = self
        self._script_resp = 2
        try:
            result = scripts.run(script, numkeys, keys_and_args)
        except LUA_MODULE.LuaError as error:
            raise SimpleError(f"ERR {error}") from None
        finally:
            self._script_resp = None
        try:
            return scripts.answer(result)
        except _Special:
            if type(result) is tuple:
                result = scripts.lua.table_from(result[1:])
            return self._decode_result(self._convert_lua_result(result, nested=False))


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    at_s: float
    data: bytes
    journal_length: int


class _History:
    """What the server held some seconds ago: checkpoints, and the commands since the oldest."""

    def __init__(self, history_s: float) -> None:
        self._history_s = history_s
        self._journal: list[tuple[float, list[bytes]]] = []
        self._checkpoints: list[_Checkpoint] = []

    def note(self, state: _State, fields: list[bytes], now_s: float) -> None:
        """A command that changed data was executed."""
        if self._history_s <= 0:
            return
        self._journal.append((now_s, fields))
        if not self._checkpoints:
            self._checkpoints.append(_Checkpoint(at_s=float("-inf"), data=pickle.dumps({}), journal_length=0))
            self._started_s = now_s
        last_s = max(self._checkpoints[-1].at_s, self._started_s)
        if now_s - last_s >= self._history_s / 2:
            self._checkpoints.append(
                _Checkpoint(at_s=now_s, data=_dump(state), journal_length=len(self._journal))
            )
            while len(self._checkpoints) > 1 and self._checkpoints[1].at_s <= now_s - self._history_s:
                del self._checkpoints[0]
                dropped = self._checkpoints[0].journal_length
                del self._journal[:dropped]
                self._checkpoints = [
                    _Checkpoint(at_s=c.at_s, data=c.data, journal_length=c.journal_length - dropped)
                    for c in self._checkpoints
                ]

    def restore(self, state: _State, socket: _Socket, until_s: float) -> None:
        """Make `state` what it was at `until_s`."""
        while len(self._checkpoints) > 1 and self._checkpoints[-1].at_s > until_s:
            self._checkpoints.pop()
        if not self._checkpoints:
            return
        if self._checkpoints[0].at_s > until_s:
            raise ValueError(
                f"lose_last_s: expected at most {self._history_s} s of history; give SimRedis more history_s"
            )
        checkpoint = self._checkpoints[-1]
        _load(state, checkpoint.data)
        kept = checkpoint.journal_length
        for at_s, fields in self._journal[kept:]:
            if at_s > until_s:
                break
            socket.execute(fields, at_s)
            kept += 1
        del self._journal[kept:]

    def forget(self) -> None:
        """The data are gone."""
        self._journal.clear()
        self._checkpoints.clear()


def _dump(state: _State) -> bytes:
    data = {
        number: {key: (item.value, item.expireat) for key, item in database._dict.items()}
        for number, database in state.dbs.items()
    }
    return pickle.dumps(data, protocol=pickle.HIGHEST_PROTOCOL)


def _load(state: _State, data: bytes) -> None:
    state.wipe()
    for number, items in pickle.loads(data).items():
        database = state.dbs[number]
        for key, (value, expireat) in items.items():
            item = Item(value)
            item.expireat = expireat
            database[key] = item


class _Wait:
    """A client that waits in the server for one of `keys` ([]: for any change)."""

    def __init__(self, fields: list[bytes], keys: list[bytes], blocked: _Blocked) -> None:
        self.fields = fields
        self.keys = keys
        self.blocked = blocked


class SimRedis:
    """A Redis server on the simulated network."""

    def __init__(self, network: Network, *, name: str = "redis", history_s: float = HISTORY_S) -> None:
        self.server = Server(name, network.loop, refused=ConnectionError, timed_out=TimeoutError)
        self.network = network
        self._state = _State()
        self._socket = _Socket(self._state)
        self._history = _History(history_s)
        self._waits: dict[asyncio.Future[Any], _Wait] = {}
        self._waits_by_key: dict[bytes, dict[asyncio.Future[Any], None]] = {}
        self._direct = _Client(self, None)

    def client(self, process: Process, *, timeout_s: float | None = REDIS_TIMEOUT_S, retries: int = 1) -> Any:
        """What `connect_redis` gives, for a simulated process."""
        return _Client(self, process, timeout_s=timeout_s, retries=retries)

    def call(self, *arguments: Any) -> Any:
        """Execute a command at once, past the network: for tests and invariants."""
        answer = self.execute(self._direct.encoded(arguments))
        if isinstance(answer, asyncio.Future):
            raise RuntimeError(f"{arguments[0]}: expected a command that does not block; use a client")
        return self._direct.parsed(arguments[0], answer, {})

    def value(self, key: str | bytes) -> Any:
        """What a key holds, in fakeredis's own form, None without it: for invariants, which read much."""
        database = self._state.dbs[0]
        database.time = self.network.loop.epoch_s()
        item = database.get(key if isinstance(key, bytes) else key.encode())
        return None if item is None else item.value

    # Faults

    def restart(self, *, keep_data: bool = True, lose_last_s: float = 0.0, down_s: float = 0.0) -> None:
        """Stop and start again: connections break, the script cache is empty.

        Args:
            keep_data: False for a server without persistence: everything is gone.
            lose_last_s: what an append-only file had not yet got on disk; at most `history_s`.
            down_s: how long it refuses connections.
        """
        self.server.down(down_s or None)
        state = self._state
        if not keep_data:
            state.wipe()
            self._history.forget()
        elif lose_last_s > 0:
            self._history.restore(state, self._socket, self.network.loop.epoch_s() - lose_last_s)
        state.touched.clear()
        state.script_cache.clear()  # only now: replaying the history needs the scripts
        if down_s <= 0:
            self.server.up()

    def freeze(self, seconds: float | None = None) -> None:
        """SIGSTOP the server; SIGCONT after `seconds`."""
        self.server.freeze(seconds)

    def thaw(self) -> None:
        """SIGCONT the server."""
        self.server.thaw()

    def down(self, seconds: float | None = None) -> None:
        """Refuse connections, data kept and script cache too; up again after `seconds`."""
        self.server.down(seconds)

    def up(self) -> None:
        """Accept connections again."""
        self.server.up()

    def fill(self, is_full: bool = True) -> None:
        """Be at maxmemory: scripts without `allow-oom` are refused."""
        self._state.is_full = is_full

    # Commands

    def execute(self, fields: list[bytes]) -> Any:
        """Execute one encoded command: its raw answer, an error raised, or a future while it blocks."""
        answer = self._execute(fields)
        if isinstance(answer, RedisError):
            raise answer
        return answer

    def execute_all(self, commands: list[list[bytes]]) -> list[Any]:
        """Execute a pipeline; errors stand in their places."""
        return [self._execute(fields) for fields in commands]

    def _execute(self, fields: list[bytes]) -> Any:
        answer = self._socket.execute(fields, self.network.loop.epoch_s())
        if isinstance(answer, _Blocked):
            return self._block(_Wait(fields, _keys_waited_for(fields), answer))
        self._changed(fields)
        return answer

    def _changed(self, fields: list[bytes]) -> None:
        touched = self._state.touched
        if not touched:
            return
        self._history.note(self._state, fields, self.network.loop.epoch_s())
        keys = list(touched)
        touched.clear()
        if self._waits:
            for key in keys:
                self._serve(key)

    def _block(self, wait: _Wait) -> asyncio.Future[Any]:
        loop = self.network.loop
        future = loop.create_future()
        self._waits[future] = wait
        for key in wait.keys:
            self._waits_by_key.setdefault(key, {})[future] = None
        future.add_done_callback(self._unblock, context=OUTSIDE)
        if wait.blocked.timeout_s > 0:
            loop.call_later(wait.blocked.timeout_s, self._give_up, future, context=OUTSIDE)
        return future

    def _unblock(self, future: asyncio.Future[Any]) -> None:
        wait = self._waits.pop(future, None)
        for key in wait.keys if wait else ():
            waiting = self._waits_by_key[key]
            waiting.pop(future, None)
            if not waiting:
                del self._waits_by_key[key]

    def _give_up(self, future: asyncio.Future[Any]) -> None:
        def empty() -> None:
            wait = self._waits.get(future)
            if wait is not None and not future.done():
                self._unblock(future)
                future.set_result(wait.blocked.empty())

        self.server.when_running(empty)

    def _serve(self, key: bytes) -> None:
        for future in list(self._waits_by_key.get(key, ())):
            wait = self._waits.get(future)
            if wait is None or future.done():
                continue
            now_s = self.network.loop.epoch_s()
            with _at(now_s):
                answer = wait.blocked.retry()
            if answer is None:
                continue
            self._unblock(future)
            if isinstance(answer, RedisError):
                future.set_exception(answer)
            else:
                future.set_result(answer)
            self._changed(wait.fields)


@functools.cache
def _encoder() -> Any:
    return _pattern()["connection_pool"].get_encoder()


def _keys_waited_for(fields: list[bytes]) -> list[bytes]:
    name = fields[0].upper()
    if name in {b"BLMOVE", b"BRPOPLPUSH"}:
        return fields[1:2]
    if name in {b"BLPOP", b"BRPOP", b"BZPOPMIN", b"BZPOPMAX"}:
        return fields[1:-1]
    if name in {b"XREAD", b"XREADGROUP"}:
        at = next(i for i, field in enumerate(fields) if field.upper() == b"STREAMS") + 1
        return fields[at : at + (len(fields) - at) // 2]
    raise NotImplementedError(f"{name.decode()}: the simulated Redis does not know which keys it waits for")


class _Label:
    """What a command is called in the trace."""

    __slots__ = ("_arguments",)

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self._arguments = arguments

    def __str__(self) -> str:
        arguments = self._arguments
        about = arguments[3:4] if arguments[0] in {"EVAL", "EVALSHA"} else arguments[1:2]
        return " ".join(str(part)[:60] for part in (arguments[0], *about))


@functools.cache
def _pattern() -> dict[str, Any]:
    """The attributes of redis-py's client, which all of ours share: long in the making, and only read."""
    return vars(redis.asyncio.Redis(protocol=2))


@functools.cache
def _parsers() -> dict[str, Any]:
    """redis-py's own of answers, by the names of commands as it sends them."""
    return dict(_pattern()["response_callbacks"])


class _Client(redis.asyncio.Redis):
    """redis-py's client over the simulated network."""

    def __init__(
        self,
        server: SimRedis,
        process: Process | None,
        *,
        timeout_s: float | None = None,
        retries: int = 0,
    ) -> None:
        vars(self).update(_pattern())
        self._sim = server
        self._process = process
        self._timeout_s = timeout_s
        self._retries = retries
        self._encode = _encoder().encode
        self._parse = _parsers()

    def encoded(self, arguments: tuple[Any, ...]) -> list[bytes]:
        """A command as it goes over the wire."""
        name = arguments[0]
        if " " in name:
            arguments = (*name.split(), *arguments[1:])
        fields = []
        for value in arguments:
            kind = type(value)
            if kind is bytes:
                fields.append(value)
            elif kind is str:
                fields.append(value.encode())
            elif kind is int:
                fields.append(b"%d" % value)
            else:
                fields.append(bytes(self._encode(value)))
        return fields

    def parsed(self, name: str | bytes, answer: Any, options: dict[str, Any]) -> Any:
        """An answer as redis-py's methods give it."""
        options.pop("keys", None)
        callback = self.response_callbacks.get(name)
        return answer if callback is None else callback(answer, **options)

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Send one command."""
        sim = self._sim
        effect = functools.partial(sim.execute, self.encoded(arguments))
        answer = await self.send(effect, _Label(arguments))
        callback = self._parse.get(arguments[0])
        if callback is None:
            return answer
        options.pop("keys", None)
        return callback(answer, **options)

    async def send(self, effect: Callable[[], Any], label: object) -> Any:
        """Have `effect` at the server, repeated after a broken connection as redis-py does."""
        process, server = self._process, self._sim.server
        assert process is not None
        retries = self._retries
        while True:
            try:
                return await self._sim.network.call(
                    process, server, effect, label=label, timeout_s=self._timeout_s
                )
            except (ConnectionError, TimeoutError):
                if retries <= 0:
                    raise
                retries -= 1

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        """Commands that travel together."""
        return _Pipeline(self, transaction)


class _Pipeline(Pipeline):
    def __init__(self, client: _Client, transaction: bool) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, None)
        self._client = client

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send everything in one message."""
        stack, self.command_stack = self.command_stack, []
        if not stack:
            return []
        client = self._client
        commands = [client.encoded(arguments) for arguments, _ in stack]
        answers = await client.send(lambda: client._sim.execute_all(commands), f"pipeline of {len(stack)}")
        results = []
        for (arguments, options), answer in zip(stack, answers, strict=True):
            if isinstance(answer, RedisError):
                if raise_on_error:
                    raise answer
                results.append(answer)
            else:
                results.append(client.parsed(arguments[0], answer, dict(options)))
        return results
