"""Drive headless Chromium over the DevTools protocol: open a page, choose files, run scripts, take screenshots.

`Browser.complaints` collects what the console reports: errors, exceptions, blocked resources.
"""

from __future__ import annotations

import base64
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

QUIET = ("--no-first-run", "--disable-background-networking", "--disable-gpu", "--hide-scrollbars")


class Browser:
    """One tab. Context manager; `profile` is a directory of its own. `complaints`: what the console said is wrong."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        self.profile, self.size = profile, (width, height)
        self.complaints: list[str] = []
        self._last = 0

    def __enter__(self) -> Browser:
        # no sandbox: it needs rights that root in a container lacks; the only page is ours
        command = ["chromium", "--headless=new", "--no-sandbox", "--remote-debugging-port=0", *QUIET]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self.profile}", f"--window-size={self.size[0]},{self.size[1]}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        file, end = self.profile / "DevToolsActivePort", time.monotonic() + 60
        while not (file.exists() and file.read_text().count("\n")):
            assert self._process.poll() is None, "chromium ended by itself"
            assert time.monotonic() < end, "chromium does not start"
            time.sleep(0.1)
        port = file.read_text().splitlines()[0]
        tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=60).json()
        address = next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
        self._socket = connect(address, max_size=None, open_timeout=60, ping_interval=None)
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; events that come meanwhile are looked at for complaints."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            said = json.loads(self._socket.recv(timeout=120))
            if said.get("id") == self._last:
                assert "error" not in said, (method, said["error"])
                return said["result"]
            self._notice(said)

    def _notice(self, event: dict[str, Any]) -> None:
        found = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(found["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(found["args"]))

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.until(f"document.readyState === 'complete' && location.href === {json.dumps(address)}")

    def value(self, script: str) -> Any:
        """What an expression is in the page; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 240.0) -> None:
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"the page never came to {script}; it says: {self.text('body')}"
            time.sleep(0.2)

    def text(self, selector: str) -> str:
        """What a reader sees there."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def choose(self, selector: str, *files: Path) -> None:
        """Choose files in an `<input type=file>`, as a user does in the dialogue."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(f) for f in files])

    def drop(self, x: float, y: float, *files: Path) -> None:
        """Drag files over a point of the window and let them fall there."""
        data = {"items": [], "files": [str(f) for f in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press_enter(self) -> None:
        """With its text: without one, Chromium presses no button."""
        for kind, text in (("keyDown", "\r"), ("keyUp", "")):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text=text)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Take the size of another screen, or its colours."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(taken["data"]))
