"""What must hold after every simulated effect, read from the servers' own data.

One place: below the marks, each unanswered request is in exactly one Redis place. One leader, one
incarnation: a script that the shipped fence should have refused must not have had an effect. One answer: at
most one outcome per record. *Finished* never passes an unanswered record. Every key has an expiry or
is declared permanent.

After an effect only what it touched is read: what lies in which place is kept, as are the answers so far.
After each fault and at the end all is read anew, and must be what was kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from dispatcher.backends.scripts import Script
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Names, Ref
from dispatcher.protocol.outcome import Reason
from tests.support.sim.kafka import Entry, SimKafka
from tests.support.sim.redis import SimRedis

LEADER_SCRIPTS = (
    "admit",
    "adopt",
    "assign",
    "begin_generation",
    "close",
    "explain",
    "mend",
    "remember",
    "requeue",
    "retry",
    "settle",
)
AGENT_SCRIPTS = ("claim", "complete", "extend", "report")


@dataclass
class Expectations:
    """What was appended: by ref, and by what makes records repeat each other."""

    requests: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    """Refs that share their group with others."""
    refs: dict[str, tuple[str, int, bytes]] = field(default_factory=dict)
    """Of each ref its lane and partition, its offset, and that as a member of Redis's sets."""

    def add(self, ref: str, request: dict[str, Any]) -> None:
        """Note a record."""
        self.requests[ref] = request
        parsed = Ref.parse(ref)
        self.refs[ref] = (parsed.source, parsed.offset, str(parsed.offset).encode())
        key = (str(request.get("tenant", "")), str(request["id"]), repr(request.get("body")))
        group = self.groups.setdefault(key, [])
        group.append(ref)
        if len(group) > 1:
            self.repeated.update(group)


class ObservedRedis(SimRedis):
    """A simulated Redis that tells an observer of every command that it executed.

    The observer gets the command, its answer and the keys touched, those that were touched by whom it woke
    included; None for keys when the whole data set is another one.
    """

    observer: Callable[[Sequence[bytes], Any, Collection[bytes] | None], None] | None = None
    _is_observing = False
    _touched: set[bytes] | None = None

    def _execute(self, fields: list[bytes]) -> Any:
        answer = super()._execute(fields)
        if self.observer is not None and not self._is_observing:
            touched, self._touched = self._touched, set()
            self._is_observing = True
            try:
                self.observer(fields, answer, touched)
            finally:
                self._is_observing = False
        return answer

    @property
    def is_another_data_set(self) -> bool:
        """Whether the data changed otherwise than by commands since the last one."""
        return self._touched is None

    def _changed(self, fields: list[bytes]) -> None:
        if self._touched is not None:
            self._touched.update(self._state.touched)
        super()._changed(fields)

    def restart(self, *, keep_data: bool = True, lose_last_s: float = 0.0, down_s: float = 0.0) -> None:
        """Stop and start again."""
        super().restart(keep_data=keep_data, lose_last_s=lose_last_s, down_s=down_s)
        self._touched = None


class Invariants:
    """Watches one cluster; violations are appended to the list given.

    Args:
        scripts: sources that replace shipped ones in this cluster, by name.
    """

    def __init__(
        self,
        names: Names,
        nodes: Sequence[str],
        redis: ObservedRedis,
        kafka: SimKafka,
        expectations: Expectations,
        violations: list[str],
        *,
        scripts: Mapping[str, str],
    ) -> None:
        self._names = names
        self._nodes = nodes
        self._redis = redis
        self._kafka = kafka
        self._expectations = expectations
        self._violations = violations
        self._scripts = {
            Script(name, scripts.get(name)).digest.encode(): name
            for name in (*LEADER_SCRIPTS, *AGENT_SCRIPTS)
        }
        self._refs_in: dict[bytes, Callable[[Any], list[str]]] = dict.fromkeys(
            (key.encode() for node in nodes for key in self._queues(node)), _refs_of_jobs
        )
        """Of each key that is a place, how to read the refs there."""
        self._refs_in[names.pending.encode()] = _refs_of_members
        self._closing = names.closing.encode()
        self._refs_in[self._closing] = _refs_of_entries
        self._marks = re.compile(rb"%b(marks|above:.*)$" % re.escape(names.prefix.encode()))
        self._in_place: dict[bytes, list[str]] = {}
        self._places: Counter[str] = Counter()
        self._taken: set[str] = set()
        self._answers: Counter[str] = Counter()
        """Of all that is decided for good."""
        self._read_to: dict[tuple[str, int], int] = {}
        self._finished: dict[TopicPartition, int] = {}
        self._lanes = {names.requests(lane): lane for lane in Lane}
        kafka.broker.observer = self.after_log_change
        self._permanent = re.compile(
            rf"{re.escape(names.prefix)}(leader|epoch|renewals|generation|marks|settled|pending|pending:.*|closing"
            rf"|reports|blocks|nodes|cordons|above:.*|node:[^:]*:claimed)$|rq:(queues|workers|workers:.*|queue:.*|job:.*|wip:.*)$"
        )

    def violate(self, what: str) -> None:
        """Note a violation."""
        now_s = self._redis.network.loop.time()
        self._violations.append(f"at {now_s:.3f} s: {what}")

    # After each effect

    def after_effect(self, fields: Sequence[bytes], answer: Any, touched: Collection[bytes] | None) -> None:
        """One command was executed."""
        name = self._script_name(fields)
        if name is not None and not isinstance(answer, Exception):
            keys = int(fields[2])
            arguments = fields[3 + keys :]
            if name in LEADER_SCRIPTS:
                epoch = self._redis.value(self._names.epoch)
                if epoch != arguments[0]:
                    self.violate(
                        f"{name} by deposed leader {arguments[0]!r} had an effect; the epoch is {epoch!r}"
                    )
            elif name in AGENT_SCRIPTS:
                self._check_incarnation(name, fields[3].decode(), arguments[0])
        if touched is None:
            self._read_places()
            self._check_places(f"after {name or fields[0].decode()}", self._places.keys() | self._taken)
        elif touched or name is not None:
            # fakeredis does not call a stream touched of which an entry was deleted.
            moved = self._note_places({*touched, self._closing})
            if moved:
                self._check_places(f"after {name or fields[0].decode()}", moved)

    def after_log_change(self, partitions: Collection[TopicPartition]) -> None:
        """Records of these partitions were written or decided; none of them: a group's offsets were."""
        if not partitions:
            self._check_marks(self._kafka.broker.offsets.get(self._names.group, {}))
        elif any(tp.topic == self._names.outcomes for tp in partitions):
            self._note_answers()

    def _script_name(self, fields: Sequence[bytes]) -> str | None:
        command = fields[0]
        if command == b"EVALSHA":
            return self._scripts.get(fields[1])
        if command == b"EVAL":
            return self._scripts.get(Script("", fields[1].decode()).digest.encode())
        return None

    def _check_incarnation(self, name: str, node_key: str, incarnation: bytes) -> None:
        stored = self._redis.value(node_key)
        known = {} if stored is None else stored.getall()
        current, fenced = known.get(b"incarnation"), known.get(b"fenced")
        if current != incarnation or fenced == incarnation:
            self.violate(f"{name} by superseded incarnation {incarnation!r} of {node_key} had an effect")

    # One place

    def check_places(self, when: str) -> None:
        """Each taken and unanswered request is in exactly one place; reads all of them anew."""
        kept = None if self._redis.is_another_data_set else (+self._places, self._taken)
        self._read_places()
        if kept is not None and kept != (self._places, self._taken):
            self.violate(f"{when}: expected {self._places}, {self._taken}, kept {kept}: watching went wrong")
        self._check_places(when, self._places.keys() | self._taken)

    def _check_places(self, when: str, refs: Collection[str]) -> None:
        """Check these requests."""
        places, expectations = self._places, self._expectations
        answered = None
        for ref in sorted(refs):
            count = places[ref]
            if count > 1:
                self.violate(f"{when}: {ref} is in {count} places: {self._where(ref)}")
            elif (
                count == 0
                and ref in self._taken
                and ref in expectations.requests
                and ref not in expectations.repeated
            ):
                answered = self._answered() if answered is None else answered
                if ref not in answered:
                    self.violate(f"{when}: {ref} is taken and unanswered but in no place")

    def _read_places(self) -> None:
        """Read every place, and the marks."""
        self._in_place = {key: read(self._redis.value(key)) for key, read in self._refs_in.items()}
        self._places = Counter(ref for refs in self._in_place.values() for ref in refs)
        self._taken = self._read_taken()

    def _note_places(self, touched: Collection[bytes]) -> set[str]:
        """Read the places and marks that were touched; the requests that moved."""
        moved: set[str] = set()
        places, are_marks_touched = self._places, False
        for key in touched:
            read = self._refs_in.get(key)
            if read is None:
                are_marks_touched = are_marks_touched or self._marks.match(key) is not None
                continue
            before, now = self._in_place.get(key, []), read(self._redis.value(key))
            if before != now:
                self._in_place[key] = now
                places.update(now)
                places.subtract(before)
                moved.update(before, now)
        if are_marks_touched:
            taken = self._read_taken()
            moved |= taken - self._taken
            self._taken = taken
        return moved

    def _queues(self, node: str) -> tuple[str, str, str]:
        names = self._names
        return names.queue_key(node), names.intermediate(node), names.claimed(node)

    def _where(self, ref: str) -> str:
        found = []
        for key in self._refs_in:
            value = self._redis.value(key) or ()
            if key == self._closing:
                found += [
                    f"closing {fields[b'kind'].decode()} {fields[b'job'].decode()}"
                    for fields in _entries_of(value)
                    if fields[b"ref"].decode() == ref
                ]
            elif key == self._names.pending.encode():
                found += ["pending"] if ref.encode() in value else []
            else:
                found += [f"{key.decode()}: {job.decode()}" for job in value if f"--{ref}--" in job.decode()]
        return ", ".join(found)

    def _read_taken(self) -> set[str]:
        stored = self._redis.value(self._names.marks)
        if stored is None:
            return set()
        marks = {source.decode(): int(low) for source, low in stored.getall().items()}
        above = {source: self._redis.value(self._names.above(source)) or () for source in marks}
        taken = set()
        for text, (source, offset, member) in self._expectations.refs.items():
            low = marks.get(source)
            if low is not None and (offset < low or member in above[source]):
                taken.add(text)
        return taken

    # Answers

    def _answered(self) -> Counter[str]:
        """How many outcomes each ref has, those included whose commit is decided and not yet marked."""
        self._note_answers()
        answered = self._answers
        for topic in (self._names.outcomes, self._names.dead):
            for partition in self._kafka.broker.topics[topic].partitions:
                ending = partition.slice(partition.stable_end, partition.end)
                for entry in ending:
                    if entry.transaction is not None and entry.transaction.markers_to_write > 0:
                        answered = Counter(answered) if answered is self._answers else answered
                        self._note_answer(answered, topic, entry)
        return answered

    def _note_answers(self) -> None:
        """Read on, as far as all is decided."""
        for topic in (self._names.outcomes, self._names.dead):
            for number, partition in enumerate(self._kafka.broker.topics[topic].partitions):
                begin, end = self._read_to.get((topic, number), 0), partition.stable_end
                if begin == end:
                    continue
                self._read_to[topic, number] = end
                for entry in partition.slice(begin, end):
                    ref = self._note_answer(self._answers, topic, entry)
                    if ref is not None and self._answers[ref] == 2:
                        self.violate(f"a second outcome for {ref}")

    def _note_answer(self, answers: Counter[str], topic: str, entry: Entry) -> str | None:
        """Count what a record answers; the ref of an outcome."""
        if not _is_record(entry):
            return None
        assert entry.value is not None
        if topic == self._names.outcomes:
            ref = codec.outcome_heads.decode(entry.value).ref
            answers[ref] += 1
            return ref
        letter = codec.dead_letters.decode(entry.value)
        if not letter.id:
            answers[letter.ref] = 1  # a loss of Redis data may make a second one: nobody waits for it
        return None

    def unanswered(self) -> list[str]:
        """Refs that still lack what they should come to."""
        answered = self._answered()
        missing = []
        for refs in self._expectations.groups.values():
            if not any(ref in answered for ref in refs):
                missing += refs
        return missing

    def check_finished(self) -> None:
        """The committed marks have passed nothing unanswered."""
        self._finished.clear()
        self._check_marks(self._kafka.group_offsets(self._names.group))

    def _check_marks(self, offsets: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
        """What the marks have passed since they were looked at is answered."""
        answered = None
        for tp, stored in offsets.items():
            begin, end = self._finished.get(tp, 0), stored.offset
            self._finished[tp] = end
            lane = self._lanes[tp.topic]
            for offset in range(begin, end):
                text = str(Ref(lane, tp.partition, offset))
                if text not in self._expectations.requests or text in self._expectations.repeated:
                    continue
                answered = self._answered() if answered is None else answered
                if text not in answered:
                    self.violate(
                        f"finished mark {end} of {lane.value}{tp.partition} passed unanswered {text}"
                    )

    def check_end(self) -> None:
        """The run is over: everything is answered, once."""
        self.check_places("at the end")
        self.check_finished()
        kept = self._answered()
        self._answers, self._read_to = Counter(), {}
        answered = self._answered()
        if kept != answered:
            self.violate(f"expected the answers {answered}, kept {kept}: watching went wrong")
        for ref, count in answered.items():
            if count > 1:
                self.violate(f"{ref} has {count} outcomes")
            if ref not in self._expectations.requests:
                self.violate(f"an outcome for {ref}, which nobody appended")
        for (tenant, id, _), refs in self._expectations.groups.items():
            count = sum(answered[ref] for ref in refs)
            if count != 1:
                self.violate(f"{tenant}/{id} at {refs} has {count} outcomes, expected exactly one")
        self._check_deadlines()
        self._check_keys()

    def _check_deadlines(self) -> None:
        """Nobody ends what has time, whatever a host's clock says: runs are shorter than defaults."""
        for record in self._kafka.committed(self._names.outcomes):
            head = codec.outcome_heads.decode(record.value or b"")
            is_given_up = head.reason in {Reason.DEADLINE_EXCEEDED, Reason.DEADLINE_PASSED}
            if is_given_up and not self._expectations.requests.get(head.ref, {}).get("deadline_ms"):
                who = "an agent" if head.attempt else "a leader"
                self.violate(f"{who} gave up {head.ref} long before its deadline")

    def _check_keys(self) -> None:
        for key in self._redis.call("KEYS", "*"):
            name = key.decode()
            if self._redis.call("PTTL", key) == -1 and not self._permanent.match(name):
                self.violate(f"key {name} has no expiry and is not declared permanent")


def _is_record(entry: Entry) -> bool:
    is_aborted = entry.transaction is not None and entry.transaction.is_aborted
    return not entry.is_control and not is_aborted and entry.value is not None


def _refs_of_jobs(jobs: Iterable[bytes] | None) -> list[str]:
    return [job.rsplit(b"--", 2)[1].decode() for job in jobs or ()]


def _refs_of_members(refs: Iterable[bytes] | None) -> list[str]:
    return [ref.decode() for ref in refs or ()]


def _refs_of_entries(stream: Any) -> list[str]:
    return [fields[b"ref"].decode() for fields in _entries_of(stream)]


def _entries_of(stream: Any) -> list[dict[bytes, bytes]]:
    if not stream:
        return []
    return [dict(zip(f[::2], f[1::2], strict=True)) for f in stream._values_dict.values()]
