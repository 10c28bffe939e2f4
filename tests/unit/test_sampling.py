"""Which decisions are explained: by ref, and never more than allowed."""

from __future__ import annotations

import pytest

from dispatcher.scheduling.sampling import Sampler


def taken(sampler: Sampler, refs: range, now_s: float = 0.0) -> set[int]:
    """The refs taken in one round."""
    sampler.begin(now_s)
    return {number for number in refs if sampler.takes(f"i0_{number}")}


def test_all_are_taken_while_few_come() -> None:
    sampler = Sampler(share=1.0, per_s=50)
    for second in range(5):
        refs = range(50 * second, 50 * second + 50)
        assert taken(sampler, refs, now_s=float(second)) == set(refs)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_a_share_of_refs_that_follow_each_other_is_taken(share: float) -> None:
    found = taken(Sampler(share=share, per_s=1000), range(1000))
    expected = 1000 * share
    assert len(found) == pytest.approx(expected, abs=4 * expected**0.5)


def test_a_ref_is_taken_by_every_sampler_or_none() -> None:
    one, other = Sampler(share=0.3, per_s=1000), Sampler(share=0.3, per_s=1000)
    assert taken(one, range(1000)) == taken(other, range(1000), now_s=77.0)
    wider = taken(Sampler(share=0.6, per_s=1000), range(1000))
    assert taken(Sampler(share=0.3, per_s=1000), range(1000)) <= wider


def test_no_second_takes_more_than_the_rate_allows() -> None:
    sampler = Sampler(share=1.0, per_s=50)
    for second in range(4):
        refs = range(5000 * second, 5000 * second + 5000)
        assert len(taken(sampler, refs, now_s=float(second))) <= 50


def test_beyond_the_rate_the_share_shrinks_instead_of_taking_the_first_of_each_second() -> None:
    sampler = Sampler(share=1.0, per_s=50)
    taken(sampler, range(5000))
    later = taken(sampler, range(5000, 10_000), now_s=1.0)
    assert 30 <= len(later) <= 50
    assert max(later) > 9000
    assert taken(sampler, range(10_000, 10_020), now_s=2.0) != set(range(10_000, 10_020))
    assert taken(sampler, range(20_000, 20_020), now_s=3.0) == set(range(20_000, 20_020))


@pytest.mark.parametrize(("share", "per_s"), [(0.0, 50), (1.0, 0)])
def test_none_are_taken_when_it_is_off(share: float, per_s: float) -> None:
    assert taken(Sampler(share=share, per_s=per_s), range(1000)) == set()
