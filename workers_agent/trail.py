"""What earlier attempts have published of one answer, by the rules of the clients' reader. Pure.

The attempt that goes on has written its own `begin` first. Readers show what lies before it in the log and
drop what earlier attempts write after it, so what is read up to there is exactly what clients show.
"""

from __future__ import annotations

from dispatcher.protocol.chunk import Chunk, ChunkKind
from dispatcher.protocol.names import Attempt


class Trail:
    """The answer so far, as text and token ids.

    Attributes:
        is_sound: the ids are those of the whole text; only then may another run go on from them.
        is_closed: the own `begin` was seen (or that of a later attempt): nothing after it counts.
        finish_reason: of an attempt that came to its end and was lost before its outcome was known.
        first_token_ms: when the first tokens were written.
    """

    def __init__(self, own: Attempt) -> None:
        self.ids: list[int] = []
        self.is_sound = True
        self.is_closed = False
        self.finish_reason = ""
        self.first_token_ms = 0
        self._own = own
        self._texts: list[str] = []
        self._attempt = Attempt(-1, 0)
        self._has_begun = False
        self._has_tokens = False

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    def read(self, chunk: Chunk, at_ms: int) -> None:
        """Take the next chunk in the order of the log."""
        try:
            attempt = Attempt.parse(chunk.attempt)
        except ValueError:
            return
        if self.is_closed or attempt >= self._own:
            self.is_closed = True
            return
        if attempt < self._attempt:
            return
        if attempt > self._attempt:
            self._attempt = attempt
            self._has_begun = self._has_tokens = False
        match chunk.kind:
            case ChunkKind.BEGIN:
                self._begin(chunk)
            case ChunkKind.TOKENS:
                self._add(chunk, at_ms)
            case ChunkKind.END:
                if self._has_begun and chunk.first_token == len(self.ids):
                    self.finish_reason = chunk.finish_reason

    def _begin(self, chunk: Chunk) -> None:
        if chunk.restarted and not (self._has_begun and self._has_tokens):
            self.ids.clear()
            self._texts.clear()
            self.is_sound = True
            self.finish_reason = ""
            self.first_token_ms = 0
        self._has_begun = True

    def _add(self, chunk: Chunk, at_ms: int) -> None:
        if not self._has_begun or chunk.first_token > len(self.ids):
            return
        if chunk.first_token < len(self.ids):
            # A repetition of this attempt's, or one that joins what is shown at an earlier place.
            self.is_sound = self.is_sound and self._has_tokens
            return
        self._has_tokens = True
        self.finish_reason = ""
        self.first_token_ms = self.first_token_ms or at_ms
        ids = [token for choice in chunk.choices for token in choice.token_ids or ()]
        if len(ids) != chunk.tokens or not ids or any(c.index or c.deltas for c in chunk.choices):
            self.is_sound = False
        self.ids += ids
        self._texts += [choice.text for choice in chunk.choices]
