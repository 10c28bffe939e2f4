"""Where the published part of a running answer begins, kept in the job's hash for the next attempt.

The tokens themselves lie in the reply log: an attempt that goes on reads them there, up to its own
first chunk.
"""

from __future__ import annotations

from msgspec import Struct

from dispatcher.protocol.request import FIRST_VERSION


class Checkpoint(Struct, frozen=True, kw_only=True):
    """The `begin` chunk of the attempt that generated the answer's first token, in its reply topic."""

    partition: int
    offset: int
    v: int = FIRST_VERSION
