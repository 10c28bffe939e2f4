"""New settings for a running process: which may change, which need a restart.

On SIGHUP a process reads its settings again, from the same places. What names a server, an address or an
agreement with other processes stays as it was until a restart; the rest counts from then on.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic_settings import BaseSettings

from dispatcher.backends.access import AccessSettings
from dispatcher.errors import SettingsError
from dispatcher.telemetry.logging import Log

S = TypeVar("S", bound=BaseSettings)

LEVEL = "log_level"


@dataclass(frozen=True, kw_only=True)
class Renewal(Generic[S]):
    """Settings as they count now, the names that changed, and those that wait for a restart."""

    settings: S
    changed: tuple[str, ...]
    waiting: tuple[str, ...]


def renew(old: S, new: S, *, fixed: Collection[str]) -> Renewal[S]:
    """Take from `new` what may change while a process runs.

    Args:
        fixed: settings that need a restart, besides access to Redis and Kafka.
    """
    differing = [name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)]
    waiting = tuple(name for name in differing if name in fixed or name in AccessSettings.model_fields)
    changed = tuple(name for name in differing if name not in waiting)
    kept = {name: getattr(new, name) for name in changed}
    return Renewal(settings=old.model_copy(update=kept), changed=changed, waiting=waiting)


def renew_on_hangup(
    settings: S,
    read: Callable[[], S],
    *,
    log: Log,
    fixed: Collection[str] | None = None,
    take: Callable[[S], None] = lambda _: None,
) -> None:
    """Read the settings again on each SIGHUP; the log level is set here.

    Settings that can't be read are told and change nothing.

    Args:
        fixed: settings that need a restart; all but the log level when None.
        take: gets the settings when anything else changed.
    """
    current = settings
    if fixed is None:
        fixed = type(settings).model_fields.keys() - {LEVEL}

    def read_again() -> None:
        nonlocal current
        try:
            renewal = renew(current, read(), fixed=fixed)
        except SettingsError as error:
            log.error("settings not renewed: the old ones count", error=str(error))
            return
        current = renewal.settings
        if LEVEL in renewal.changed:
            logging.getLogger("flexlb").setLevel(getattr(current, LEVEL))
        log.warning("settings renewed", changed=renewal.changed, waiting_for_restart=renewal.waiting)
        if set(renewal.changed) - {LEVEL}:
            take(current)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read_again)
