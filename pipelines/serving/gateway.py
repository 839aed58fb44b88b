"""The gateway: a request in, the stages called through handles, an answer out. It holds no network.

Features travel from the encoders' replicas to the language replica as object references; the gateway does not touch
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import Request
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from omni_ray.config.serving import ServingConfig
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.prompt import read_answer
from omni_ray.inference.requests import Generation
from omni_ray.observability.events import emit
from omni_ray.types.batch import AUDIO_PAD
from omni_ray.types.modality import Modality
from pipelines.serving.answers import Answer, Spoken, Transcripts, completion, cut_at_stop
from pipelines.serving.conversation import read_conversation
from pipelines.serving.errors import ApiError
from pipelines.serving.guard import Asgi, read_api_keys
from pipelines.serving.http import build_http
from pipelines.serving.prompt import Prompt, PromptMaker
from pipelines.serving.protocol import ChatRequest, check_request, read_json
from pipelines.serving.replicas import options, read_recipe

DECODERS = 2
"""Requests whose media are decoded at a time; bounds the memory that unfolded media take."""
READY_TIMEOUT_S = 5.0
SPARE_REQUESTS = 64

T = TypeVar("T")


class Gateway:
    """Behind the endpoints: admission, preparation, and the walk through the stages."""

    def __init__(
        self,
        checkpoint: str,
        api_key_file: str | None,
        vision: DeploymentHandle,
        audio: DeploymentHandle,
        language: DeploymentHandle,
        speech: DeploymentHandle,
    ) -> None:
        folder = Path(checkpoint)
        self.recipe = read_recipe(folder)
        self.limits = self.recipe.serving.limits
        self.keys = read_api_keys(Path(api_key_file)) if api_key_file else ()
        self.name = f"omni-ray-{self.recipe.size}"
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self.maker = PromptMaker(self.recipe.networks, self.tokenizer, self.limits)
        self.stages = {"vision": vision, "audio": audio, "language": language, "speech": speech}
        self.transcripts = Transcripts()
        self._in_flight = 0
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def __serve_build_asgi_app__(self) -> Asgi:
        """The application, built in the replica; the method's name is Ray Serve's."""
        return build_http(self, self.keys, int(self.limits.max_body_mib * 2**20))

    async def complete(self, request: Request) -> dict[str, Any]:
        """Answer one chat request.

        Raises:
            ApiError: 400 a request that cannot be, 413 too large, 415 not JSON, 429 too many, 503 a stage is down.
        """
        with self._admitted():
            _check_type(request)
            raw = await request.body()
            asked, prompt = await self._beside(self._prepare, raw)
            answer = await self._walk(asked, prompt)
            form = asked.audio.format if asked.audio is not None else "wav"
            name = self.transcripts.keep(answer.text) if answer.spoken is not None else ""
            return await self._beside(completion, answer, self.name, form, name)

    async def ready(self) -> dict[str, bool]:
        """Which stages answer within :data:`READY_TIMEOUT_S`."""
        answers = await asyncio.gather(*(self._answers(handle) for handle in self.stages.values()))
        return dict(zip(self.stages, answers, strict=True))

    def _prepare(self, raw: bytes) -> tuple[ChatRequest, Prompt]:
        asked = check_request(read_json(raw), self.limits)
        conversation = read_conversation(asked, self.limits, self.transcripts)
        seed = secrets.randbits(62) if asked.seed is None else asked.seed % 2**63
        return asked, self.maker.make(conversation, asked, seed)

    async def _walk(self, asked: ChatRequest, prompt: Prompt) -> Answer:
        """Encoders side by side, then language, then speech; features pass as references."""
        features = {
            modality: self.stages[modality].features.remote(list(media)) if media else None
            for modality, media in prompt.media.items()
        }
        seen, heard = features[Modality.VISION], features[Modality.AUDIO]
        ids_R5, finished = await _stage("language", self.stages["language"].generate.remote(prompt.rows, seen, heard))
        generation = Generation(ids_R5=torch.from_numpy(ids_R5.copy()), finished=finished)
        found = read_answer(generation, self.tokenizer)
        text, stopped = cut_at_stop(found.text, asked.stop)
        spoken_rows = int((ids_R5[:, 1:] != AUDIO_PAD).any(axis=1).sum())
        spoken = None
        if asked.speaks:
            rate_hz = self.recipe.networks.codec.output_rate_hz
            wave_S = np.zeros(0, np.float32)
            if len(found.codes_N4):
                wave_S = await _stage("speech", self.stages["speech"].decode.remote(found.codes_N4))
            spoken = Spoken(wave_S=wave_S, sample_rate_hz=rate_hz)
        return Answer(
            text=text,
            finish_reason="stop" if finished or stopped else "length",
            prompt_rows=prompt.counts,
            text_rows=len(ids_R5) - spoken_rows,
            audio_rows=spoken_rows,
            spoken=spoken,
        )

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count a request in and out; the one too many is refused at once instead of waiting unseen."""
        if self._in_flight >= self.limits.max_concurrent:
            raise busy(f"{self._in_flight} requests are in flight, as many as this server takes")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def _beside(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run in a decoder thread, so that the event loop goes on answering."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, functools.partial(call, *arguments))

    async def _answers(self, handle: DeploymentHandle) -> bool:
        try:
            await asyncio.wait_for(_awaited(handle.ready.remote()), READY_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException):
            return False
        return True


def busy(why: str) -> ApiError:
    """The 429."""
    return ApiError(429, f"{why}; try again in a second", code="rate_limit_exceeded", headers={"retry-after": "1"})


async def _stage(name: str, response: Any) -> Any:
    """Wait for a stage; its failure is one sentence for the client and one event without anyone's words for the log."""
    try:
        return await response
    except BackPressureError:
        raise busy(f"the {name} stage is full") from None
    except (RayError, RayServeException) as error:
        emit("stage_failed", stage=name, error=type(error).__name__)
        raise ApiError(
            503,
            f"the {name} stage failed on this request; try again, and look at the server's log if it stays",
            code="stage_failed",
            headers={"retry-after": "1"},
        ) from None


async def _awaited(response: Awaitable[T]) -> T:
    return await response


def _check_type(request: Request) -> None:
    """Only JSON: a page of another origin can send other types without asking first."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != "application/json":
        raise ApiError(415, f"the content type is {found[:40] or 'missing'}; send application/json")


def gateway_options(serving: ServingConfig) -> dict[str, Any]:
    """Deployment options of the gateway: room above the admission limit, so that refusals and health checks get in."""
    return options(serving.pools.gateway) | {"max_ongoing_requests": serving.limits.max_concurrent + SPARE_REQUESTS}


GatewayReplica = serve.ingress()(Gateway)
"""The class that Ray Serve puts behind its HTTP proxy."""
