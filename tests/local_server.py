"""The whole surface in one process: a gateway over stages without Ray, behind uvicorn on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from omni_ray.config.serving import Limits


class Server:
    """A running server."""

    def __init__(self, checkpoint: Path, key_file: Path | None = None, limits: dict[str, Any] | None = None) -> None:
        """``limits``: instead of those of the checkpoint's recipe."""
        from omni_ray.inference.omni_model import load_model
        from pipelines.serving.gateway import Gateway
        from pipelines.serving.listener import patient_socket, server_config
        from pipelines.serving.local_stages import LocalStages
        from pipelines.serving.replicas import read_recipe

        self.model = load_model(checkpoint)
        self.stages = LocalStages(self.model)
        keys = str(key_file) if key_file else None
        self.gateway = Gateway(read_recipe(checkpoint), self.model.tokenizer, keys, self.stages)
        if limits is not None:
            self.gateway.serving = self.gateway.serving.model_copy(update={"limits": Limits.model_validate(limits)})
            self.gateway.limits = self.gateway.serving.limits
        self._socket = patient_socket("127.0.0.1", 0, self.gateway.limits.half_open_s)
        self.port = self._socket.getsockname()[1]
        self._server = uvicorn.Server(server_config(self.gateway.asgi(), self.gateway.limits, {}))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._server.serve(sockets=[self._socket]))

    def start(self) -> None:
        self._thread.start()
        end = time.monotonic() + 30
        while not self._server.started and time.monotonic() < end:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        if self._loop is not None and not self._thread.is_alive():
            self._loop.run_until_complete(self.stages.close())
            self._loop.close()

    def held(self) -> dict[str, int]:
        """What is held for sessions; all zero when nobody is there."""
        stages: Any = self.stages
        return {
            "sessions": len(self.gateway.sessions),
            "ears": len(stages.ears),
            "mouth": len(stages.mouth),
            "language": len(stages.language.engine),
            "in_flight": sum(self.gateway._in_flight.values()),
        }

    def wait_empty(self, timeout_s: float = 5.0) -> dict[str, int]:
        end = time.monotonic() + timeout_s
        while any(self.held().values()) and time.monotonic() < end:
            time.sleep(0.01)
        return self.held()


@contextlib.contextmanager
def running(checkpoint: Path, key_file: Path | None = None, limits: dict[str, Any] | None = None) -> Iterator[Server]:
    server = Server(checkpoint, key_file, limits)
    server.start()
    try:
        yield server
    finally:
        server.stop()
