"""Every exception that FlexLB raises on purpose.

    FlexLBError
    +-- SettingsError            a setting or an argument is wrong: fix it and start again
    +-- ServerError              a server of ours can't be provisioned or started
    +-- StoreUnavailable         Redis did not answer: try again
    |   +-- StoreFull            Redis answered that it is at maxmemory
    +-- StoreRefused             Redis answered with an error that trying again won't mend
    +-- Deposed                  a newer leader exists: stop every act of leadership
    +-- Superseded               election is off, and another dispatcher took over: end the process
    +-- GenerationLost           Redis lost data or went back in time: recover from Kafka
    +-- Fenced                   this incarnation of a node was fenced: abort and register anew
    +-- LogUnavailable           Kafka did not answer: try again
    |   +-- RecordTooLarge       Kafka answered that a record is above the topic's limit
    +-- LogRefused               Kafka answered that the request itself is wrong

Expected endings of a request are values (`protocol.outcome`), never exceptions.
"""

from __future__ import annotations


class FlexLBError(Exception):
    """The root: whatever FlexLB raises on purpose."""


class SettingsError(FlexLBError):
    """A setting or an argument is wrong."""


class ServerError(FlexLBError):
    """A local server can't be provisioned or started."""


class StoreUnavailable(FlexLBError):
    """Redis did not answer."""


class StoreFull(StoreUnavailable):
    """Redis is at maxmemory and refuses new work."""


class StoreRefused(FlexLBError):
    """Redis answered with an error that trying again won't mend."""


class Deposed(FlexLBError):
    """A newer leader exists."""


class Superseded(FlexLBError):
    """Another dispatcher took over from this one, which runs without election."""


class GenerationLost(FlexLBError):
    """Redis lost data or went back in time."""


class Fenced(FlexLBError):
    """This incarnation of a node was fenced, replaced or forgotten."""


class LogUnavailable(FlexLBError):
    """Kafka did not answer."""


class RecordTooLarge(LogUnavailable):
    """A record is above what its topic takes; nothing of the transaction was written."""


class LogRefused(FlexLBError):
    """Kafka answered that the request itself is wrong."""
