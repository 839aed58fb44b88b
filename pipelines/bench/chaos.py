"""Chaos: live sessions while replicas are killed, connections break, stall or rave, and the stages are deployed anew.

Every session is held twice: in quiet, and in the storm.  Whoever was not befallen itself must hear the same bytes, or,
where a stage had no replica left, be told within five seconds.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_ray.types.errors import OmniError
from pipelines.bench.chaos_inside import (
    REPLICAS,
    STAGES,
    Kill,
    Killer,
    census,
    end_stray_stream,
    leaks,
    memory_growth,
    settle,
    stray_stream,
)
from pipelines.bench.serve_material import write_checkpoint
from pipelines.bench.writer import BenchReport, Figure, counted, environment, negative_control, not_run

SESSIONS, QUICK_SESSIONS = 300, 30
TOGETHER = 6
KILLS, QUICK_KILLS = 24, 4
MOST_SESSIONS = 256
"""Of the server: half-open peers hold their places for a while."""
SETTLE_S = 75.0
"""After the last client: half-open peers are let go after 30 s, slow ones after their time."""
AFTERMATH_S = 5.0
"""A stage that has just come back is still met by calls that waited for it."""
MEMORY_GOAL = 0.05
ROOM = {"max_sessions": MOST_SESSIONS, "max_concurrent": MOST_SESSIONS, "max_per_key": MOST_SESSIONS}


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """All figures of the chaos row.

    Args:
        quick: 30 sessions and 4 kills instead of 300 and 24.
        seed: Other sessions, faults and moments.
    """
    sessions = QUICK_SESSIONS if quick else SESSIONS
    figures = storm(sessions, QUICK_KILLS if quick else KILLS, seed)
    return BenchReport(bench="chaos", figures=figures, environment=environment(seed=seed, quick=quick))


def storm(
    sessions: int,
    kills: int,
    seed: int,
    *,
    replicas: int = REPLICAS,
    limits: Mapping[str, float] | None = None,
    redeploys: bool = True,
) -> tuple[Figure, ...]:
    """Serve a tiny model, hold the sessions in quiet and in the storm, deploy anew, and count.

    Args:
        sessions: At least so many; the storm lasts as long as its kills do.  kills, seed: As in :func:`run`.
        replicas: Of each stage; with one every kill leaves a stage empty.
        limits: Of the server, beside room for all.  redeploys: Whether the stages are deployed anew at the end.
    """
    from pipelines.serving.app import serve

    numbers = list(range(sessions))
    pools = {name: {"replicas": replicas} for name in STAGES}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder), {"pools": pools, "limits": {**ROOM, **(limits or {})}})
        with serve(checkpoint, port=0, block=False) as served:
            url = served.url.replace("http", "ws", 1) + "/v1/realtime"
            with clients(url, numbers, seed) as quiet:
                pass
            before = settle(census(), 5.0)[0]
            killer = Killer(seed, kills, Path(folder) / "over", replicas)
            with clients(url, numbers, seed, faults=True, until=killer.over) as stormy:
                killer.stop()
                after, stayed = settle(before, SETTLE_S)
                control = _leak_control(before, stayed)
            dropped, turned = _redeployed(served, url, quiet["seen"], seed) if redeploys else ([], 0)
    found = Findings(quiet["seen"], stormy, killer.kills)
    return (*found.figures(), *_held(before, after, stayed, stormy, control, sessions), *_redeploy(dropped, turned))


@contextmanager
def clients(
    url: str,
    numbers: Sequence[int],
    seed: int,
    *,
    faults: bool = False,
    until: Path | None = None,
    together: int = TOGETHER,
) -> Iterator[dict[str, Any]]:
    """What clients in a process of their own saw; inside, their half-open connections are still held."""
    plan = {"url": url, "numbers": list(numbers), "seed": seed, "faults": faults, "hang": faults, "together": together}
    plan["until"] = None if until is None else str(until)
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines.bench.chaos_clients"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(plan) + "\n")
        process.stdin.flush()
        told = process.stdout.readline()
        if not told:
            raise OmniError(f"the clients ended without a word (exit code {process.wait()}); their error is above")
        yield json.loads(told)
        process.stdin.close()


class Findings:
    """The sessions of the storm against themselves in quiet."""

    def __init__(self, quiet: Sequence[dict[str, Any]], stormy: dict[str, Any], kills: Sequence[Kill]) -> None:
        whole = [seen for seen in quiet if _is_whole(seen)]
        self.quiet = {seen["number"]: seen for seen in whole}
        self.unquiet = [seen for seen in quiet if not _is_whole(seen)]
        self.seen: list[dict[str, Any]] = stormy["seen"]
        self.control: dict[str, Any] = stormy["control"]
        self.kills, self.goal = kills, len(quiet)

    def figures(self) -> Iterator[Figure]:
        """Counts over all sessions."""
        n = len(self.seen)
        yield Figure(name="sessions", value=n, unit="count", better="higher", goal=self.goal, n=n, runs=(n,))
        quiet = len(self.quiet) + len(self.unquiet)
        figure = counted("quiet_damaged", len(self.unquiet), n=quiet, against="sessions that were not whole in quiet")
        yield replace(figure, extra=_cases(self.unquiet))
        hung = [one for one in [*self.unquiet, *self.seen] if one["hang"]]
        against = "waits of over 5 s for an event that is due"
        yield replace(counted("hangs", len(hung), n=n, against=against), extra=_cases(hung))
        damaged = self.damaged(self.seen)
        against = "untouched sessions against the same in quiet: other sound, another ending, or an error event"
        figure = counted("foreign_damage", len(damaged), n=len(self.untouched(self.seen)), against=against)
        yield replace(figure, extra=_cases(damaged))
        flipped = len(self.damaged(self._flipped())) - len(damaged)
        yield negative_control(int(bool(self.control["hang"])), "a relay that falls silent in the middle of a session")
        yield replace(
            negative_control(flipped, "another sound in one untouched session"), name="negative_control_damage"
        )
        yield from self._by_fault(n)

    def untouched(self, seen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Sessions that no fault of their own befell; garbage that is answered leaves a session whole."""
        known = [one for one in seen if one["number"] in self.quiet]
        return [one for one in known if not one["fault"] or (one["fault"] == "garbage" and len(one["statuses"]) == 2)]

    def damaged(self, seen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Untouched sessions that were not as in quiet, and had not a stage without any replica to blame."""
        return [one for one in self.untouched(seen) if not self._as_in_quiet(one) and not self._told(one)]

    def _as_in_quiet(self, one: dict[str, Any]) -> bool:
        quiet = self.quiet[one["number"]]
        same = all(one[name] == quiet[name] for name in ("sound", "sound_bytes", "statuses", "errors"))
        return same and not one["broken"] and not one["hang"]

    def _told(self, one: dict[str, Any]) -> bool:
        """Its response failed, with an error, while a stage had no replica; a session is never cut off."""
        away = any(
            kill.whole and one["began"] <= kill.back + AFTERMATH_S and one["ended"] >= kill.at for kill in self.kills
        )
        return away and "failed" in one["statuses"] and not one["broken"] and not one["hang"]

    def _flipped(self) -> list[dict[str, Any]]:
        whole = [one for one in self.untouched(self.seen) if self._as_in_quiet(one)]
        return [{**one, "sound": "0" * 64} if whole and one is whole[0] else one for one in self.seen]

    def _by_fault(self, n: int) -> Iterator[Figure]:
        faults = Counter(one["fault"] or "none" for one in self.seen)
        for fault in ("none", "reset", "half_open", "slow_reader", "garbage"):
            yield _reported(f"sessions_{fault}", faults[fault], n)
        yield _reported("kills", sum(kill.processes for kill in self.kills), len(self.kills))
        missing = sum(math.isinf(kill.back) for kill in self.kills)
        yield counted(
            "replicas_not_back", missing, n=len(self.kills), against="kills whose replica was not started again"
        )
        told = [one for one in self.untouched(self.seen) if self._told(one)]
        yield _reported("told_failed", len(told), len(self.untouched(self.seen)), "a stage had no replica left")
        waits = tuple(one["longest_wait_s"] for one in self.seen)
        yield Figure(name="longest_wait_s", value=max(waits), unit="s", better="lower", n=n, runs=waits)


def _held(
    before: dict[str, Any],
    after: dict[str, Any],
    stayed: dict[str, int],
    stormy: dict[str, Any],
    control: int,
    sessions: int,
) -> Iterator[Figure]:
    """What was not given back."""
    total = sum(stayed.values()) + max(0, stormy["tasks_left"])
    what = "; ".join(f"{name} {count}" for name, count in stayed.items()) or "nothing stayed"
    against = f"sessions, cache pages, actors, connections, tasks, threads held after over before: {what}"
    yield counted("leaks", total, n=sessions, against=against)
    injected = replace(
        negative_control(control, "a stream on a replica that nobody ends"), name="negative_control_leak"
    )
    yield injected
    growth = memory_growth(before, after)
    yield Figure(
        name="memory_growth",
        value=growth,
        unit="fraction",
        better="lower",
        goal=MEMORY_GOAL,
        against="resident bytes of the process that grew most, over those after the quiet run",
        n=sessions,
        runs=(growth,),
    )


def _leak_control(before: dict[str, Any], stayed: dict[str, int]) -> int:
    """What the bench counts more when one stream stays."""
    stray_stream()
    more = sum(leaks(before, census()).values()) - sum(stayed.values())
    end_stray_stream()
    return more


def _redeployed(served: Any, url: str, quiet: Sequence[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], int]:
    """Sessions that a redeploy of all stages dropped or changed, and how many ran meanwhile."""
    expected = {seen["number"]: seen for seen in quiet if _is_whole(seen)}
    numbers = sorted(expected)[:12]
    work = threading.Thread(target=served.redeploy, name="redeploy")
    work.start()
    dropped: list[dict[str, Any]] = []
    turned = 0
    while work.is_alive() or not turned:
        with clients(url, numbers, seed, together=3) as seen:
            for one in seen["seen"]:
                same = all(one[name] == expected[one["number"]][name] for name in ("sound", "statuses", "errors"))
                if not same or one["broken"] or one["hang"]:
                    dropped.append(one)
                turned += 1
    work.join()
    return dropped, turned


def _redeploy(dropped: Sequence[dict[str, Any]], turned: int) -> Iterator[Figure]:
    if not turned:
        yield not_run("redeploy_dropped", "no session ran", unit="count", better="lower", goal=0)
        return
    against = "sessions during a rolling redeploy of all stages against the same in quiet"
    yield replace(counted("redeploy_dropped", len(dropped), n=turned, against=against), extra=_cases(dropped))


def _is_whole(seen: Mapping[str, Any]) -> bool:
    """Two answers, neither failed, and nothing in between."""
    heard = len(seen["statuses"]) == 2 and "failed" not in seen["statuses"] and seen["sound_bytes"] > 0
    return heard and not seen["broken"] and not seen["hang"] and not seen["errors"]


def _cases(seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first few, for whoever looks for the reason."""
    return {"cases": list(seen[:5])} if seen else {}


def _reported(name: str, count: int, n: int, against: str = "") -> Figure:
    return Figure(name=name, value=count, unit="count", better="lower", against=against, n=n, runs=(count,))
