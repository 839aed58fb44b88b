"""The gateway: a request in, the stages called through handles, an answer out. It holds no network.

Features travel from the encoders' replicas to the language replica as object references; the gateway does not touch
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from pipelines.serving.answers import Transcripts, completion
from pipelines.serving.errors import ApiError, bad_request
from pipelines.serving.guard import Asgi, read_api_keys
from pipelines.serving.http import build_http
from pipelines.serving.protocol import ChatRequest, check_request, read_json
from pipelines.serving.replicas import read_recipe

DECODERS = 2
"""Requests whose media are decoded at a time; bounds the memory that unfolded media take."""
READY_TIMEOUT_S = 5.0
STAGES = ("vision", "audio", "language", "speech")

T = TypeVar("T")
