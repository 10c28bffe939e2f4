"""Partitions: notice that a request topic has grown, so that records in new partitions are read too.

A session reads the partitions that it found at its start; a new one, begun here, finds them all.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.request_log import RequestLog
from dispatcher.errors import LogUnavailable
from dispatcher.telemetry.logging import Log

CHECK_S = 30.0


class Partitions:
    """Ends the session when partitions were added."""

    def __init__(self, requests: RequestLog, log: Log) -> None:
        self._requests = requests
        self._log = log

    async def run(self) -> None:
        """Look every half minute until cancelled.

        Raises:
            LogUnavailable: a topic has grown; the session starts over.
        """
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                grown = await self._requests.has_grown()
            except LogUnavailable as error:
                self._log.warning("partitions not compared, trying again", error=str(error))
                continue
            if grown:
                raise LogUnavailable(
                    "request log: a topic has other partitions than at the start; starting over"
                )
