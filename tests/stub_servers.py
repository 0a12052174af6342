"""Real HTTP servers on this machine that behave well or badly, as a test wants."""

import base64
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from densegrpo.engine.rewards.remote.patience import ABSENCES
from PIL import Image


@dataclass
class Answer:
    data: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay: float = 0.0
    promised: int | None = None
    """Content-Length, where it is not the truth."""
    hang_up: bool = False


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    data: Any


class Stub:
    """``script``: answers in order, the last one for ever; or a function of the request."""

    def __init__(self, *script: Answer | Callable[[Request], Answer], port: int = 0):
        self.script = list(script)
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.gone = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stub.handle(self, None)

            def do_POST(self):
                stub.handle(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args):
                pass

        self.server = Quiet(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        if not port:
            ABSENCES.over(self.url)  # of a server of an earlier test that had the same port

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.gone.set()
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler, body):
        request = Request(handler.command, handler.path, dict(handler.headers), body and json.loads(body))
        with self.lock:
            self.requests.append(request)
            step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        answer = step(request) if callable(step) else step
        self.gone.wait(answer.delay)
        if answer.hang_up:
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        raw = json.dumps(answer.data).encode() if answer.raw is None else answer.raw
        handler.send_response(answer.status)
        handler.send_header("Content-Length", str(len(raw) if answer.promised is None else answer.promised))
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)

    def posts(self):
        return [request for request in self.requests if request.method == "POST"]


def dead_url() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    ABSENCES.over(url)
    return url


@contextmanager
def wire(*parts: bytes, gap: float = 0.0, last: int = 0) -> Iterator[str]:
    """The address of a server that reads each request and sends ``parts``, the last of them ``last`` times more."""
    listener = socket.create_server(("127.0.0.1", 0))
    gone = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            for part in [*parts, *[parts[-1]] * last]:
                connection.sendall(part)
                if gone.wait(gap):
                    return

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    ABSENCES.over(url)
    try:
        yield url
    finally:
        gone.set()
        listener.close()


def grey(text: str) -> float:
    """Mean of a base64 PNG in 0..1."""
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).mean() / 255)


def grey_rewards(request: Request) -> Answer:
    """A reward server that scores with the mean grey."""
    if request.method == "GET":
        return Answer({"status": "ok"})
    return Answer({"rewards": [grey(text) for text in request.data["image"]]})


def chat(text: Any = "", tokens: list[dict[str, float]] | None = None, finish: str = "stop") -> Answer:
    """A chat completion; ``tokens``: word -> probability for each token."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if tokens is not None:
        tops = [[{"token": w, "logprob": math.log(p) if p else -9999.0} for w, p in t.items()] for t in tokens]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": top} for top in tops]}
    return Answer({"choices": [choice]})


def asked_image(request: Request) -> str:
    return request.data["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")


def asked_text(request: Request) -> str:
    return request.data["messages"][0]["content"][1]["text"]


def judge_of(answer: Callable[[Request], Answer] | Answer, model: str = "judge-1") -> Callable[[Request], Answer]:
    """A chat server with one model."""

    def respond(request: Request) -> Answer:
        if request.method == "GET":
            return Answer({"data": [{"id": model}]}) if request.path.endswith("/models") else Answer({}, 404)
        return answer(request) if callable(answer) else answer

    return respond


def grey_yes(request: Request) -> Answer:
    """Yes with the probability of the image's mean grey; bright images answer later."""
    level = grey(asked_image(request))
    time.sleep(0.05 * level)
    return chat("Yes", [{"Yes": level * 0.9, " no": (1 - level) * 0.9, "maybe": 0.1}])
