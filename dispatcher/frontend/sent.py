"""What a stream has sent already, and what of an answer that starts over may follow it. Pure.

HTTP can't take text back. When the text shown becomes void, the new answer is compared with what was
sent: what equals it is passed over, what lies beyond it is sent. An answer that says something else
can't follow, and the stream has to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import Raw

from dispatcher.protocol.chunk import ChoiceDelta


@dataclass(slots=True)
class _Choice:
    """`void` and `void_deltas` were sent and are void until said again; `seen` is how far they were."""

    pieces: list[str] = field(default_factory=list)
    deltas: list[bytes] = field(default_factory=list)
    void: str = ""
    void_deltas: list[bytes] = field(default_factory=list)
    seen: int = 0
    seen_deltas: int = 0

    def restart(self) -> None:
        self.void, self.void_deltas = "".join(self.pieces), list(self.deltas)
        self.seen = self.seen_deltas = 0

    @property
    def is_whole(self) -> bool:
        return self.seen >= len(self.void) and self.seen_deltas >= len(self.void_deltas)

    def take(self, delta: ChoiceDelta) -> ChoiceDelta | None:
        """What of `delta` was not sent yet; None when it contradicts what was."""
        if not self.void and not self.void_deltas:
            self.pieces.append(delta.text)
            self.deltas += [bytes(raw) for raw in delta.deltas]
            return delta
        again = self.void[self.seen : self.seen + len(delta.text)]
        raws = [bytes(raw) for raw in delta.deltas]
        raws_again = self.void_deltas[self.seen_deltas : self.seen_deltas + len(raws)]
        if not delta.text.startswith(again) or raws[: len(raws_again)] != raws_again:
            return None
        self.seen += len(delta.text)
        self.seen_deltas += len(raws)
        text, raws = delta.text[len(again) :], raws[len(raws_again) :]
        self.pieces.append(text)
        self.deltas += raws
        return ChoiceDelta(index=delta.index, text=text, deltas=tuple(Raw(raw) for raw in raws))


class Sent:
    """What one stream has sent."""

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}

    @property
    def is_whole(self) -> bool:
        """Whether everything that was sent is part of the answer as it stands."""
        return all(choice.is_whole for choice in self._choices.values())

    def restart(self) -> None:
        """Note that everything shown so far is void."""
        for choice in self._choices.values():
            choice.restart()

    def take(self, choices: Sequence[ChoiceDelta]) -> tuple[ChoiceDelta, ...] | None:
        """What is to be sent of what choices gained; None when it can't follow what was sent."""
        fresh = []
        for delta in choices:
            gained = self._choices.setdefault(delta.index, _Choice()).take(delta)
            if gained is None:
                return None
            if gained.text or gained.deltas:
                fresh.append(gained)
        return tuple(fresh)
