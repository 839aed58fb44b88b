"""The gateway: a request in, the stages called, an answer out. It holds no network."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from omni_ray.config.recipe import Recipe
from omni_ray.config.serving import ServingConfig
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.vad import voice_activity
from pipelines.serving.answers import Answer, Spoken, Transcripts, completion
from pipelines.serving.census import process_census
from pipelines.serving.chat_stream import chunks, logprobs_of
from pipelines.serving.chat_turn import ChatTurn, Logprob
from pipelines.serving.conversation import read_conversation
from pipelines.serving.errors import busy
from pipelines.serving.guard import Asgi, read_api_keys
from pipelines.serving.http import build_http, check_json
from pipelines.serving.metrics import Metrics
from pipelines.serving.prompt import Prompt, PromptMaker
from pipelines.serving.protocol import ChatRequest, check_request, read_json
from pipelines.serving.realtime.context import Template
from pipelines.serving.replicas import options, read_recipe
from pipelines.serving.serve_stages import ServeStages
from pipelines.serving.stages import Stages

DECODERS = 2
"""Requests whose media are decoded at a time; bounds the memory that unfolded media take."""
SPARE_REQUESTS = 64

T = TypeVar("T")


class Gateway:
    """Behind the endpoints: admission, preparation, and the walk through the stages."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, api_key_file: str | None, stages: Stages) -> None:
        self.recipe = recipe
        self.serving = self.recipe.serving
        self.limits = self.serving.limits
        self.keys = read_api_keys(Path(api_key_file)) if api_key_file else ()
        self.name = f"omni-ray-{self.recipe.size}"
        self.tokenizer = tokenizer
        self.maker = PromptMaker(self.recipe.networks, self.tokenizer, self.limits)
        self.template = Template(self.tokenizer, self.recipe.networks)
        self.activity = voice_activity(self.serving.turn.detector)
        self.stages = stages
        self.transcripts = Transcripts()
        self.metrics = Metrics()
        self.sessions: set[Any] = set()
        self._in_flight: dict[int, int] = {}
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def asgi(self) -> Asgi:
        """The application around this gateway."""
        return build_http(self, self.keys, int(self.limits.max_body_mib * 2**20))

    async def chat(self, request: Request) -> Response:
        """Answer one chat request, whole or as a stream.

        Raises:
            ApiError: 400 a request that cannot be, 413 too large, 415 not JSON, 429 too many, 503 a stage is down.
        """
        held = contextlib.ExitStack()
        try:
            held.enter_context(self.admitted(request))
            check_json(request)
            raw = await request.body()
            asked, prompt = await self.beside(self._prepare, raw)
            turn = self.turn(asked.stop, asked.alternatives)
            pieces = turn.pieces(prompt, asked.speaks)
            if asked.stream:
                frames = chunks(
                    pieces,
                    turn,
                    prompt,
                    asked,
                    model=self.name,
                    tokenizer=self.tokenizer,
                    transcripts=self.transcripts,
                )
                keep = held.pop_all()
                return StreamingResponse(_held(frames, keep), media_type="text/event-stream", headers=STREAM_HEADERS)
            answer = await self._whole(asked, prompt, turn, pieces)
            form = asked.audio.format if asked.audio is not None else "wav"
            name = self.transcripts.keep(answer.text) if answer.spoken is not None else ""
            return JSONResponse(await self.beside(completion, answer, self.name, form, name))
        finally:
            held.close()

    def turn(self, stops: list[str], alternatives: int = -1) -> ChatTurn:
        """A new answer in a session of its own."""
        return ChatTurn(self.stages, self.tokenizer, f"chat_{secrets.token_hex(12)}", stops, alternatives)

    async def ready(self) -> dict[str, bool]:
        """Which stages answer."""
        return dict(await self.stages.ready())

    async def census(self) -> dict[str, int]:
        """What this process holds; all of it is given back when its clients have gone."""
        held = {"sessions": len(self.sessions), "in_flight": sum(self._in_flight.values())}
        return {**held, **process_census()}

    @contextlib.contextmanager
    def admitted(self, request: Any) -> Iterator[None]:
        """Count a request in and out; the one too many is refused at once instead of waiting unseen."""
        key = int(request.scope.get("omni_ray.key", 0))
        total = sum(self._in_flight.values())
        if total >= self.limits.max_concurrent:
            raise busy(f"{total} requests are in flight, as many as this server takes")
        if self._in_flight.get(key, 0) >= self.limits.max_per_key:
            raise busy(f"{self._in_flight[key]} requests of this key are in flight, as many as one key may have")
        self._in_flight[key] = self._in_flight.get(key, 0) + 1
        try:
            yield
        finally:
            self._in_flight[key] -= 1

    async def beside(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run in a decoder thread, so that the event loop goes on answering."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, functools.partial(call, *arguments))

    def _prepare(self, raw: bytes) -> tuple[ChatRequest, Prompt]:
        asked = check_request(read_json(raw), self.limits)
        conversation = read_conversation(asked, self.limits, self.transcripts)
        seed = secrets.randbits(62) if asked.seed is None else asked.seed % 2**63
        return asked, self.maker.make(conversation, asked, seed)

    async def _whole(self, asked: ChatRequest, prompt: Prompt, turn: ChatTurn, pieces: AsyncIterator[Any]) -> Answer:
        text, waves = "", []
        logprobs: list[Logprob] = []
        async for piece in pieces:
            text += piece.text
            waves.append(piece.wave_S)
            logprobs += piece.logprobs
        spoken = None
        if asked.speaks:
            wave_S = np.concatenate(waves) if waves else np.zeros(0, np.float32)
            spoken = Spoken(wave_S=wave_S, sample_rate_hz=self.recipe.networks.codec.output_rate_hz)
        return Answer(
            text=text.strip(),
            finish_reason=turn.finish_reason,
            prompt_rows=prompt.counts,
            text_rows=turn.text_rows,
            audio_rows=turn.audio_rows,
            spoken=spoken,
            logprobs=logprobs_of(logprobs, self.tokenizer) if asked.alternatives >= 0 else None,
        )


class ServeGateway(Gateway):
    """The gateway as a Serve replica."""

    def __init__(
        self,
        checkpoint: str,
        api_key_file: str | None,
        **handles: DeploymentHandle,
    ) -> None:
        """``handles``: vision, audio, language, speech, and prefill where prompts are read apart."""
        recipe = read_recipe(Path(checkpoint))
        stages = ServeStages(recipe.serving.limits.stage_s, **handles)
        super().__init__(recipe, Tokenizer.load(Path(checkpoint) / "tokenizer.json"), api_key_file, stages)
        stages.on_handover = self.metrics.handed

    def __serve_build_asgi_app__(self) -> Asgi:
        """The application, built in the replica; the method's name is Ray Serve's."""
        return self.asgi()


STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


async def _held(frames: AsyncIterator[T], keep: contextlib.ExitStack) -> AsyncIterator[T]:
    """A stream that counts as a request in flight until it ends or its client goes."""
    with keep:
        try:
            async for frame in frames:
                yield frame
        finally:
            await frames.aclose()  # type: ignore[attr-defined]


def gateway_options(serving: ServingConfig) -> dict[str, Any]:
    """Deployment options of the gateway: room above the admission limit, so that refusals and health checks get in."""
    most = serving.limits.max_concurrent + serving.limits.max_sessions + SPARE_REQUESTS
    return options(serving.pools.gateway) | {"max_ongoing_requests": most}


GatewayReplica = serve.ingress()(ServeGateway)
"""The class that Ray Serve puts behind its HTTP proxy."""
