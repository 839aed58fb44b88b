"""A real Chromium with a fake microphone and camera fed from files, driven over its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

NAME = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)


class Browser:
    """One page."""

    def __init__(self, microphone: Path, camera: Path | None = None, size: tuple[int, int] = (1000, 800)) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        fakes = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        fakes.append(f"--use-file-for-fake-audio-capture={microphone}%noloop")
        if camera is not None:
            fakes.append(f"--use-file-for-fake-video-capture={camera}")
        self._process = subprocess.Popen(
            [
                str(NAME),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--mute-audio",
                "--no-first-run",
                "--autoplay-policy=no-user-gesture-required",
                "--remote-debugging-port=0",
                f"--user-data-dir={self._folder.name}",
                f"--window-size={size[0]},{size[1]}",
                *fakes,
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._number = 0

    async def open(self, url: str) -> None:
        import websockets

        port_file = Path(self._folder.name) / "DevToolsActivePort"
        end = time.monotonic() + 120
        while not port_file.exists() or not port_file.read_text().strip():
            assert time.monotonic() < end, "Chromium did not start"
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        pages = json.loads(direct.open(f"http://127.0.0.1:{port}/json/list", timeout=10).read())
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._socket = await websockets.connect(address, max_size=None)
        await self.call("Page.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        await self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            reply = json.loads(await asyncio.wait_for(self._socket.recv(), 120))
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    async def run(self, script: str) -> Any:
        """Value of an expression, as if the user had clicked."""
        out = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    async def until(self, script: str, timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not await self.run(script):
            if time.monotonic() > end:
                raise AssertionError(
                    f"never true: {script}; the page says {await self.run('document.body.innerText')!r}"
                )
            await asyncio.sleep(0.05)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    async def screenshot(self, path: Path) -> None:
        picture = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(picture["data"]))

    async def close(self) -> None:
        if hasattr(self, "_socket"):
            await self._socket.close()
        self._process.terminate()
        self._process.wait(10)
        self._folder.cleanup()
