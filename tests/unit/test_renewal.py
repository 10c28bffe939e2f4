"""Which settings a running process takes anew."""

from __future__ import annotations

import pytest

from dispatcher.backends.access import AccessSettings
from dispatcher.backends.renewal import renew
from dispatcher.settings import NEEDS_RESTART, DispatcherSettings

OLD = DispatcherSettings()


def test_what_may_change_counts_and_the_rest_stays() -> None:
    new = OLD.model_copy(update={"stall_weight": 1.0, "pool": "other", "redis_ca_file": "x"})
    renewal = renew(OLD, new, fixed=NEEDS_RESTART)
    assert renewal.changed == ("stall_weight",)
    assert set(renewal.waiting) == {"pool", "redis_ca_file"}
    assert renewal.settings == OLD.model_copy(update={"stall_weight": 1.0})


def test_nothing_changed() -> None:
    renewal = renew(OLD, DispatcherSettings(), fixed=NEEDS_RESTART)
    assert (renewal.settings, renewal.changed, renewal.waiting) == (OLD, (), ())


@pytest.mark.parametrize("name", sorted(NEEDS_RESTART))
def test_every_fixed_name_is_a_setting(name: str) -> None:
    assert name in DispatcherSettings.model_fields
    assert name not in AccessSettings.model_fields
