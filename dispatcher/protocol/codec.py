"""Bytes to values and back: one decoder per record type, errors that name the field.

All records are JSON. Decoding ignores unknown fields (a newer release may add some) and refuses
wrong types with their path; a record of a later protocol version than ours is refused as such.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.checkpoint import Checkpoint
from dispatcher.protocol.chunk import Chunk
from dispatcher.protocol.explanation import Explanation
from dispatcher.protocol.handoff import Handoff
from dispatcher.protocol.node import BlockEvent, NodeIdentity, NodeReport
from dispatcher.protocol.outcome import DeadLetter, FailedAttempt, Outcome, OutcomeHead
from dispatcher.protocol.request import PROTOCOL_VERSION, CancelRequest, InferenceRequest, LeaseRecord

T = TypeVar("T")
MESSAGE_CHARS = 400
"""Of a decoder's message: it may repeat what it was given."""


class MalformedRecord(ValueError):
    """A record that can't be read: says what was expected and where it differs."""


class UnsupportedVersion(MalformedRecord):
    """A record of a protocol version that this release does not know."""


class Codec(Generic[T]):
    """Decode and encode one record type.

    Args:
        newest: the latest protocol version that it reads, None for any.
    """

    def __init__(self, kind: type[T], *, newest: int | None = PROTOCOL_VERSION) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._newest = newest
        self._name = kind.__name__

    def decode(self, data: bytes) -> T:
        """Read one record.

        Raises:
            UnsupportedVersion: its `v` is above ours.
            MalformedRecord: it is not JSON, or a field is missing or of the wrong type.
        """
        try:
            value = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._check_version(_version_of(data))
            raise MalformedRecord(f"{self._name}: {str(error)[:MESSAGE_CHARS]}") from None
        except RecursionError:
            raise MalformedRecord(f"{self._name}: nested too deeply") from None
        self._check_version(getattr(value, "v", PROTOCOL_VERSION))
        return value

    def _check_version(self, version: int) -> None:
        if self._newest is not None and version > self._newest:
            raise UnsupportedVersion(
                f"{self._name}: version {version} is newer than {self._newest}; upgrade this process"
            )


class _Versioned(msgspec.Struct):
    v: int = 0


_versioned = msgspec.json.Decoder(_Versioned)


def _version_of(data: bytes) -> int:
    """The version of a record whose types are wrong for ours: a later one may have changed them."""
    try:
        return _versioned.decode(data).v
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0


def encode(record: msgspec.Struct) -> bytes:
    """Write a record as JSON; defaults are left out."""
    return msgspec.json.encode(record)


requests = Codec(InferenceRequest)
cancels = Codec(CancelRequest)
leases = Codec(LeaseRecord)
outcomes = Codec(Outcome)
outcome_heads = Codec(OutcomeHead)
published_heads = Codec(OutcomeHead, newest=None)
"""Of what is on Kafka already: an answer of a later release is an answer."""
chunks = Codec(Chunk)
envelopes = Codec(Envelope)
identities = Codec(NodeIdentity)
reports = Codec(NodeReport)
block_events = Codec(BlockEvent)
dead_letters = Codec(DeadLetter)
failed_attempts = Codec(FailedAttempt)
checkpoints = Codec(Checkpoint)
handoffs = Codec(Handoff)
explanations = Codec(Explanation)


class _Named(msgspec.Struct):
    id: str = ""
    tenant: str = ""


_named = msgspec.json.Decoder(_Named)


def salvage_identity(data: bytes) -> tuple[str, str] | None:
    """Find (tenant, id) in a record that its codec refused, so that its sender gets an answer."""
    try:
        found = _named.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not 0 < len(found.id) <= 256 or len(found.tenant) > 256:
        return None
    return found.tenant, found.id


class _OnCancelTopic(msgspec.Struct):
    id: object = None
    lease: object = None


_on_cancel_topic = msgspec.json.Decoder(_OnCancelTopic)


def decode_cancel(data: bytes) -> CancelRequest | LeaseRecord:
    """Read a record of `requests.cancel`: one that names a lease and no request is about the lease.

    Raises:
        MalformedRecord: as `Codec.decode`.
    """
    try:
        found = _on_cancel_topic.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return cancels.decode(data)
    return leases.decode(data) if found.lease is not None and found.id is None else cancels.decode(data)


def decode_handoff(stored: bytes) -> Handoff | None:
    """What a prefill stage left; None for nothing or what can't be read: the prompt is computed again."""
    try:
        return handoffs.decode(stored) if stored else None
    except MalformedRecord:
        return None
