"""Who listens: one gateway itself, which takes leave of its clients in order; several behind Ray Serve's proxy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_checkpoint import write_tiny_checkpoint

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

ASKED = {"messages": [{"role": "user", "content": "which digit is it"}], "max_tokens": 4, "temperature": 0, "seed": 1}


def asked(url: str) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/chat/completions", json=ASKED, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    message: dict[str, Any] = answer.json()["choices"][0]["message"]
    return message


def test_one_gateway_and_several_answer_alike_and_one_takes_leave(ray_cluster: None, tmp_path: Path) -> None:
    from ray import serve as ray_serve
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    from pipelines.serving.app import APP_NAME, serve

    alone = write_tiny_checkpoint(tmp_path / "alone")
    with serve(alone, port=0, block=False) as served:
        said = asked(served.url)
        assert not ray_serve.status().proxies
        with connect(served.url.replace("http", "ws", 1) + "/v1/realtime") as talk:
            assert json.loads(talk.recv(timeout=20))["type"] == "session.created"
            served.close()
            with pytest.raises(ConnectionClosed) as left:
                talk.recv(timeout=20)
        assert left.value.rcvd is not None
        assert left.value.rcvd.code == 1012
        assert APP_NAME not in ray_serve.status().applications
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/healthz", trust_env=False)
    ray_serve.shutdown()
    pair = write_tiny_checkpoint(tmp_path / "pair", serving={"pools": {"gateway": {"replicas": 2}}})
    with serve(pair, port=0, block=False) as served:
        assert ray_serve.status().proxies
        assert asked(served.url) == said
    ray_serve.shutdown()
