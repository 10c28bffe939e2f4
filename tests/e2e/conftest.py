"""A stack of real processes per test, on a broker and a Valkey of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dispatcher.local.stack import LocalStack, StackSettings
from tests.support.servers import give_up, why_no_kafka

MakeStack = Callable[..., LocalStack]


@pytest.fixture
def make_stack(tmp_path: Path) -> MakeStack:
    """Make a stack of real processes; `async with` starts and stops it."""
    if (reason := why_no_kafka()) is not None:
        give_up(reason)

    def make(**settings: object) -> LocalStack:
        return LocalStack(
            StackSettings(broker="apache", **settings),  # type: ignore[arg-type]
            folder=tmp_path / "stack",
        )

    return make
