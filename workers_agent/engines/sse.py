"""Server-Sent Events: bytes in, the data of whole events out.

Pure and incremental: however the stream is cut, also inside a character or between CR and LF, the
same events come out. Event names, ids, retry times and comments are dropped; what the stream leaves
unfinished at its end is no event. Memory is bounded by `MAX_EVENT_BYTES`.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 8 << 20
_BOM = b"\xef\xbb\xbf"


class EventParser:
    """Parses one stream."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._line: list[bytes] = []
        self._line_bytes = 0
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, data: bytes) -> list[bytes]:
        """Take the stream's next bytes; return the data of the events that they complete.

        Raises:
            ValueError: a line, or an event's data, is above the bound; the stream can't be read on.
        """
        if self._after_cr and data:
            self._after_cr = False
            if data.startswith(b"\n"):
                data = data[1:]
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        head, *lines = data.split(b"\n")
        self._hold(head)
        events: list[bytes] = []
        for line in lines:
            self._end_line(events)
            self._hold(line)
        return events

    def _hold(self, part: bytes) -> None:
        self._line_bytes += len(part)
        self._bound(self._line_bytes, "a line")
        if part:
            self._line.append(part)

    def _end_line(self, events: list[bytes]) -> None:
        line = self._line[0] if len(self._line) == 1 else b"".join(self._line)
        self._line.clear()
        self._line_bytes = 0
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
                self._data_bytes = 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._data_bytes += len(value) + 1
            self._bound(self._data_bytes, "an event's data")

    def _bound(self, size: int, what: str) -> None:
        if size > self._max_event_bytes:
            raise ValueError(
                f"event stream: expected at most {self._max_event_bytes} bytes in {what}, seen {size} or more"
            )
