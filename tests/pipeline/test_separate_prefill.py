"""Prefill and decode as deployments of their own: a real server's answers are those of one engine in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = """
    import asyncio, contextlib, json, sys
    from pathlib import Path
    import httpx
    from local_server import Server
    from pipelines.bench.serve_clients import Voice
    from pipelines.serving.app import serve

    words = ["say blue two", "say red seven"]
    asked = {"model": "m", "messages": [{"role": "user", "content": words[0]}], "seed": 5, "temperature": 0.7,
             "max_tokens": 12, "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}

    class Talk(Voice):
        async def _turns(self):
            self.said = []
            for word in words:
                content = [{"type": "input_text", "text": word}]
                await self._send({"type": "conversation.item.create",
                                  "item": {"type": "message", "role": "user", "content": content}})
                await self._send({"type": "response.create"})
                done = await self._until("response.done")
                self.said.append(done["response"]["output"][0]["content"][0]["transcript"])

    @contextlib.contextmanager
    def together(checkpoint):
        server = Server(checkpoint)
        server.start()
        yield server
        server.stop()

    checkpoint, found = Path(sys.argv[1]), {}
    sides = {"together": together(checkpoint),
             "separate": serve(checkpoint, port=0, block=False, prefill_decode="separate")}
    for side, server in sides.items():
        with server as served:
            with httpx.Client(base_url=served.url, timeout=120, trust_env=False) as client:
                message = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]
                voice = Talk(served.url.replace("http", "ws", 1) + "/v1/realtime", {"kind": "turns", "rows": 12}, 0)
                asyncio.run(voice.run())
                ready = client.get("/readyz").json()
                metrics = client.get("/metrics").text
        found[side] = {"audio": message["audio"]["data"], "said": voice.said, "ready": ready,
                       "handovers": [line for line in metrics.splitlines() if "handover" in line and "#" not in line]}
    print(json.dumps(found))
"""


@pytest.mark.full
def test_a_separate_prefill_answers_alike_and_hands_its_cache_over(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(checkpoint)]
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    together, separate = found["together"], found["separate"]
    assert separate["audio"] == together["audio"] != ""
    assert separate["said"] == together["said"]
    assert len(separate["said"]) == 2
    assert "prefill" in json.dumps(separate["ready"])
    counts = dict(line.rsplit(" ", 1) for line in separate["handovers"])
    # Three answers, and the first one's rows back to the reading stage before the second turn.
    assert float(counts["omni_ray_handover_seconds_count"]) == 4
    assert float(counts["omni_ray_handover_bytes_total"]) > 0
    assert float(dict(line.rsplit(" ", 1) for line in together["handovers"])["omni_ray_handover_seconds_count"]) == 0
