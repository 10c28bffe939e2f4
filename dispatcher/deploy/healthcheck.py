"""`python -m dispatcher.deploy.healthcheck URL`: a container's health check, where there is no curl.

Exits 0 when the URL answers 2xx in time, else 1 with what was seen. Needs only the standard library,
so that a check costs one bare start of Python.
"""

from __future__ import annotations

import http.client
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

TIMEOUT_S = 2.0
"""Below the checks' own timeout in compose.yaml, so that the reason is told."""


def main(argv: Sequence[str] | None = None) -> int:
    """Ask once; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or not arguments[0].startswith("http://"):
        print("healthcheck: expected one address, http://host:port/path", file=sys.stderr)
        return 2
    if problem := find_problem(arguments[0]):
        print(f"unhealthy: {arguments[0]}: {problem}", file=sys.stderr)
        return 1
    return 0


def find_problem(url: str) -> str:
    """What is wrong with the answer of `url`; empty when it is 2xx."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=TIMEOUT_S)
    try:
        connection.request("GET", address.path or "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return "" if 200 <= status < 300 else f"expected a status of 2xx, seen {status}"


if __name__ == "__main__":
    sys.exit(main())
