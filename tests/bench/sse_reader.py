"""`python -m tests.bench.sse_reader URL STREAMS`: read an engine's streams and do nothing else.

The least that any reader of such streams in Python does: the same HTTP client, lines, one JSON decoding a
token. The last line of output is JSON: `cpu_s` of this process while it read, and `tokens`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import aiohttp
import msgspec

PREFIX = b"data: "


async def _read(session: aiohttp.ClientSession, url: str, number: int) -> int:
    tokens = 0
    async with session.post(
        f"{url}/v1/completions", json={"prompt": f"bare-{number}", "stream": True}
    ) as answer:
        async for line in answer.content:
            if line.startswith(PREFIX) and line.strip() != b"data: [DONE]":
                tokens += bool(msgspec.json.decode(line[len(PREFIX) :])["choices"])
    return tokens


async def _main(url: str, streams: int) -> None:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began = time.process_time()
        counts = await asyncio.gather(*(_read(session, url, number) for number in range(streams)))
        print(json.dumps({"cpu_s": time.process_time() - began, "tokens": sum(counts)}))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))
