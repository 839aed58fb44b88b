"""The door between a training and those who look at it."""

from __future__ import annotations

import asyncio

import pytest

from pipelines.serving.live.door import LINGER_S, Door


def test_whoever_knocks_waits_and_holds_the_door_open() -> None:
    async def story() -> list[str]:
        door, seen = Door(), list[str]()

        async def look(name: str, seconds: float) -> None:
            async with door.entered():
                seen.append(f"{name} in")
                await asyncio.sleep(seconds)
                seen.append(f"{name} out")

        first = asyncio.create_task(look("first", 3 * LINGER_S))
        await asyncio.sleep(0.01)
        assert door.knocking
        assert seen == []
        await door.let_in(10)
        seen.append("shut")
        assert not door.knocking
        second = asyncio.create_task(look("second", 0))
        await asyncio.sleep(0.05)
        assert door.knocking, "a shut door lets nobody in"
        await door.let_in(10)
        await asyncio.gather(first, second)
        return seen

    assert asyncio.run(story()) == ["first in", "first out", "shut", "second in", "second out"]


def test_a_call_soon_after_another_finds_the_door_open() -> None:
    async def story() -> int:
        door, calls = Door(), 0

        async def answer() -> None:
            nonlocal calls
            for _ in range(5):
                async with door.entered():
                    calls += 1
                await asyncio.sleep(LINGER_S / 4)

        asking = asyncio.create_task(answer())
        await asyncio.sleep(0.01)
        await door.let_in(10)
        assert calls == 5
        await asking
        return calls

    assert asyncio.run(story()) == 5


def test_those_who_never_stop_asking_are_shut_out_in_time() -> None:
    async def story() -> tuple[int, int]:
        door, calls = Door(), 0

        async def endless() -> None:
            nonlocal calls
            while True:
                async with door.entered():
                    calls += 1
                    await asyncio.sleep(0.005)

        asking = asyncio.create_task(endless())
        await asyncio.sleep(0.01)
        await asyncio.wait_for(door.let_in(0.1), 5)
        then = calls
        await asyncio.sleep(0.1)
        after = calls
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not door.knocking, "who gave up no longer waits"
        return then, after

    then, after = asyncio.run(story())
    assert then > 1
    assert after == then, "nobody is inside while the training runs"
