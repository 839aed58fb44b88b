"""Programs of others, unmodified, against a running server: two voice-agent frameworks, each twenty turns with sound,
pictures, interruptions and a new connection; and a tester of HTTP interfaces.  They live in an environment of their own
(``make clients``)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_server import Server, running
from tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(not PYTHON.exists(), reason="pipecat, livekit and schemathesis are not installed: make clients"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Answers end after 30 rows."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("clients"), serving={"limits": {"max_tokens": 30}})
    with running(folder) as server:
        yield server


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six spoken questions of 1.2 s."""
    from pipelines.bench.serve_material import speech

    path = tmp_path_factory.mktemp("speech") / "speech.npy"
    np.save(path, np.stack([speech(1.2, number) for number in range(6)]))
    return path


def dialogue(name: str, url: str, speech: Path) -> dict[str, Any]:
    script = ROOT / "tests" / "clients" / f"{name}_dialogue.py"
    done = subprocess.run([PYTHON, script, url, speech], capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert seen["errors"] == [], done.stderr[-4000:]
    return seen


def test_pipecat(server: Server, speech: Path) -> None:
    seen = dialogue("pipecat", server.url.replace("http", "ws", 1) + "/v1/realtime", speech)
    assert seen["turns"] == 20
    assert seen["interrupts"] == 3
    assert seen["reconnects"] == 1
    assert seen["sound_s"] > 20
    assert server.wait_empty() == dict.fromkeys(server.held(), 0)


def test_livekit(server: Server, speech: Path) -> None:
    seen = dialogue("livekit", f"{server.url}/v1", speech)
    assert seen["turns"] == 20
    assert seen["interrupts"] == 3
    assert seen["reconnects"] >= 1
    assert seen["sound_s"] > 20
    assert server.wait_empty() == dict.fromkeys(server.held(), 0)


def test_schemathesis_meets_no_server_error(server: Server, tmp_path: Path) -> None:
    command = [PYTHON.parent / "schemathesis", "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error"]
    options = ["--max-examples", "40", "--request-timeout", "30", "--seed", "1", "--no-color"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=540, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Tested: 7" in done.stdout
    assert server.wait_empty() == dict.fromkeys(server.held(), 0)
