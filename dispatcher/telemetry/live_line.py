"""A line on a terminal that is written over again and again; nothing anywhere else."""

from __future__ import annotations

import sys
from typing import TextIO

ANEW = "\r\x1b[K"
"""Back to the beginning of the line, which is cleared."""


class LiveLine:
    """Shows how far something is.

    Args:
        stream: a terminal or not; stderr, as it is then, when absent.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    @property
    def stream(self) -> TextIO:
        """What is written to."""
        return self._stream if self._stream is not None else sys.stderr

    @property
    def is_live(self) -> bool:
        """Whether anybody sees the line."""
        return self.stream.isatty()

    def show(self, text: str) -> None:
        """Write a line over the last one."""
        if self.is_live:
            self.stream.write(f"{ANEW}{text}")
            self.stream.flush()

    def clear(self) -> None:
        """Leave no trace."""
        self.show("")

    def end(self) -> None:
        """Leave the last line where it is."""
        if self.is_live:
            self.stream.write("\n")
            self.stream.flush()


def say(text: str) -> None:
    """Tell something on stderr, in the place of a live line if there is one."""
    start = ANEW if sys.stderr.isatty() else ""
    print(f"{start}flexlb: {text}", file=sys.stderr, flush=True)
