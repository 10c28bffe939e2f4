"""Settings from the environment and from flags, for every process alike.

A settings class is a pydantic `BaseSettings`; each field becomes a flag, which wins over the variable
`FLEXLB_<FIELD>`. A wrong value stops the process with its name, what was expected and what was seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from dispatcher.errors import SettingsError

S = TypeVar("S", bound=BaseSettings)


def add_flags(
    parser: argparse.ArgumentParser, kind: type[BaseSettings], *, only: Collection[str] | None = None
) -> None:
    """Give `parser` a flag per setting (all, or those named); a flag that is not given stays unset."""
    for name, field in kind.model_fields.items():
        if only is not None and name not in only:
            continue
        default = f", default {field.default}" if field.default not in ("", None) else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar=_metavar(field.annotation),
            help=f"{field.description} (FLEXLB_{name.upper()}{default})".replace("%", "%%"),
        )


def _metavar(annotation: object) -> str:
    if annotation is str:
        return "TEXT"
    if annotation in (int, float):
        return "N"
    return "|".join(str(choice) for choice in get_args(annotation))


def read_settings(kind: type[S], flags: Mapping[str, object]) -> S:
    """Settings from `flags` (as argparse leaves them) over the environment.

    Raises:
        SettingsError: names each wrong setting, what was expected and what was seen.
    """
    given: dict[str, Any] = {name: value for name, value in flags.items() if name in kind.model_fields}
    try:
        return kind(**given)
    except ValidationError as error:
        raise SettingsError("\n".join(_problem(problem, given) for problem in error.errors())) from None


def _problem(problem: Any, given: Mapping[str, object]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    where = f"--{name.replace('_', '-')}" if name in given else f"FLEXLB_{name.upper()}"
    return f"{where}: {problem['msg']}, seen {str(problem['input'])[:80]!r}"
