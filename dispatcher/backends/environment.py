"""Settings of every process: from flags, the environment, a TOML file and the original's documents.

A settings class is a pydantic `BaseSettings` named `<Table>Settings`. Each field is a flag, which wins
over the variable `FLEXLB_<FIELD>`, which wins over the file (`--config`, `FLEXLB_CONFIG_FILE`), which
wins over the original FlexLB's documents, which win over the default. A wrong value stops the process
with where it stands, what was expected and what was seen.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from dispatcher.backends.access import AccessSettings
from dispatcher.backends.addresses import masked
from dispatcher.backends.legacy_environment import read_legacy
from dispatcher.errors import SettingsError

S = TypeVar("S", bound=BaseSettings)

PREFIX = "FLEXLB_"
FILE_VARIABLE = "FLEXLB_CONFIG_FILE"
TABLES = ("dispatcher", "agent", "frontend")
"""Tables of the file, one for each kind of process."""
SHARED = frozenset(
    {
        "redis",
        "kafka",
        "pool",
        "block_size",
        "metrics_port",
        "metrics_host",
        "heartbeat_ttl_s",
        "claim_lease_s",
        "default_deadline_s",
        "isolate_tenants",
        "log_level",
        *AccessSettings.model_fields,
    }
)
"""Settings that several processes have: the file may hold them above its tables, for all that do."""
ALIKE = frozenset({"max_record_bytes", "max_body_bytes", "max_held_bytes"})
"""Settings of one process that look like a slip of another's."""
NEAR = 0.8
"""How like a setting an unknown variable must be to be taken for a slip."""
DEFAULT = "default"
SECRETS = ("password", "secret", "token", "api_key")
"""A setting whose name ends like this is never shown and no flag; that of a file which holds one is both."""


@dataclass(frozen=True, kw_only=True)
class Effective(Generic[S]):
    """Settings as they count, and where each stands.

    `sources` names a flag, a variable, a key of the file, a key of a document, or `DEFAULT`.
    """

    settings: S
    sources: Mapping[str, str]
    warnings: tuple[str, ...]


def add_flags(
    parser: argparse.ArgumentParser, kind: type[BaseSettings], *, only: Collection[str] | None = None
) -> None:
    """Give `parser` a flag per setting (all, or those named) and `--config`; none is set by default."""
    for name, field in kind.model_fields.items():
        if (only is not None and name not in only) or name.endswith(SECRETS):
            continue
        default = f", default {field.default}" if field.default not in ("", None, PydanticUndefined) else ""
        parser.add_argument(
            _flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            metavar=_metavar(field.annotation),
            help=f"{field.description} ({PREFIX}{name.upper()}{default})".replace("%", "%%"),
        )
    add_file_flag(parser)


def add_file_flag(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the flag that names the settings file."""
    parser.add_argument(
        "--config",
        dest="config_file",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"TOML file of settings; flags and variables win over it ({FILE_VARIABLE})",
    )


def read_settings(kind: type[S], flags: Mapping[str, object]) -> S:
    """Settings from `flags` (as argparse leaves them) over every other source; warns on stderr.

    Raises:
        SettingsError: names each wrong setting, what was expected and what was seen.
    """
    effective = read_effective(kind, flags)
    for warning in effective.warnings:
        print(f"flexlb: warning: {warning}", file=sys.stderr)
    return effective.settings


def read_effective(
    kind: type[S], flags: Mapping[str, object], environ: Mapping[str, str] | None = None
) -> Effective[S]:
    """Settings with the source of each.

    Args:
        environ: the environment; the process's own when absent.
    Raises:
        SettingsError: names each wrong setting, what was expected and what was seen.
    """
    environ = os.environ if environ is None else environ
    table = table_of(kind)
    named = flags.get("config_file") or environ.get(FILE_VARIABLE)
    from_file, problems = _read_file(kind, table, str(named)) if named else ({}, [])
    legacy = read_legacy(environ, table)
    from_environment, slips = _read_environment(kind, environ)
    given: dict[str, tuple[Any, str]] = {
        **{name: found for name, found in legacy.values.items() if name in kind.model_fields},
        **from_file,
        **from_environment,
        **{name: (value, _flag(name)) for name, value in flags.items() if name in kind.model_fields},
    }
    try:
        settings = kind(**{name: value for name, (value, _) in given.items()})
    except ValidationError as error:
        problems += [_problem(kind, problem, given) for problem in error.errors()]
    if problems:
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    sources = {name: given[name][1] if name in given else DEFAULT for name in kind.model_fields}
    return Effective(settings=settings, sources=sources, warnings=(*legacy.warnings, *slips))


def table_of(kind: type[BaseSettings]) -> str:
    """The file's table of a settings class: `DispatcherSettings` has `[dispatcher]`."""
    return kind.__name__.removesuffix("Settings").lower()


def expected_of(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    kind = field.annotation
    low, high = _bound(field, "ge"), _bound(field, "le")
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        number = "a whole number" if kind is int else "a number"
        if low is not None and high is not None:
            return f"{number} from {low} to {high}"
        return number + (f" of at least {low}" if low is not None else "")
    if form := _bound(field, "expected"):
        return str(form)
    if choices := _choices(kind):
        return f"one of {', '.join(choices)}"
    pattern, longest = _bound(field, "pattern"), _bound(field, "max_length")
    return (
        "text"
        + (f" of at most {longest} characters" if longest else "")
        + (f" that matches {pattern}" if pattern else "")
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(annotation: object) -> str:
    if annotation is str:
        return "TEXT"
    if annotation is bool:
        return "true|false"
    if annotation in (int, float):
        return "N"
    return "|".join(_choices(annotation))


def _choices(annotation: object) -> list[str]:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(choice.value) for choice in annotation]
    return [str(choice) for choice in get_args(annotation)]


def _bound(field: FieldInfo, name: str) -> Any:
    return next((found for one in field.metadata if (found := getattr(one, name, None)) is not None), None)


def _read_environment(
    kind: type[BaseSettings], environ: Mapping[str, str]
) -> tuple[dict[str, tuple[object, str]], list[str]]:
    """What variables set, and those that look like a slip of the pen."""
    given: dict[str, tuple[object, str]] = {}
    slips = []
    for variable, value in environ.items():
        name = variable.lower().removeprefix(PREFIX.lower())
        if not variable.upper().startswith(PREFIX) or variable == FILE_VARIABLE:
            continue
        if name in kind.model_fields:
            given[name] = (value, variable)
        elif name not in SHARED | ALIKE and (near := get_close_matches(name, kind.model_fields, 1, NEAR)):
            slips.append(
                f"{variable}: no {table_of(kind)} setting has this name; "
                f"did you mean {PREFIX}{near[0].upper()}?"
            )
    return given, slips


def _read_file(
    kind: type[BaseSettings], table: str, named: str
) -> tuple[dict[str, tuple[object, str]], list[str]]:
    """What a file sets for one process, and what is wrong with its keys.

    Keys of another process's table are that process's to check.
    """
    path = Path(named)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"--config: expected a file that can be read, seen {named!r}: {error.strerror or error}"
        ) from None
    except ValueError as error:
        raise SettingsError(f"{named}: expected TOML: {error}") from None
    given: dict[str, tuple[object, str]] = {}
    problems = []
    for key, value in content.items():
        if key in TABLES or key == table:
            if not isinstance(value, dict):
                problems.append(f"{named}: {key}: expected a table, seen {str(value)[:80]!r}; write [{key}]")
        elif key in SHARED:
            if key in kind.model_fields:
                given[key] = (value, f"{named}: {key}")
        elif key in kind.model_fields:
            problems.append(
                f"{named}: {key}: expected above the tables only what several processes have; move it "
                f"into [{table}]"
            )
        else:
            problems.append(_unknown(named, key, key, [*sorted(SHARED), *TABLES, *kind.model_fields]))
    own = content.get(table, {})
    for key, value in own.items() if isinstance(own, dict) else ():
        if key in kind.model_fields:
            given[key] = (value, f"{named}: {table}.{key}")
        else:
            problems.append(_unknown(named, f"{table}.{key}", key, kind.model_fields))
    return given, problems


def _unknown(file: str, path: str, key: str, known: Iterable[str]) -> str:
    near = get_close_matches(key, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "'flexlb config -v' names all"
    return f"{file}: {path}: expected a setting, seen an unknown key; {hint}"


def _problem(kind: type[BaseSettings], problem: Any, given: Mapping[str, tuple[object, str]]) -> str:
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    field = kind.model_fields.get(name)
    where = given[name][1] if name in given else PREFIX + name.upper()
    expected = f"{expected_of(field)} ({field.description})" if field is not None else problem["msg"]
    seen = "***" if name.endswith(SECRETS) else masked(problem["input"])[:80]
    return f"{where}: expected {expected}, seen {seen!r}"
