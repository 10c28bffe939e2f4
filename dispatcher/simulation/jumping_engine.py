"""The engine model in jumps: the schedule of `EngineModel`, without a call for each step.

Between two events (an arrival, the end of a prompt's chunk, an answer's end, a block that becomes full) all
steps decode the same sequences, and their time is a sum in closed form. Prompts are block hashes, not tokens;
blocks of answers are shared with nobody, not even with the next turn that repeats the answer. Who calls it
owns the time. `tests/unit/test_fleet_engine.py` holds it to `EngineModel`, preemptions and prompts handed
over included.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from dispatcher.simulation.engine import Pull
from dispatcher.simulation.kv_cache import BlocksRemoved, KVCache
from dispatcher.simulation.profile import Profile

OWN_BLOCKS = 1 << 20
"""More blocks than any sequence has: ids of blocks that nobody shares are made of it and the key."""


class Progress(NamedTuple):
    """A sequence got its first or last token, or both; `cached_tokens` of its prompt were not computed."""

    key: int
    is_first: bool
    is_last: bool
    cached_tokens: int


class _Sequence:
    """One request. While it decodes, `generated` is counted from the engine's steps: `base + steps`."""

    __slots__ = (
        "base",
        "blocks",
        "cached_tokens",
        "computed",
        "generated",
        "held",
        "is_handed",
        "is_remote",
        "keeps",
        "key",
        "order",
        "output_tokens",
        "owed",
        "private",
        "prompt_tokens",
    )

    def __init__(self, key: int, prompt_tokens: int, output_tokens: int, blocks: Sequence[int]) -> None:
        self.key = key
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.blocks = blocks
        self.generated = 0
        self.computed = 0
        self.base = 0
        self.order = -1
        self.cached_tokens = -1
        self.owed = 0
        self.held: list[int] = []
        self.private = 0
        self.is_remote = False
        self.is_handed = False
        self.keeps = False

    def block(self, place: int) -> int:
        """The hash of a full block: one of the prompt's, or one of its own (negative)."""
        if place < len(self.blocks):
            return self.blocks[place]
        return -(self.key * OWN_BLOCKS + place) - 1

    def first_blocks(self, count: int) -> list[int]:
        """The hashes of the first `count` blocks."""
        known = list(self.blocks[:count])
        return known + [self.block(place) for place in range(len(known), count)]


class JumpingEngine:
    """One engine. `due` is when `advance` is to be called next, None while it is idle.

    Raises:
        ValueError: more sequences may run than a step has tokens; steps of a jump would not be equal.
    """

    def __init__(self, profile: Profile) -> None:
        if profile.max_running > profile.max_batched_tokens:
            raise ValueError(
                f"max_running: expected at most max_batched_tokens ({profile.max_batched_tokens}), "
                f"seen {profile.max_running}"
            )
        self.profile = profile
        self.cache = KVCache(profile.kv_blocks)
        self.due: float | None = None
        self.preemptions = 0
        self.busy_s = 0.0
        self.waiting_tokens = 0
        self.stored: list[int] = []
        self._waiting: deque[_Sequence] = deque()
        self._pulling: dict[int, _Sequence] = {}
        self._pulled: deque[_Sequence] = deque()
        self._kept: dict[int, _Sequence] = {}
        self.pulls: list[Pull] = []
        self._running: dict[_Sequence, None] = {}
        self._partial: _Sequence | None = None
        self._scheduled: list[tuple[_Sequence, int]] = []
        self._needy: list[_Sequence] = []
        self._marks: list[tuple[int, int, _Sequence]] = []
        self._steps = 0
        self._admissions = 0
        self._decoding = 0
        self._context = 0
        self._began_s = 0.0
        self._first_step_s = 0.0
        self._growth_s = 0.0
        self._jump = 0

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot, or for their prompt from another engine."""
        return len(self._waiting) + len(self._pulling) + len(self._pulled)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    def submit(
        self,
        key: int,
        prompt_tokens: int,
        output_tokens: int,
        blocks: Sequence[int],
        now_s: float,
        *,
        keeps: bool = False,
        is_remote: bool = False,
        is_followed: bool = False,
    ) -> None:
        """Queue a sequence at `now_s`; a jump under way ends with the step that is running then.

        Args:
            blocks: hashes of the prompt's full blocks, from 0 up; full blocks beyond are shared with nobody.
            keeps: its blocks stay held after its end, until `release`.
            is_remote: another engine has computed its prompt, and gives it.
            is_followed: another is submitted at the same time, with which it is seen at once.
        Raises:
            ValueError: prompt or answer are empty, or it can never fit the KV cache.
        """
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(f"expected 1 or more tokens, seen {prompt_tokens} in and {output_tokens} out")
        if prompt_tokens + output_tokens > self.profile.kv_tokens:
            raise ValueError(
                f"prompt and answer: expected at most {self.profile.kv_tokens} tokens (the KV cache), "
                f"seen {prompt_tokens} and {output_tokens}"
            )
        sequence = _Sequence(key, prompt_tokens, output_tokens, blocks)
        sequence.keeps, sequence.is_remote = keeps, is_remote
        if is_remote:
            self._owe(sequence, 1)
        else:
            self._owe(sequence, prompt_tokens - self.cache.hit(blocks) * self.profile.block_tokens)
        was_blocked = bool(self._waiting) or len(self._running) >= self.profile.max_running
        self._waiting.append(sequence)
        if self.due is None:
            if not is_followed:
                self._begin(now_s)
        elif not was_blocked:
            self._cut(now_s)

    def pulled(self, key: int, now_s: float) -> None:
        """A sequence's prompt is here, at `now_s`."""
        self._pulled.append(self._pulling.pop(key))
        if self.due is None:
            self._begin(now_s)
        elif len(self._running) < self.profile.max_running:
            self._cut(now_s)

    def release(self, key: int, now_s: float) -> None:
        """Free the blocks that a sequence kept, at `now_s`."""
        self._free(self._kept.pop(key))
        if self._waiting:
            if self.due is None:
                self._begin(now_s)
            else:
                self._cut(now_s)

    def _cut(self, now_s: float) -> None:
        """End the jump under way with the step that is running at `now_s`."""
        if self._jump > 1:
            self._jump = self._steps_until(now_s - self._began_s)
            self.due = self._began_s + self._span_s(self._jump)

    def advance(self) -> list[Progress]:
        """End the jump under way, at `due`, and begin the next; what came of it, in order."""
        ended_s = self.due
        if ended_s is None:
            return []
        self.busy_s += ended_s - self._began_s
        made = self._end()
        self._begin(ended_s)
        return made

    def take_removed(self) -> list[int]:
        """Shared blocks evicted since the last call."""
        events, self.cache.events = self.cache.events, []
        return [
            block
            for event in events
            if isinstance(event, BlocksRemoved)
            for block in event.hashes
            if block >= 0
        ]

    def take_pulls(self) -> list[Pull]:
        """What sequences asked of other engines since the last call."""
        pulls, self.pulls = self.pulls, []
        return pulls

    def take_stored(self) -> list[int]:
        """Shared blocks newly held since the last call."""
        stored, self.stored = self.stored, []
        return stored

    # The time of equal steps: step i of a jump takes first + i * growth

    def _span_s(self, steps: int) -> float:
        return steps * self._first_step_s + self._growth_s * (steps * (steps - 1) / 2)

    def _steps_until(self, elapsed_s: float) -> int:
        """The fewest steps of this jump, at least one, that last `elapsed_s`."""
        growth, first = self._growth_s, self._first_step_s
        if growth > 0:
            linear = first - growth / 2
            steps = (math.sqrt(linear * linear + 2 * growth * max(0.0, elapsed_s)) - linear) / growth
        else:
            steps = elapsed_s / first if first else 1.0
        count = min(self._jump, max(1, math.ceil(steps)))
        while count > 1 and self._span_s(count - 1) >= elapsed_s:
            count -= 1
        while count < self._jump and self._span_s(count) < elapsed_s:
            count += 1
        return count

    # Begin

    def _begin(self, at_s: float) -> None:
        self._scheduled = []
        profile = self.profile
        before = self.preemptions
        self._give_blocks()
        budget = profile.max_batched_tokens - self._decoding
        sequence = self._partial
        if sequence is not None:
            count = min(sequence.prompt_tokens + sequence.generated - sequence.computed, budget)
            if self._reserve_or_preempt(sequence, sequence.computed, count):
                self._scheduled.append((sequence, count))
                budget -= count
        preempted = self.preemptions > before
        while budget and not preempted and len(self._running) < profile.max_running:
            if self._pulled:
                sequence = self._pulled.popleft()
                self._hand(sequence)
                self._scheduled.append((sequence, 1))
                budget -= 1
                continue
            if not self._waiting:
                break
            sequence = self._waiting[0]
            if sequence.is_remote:
                if not self._claim(sequence):
                    break
                self._waiting.popleft()
                continue
            count = self._admit(sequence, budget)
            if not count:
                break
            self._waiting.popleft()
            self._scheduled.append((sequence, count))
            budget -= count
        if not self._scheduled and not self._decoding:
            self.due = None
            if preempted:
                # The last one gave its blocks back: who waits may have room now.
                self._begin(at_s)
            return
        prefilled = pairs = read_back = 0
        decoding, context = self._decoding, self._context
        for sequence, count in self._scheduled:
            if count == 1 and (sequence.computed >= sequence.prompt_tokens or sequence.is_handed):
                decoding += 1
                context += sequence.computed
            else:
                prefilled += count
                pairs += count * (count + 2 * sequence.computed)
                read_back += sequence.computed
        self._began_s = at_s
        self._first_step_s = profile.step_s(prefilled, pairs, read_back, decoding, context)
        if self._scheduled or (preempted and self._waiting):
            self._jump = 1
        else:
            self._jump = self._next_mark() - self._steps
            self._growth_s = profile.decode_context_s * decoding
        self.due = at_s + (self._first_step_s if self._jump == 1 else self._span_s(self._jump))

    def _next_mark(self) -> int:
        marks = self._marks
        while marks[0][1] != marks[0][2].order:
            heapq.heappop(marks)
        return marks[0][0]

    def _give_blocks(self) -> None:
        """Give decoding sequences at the end of their last block another, in the order of admission."""
        needy, self._needy = self._needy, []
        needy.sort(key=lambda sequence: sequence.order)
        for sequence in needy:
            if sequence.order >= 0:
                self._reserve_or_preempt(sequence, self._computed(sequence), 1)

    def _reserve_or_preempt(self, sequence: _Sequence, computed: int, count: int) -> bool:
        """Take the blocks of the next `count` tokens, preempting who came last; False when it is itself."""
        needed = -(-(computed + count) // self.profile.block_tokens) - len(sequence.held) - sequence.private
        if needed <= 0:
            return True
        while not self.cache.take(needed):
            last, _ = self._running.popitem()
            self._preempt(last)
            if last is sequence:
                return False
        sequence.private += needed
        return True

    def _computed(self, sequence: _Sequence) -> int:
        return sequence.prompt_tokens + sequence.base + self._steps - 1

    def _preempt(self, sequence: _Sequence) -> None:
        self.preemptions += 1
        if sequence is self._partial:
            self._partial = None
        else:
            self._decoding -= 1
            self._context -= self._computed(sequence)
            sequence.generated = sequence.base + self._steps
        self._free(sequence)
        self._owe(sequence, sequence.prompt_tokens + sequence.generated)
        self._waiting.appendleft(sequence)

    def _free(self, sequence: _Sequence) -> None:
        self.cache.free(sequence.held, sequence.private)
        sequence.held, sequence.private, sequence.computed, sequence.order = [], 0, 0, -1
        sequence.is_handed = False

    def _owe(self, sequence: _Sequence, tokens: int) -> None:
        self.waiting_tokens += tokens - sequence.owed
        sequence.owed = tokens

    def _admit(self, sequence: _Sequence, budget: int) -> int:
        """Give a sequence what the cache holds of it and its first blocks; the tokens it computes now."""
        size = self.profile.block_tokens
        tokens = sequence.prompt_tokens + sequence.generated
        usable = sequence.first_blocks((tokens - 1) // size)
        hits = self.cache.hit(usable)
        found = usable[:hits]
        if not self.cache.fits(found, -(-tokens // size) - hits):
            return 0
        self.cache.hold(found)
        sequence.held = found
        sequence.computed = hits * size
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
        left = tokens - sequence.computed
        count = min(left, budget)
        needed = -(-(sequence.computed + count) // size) - hits
        if needed > 0 and self.cache.take(needed):
            sequence.private = needed
        self._owe(sequence, left)
        self._admissions += 1
        sequence.order = self._admissions
        self._running[sequence] = None
        if count < left:
            self._partial = sequence
        return count

    def _claim(self, sequence: _Sequence) -> bool:
        """Take all blocks of a prompt that another engine has computed, and ask for what isn't cached."""
        size = self.profile.block_tokens
        tokens = sequence.prompt_tokens
        usable = sequence.first_blocks((tokens - 1) // size)
        hits = self.cache.hit(usable)
        found = usable[:hits]
        more = -(-tokens // size) - hits
        if not self.cache.fits(found, more):
            return False
        self.cache.hold(found)
        self.cache.take(more)
        sequence.held, sequence.private = found, more
        sequence.cached_tokens = hits * size
        sequence.is_remote = False
        self._pulling[sequence.key] = sequence
        self.pulls.append(Pull(sequence.key, tokens - hits * size))
        return True

    def _hand(self, sequence: _Sequence) -> None:
        """Go on with a prompt that came from another engine: its last token is computed here."""
        sequence.computed = sequence.prompt_tokens - 1
        sequence.is_handed = True
        self._register(sequence, sequence.computed)
        self._admissions += 1
        sequence.order = self._admissions
        self._running[sequence] = None

    # End

    def _end(self) -> list[Progress]:
        made: list[Progress] = []
        self._steps += self._jump
        steps = self._steps
        self._context += self._jump * self._decoding
        marks = self._marks
        size = self.profile.block_tokens
        while marks and marks[0][0] <= steps:
            _, order, sequence = heapq.heappop(marks)
            if sequence.order != order:
                continue
            computed = self._computed(sequence)
            is_full = computed % size == 0
            if is_full:
                self._register(sequence, computed)
            if sequence.base + steps == sequence.output_tokens:
                self._decoding -= 1
                self._context -= computed
                self._finish(sequence)
                made.append(Progress(sequence.key, False, True, max(0, sequence.cached_tokens)))
            else:
                if is_full:
                    self._needy.append(sequence)
                self._mark(sequence, computed)
        for sequence, count in self._scheduled:
            sequence.computed += count
            sequence.is_handed = False
            self._owe(sequence, sequence.owed - count)
            self._register(sequence, sequence.computed)
            if sequence.computed == sequence.prompt_tokens + sequence.generated:
                made += self._computed_whole(sequence)
        return made

    def _computed_whole(self, sequence: _Sequence) -> list[Progress]:
        """A sequence has all its tokens computed: it makes one, and decodes from now on."""
        if sequence is self._partial:
            self._partial = None
        is_first = not sequence.generated
        sequence.generated += 1
        cached = max(0, sequence.cached_tokens)
        if sequence.generated == sequence.output_tokens:
            self._finish(sequence)
            return [Progress(sequence.key, is_first, True, cached)]
        sequence.base = sequence.generated - self._steps
        self._decoding += 1
        self._context += sequence.computed
        if sequence.computed % self.profile.block_tokens == 0:
            self._needy.append(sequence)
        self._mark(sequence, sequence.computed)
        return [Progress(sequence.key, True, False, cached)] if is_first else []

    def _mark(self, sequence: _Sequence, computed: int) -> None:
        """Note the step after which something happens to it next: its block is full, or its answer ends."""
        size = self.profile.block_tokens
        at = min(self._steps + size - computed % size, sequence.output_tokens - sequence.base)
        heapq.heappush(self._marks, (at, sequence.order, sequence))

    def _finish(self, sequence: _Sequence) -> None:
        del self._running[sequence]
        if sequence.keeps:
            self._kept[sequence.key] = sequence
        else:
            self._free(sequence)

    def _register(self, sequence: _Sequence, computed: int) -> None:
        """Share the blocks that became full."""
        cache, held = self.cache, sequence.held
        for place in range(len(held), computed // self.profile.block_tokens):
            block = sequence.block(place)
            if cache.fill(block):
                if block >= 0:
                    self.stored.append(block)
            else:
                # Somebody else computed the same block meanwhile: from here on share theirs.
                cache.hold((block,))
                cache.free((), 1)
            sequence.private -= 1
            held.append(block)
