"""The sending side: order, bytes counted with the next frame, and a client that does not read."""

from __future__ import annotations

import asyncio
import json

from pipelines.serving.realtime import outbox as outboxes
from pipelines.serving.realtime.outbox import Outbox


def test_events_leave_in_order_with_ids() -> None:
    async def main() -> list[str]:
        sent: list[str] = []

        async def send(frame: str) -> None:
            sent.append(frame)

        outbox = Outbox(send)
        pump = asyncio.create_task(outbox.run())
        for number in range(50):
            outbox.put({"type": "x", "number": number})
        await outbox.drained(5.0)
        pump.cancel()
        assert outbox.bytes == 0
        assert outbox.sent_bytes == sum(map(len, sent))
        return sent

    events = [json.loads(frame) for frame in asyncio.run(main())]
    assert [event["number"] for event in events] == list(range(50))
    assert len({event["event_id"] for event in events}) == 50


def test_sound_waits_for_room_and_control_does_not() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def send(frame: str) -> None:
            await gate.wait()

        outbox = Outbox(send, slow_s=30.0)
        pump = asyncio.create_task(outbox.run())
        outbox.put({"type": "sound", "delta": "x" * (outboxes.MOST_BYTES + 1)})
        waiting = asyncio.create_task(outbox.room())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        outbox.put({"type": "control"})  # let in, whatever waits
        gate.set()
        await asyncio.wait_for(waiting, 5.0)
        await outbox.drained(5.0)
        pump.cancel()
        assert not outbox.stuck.is_set()

    asyncio.run(main())


def test_a_client_that_does_not_read_is_found_out() -> None:
    async def main() -> tuple[bool, bool]:
        async def never(frame: str) -> None:
            await asyncio.sleep(3600)

        slow = Outbox(never, slow_s=0.05)
        pump = asyncio.create_task(slow.run())
        slow.put({"type": "x"})
        await asyncio.wait_for(slow.stuck.wait(), 5.0)
        pump.cancel()
        full = Outbox(never)
        full.put({"type": "x", "delta": "y" * outboxes.HARD_BYTES})
        return slow.stuck.is_set(), full.stuck.is_set()

    assert asyncio.run(main()) == (True, True)


def test_a_cancellation_that_comes_as_a_frame_leaves_ends_the_sender() -> None:
    async def main(turns: int) -> None:
        leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def send(frame: str) -> None:
            await leaving

        outbox = Outbox(send)
        pump = asyncio.create_task(outbox.run())
        outbox.put({"type": "x"})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leaving.set_result(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        pump.cancel()
        done, _ = await asyncio.wait([pump], timeout=1.0)
        assert done, "the sender goes on after it was cancelled"

    for turns in range(4):
        asyncio.run(main(turns))
