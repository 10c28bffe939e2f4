"""Routers by the names of `--policy`: ours with its policies and constants, and the field's.

A name of the original FlexLB's (`COST_BASED_PREFILL`) is the live scheduler's policy of that name.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from dispatcher.backends.legacy_environment import POLICIES as ORIGINAL
from dispatcher.backends.legacy_environment import our_policy
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
OWN_CONSTANTS = {"cost_based_prefill": "cost_based", "shortest_ttft": "ttft_pool"}
"""Policies that have constants of their own, and which of `SchedulingParameters` these are."""
EVERY = (OURS, *BY_NAME)
"""Ours as it is, and every policy of the field."""


def explaining_router_of(name: str, number: int) -> LiveRouter:
    """A router of ours that explains its decisions about one request.

    Raises:
        SettingsError: no such policy, or the field's: those tell nothing of why.
    """
    router = router_of(name)()
    if not isinstance(router, LiveRouter):
        raise SettingsError(f"--policy {name}: expected {OURS} or {OURS}:... with --explain, which tells why")
    router.explain(number)
    return router


def router_of(name: str) -> Callable[[], Router]:
    """What makes the router of a `--policy`.

    Raises:
        SettingsError: no such policy, or it has no such constant.
    """
    base, _, rest = name.partition(":")
    if base in ORIGINAL:
        return _live(name, str(our_policy(base)), _constants(name, rest))
    if base == OURS:
        policy, _, constants = rest.partition(",")
        if (policy := str(our_policy(policy))) in POLICIES:
            return _live(name, policy, _constants(name, constants))
        return _live(name, "prefill_cost", _constants(name, "" if name == ORACLE else rest), name == ORACLE)
    if base in BY_NAME:
        found = _constants(name, rest)
        try:
            BY_NAME[base](**found)
        except TypeError as error:
            raise SettingsError(f"--policy {name}: {error}") from None
        return lambda: PolicyRouter(BY_NAME[base](**found))
    known = ", ".join((OURS, *(f"{OURS}:{policy}" for policy in POLICIES), ORACLE, *ORIGINAL, *BY_NAME))
    raise SettingsError(f"--policy {name}: expected one of {known}")


def _live(
    name: str, policy: str, constants: dict[str, Any], knows_speeds: bool = False
) -> Callable[[], Router]:
    """The live code with a policy and constants, those of the policy itself before those of all."""
    parameters = SchedulingParameters()
    knows_speeds = bool(constants.pop("knows_speeds", knows_speeds))
    part = OWN_CONSTANTS.get(policy)
    try:
        if part is not None:
            of_part = getattr(parameters, part)
            own = {field.name for field in fields(of_part)} & constants.keys()
            made = replace(of_part, **{key: constants.pop(key) for key in own})
            parameters = replace(parameters, **{part: made})
        parameters = replace(parameters, **constants)
    except TypeError as error:
        raise SettingsError(f"--policy {name}: {error}") from None
    return lambda: LiveRouter(policy, parameters=parameters, knows_speeds=knows_speeds)


def oracle_of(name: str) -> str | None:
    """Ours of these constants and told each node's speed; None of any other policy."""
    base, _, rest = name.partition(":")
    if base != OURS or our_policy(rest.partition(",")[0]) in POLICIES:
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
