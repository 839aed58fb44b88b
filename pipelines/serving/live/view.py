"""``omni-ray train RECIPE --live-port 8000``: the served model's surface over a run that trains."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import uvicorn

from actors.pool import Pool
from omni_ray.config.recipe import Recipe
from omni_ray.observability.events import emit
from omni_ray.training.prepare import fitting_tokenizer
from pipelines.serving.gateway import Gateway
from pipelines.serving.guard import check_port
from pipelines.serving.listener import DRAIN_S, patient_socket, server_config
from pipelines.serving.live.stages import LiveStages

HOST = "127.0.0.1"
"""Others reach it through a tunnel; a run asks nobody for keys."""
LEAST_S = 1.0
"""Time in which those who look are answered, at least, each time that the training waits for them."""
READY_S = 30.0


class LiveView:
    """A server in a thread; the training lets its callers in between two steps."""

    def __init__(self, port: int) -> None:
        """Check the port; 0 takes a free one.

        Raises:
            ResourceError: it is taken.
        """
        self.port = check_port(HOST, port)
        self._stages: LiveStages | None = None
        self._thread: threading.Thread | None = None
        self._loop = asyncio.new_event_loop()
        self._last = time.monotonic()
        self.pauses = 0
        """How often the training has waited."""
        self.paused_s = 0.0
        """How long in all."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def start(self, recipe: Recipe, root: Path, pools: Mapping[str, Pool]) -> None:
        """Listen.

        Args:
            recipe: The run.  root: Its data.  pools: Mapping that names the pools of any time.
        """
        tokenizer = fitting_tokenizer(recipe, root)
        self._stages = LiveStages(pools, tokenizer, recipe.schedule.timeout_s)
        gateway = Gateway(recipe, tokenizer, None, self._stages)
        self._server = uvicorn.Server(server_config(gateway.asgi(), gateway.limits, {}))
        listening = patient_socket(HOST, self.port, gateway.limits.half_open_s)
        self._thread = threading.Thread(target=self._run, args=(listening,), name="live-view", daemon=True)
        self._thread.start()
        end = time.monotonic() + READY_S
        while not self._server.started and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        emit("live_view", url=self.url)

    def _run(self, listening: object) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._server.serve(sockets=[listening]))  # type: ignore[list-item]

    def between(self, settle: Callable[[], None]) -> None:
        """Let those in who wait; the training's thread calls this between two steps.

        They get as much time as the training had since they last got some, :data:`LEAST_S` at least.

        Args:
            settle: Ends the steps in flight and brings the weights together; called only when somebody waits.
        """
        if self._stages is None or self._thread is None or not self._thread.is_alive():
            return
        if not self._stages.door.knocking:
            return
        settle()
        began = time.monotonic()
        most_s = max(LEAST_S, began - self._last)
        asyncio.run_coroutine_threadsafe(self._stages.door.let_in(most_s), self._loop).result()
        self._stages.leave()
        self._last = time.monotonic()
        self.pauses += 1
        self.paused_s += self._last - began

    def close(self) -> None:
        """Take leave of those who are there; their answers end."""
        if self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(3 * DRAIN_S)
        if not self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.close()
        emit("live_view_closed", pauses=self.pauses, seconds=round(self.paused_s, 1))
