"""``omni-ray serve`` and the Serve application: ``serve run pipelines.serving.app:app checkpoint=PATH``."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import ssl
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import ray
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve import Application, Deployment
from ray.serve.exceptions import RayServeException

from actors.cluster import LOCAL_CPUS, RaySession
from omni_ray.config.serving import ServingConfig
from omni_ray.observability.events import emit
from omni_ray.types.errors import ConfigError, OmniError, ResourceError
from pipelines.serving.gateway import GatewayReplica, gateway_options
from pipelines.serving.guard import check_address, check_port, check_tls
from pipelines.serving.listener import DRAIN_S, Listen, ListeningGateway, on_this_node
from pipelines.serving.replicas import (
    AudioReplica,
    LanguageReplica,
    SpeechReplica,
    VisionReplica,
    options,
    read_recipe,
    sticky,
)

APP_NAME = "omni-ray"
LOOK_S = 0.5
"""How often a running server looks for a signal that asks for something."""
STAGES: dict[str, type] = {
    "vision": VisionReplica,
    "audio": AudioReplica,
    "language": LanguageReplica,
    "speech": SpeechReplica,
}


class AppArgs(BaseModel):
    """Arguments of the application, in YAML's ``args`` or as words of ``serve run``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    """A checkpoint folder, readable at the same path on every node that holds a replica."""
    api_key_file: str | None = None
    """One key a line; without it only this machine is answered."""
    prefill_decode: Literal["together", "separate"] | None = None
    """Instead of the recipe's ``serving.prefill_decode``."""


def app(args: AppArgs | dict[str, str]) -> Application:
    """Build the application: a gateway over vision, audio, language and speech, sized by the checkpoint's recipe.

    Raises:
        CheckpointError: ``checkpoint`` is not a whole checkpoint.
        ConfigError: arguments that are not known or missing, or an API key file that cannot be used.
    """
    args = _checked(args)
    folder = Path(args.checkpoint).expanduser().resolve()
    key_file = str(Path(args.api_key_file).expanduser().resolve()) if args.api_key_file else None
    check_address("127.0.0.1", Path(key_file) if key_file else None)
    recipe = read_recipe(folder)
    serving = _with(recipe.serving, args.prefill_decode)
    gateway = _deployment(GatewayReplica, "gateway", gateway_options(serving))
    return gateway.bind(str(folder), key_file, **_stages(folder, serving))


def _with(serving: ServingConfig, prefill_decode: str | None) -> ServingConfig:
    return serving if prefill_decode is None else serving.model_copy(update={"prefill_decode": prefill_decode})


def stage_classes(serving: ServingConfig) -> dict[str, type]:
    """The class of every stage's replicas, by the stage's name."""
    return {**STAGES, "prefill": LanguageReplica} if serving.prefill_decode == "separate" else STAGES


def _stages(folder: Path, serving: ServingConfig, version: str | None = None) -> dict[str, Application]:
    stages = {}
    for name, replica in stage_classes(serving).items():
        chosen = options(getattr(serving.pools, name))
        # Pictures belong to nobody's session; the other stages hold sessions.
        chosen = chosen if name == "vision" else sticky(chosen)
        stages[name] = _deployment(replica, name, chosen, version).bind(str(folder))
    return stages


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is deployed, and deployed again."""

    folder: Path
    key_file: str | None
    serving: ServingConfig
    listen: Listen

    @property
    def listens(self) -> bool:
        """One gateway listens itself; several stand behind Ray Serve's proxy."""
        pool = self.serving.pools.gateway
        return max(pool.replicas, pool.max_replicas) == 1

    def run(self, version: int) -> None:
        """Deploy; with another version than before the stages are replaced, and the gateway with its clients stays."""
        chosen, stages = gateway_options(self.serving), _stages(self.folder, self.serving, str(version))
        if self.listens:
            gateway = _deployment(ListeningGateway, "gateway", on_this_node(chosen), "0")
            application = gateway.bind(self.listen, str(self.folder), self.key_file, **stages)
        else:
            gateway = _deployment(GatewayReplica, "gateway", chosen, "0")
            application = gateway.bind(str(self.folder), self.key_file, **stages)
        ray_serve.run(application, name=APP_NAME, route_prefix=None if self.listens else "/")


def _checked(args: AppArgs | dict[str, str]) -> AppArgs:
    """Ray Serve hands the words of its command line over as they are."""
    try:
        return AppArgs.model_validate(args)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(step) for step in first["loc"])
        raise ConfigError(
            f"argument {name} of the application: {first['msg'].lower()}; arguments are checkpoint=PATH, "
            "prefill_decode=together|separate and, for other machines than this, api_key_file=FILE"
        ) from None


def _deployment(replica: type, name: str, chosen: dict[str, Any], version: str | None = None) -> Deployment:
    """``version``: replicas of the same one stay when the application is deployed again; None: they are replaced."""
    wrapped: Any = ray_serve.deployment(name=name, **chosen)(replica)
    # Ray Serve has versions inside and takes them from its own tools only; without, every deploy ends the gateway.
    return wrapped if version is None else wrapped.options(version=version, _internal=True)  # type: ignore[no-any-return]


class Served:
    """A running server; closing it ends what it started."""

    def __init__(self, url: str, session: RaySession) -> None:
        self.url = url
        self.plan: _Plan | None = None
        self._version = 0
        self._session: RaySession | None = session
        self._local = session.owns_connection and not os.environ.get("RAY_ADDRESS")

    def redeploy(self) -> None:
        """Replace every stage's replicas by new ones that read the checkpoint's folder again.

        Live conversations go on: their gateway stays, new replicas are up before old ones end, and what a replica held
        is built again on its successor.

        Raises:
            ResourceError: the server is closed.  CheckpointError: the folder is no whole checkpoint any more.
        """
        if self._session is None or self.plan is None:
            raise ResourceError("the server is closed; start another")
        read_recipe(self.plan.folder)
        began = time.monotonic()
        self._version += 1
        with _quiet():
            self.plan.run(self._version)
        emit("redeployed", checkpoint=str(self.plan.folder), seconds=time.monotonic() - began)

    def close(self) -> None:
        """End the application and, where it was started here, the cluster; may be called twice."""
        session, self._session = self._session, None
        if session is None:
            return
        try:
            with _quiet():
                self._drain()
                ray_serve.delete(APP_NAME)
                if not self._local and not ray_serve.status().applications:
                    ray_serve.shutdown()  # a cluster of our own ends as a whole
        finally:
            session.close()

    def _drain(self) -> None:
        if self.plan is None or not self.plan.listens:
            return
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            ray_serve.get_deployment_handle("gateway", APP_NAME).drain.remote().result(timeout_s=3 * DRAIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def serve(
    checkpoint: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    prefill_decode: str | None = None,
    block: bool = True,
) -> Served:
    """Serve a checkpoint over HTTP and WebSockets.

    One gateway listens itself; several stand behind Ray Serve's proxy (``serving.pools.gateway``).

    Args:
        checkpoint: A checkpoint folder.  host, port: Where to listen; port 0 takes a free one.
        api_key_file: One key a line; needed for any host that others reach.
        tls_cert, tls_key: PEM files; a browser gives its microphone to a secure page (or this machine's own) only.
        prefill_decode: ``together`` or ``separate``, instead of the recipe's.
        block: Stay until SIGINT or SIGTERM, then end everything; False returns the running server at once.
    Returns:
        The server: running if ``block`` is False, else already closed.

    Raises:
        CheckpointError: not a whole checkpoint.  ConfigError: a host that needs a key, or an unusable key file.
        ResourceError: the port is taken, or the deployments do not fit or do not come up.
    """
    check_address(host, api_key_file)
    tls = check_tls(host, tls_cert, tls_key)
    serving = _with(read_recipe(checkpoint).serving, prefill_decode)
    port = check_port(host, port)
    emit("serve_start", checkpoint=str(checkpoint), host=host, port=port)  # replicas load for some seconds
    session = RaySession(num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1))
    served = Served(f"http{'s' if tls else ''}://{_in_url(host)}:{port}", session)
    try:
        check_fits(serving)
        began = time.monotonic()
        key_file = str(api_key_file.expanduser().resolve()) if api_key_file is not None else None
        with _quiet():
            listen = Listen(host=host, port=port, tls=tls)
            _start_serve(plan := _Plan(checkpoint.expanduser().resolve(), key_file, serving, listen))
            served.plan = plan
            plan.run(0)
        _wait_until_answers(served.url)
        emit("serving", url=served.url, checkpoint=str(checkpoint), seconds=time.monotonic() - began)
        if block:
            _wait_for_signal(served)
    except BaseException:
        served.close()
        raise
    if block:
        served.close()
    return served


def _start_serve(plan: _Plan) -> None:
    if plan.listens:
        ray_serve.start(proxy_location="Disabled")
        return
    listen = plan.listen
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": listen.host, "port": listen.port, **listen.tls})


def check_fits(serving: ServingConfig) -> None:
    """Refuse deployments that the cluster cannot hold.

    Raises:
        ResourceError: names the resource, what is asked and what is there.
    """
    total: dict[str, float] = {}
    for name in ("gateway", *stage_classes(serving)):
        pool = getattr(serving.pools, name)
        wants = {"CPU": pool.resources.cpu, "GPU": pool.resources.gpu, **pool.resources.custom}
        for resource, amount in wants.items():
            total[resource] = total.get(resource, 0.0) + amount * pool.replicas
    there = ray.cluster_resources()
    for resource, amount in total.items():
        if amount > there.get(resource, 0.0):
            raise ResourceError(
                f"the deployments ask for {amount:g} {resource}, yet the cluster has {there.get(resource, 0.0):g}; "
                "lower serving.pools.*.replicas or serving.pools.*.resources, or add nodes"
            )


def _wait_until_answers(url: str, timeout_s: float = 30.0) -> None:
    """The proxy starts listening a moment after the replicas are up.

    Raises:
        ResourceError: nothing answers; the cluster's Serve was started before, at another address.
    """
    local = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    # The server was started here a moment ago, by this process: who it is needs no certificate.
    own = ssl._create_unverified_context()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=own))
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError, OSError), direct.open(f"{local}/healthz", timeout=2) as reply:
            if reply.status == 200:
                return
        time.sleep(0.05)
    raise ResourceError(
        f"the replicas are up, yet nothing answers at {url}; if this cluster's Serve was started before, its address "
        "cannot change: end it with `serve shutdown`, or use that address"
    )


def _wait_for_signal(served: Served) -> None:
    """Sleep until SIGINT or SIGTERM; SIGHUP replaces the stages."""
    stop, again = threading.Event(), threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: again.set())
    try:
        while not stop.wait(LOOK_S):
            if again.is_set():
                again.clear()
                _redeploy(served)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _redeploy(served: Served) -> None:
    """What cannot be deployed leaves what is there."""
    try:
        served.redeploy()
    except (OmniError, RayError, RayServeException, RuntimeError) as error:
        emit("redeploy_failed", error=type(error).__name__, reason=str(error)[:200])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Ray Serve's own progress lines and notices; errors are raised anyway."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


__all__ = ["AppArgs", "Served", "app", "serve"]
