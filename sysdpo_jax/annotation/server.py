"""A page on this machine's own address that asks for preferences, one pair after the other."""

import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from sysdpo_jax.annotation.answers import Answers, StaleError
from sysdpo_jax.annotation.comparisons import Comparison
from sysdpo_jax.annotation.page import SCRIPT, STYLE, Shown, asking_page, shown
from sysdpo_jax.data.annotations import ANSWERS
from sysdpo_jax.errors import ConfigError

HOST = "127.0.0.1"
# Bytes of an answer at most.
LONGEST = 4096
# Seconds that a browser may take to say what it wants.
PATIENCE = 30.0
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'nonce-{0}'; script-src 'nonce-{0}'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


class AskingServer(ThreadingHTTPServer):
    """Asks on 127.0.0.1. The page holds a token without which nothing is answered: other sites' pages cannot know it.

    Args:
        comparisons: In the order of asking.
        answers: Where answers go.
        nodes: Whose values are shown, all by default.
        port: To listen at, 0 for a free one.

    Raises:
        ConfigError: The port cannot be had.
    """

    daemon_threads = True

    def __init__(self, comparisons: Sequence[Comparison], answers: Answers, nodes: Sequence[str], port: int):
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--port {port} cannot be had ({error}): choose another one, or 0 for any") from None
        self.comparisons, self.answers, self.nodes = comparisons, answers, nodes
        self.token, self.lock = secrets.token_urlsafe(32), threading.Lock()
        self._images: list[bytes] = []
        self.asked, self._since = "", 0.0
        self._shown: Shown | None = None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def page(self, notice: str = "") -> tuple[bytes, str]:
        """The page of the pair that is asked now, and its policy."""
        place, number = self.answers.place, len(self.comparisons)
        asked = self.comparisons[place].id if place < number else ""
        self._show(place, asked)
        nonce = secrets.token_urlsafe(16)
        it = self._shown
        names = [*it.left, *(name for name in it.right if name not in it.left)] if it else []
        values: dict[str, Any] = {"place": place, "number": number, "pair": asked, "shown": it, "names": names}
        values |= {"notice": notice, "token": self.token, "nonce": nonce, "style": STYLE, "script": SCRIPT}
        counts = Counter(answer for _, answer in self.answers.judgements)
        return asking_page(counts={name: counts[name] for name in ANSWERS}, **values), POLICY.format(nonce)

    def image(self, number: str) -> bytes | None:
        """A picture of the pair that was shown last, by a number that says nothing of it."""
        return self._images[int(number)] if number.isdecimal() and int(number) < len(self._images) else None

    def answer(self, asked: str, answer: str) -> None:
        """Keep an answer, or take the last one back. Raises `StaleError`, and `ValueError` for what is no answer."""
        if answer == "undo":
            self.answers.take_back(asked)
        elif answer in ANSWERS:
            seconds = time.monotonic() - self._since if asked == self.asked else 0.0
            self.answers.answer(asked, answer, seconds)
        else:
            raise ValueError(f"{answer!r} is no answer")

    def _show(self, place: int, asked: str) -> None:
        """Open the pair, unless it is shown already; pictures are numbered on, so that no browser shows an old one."""
        if asked == self.asked and self._shown is not None:
            return
        self.asked, self._shown, self._since = asked, None, time.monotonic()
        if asked:
            self._images = []
            self._shown = shown(self.comparisons[place], self.nodes, self._place)

    def _place(self, image: bytes) -> str:
        self._images.append(image)
        return f"/pictures/{self.asked}/{len(self._images) - 1}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no fault of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server: AskingServer

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        with self.server.lock:
            if self.path == "/":
                self._send_page(HTTPStatus.OK)
                return
            folder, _, number = self.path.rpartition("/")
            image = self.server.image(number) if folder == f"/pictures/{self.server.asked}" else None
        if image is None:
            self._say(HTTPStatus.NOT_FOUND, "there is no such page")
        else:
            self._send(HTTPStatus.OK, image, "image/png")

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._say(HTTPStatus.LENGTH_REQUIRED, "an answer has a length")
            return
        if int(length) > LONGEST:
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "an answer is short")
            return
        said = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"), keep_blank_values=True)
        token, asked, answer = (said.get(name, [""])[0] for name in ("token", "pair", "answer"))
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._say(HTTPStatus.FORBIDDEN, "the page is of an earlier start of the command: open it again")
            return
        with self.server.lock:
            try:
                self.server.answer(asked, answer)
            except StaleError:
                notice = "That pair was answered in another window: nothing was changed, and this is what is asked now."
                self._send_page(HTTPStatus.CONFLICT, notice)
                return
            except ValueError as error:
                self._say(HTTPStatus.BAD_REQUEST, str(error))
                return
            except OSError as error:
                notice = f"It could not be written ({error.strerror or error}). What is asked here has no answer yet."
                self._send_page(HTTPStatus.INTERNAL_SERVER_ERROR, notice)
                return
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _is_ours(self) -> bool:
        """Whether the browser was told our name: another one that leads here is a foreign page's (DNS rebinding)."""
        if self.headers.get("Host", "") in (f"{name}:{self.server.server_port}" for name in (HOST, "localhost")):
            return True
        self._say(HTTPStatus.FORBIDDEN, f"open {self.server.address}")
        return False

    def _send_page(self, status: HTTPStatus, notice: str = "") -> None:
        page, policy = self.server.page(notice)
        self._send(status, page, "text/html; charset=utf-8", policy)

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(status, f"{text}\n".encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, policy: str = "default-src 'none'") -> None:
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        headers |= {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        headers |= {"Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """The terminal is for what the command says."""
