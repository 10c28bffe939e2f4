"""What every HTTP server of ours does before its routes: turn away what aiohttp would answer with 500.

aiohttp repeats an `Expect` that it does not know in its answer, and breaks on one that is no UTF-8.
"""

from __future__ import annotations

from aiohttp import web

EXPECTED = "100-continue"


def guard_expectations(server: web.Server | None) -> None:
    """Refuse an unknown `Expect` with 417, on whatever path it comes."""
    assert server is not None, "a runner has its server once it is set up"
    serve = server.request_handler

    async def guarded(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Expect", EXPECTED).lower() not in {EXPECTED, ""}:
            raise web.HTTPExpectationFailed(text=f"Expect: expected {EXPECTED}, seen something else")
        return await serve(request)

    server.request_handler = guarded
