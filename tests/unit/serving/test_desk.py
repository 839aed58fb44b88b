"""Packets of many sessions through one encoder: the same bits as alone, the one that is due first before the others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import room, voiced

from omni_ray.types.errors import MediaError
from pipelines.serving.desk import MOST_TOGETHER, Desk
from pipelines.serving.rooms import AudioRoom, Packet
from pipelines.serving.stages import SessionLostError

SECOND = 16000


def waves(session: int) -> list[np.ndarray]:
    """Three whole seconds, and a rest of its own length."""
    whole = np.concatenate([room(0.2, SECOND), voiced(3.4 + 0.05 * (session % 3), SECOND, session)])
    return [whole[:SECOND], whole[SECOND : 2 * SECOND], whole[2 * SECOND : 3 * SECOND], whole[3 * SECOND :]]


def alone(model: Any, session: int) -> list[np.ndarray]:
    heard = AudioRoom(model.audio)
    return [heard.hear("s", 1, number, wave_S, number == 3) for number, wave_S in enumerate(waves(session))]


@pytest.mark.parametrize("sessions", [2, 3, 8])
def test_bits_do_not_depend_on_who_shares_a_forward(model_and_stages: Any, sessions: int) -> None:
    """All together; and staggered, so that first packets, middle ones and ends meet."""
    model, _ = model_and_stages
    want = [alone(model, session) for session in range(sessions)]
    for stagger in (0, 1):
        heard = AudioRoom(model.audio)
        got: list[list[np.ndarray]] = [[] for _ in range(sessions)]
        for step in range(4 + stagger * (sessions - 1)):
            asked = [(s, step - s * stagger) for s in range(sessions) if 0 <= step - s * stagger < 4]
            packets = [Packet(str(s), 1, number, waves(s)[number], number == 3) for s, number in asked]
            for (s, _), rows in zip(asked, heard.hear_together(packets), strict=True):
                assert isinstance(rows, np.ndarray)
                got[s].append(rows)
        for mine, expected in zip(got, want, strict=True):
            for rows, right in zip(mine, expected, strict=True):
                assert np.array_equal(rows, right)


def test_one_packet_that_cannot_be_heard_fails_by_itself(model_and_stages: Any) -> None:
    model, _ = model_and_stages
    heard = AudioRoom(model.audio)
    broken = waves(1)[0].copy()
    broken[7] = np.nan
    lost = Packet("lost", 1, 2, waves(2)[2], False)
    packets = [Packet("a", 1, 0, waves(0)[0], False), Packet("b", 1, 0, broken, False), lost]
    fine, nan, gone = heard.hear_together(packets)
    assert np.array_equal(fine, alone(model, 0)[0])  # type: ignore[arg-type]
    assert isinstance(nan, MediaError)
    assert isinstance(gone, SessionLostError)


def test_the_earliest_due_goes_first_and_takes_others_along() -> None:
    """While a group is at work others gather; an end of a turn overtakes packets that have time."""
    groups: list[list[str]] = []

    async def work(packets: Sequence[Packet]) -> list[Any]:
        groups.append([packet.session for packet in packets])
        await asyncio.sleep(0.05)
        return [RuntimeError("no") if packet.session == "bad" else packet.session for packet in packets]

    def asked(desk: Desk[Packet], name: str, time_s: float = 0.25) -> Any:
        return desk.ask(Packet(name, 1, 0, np.zeros(1, np.float32), False), name, time_s)

    async def main() -> list[Any]:
        desk: Desk[Packet] = Desk(work)
        first = asyncio.create_task(asked(desk, "first", 0.0))
        await asyncio.sleep(0.02)
        names = [f"p{i}" for i in range(MOST_TOGETHER + 2)]
        rest = [asyncio.create_task(asked(desk, name)) for name in [*names, "bad"]]
        gone = asyncio.create_task(asked(desk, "gone"))
        ended = asyncio.create_task(asked(desk, "ended"))
        end = asyncio.create_task(asked(desk, "end", 0.0))
        await asyncio.sleep(0)
        gone.cancel()
        desk.forget("ended")
        assert (await asyncio.gather(ended, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        return await asyncio.gather(first, *rest, end, return_exceptions=True)

    told = asyncio.run(main())
    assert groups[0] == ["first"]
    assert groups[1][0] == "end"
    assert len(groups[1]) == MOST_TOGETHER
    worked = sorted(name for group in groups for name in group)
    assert worked == sorted(["first", "end", "bad", *(f"p{i}" for i in range(MOST_TOGETHER + 2))])
    assert isinstance(told[-2], RuntimeError)
    assert told[0] == "first"


# Raised by ray.serve's own settings classes when they are imported.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_pictures_asked_together_have_the_rows_that_they_have_alone(tiny_checkpoint: Path) -> None:
    """Those that come while one is at work go together; one that cannot be encoded fails by itself."""
    from pipelines.serving.replicas import VisionReplica

    draws = np.random.default_rng(0)
    sides = [(56, 56), (28, 84), (56, 28), (112, 56), (84, 84)]
    pictures = [draws.integers(0, 255, (1, *side, 3), dtype=np.uint8) for side in sides]
    bad = np.zeros((1, 30, 30, 3), np.uint8)

    async def main() -> tuple[list[Any], list[int]]:
        replica = VisionReplica(str(tiny_checkpoint))
        alone = [(await replica.features([picture]))[0] for picture in pictures]
        asked = [replica.features(media) for media in ([pictures[0]], pictures[1:3], [bad], [], pictures[3:])]
        first, second, failed, none, last = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(failed, ValueError)
        assert none == []
        for rows, right in zip([*first, *second, *last], alone, strict=True):
            assert np.array_equal(rows, right)
        return alone, replica._desk.groups

    _, groups = asyncio.run(main())
    assert max(groups) > 1, "some went together"
