"""A page in headless Chromium, driven over the pipe of its DevTools protocol."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


def chromium() -> str | None:
    """The path of a browser on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page, and what it has complained of."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from, self._rest, self._number = to_browser, from_browser, b"", 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session: dict[str, Any] = {
            "sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", **self._session)

    def open(self, path: Path, width: int, height: int = 800) -> None:
        """Load a file in a window of that many pixels, as a phone shows it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.ask("Emulation.setDeviceMetricsOverride", **size, **self._session)
        self.ask("Page.navigate", url=path.absolute().as_uri(), **self._session)
        while self.value("document.readyState") != "complete":
            pass

    def value(self, expression: str) -> Any:
        """What a JavaScript expression evaluates to."""
        made = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, **self._session)
        return made["result"].get("value")

    def ask(self, method: str, sessionId: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events on the way are noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if sessionId is not None:
            message["sessionId"] = sessionId
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Log.entryAdded" if event["params"]["entry"]["level"] in ("error", "warning"):
                self.errors.append(event["params"]["entry"]["text"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.errors.append(json.dumps(event["params"]))
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 65536)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_page(browser: str, profile: Path) -> Iterator[Page]:
    """A page of a browser that ends with the block. profile: an empty folder."""
    (commands_read, commands), (answers, answers_write) = os.pipe(), os.pipe()
    # The browser reads commands at descriptor 3 and answers at 4.
    script = f'exec "$0" "$@" 3<&{commands_read} 4>&{answers_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, browser, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(commands_read, answers_write),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    os.close(commands_read)
    os.close(answers_write)
    try:
        yield Page(commands, answers)
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(answers)
