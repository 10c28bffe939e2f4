"""Reply chunks: what an attempt streams to its client while it runs.

An attempt publishes `begin` first, then `tokens`, then `end`. Chunks carry the attempt and the
index of their first token, so that the pure reader can drop what a superseded attempt still says.
The outcome on the `outcomes` topic is what counts; `end` only announces it.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import Struct

from dispatcher.protocol.request import FIRST_VERSION


class ChunkKind(StrEnum):
    """Where in its attempt a chunk stands."""

    BEGIN = "begin"
    TOKENS = "tokens"
    END = "end"


class ChoiceDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one choice gained: text, its token ids when the engine gives them, raw non-text deltas."""

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] | None = None
    deltas: tuple[msgspec.Raw, ...] = ()


class Chunk(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One record on `replies`.

    `first_token` counts tokens of the whole answer over all choices before this chunk, `tokens`
    those in it. `restarted` on a `begin` says that earlier text is void: the answer starts over.
    """

    id: str
    ref: str
    attempt: str
    kind: ChunkKind
    tenant: str = ""
    node: str = ""
    first_token: int = 0
    tokens: int = 0
    choices: tuple[ChoiceDelta, ...] = ()
    restarted: bool = False
    finish_reason: str = ""
    v: int = FIRST_VERSION
