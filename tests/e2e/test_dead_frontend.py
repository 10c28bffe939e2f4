"""A frontend that is killed: nobody goes on generating for its clients, but for those who asked for that."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from dispatcher.local.stack import Member
from tests.e2e.test_faults import MakeStack, clean_audit, events
from tests.support.wait import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

TOKENS = 600
STEP_MS = 20
"""600 of them are 12 s: far longer than the lease."""


async def test_requests_of_a_killed_frontend_are_cancelled_and_nobody_elses(
    make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXLB_LEASE_TTL_S", "3")
    stack = make_stack(nodes=1, frontend_port=0, frontends=2, engine_flags=("--decode-step-ms", str(STEP_MS)))
    async with stack, aiohttp.ClientSession() as http:
        dying, living = stack.frontends

        async def ask(frontend: Member, id: str, **headers: str) -> int:
            body = {"model": "sim", "prompt": id, "max_tokens": TOKENS}
            named = {"X-Request-Id": id, **headers}
            async with http.post(f"{frontend.url}/v1/completions", json=body, headers=named) as response:
                await response.read()
                return response.status

        asking = [
            asyncio.create_task(ask(dying, "gone")),
            asyncio.create_task(ask(dying, "detached", **{"X-FlexLB-Detached": "true"})),
            asyncio.create_task(ask(living, "kept")),
        ]

        async def is_running() -> bool:
            async with http.get(f"{stack.agents[0].url}/health") as response:
                return int((await response.json())["running"]) == len(asking)

        await wait_until(is_running, "all three to run")
        await dying.kill()
        statuses = await asyncio.gather(*asking, return_exceptions=True)
        assert [isinstance(status, aiohttp.ClientError) for status in statuses] == [True, True, False]
        assert statuses[2] == 200
        found = await clean_audit(stack)
        assert found.outcomes == {"Cancelled": 1, "Completed": 2}
        finished = [line for member in stack.dispatchers for line in events(member, "request finished")]
        assert {line["id"]: line["reason"] for line in finished} == {
            "gone": "client_gone",
            "detached": "finished",
            "kept": "finished",
        }
