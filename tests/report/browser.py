"""A headless Chromium through chromedriver's HTTP interface, with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    if shutil.which("chromedriver") is None:
        return "chromedriver is not installed"
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        return "Chromium is not installed"
    return None


class Browser:
    """One session of a headless browser."""

    def __init__(self) -> None:
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._base = f"http://127.0.0.1:{self._port()}"
        binary = next(
            path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))
        )
        options = {"binary": binary, "args": list(FLAGS)}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            answer = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._driver.kill()
            raise
        self._base += f"/session/{answer['sessionId']}"

    def _port(self) -> int:
        assert self._driver.stdout is not None
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            line = self._driver.stdout.readline()
            if "successfully on port" in line:
                return int(line.rstrip().rstrip(".").rpartition(" ")[2])
        raise RuntimeError("chromedriver did not start")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **params: Any) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": command, "params": params})

    def open(self, page: Path, width: int, height: int, mobile: bool = False, dark: bool = False) -> None:
        """Load a file in a window of this size; phone widths need device metrics, not a window size."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self._post("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self._post("/execute/sync", {"script": f"return {script}", "args": []})

    def messages(self) -> list[dict[str, Any]]:
        """What the page wrote to the console, and errors of loading, since the last call."""
        found: list[dict[str, Any]] = self._post("/se/log", {"type": "browser"})
        return found

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(data["data"]))

    def close(self) -> None:
        try:
            request = urllib.request.Request(self._base, method="DELETE")
            urllib.request.urlopen(request, timeout=30).close()
        except (urllib.error.URLError, OSError):
            pass
        self._driver.kill()
        self._driver.wait()
