"""Tasks end for certain, also those that lose a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher.tasks import end_tasks, run_together, to_the_end


async def _deaf(times: int) -> None:
    """Lose so many cancellations, as `asyncio.wait_for` of Python 3.11 may."""
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            times -= 1
            if times < 0:
                raise


async def test_a_task_that_loses_a_cancellation_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatcher.tasks.SAY_AGAIN_S", 0.01)
    task = asyncio.create_task(_deaf(3))
    await asyncio.wait([task], timeout=0.01)
    await end_tasks([task])
    assert task.cancelled()


async def test_one_failure_ends_the_others_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatcher.tasks.SAY_AGAIN_S", 0.01)

    async def fails() -> None:
        raise ValueError("no")

    with pytest.raises(BaseExceptionGroup) as raised:
        await run_together(deaf=_deaf(1), fails=fails())
    assert [str(error) for error in raised.value.exceptions] == ["no"]


async def test_cancelling_the_caller_ends_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatcher.tasks.SAY_AGAIN_S", 0.01)
    ended = []

    async def notes() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    running = asyncio.create_task(run_together(deaf=_deaf(2), notes=notes()))
    await asyncio.wait([running], timeout=0.01)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert ended == [True]


async def test_all_of_them_may_end_by_themselves() -> None:
    async def ends() -> None:
        return

    await run_together(one=ends(), other=ends())


async def test_a_goodbye_runs_to_its_end_however_often_it_is_cut_short() -> None:
    said: list[str] = []

    async def goodbye() -> None:
        for word in ("so", "long"):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            said.append(word)

    task = asyncio.create_task(to_the_end(goodbye()))
    while not task.done():
        await asyncio.sleep(0)
        task.cancel()
    assert said == ["so", "long"]
    assert task.cancelled()


async def test_what_goes_wrong_in_a_goodbye_is_raised() -> None:
    async def goodbye() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await to_the_end(goodbye())
