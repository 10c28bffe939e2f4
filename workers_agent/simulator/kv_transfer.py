"""KV blocks that pass between simulated engines, in the words of vLLM's NIXL connector (pull, 0.33).

An engine that was asked for a prompt alone names its blocks and lends them for a lease; the engine that goes
on reads them from its side channel and gives them back. What is real here is the protocol, its failures and
its time: the side channel is HTTP on the engine's own port instead of NIXL's handshake, and no bytes move.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from workers_agent.simulator.wire import KVTransfer, Refusal

PATH = "/sim/kv"
LEASE_S = 30.0
"""Modelled seconds for which blocks are lent (`kv_lease_duration`)."""
SIDE_CHANNEL_TIMEOUT_S = 5.0


class Lent(Struct):
    """The answer of the side channel."""

    tokens: int


class Lender:
    """The prompts that an engine has computed for others.

    Args:
        release: gives a sequence's blocks back to the cache.
        wall_s: turns modelled seconds into those of the event loop.
    """

    def __init__(
        self, engine_id: str, release: Callable[[int], None], wall_s: Callable[[float], float]
    ) -> None:
        self._engine_id = engine_id
        self._release = release
        self._wall_s = wall_s
        self._lent: dict[str, tuple[int, int, asyncio.TimerHandle]] = {}
        self.expired = 0

    def lend(self, request: str, key: int, tokens: int, host: str, port: int, block: int) -> dict[str, Any]:
        """Keep a finished prompt; returns what the next engine is to be told, verbatim."""
        self.give_back(request)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._wall_s(LEASE_S), self._expire, request)
        self._lent[request] = (key, tokens, timer)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(-(-tokens // block)))],
            "remote_engine_id": self._engine_id,
            "remote_request_id": request,
            "remote_host": host,
            "remote_port": port,
            "tp_size": 1,
            "remote_num_tokens": tokens,
            "remote_blocks_expiry_time": loop.time() + self._wall_s(LEASE_S),
            "transfer_mode": "pull",
        }

    def tokens_of(self, engine_id: str, request: str) -> int | None:
        """How many tokens of a request are lent; None when they are not (any more)."""
        found = self._lent.get(request) if engine_id == self._engine_id else None
        return found[1] if found is not None else None

    def give_back(self, request: str) -> None:
        """End a loan; one that has ended already is ignored."""
        found = self._lent.pop(request, None)
        if found is not None:
            found[2].cancel()
            self._release(found[0])

    def _expire(self, request: str) -> None:
        self.expired += 1
        self.give_back(request)

    def close(self) -> None:
        """End every loan."""
        for request in list(self._lent):
            self.give_back(request)


async def borrow(
    session: aiohttp.ClientSession,
    transfer: KVTransfer,
    wait: Callable[[float], Awaitable[None]],
    prompt_tokens: int,
    seconds: float,
) -> None:
    """Read a prompt's blocks from the engine that lends them, which takes some `seconds`, and give them back.

    Args:
        wait: waits so many modelled seconds.

    Raises:
        Refusal: 500, the other engine is gone or lends them no more (vLLM's `kv_load_failure_policy=fail`).
    """
    host, port, request = transfer.remote_host, transfer.remote_port, transfer.remote_request_id or ""
    where = f"http://{host}:{port}{PATH}"
    asked = {"engine": transfer.remote_engine_id or "", "request": request}
    timeout = aiohttp.ClientTimeout(total=SIDE_CHANNEL_TIMEOUT_S)
    try:
        async with session.get(where, params=asked, timeout=timeout) as response:
            if response.status != 200:
                raise Refusal(
                    500, "InternalServerError", f"KV transfer failed: {where} lends {request} no more"
                )
            lent = msgspec.json.decode(await response.read(), type=Lent)
        if lent.tokens != prompt_tokens:
            raise Refusal(
                500,
                "InternalServerError",
                f"KV transfer failed: expected {prompt_tokens} tokens, seen {lent.tokens}",
            )
        await wait(seconds)
        async with session.delete(where, params=asked, timeout=timeout):
            pass
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
        raise Refusal(500, "InternalServerError", f"KV transfer failed: {where}: {error}") from None
