"""Effective settings as text or JSON, for `flexlb config` and `flexlb agent --print-config`."""

from __future__ import annotations

import json
from typing import Any

from pydantic_settings import BaseSettings

from dispatcher.backends.addresses import masked
from dispatcher.backends.environment import DEFAULT, SECRETS, Effective, expected_of, table_of

FORMS = ("text", "verbose", "json")


def rows_of(effective: Effective[Any]) -> list[dict[str, object]]:
    """One row a setting: name, value (secrets masked), source, expected, description."""
    settings: BaseSettings = effective.settings
    rows: list[dict[str, object]] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name.endswith(SECRETS):
            value = "***" if value else ""
        elif isinstance(value, str):
            value = masked(value)
        rows.append(
            {
                "setting": name,
                "value": value,
                "source": effective.sources[name],
                "expected": expected_of(field),
                "description": field.description or "",
            }
        )
    return rows


def print_effective(effective: Effective[Any], form: str) -> str:
    """The settings of one process in one of `FORMS`."""
    table, rows = table_of(type(effective.settings)), rows_of(effective)
    if form == "json":
        return json.dumps({table: {"settings": rows, "warnings": effective.warnings}}, indent=2)
    lines = [f"[{table}]"]
    shown = [f"{row['setting']} = {json.dumps(row['value'])}" for row in rows]
    width = min(max(map(len, shown)), 48)
    for row, text in zip(rows, shown, strict=True):
        lines.append(f"{text:<{width}}  # {row['source']}")
        if form == "verbose":
            lines.append(f"    # {row['description']}; {row['expected']}")
    lines += [f"# warning: {warning}" for warning in effective.warnings]
    unset = sum(row["source"] == DEFAULT for row in rows)
    lines.append(f"# {len(rows)} settings, {unset} by default")
    return "\n".join(lines)
