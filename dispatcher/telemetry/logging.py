"""Structured logs: one JSON object a line on stderr, or short text on a terminal.

`event` names what happened, in words that do not change; everything else is a field. Prompts,
completions and secrets are never fields. Lines of libraries are rationed: a Kafka client whose broker is away
would write a hundred a second.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

RATION_S = 10.0
"""The same line of a library (its logger, level and text without arguments) is written once in so long."""
MOST_RATIONED = 1000
SENDERS_FAULTS = {"HttpProcessingError", "RequestPayloadError", "ClientConnectionResetError"}
"""aiohttp's errors about what it was sent and who has left, by name: whoever logs need not have it loaded."""


class NoFault(logging.Filter):
    """Leaves out what a sender of bytes that are no HTTP has done to itself: it was told so, or has left."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a line of an HTTP server's."""
        kind = record.exc_info[0] if record.exc_info else None
        names = {base.__name__ for base in kind.__mro__} if kind is not None else set()
        return record.name != "aiohttp.server" or not names & SENDERS_FAULTS


class Ration(logging.Filter):
    """Lets a library's line pass once in `period_s`, with the number of its like held back since."""

    def __init__(
        self, period_s: float = RATION_S, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._period_s = period_s
        self._monotonic = monotonic
        self._passed_s: dict[tuple[str, int, str], float] = {}
        self._held: dict[tuple[str, int, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a line; ours always are."""
        if record.name == "flexlb":
            return True
        kind, now_s = (record.name, record.levelno, str(record.msg)), self._monotonic()
        if now_s - self._passed_s.get(kind, -self._period_s) < self._period_s:
            self._held[kind] = self._held.get(kind, 0) + 1
            return False
        if len(self._passed_s) >= MOST_RATIONED:
            self._passed_s.clear()
            self._held.clear()
        self._passed_s[kind] = now_s
        if held := self._held.pop(kind, 0):
            record.fields = {"held_back": held, "in_s": self._period_s}
        return True


def _shown(record: logging.LogRecord, formatter: logging.Formatter) -> str:
    """An exception of a log line. A library's is shown without its text, which may be input."""
    assert record.exc_info
    kind, _, trace = record.exc_info
    if record.name == "flexlb" or kind is None:
        return formatter.formatException(record.exc_info)
    return "".join(traceback.format_tb(trace)) + kind.__name__


class _JSONLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.name != "flexlb":
            line["logger"] = record.name
        if record.exc_info:
            line["exception"] = _shown(record, self)
        return json.dumps(line, default=str, ensure_ascii=False)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())
        text = f"{time.strftime('%H:%M:%S')} {record.levelname.lower():7} {record.getMessage()} {fields}"
        return text + ("\n" + _shown(record, self) if record.exc_info else "")


def configure_logging(level: str = "INFO") -> None:
    """Send all logs to stderr in our form."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(_Text() if sys.stderr.isatty() else _JSONLines())
    stream.addFilter(NoFault())
    stream.addFilter(Ration())
    root = logging.getLogger()
    root.handlers[:] = [stream]
    root.setLevel(logging.WARNING)
    logging.getLogger("flexlb").setLevel(level)
    logging.getLogger("aiokafka").setLevel(logging.ERROR)


def where_broke(error: BaseException) -> str:
    """What kind of error it is, and where it was raised: its text may hold what it was given."""
    at, place = error.__traceback__, ""
    while at is not None:
        place = f" at {Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
        at = at.tb_next
    return type(error).__name__ + place


class Log:
    """A logger that takes fields. `who` is put on each line."""

    def __init__(self, **who: object) -> None:
        self._logger = logging.getLogger("flexlb")
        self._who = who

    def debug(self, event: str, **fields: object) -> None:
        """Why something was decided, for whoever asks."""
        if self._logger.isEnabledFor(logging.DEBUG):
            self._logger.debug(event, extra={"fields": {**self._who, **fields}})

    def info(self, event: str, **fields: object) -> None:
        """Something normal worth a line."""
        self._logger.info(event, extra={"fields": {**self._who, **fields}})

    def warning(self, event: str, **fields: object) -> None:
        """Something an operator may want to look at."""
        self._logger.warning(event, extra={"fields": {**self._who, **fields}})

    def error(self, event: str, **fields: object) -> None:
        """Something an operator must look at."""
        self._logger.error(event, extra={"fields": {**self._who, **fields}})
