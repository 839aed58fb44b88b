"""A gateway that listens itself: one process between a client and the stages, where Serve's proxy would be a second."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from ray.serve.handle import DeploymentHandle

from omni_ray.config.serving import Limits
from omni_ray.types.errors import ResourceError
from pipelines.serving.frames import FrameProtocol
from pipelines.serving.gateway import ServeGateway
from pipelines.serving.guard import Asgi, listening_socket
from pipelines.serving.realtime.socket import MOST_FRAME_CHARACTERS

DRAIN_S = 3
"""Time for answers in progress and for live conversations to take leave; those are told 1012, come again."""

SEND_BUFFER_BYTES = 256 * 2**10
"""What the system takes for a client that does not read: three seconds of sound, so that its slowness is soon felt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where a gateway listens."""

    host: str
    """A name or address of this machine."""
    port: int
    """A free port."""
    tls: dict[str, str] = field(default_factory=dict)
    """``ssl_certfile`` and ``ssl_keyfile``, or nothing."""


class ListeningGateway(ServeGateway):
    """See :class:`pipelines.serving.gateway.ServeGateway`; there is one of it, on the machine that serves."""

    def __init__(self, listen: Listen, checkpoint: str, api_key_file: str | None, **stages: DeploymentHandle) -> None:
        """Load, and listen before the replica counts as ready; Ray Serve calls this in the replica's event loop.

        Raises:
            ResourceError: the port is taken.
        """
        super().__init__(checkpoint, api_key_file, **stages)
        self._server = uvicorn.Server(server_config(self.asgi(), self.limits, listen.tls))
        listening = patient_socket(listen.host, listen.port, self.limits.half_open_s)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))

    async def census(self) -> dict[str, int]:
        """See the gateway's; and the connections that are open, told apart from Ray's own files."""
        return {**await super().census(), "connections": len(self._server.server_state.connections)}

    def check_health(self) -> None:
        """Ray Serve asks; a gateway that no longer listens is replaced.

        Raises:
            ResourceError: it has stopped listening.
        """
        if self._serving.done() and not self._server.should_exit:
            raise ResourceError("the gateway no longer listens; it is started again")

    async def drain(self) -> None:
        """Take nothing new, let go of clients in order, return when all have gone."""
        self._server.should_exit = True
        await asyncio.wait({self._serving}, timeout=2 * DRAIN_S)


def server_config(app: Asgi, limits: Limits, tls: dict[str, str]) -> uvicorn.Config:
    """How the gateway's own server behaves: frames, pings, and the time for its leave."""
    return uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        ws=FrameProtocol,
        ws_max_size=MOST_FRAME_CHARACTERS + 1024,
        ws_ping_interval=limits.ping_s,
        ws_ping_timeout=limits.half_open_s - limits.ping_s,
        timeout_graceful_shutdown=DRAIN_S,
        **tls,  # type: ignore[arg-type]
    )


def patient_socket(host: str, port: int, half_open_s: float) -> socket.socket:
    """A listening socket whose connections hold little for a peer that does not read, and end when it is gone.

    Both options go over to the accepted connections.  Without the time-out a connection to a peer that stopped reading
    stays, closed and unsent, until the system gives up on it after a quarter of an hour.

    Raises:
        ResourceError: see :func:`pipelines.serving.guard.listening_socket`.
    """
    listening = listening_socket(host, port)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * half_open_s))
    return listening


def on_this_node(chosen: dict[str, Any]) -> dict[str, Any]:
    """Deployment options with the replica held to the machine of the caller, whose address clients are told."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    names = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    place = next(name for name in names if name.startswith("node:") and name != "node:__internal_head__")
    actor = dict(chosen["ray_actor_options"])
    actor["resources"] = {**actor.get("resources", {}), place: 0.001}
    return chosen | {"ray_actor_options": actor}
