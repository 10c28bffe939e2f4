"""Routers by the names of `--policy`: ours with its policies and constants, and the field's."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from dispatcher.errors import SettingsError
from dispatcher.scheduling.choice import SchedulingParameters
from dispatcher.scheduling.policies import POLICIES
from dispatcher.simulation.fleet import Router
from dispatcher.simulation.live_router import LiveRouter
from dispatcher.simulation.policies import BY_NAME
from dispatcher.simulation.policy_router import PolicyRouter

OURS = "flexlb"
ORACLE = f"{OURS}:knows_speeds"
"""Ours, and told how fast each node is: what learning it costs."""
EVERY = (OURS, *BY_NAME)
"""Ours as it is, and every policy of the field."""


def router_of(name: str) -> Callable[[], Router]:
    """What makes the router of a `--policy`.

    Raises:
        SettingsError: no such policy, or it has no such constant.
    """
    base, _, rest = name.partition(":")
    if base == OURS and rest in {"", *POLICIES}:
        return lambda: LiveRouter(rest or "prefill_cost")
    if name == ORACLE:
        return lambda: LiveRouter(knows_speeds=True)
    constants = _constants(name, rest)
    try:
        if base == OURS:
            knows_speeds = bool(constants.pop("knows_speeds", False))
            parameters = SchedulingParameters(**constants)
            return lambda: LiveRouter(parameters=parameters, knows_speeds=knows_speeds)
        if base in BY_NAME:
            BY_NAME[base](**constants)
            return lambda: PolicyRouter(BY_NAME[base](**constants))
    except TypeError as error:
        raise SettingsError(f"--policy {name}: {error}") from None
    known = ", ".join((OURS, *(f"{OURS}:{policy}" for policy in POLICIES), ORACLE, *BY_NAME))
    raise SettingsError(f"--policy {name}: expected one of {known}")


def oracle_of(name: str) -> str | None:
    """Ours of these constants and told each node's speed; None of any other policy."""
    base, _, rest = name.partition(":")
    if base != OURS or rest in POLICIES:
        return None
    return f"{name},knows_speeds=True" if rest else ORACLE


def _constants(name: str, text: str) -> dict[str, Any]:
    constants = {}
    for pair in text.split(",") if text else ():
        key, _, value = pair.partition("=")
        try:
            constants[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise SettingsError(
                f"--policy {name}: expected NAME or KEY=VALUE after the colon, seen {pair!r}"
            ) from None
    return constants
