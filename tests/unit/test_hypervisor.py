"""Ending the tasks of a guest: a stop must not hang on one that missed its cancellation."""

from __future__ import annotations

import asyncio

from deskfleet.agent.processes import end_tasks


def test_a_task_whose_cancellation_met_its_answer_ends_nevertheless() -> None:
    """The answer and the cancellation come in one moment; wait_for of Python 3.11 then goes on as if not cancelled."""

    async def work() -> None:
        answer = asyncio.get_running_loop().create_future()

        async def attend() -> None:
            await asyncio.wait_for(answer, 60)
            await asyncio.sleep(3600)

        task = asyncio.create_task(attend())
        await asyncio.sleep(0)
        answer.set_result(None)
        await asyncio.wait_for(end_tasks([task]), 60)
        assert task.done()

    asyncio.run(work())


def test_a_task_that_has_ended_already_and_no_task_at_all_are_fine() -> None:
    async def work() -> None:
        async def nothing() -> None:
            return

        task = asyncio.create_task(nothing())
        await task
        await end_tasks([task])
        await end_tasks([])

    asyncio.run(work())
