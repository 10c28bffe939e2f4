"""The prompts that a node has yet to compute: predicted seconds, counted down by its reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_SLACK_S = 1.0
"""How late a report is taken to be at most: the way back also holds a wait for a slot."""
OVERDUE = 1.5
"""A prompt is overdue once it took so many times its prediction."""
BURST_S = 20.0
"""How long prompts bound to a node are remembered for what its next ones will be like."""


@dataclass(slots=True)
class _Prompt:
    """What it has to compute, its assignment number (0 while it has none), and its predicted time."""

    tokens: int
    number: int
    seconds: float


class PromptQueue:
    """One node's prompts, in the order in which they were bound. `tokens` is what all have to compute."""

    def __init__(self) -> None:
        self.tokens = 0
        self._prompts: dict[str, _Prompt] = {}
        self._seconds = 0.0
        self._head_since_s = 0.0

    def __len__(self) -> int:
        return len(self._prompts)

    def push(self, ref: str, tokens: int, number: int, seconds: float, now_s: float) -> None:
        """Enter a prompt."""
        if not self._prompts:
            self._head_since_s = now_s
        self._prompts[ref] = _Prompt(tokens, number, seconds)
        self._seconds += seconds
        self.tokens += tokens

    def note_number(self, ref: str, number: int) -> None:
        """Note a prompt's assignment number. Without one no report will be known to cover it: it leaves."""
        prompt = self._prompts.get(ref)
        if prompt is not None:
            prompt.number = number
            if not number:
                self.drop(ref, self._head_since_s)

    def begin(self, ref: str, now_s: float) -> None:
        """Note that a prompt goes to the node now: if it is the first, it has computed nothing yet."""
        if ref == next(iter(self._prompts), None):
            self._head_since_s = now_s

    def drop(self, ref: str, now_s: float) -> None:
        """Take a prompt out, if it is there: it is computed, or was taken away."""
        prompt = self._prompts.get(ref)
        if prompt is None:
            return
        if ref == next(iter(self._prompts)):
            self._head_since_s = now_s
        del self._prompts[ref]
        self._seconds = self._seconds - prompt.seconds if self._prompts else 0.0
        self.tokens -= prompt.tokens

    def hear(self, seen: int, queued_tokens: int, now_s: float) -> None:
        """Take a report: of the assignments up to `seen`, `queued_tokens` are still to be computed.

        Prompts are computed in the order they came: what is not queued any more is the head.
        """
        covered = sum(one.tokens for one in self._prompts.values() if 0 < one.number <= seen)
        for ref, one in list(self._prompts.items()):
            if covered <= queued_tokens or not 0 < one.number <= seen:
                break
            covered -= one.tokens
            self.drop(ref, now_s)

    def course(self, feedback_s: float) -> tuple[float, float, float, float]:
        """How the predicted seconds until all are computed go on, until something changes (`left_s`).

        Returns:
            The seconds at `since_s`, that moment, how many of them the time since then takes away at most,
            and the time since then after which they grow again.
        """
        if not self._prompts:
            return self._seconds, self._head_since_s, 0.0, math.inf
        head = next(iter(self._prompts.values()))
        # A report may be as late as the feedback's way: the first may be done, and the next begun.
        slack_s = min(feedback_s, MOST_SLACK_S)
        # What takes far longer than predicted takes as long again, for all that is known.
        return (
            self._seconds,
            self._head_since_s,
            head.seconds + slack_s,
            OVERDUE * head.seconds + slack_s,
        )

    def seconds(self, now_s: float, feedback_s: float) -> float:
        """Predicted seconds until all are computed, less what the first had already."""
        seconds, since_s, most_s, overdue_s = self.course(feedback_s)
        elapsed_s = max(0.0, now_s - since_s)
        return max(0.0, seconds - min(elapsed_s, most_s)) + max(0.0, elapsed_s - overdue_s)


class Burst:
    """How much prefill at once a node's prompts bring, by the last ones bound there.

    `squares` is the sum of their squared seconds at `at_s`, which fades.
    """

    def __init__(self) -> None:
        self.squares = 0.0
        self.at_s = 0.0

    def add(self, seconds: float, now_s: float) -> None:
        """Count a prompt of so many predicted seconds."""
        self.squares = self._squares_at(now_s) + seconds**2
        self.at_s = now_s

    def seconds(self, now_s: float) -> float:
        """Seconds of prefill that one who comes at any moment is to find before it.

        The rate of prompts times the mean square of their prefills: twice the mean wait of M/G/1
        (Pollaczek-Khinchine), so that one long prompt counts for more than many short ones of the same work.
        """
        return self._squares_at(now_s) / BURST_S

    def _squares_at(self, now_s: float) -> float:
        return self.squares * math.exp((self.at_s - now_s) / BURST_S)
