"""An example reward server: any local reward behind ``/health`` and ``/compute``.

The protocol is described in ``rewards/remote/http_reward.py``; Flow-Factory's client speaks it as well. One machine
samples, another one with a GPU to spare scores. JSON and PNG only, nothing that is sent is ever executed.
"""

import base64
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .knobs import check
from .pictures import to_tensor
from .protocols import Reward, RewardBatch, RewardResult
from .rewards import COMMON, Member, Panel, ask, members
from .rewards.panel import unscored
from .rewards.remote.address import is_loopback

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8090
MAX_REQUEST = 128 * 2**20
"""Bytes; sixteen images of 1024 x 1024 pixels have about 40 MiB."""
MAX_PIXELS = 4096 * 4096
MAX_REQUEST_PIXELS = 4 * MAX_PIXELS
"""Of all images together; as numbers they take 12 bytes each."""
MAX_IMAGES = 1024

log = logging.getLogger("densegrpo.serve")


class RequestError(ValueError):
    """What is wrong with a request, and the HTTP status that says so."""

    def __init__(self, reason: str, status: int = 400):
        super().__init__(reason)
        self.status = status


class Order(NamedTuple):
    """A request to score B images."""

    prompts: Sequence[str]
    images: Sequence[Tensor]
    """[3, H, W] in 0..1 each."""
    metadata: Sequence[Mapping[str, Any]]


def serve(
    entries: Sequence[Mapping[str, Any]],
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    tell: Callable[[str], object] = log.info,
) -> None:
    """Serve the weighted sum of configured rewards until interrupted.

    Raises ValueError when a reward cannot be served or the port cannot be had.
    """
    server = make_server(entries, host, port)
    try:
        tell(greeting(server))
        server.serve_forever()
    finally:
        server.server_close()


class RewardServer(ThreadingHTTPServer):
    """Answers requests for scores; requests are read in threads of their own, models compute one at a time."""

    daemon_threads = True
    request_queue_size = 256
    """Clients that may connect at once: as many as ``workers`` allows. Where more come, some systems turn them away."""
    allow_reuse_address = os.name != "nt"  # there it would let two servers share a port

    def __init__(self, address: tuple[str, int], members: Sequence[Member]):
        super().__init__(address, Handler)
        self.members = members
        self.lock = Lock()

    def scores(self, order: Order) -> tuple[list[float | None], dict[str, str]]:
        """For each image its score or None, and for each index without one the reason."""
        total: list[float | None] = [None] * len(order.prompts)
        reasons: dict[str, str] = {}
        shapes = [tuple(image.shape) for image in order.images]
        for shape in dict.fromkeys(shapes):
            rows = [row for row, other in enumerate(shapes) if other == shape]
            batch = RewardBatch(
                torch.stack([order.images[row] for row in rows]),
                [order.prompts[row] for row in rows],
                [order.metadata[row] for row in rows],
            )
            found, errors = self.summed(batch)
            for index, row in enumerate(rows):
                if index in errors:
                    reasons[str(row)] = errors[index]
                else:
                    total[row] = found[index].item()
        return total, reasons

    def summed(self, batch: RewardBatch) -> tuple[Tensor, dict[int, str]]:
        """The weighted sum of all rewards [B], and why it is NaN."""
        total, errors = torch.zeros(len(batch.prompts)), {}
        for one in self.members:
            with self.lock:
                result = asked(one, batch)
            total += one.weight * result.scores
            errors |= {index: f"{one.label}: {reason}" for index, reason in result.errors.items()}
        return total, {index: errors.get(index, "the weighted sum is not a finite number") for index in unscored(total)}


def asked(one: Member, batch: RewardBatch) -> RewardResult:
    """What a reward says of a batch; a prompt or metadata that it cannot use do not spoil the other images.

    Whoever sends them cannot have them checked before training, as a local run does.
    """
    result = ask(one.label, one.reward, batch)
    if len(result.errors) < len(batch.prompts):
        return result
    pairs = enumerate(zip(batch.prompts, batch.metadata, strict=True))
    errors = {i: "; ".join(found) for i, (text, data) in pairs if (found := one.reward.validate([text], [data]))}
    good = [i for i in range(len(batch.prompts)) if i not in errors]
    if not errors or not good:
        return replace(result, errors=errors or result.errors)
    rest = RewardBatch(batch.images[good], [batch.prompts[i] for i in good], [batch.metadata[i] for i in good])
    again = ask(one.label, one.reward, rest)
    errors |= {good[index]: reason for index, reason in again.errors.items()}
    return RewardResult(result.scores.index_copy(0, torch.tensor(good), again.scores), {}, errors)


def make_server(entries: Sequence[Mapping[str, Any]], host: str, port: int) -> RewardServer:
    """A server that listens, and answers once its ``serve_forever`` runs; port 0: any that is free.

    Raises ValueError when a reward is not a local one, lacks its files, or the port cannot be had.
    """
    wrong = [name for entry in entries for name in entry if name in COMMON and name != "weight"]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} belongs to the run that trains, set it there; a server only weighs")
    served = members([{**entry, "weight": weight_of(entry)} for entry in entries])
    distant = [one.label for one in served if not local(one.reward)]
    if distant:
        raise ValueError(f"{', '.join(distant)} cannot be served: serve a reward that is computed on this machine")
    Panel(served).validate([])
    try:
        return RewardServer((host, port), served)
    except (OSError, OverflowError) as problem:
        raise ValueError(
            f"cannot listen on {host} port {port} ({problem}); choose another --port, or --host 127.0.0.1"
        ) from None


def weight_of(entry: Mapping[str, Any]) -> float:
    """What the reward counts in the sum; a command line gives it as text. Raises ValueError when it is no number."""
    try:
        weight = float(entry.get("weight", 1.0))
    except (TypeError, ValueError):
        raise ValueError(f"reward {entry['name']}: weight must be a number, got {entry['weight']!r}") from None
    check(f"reward {entry['name']}", COMMON, {"weight": weight})
    return weight


def local(reward: Reward) -> bool:
    """Whether this process computes it, not another server or a person."""
    return not (getattr(reward, "remote", False) or getattr(reward, "interactive", False))


def greeting(server: RewardServer) -> str:
    """What is served where, and a warning when others can reach it."""
    host, port = str(server.server_address[0]), server.server_address[1]
    names = " + ".join(one.label if one.weight == 1 else f"{one.weight:g} * {one.label}" for one in server.members)
    lines = [f"serving {names} at http://{host}:{port} (stop with Ctrl-C)"]
    if not is_loopback(host):
        lines += [
            "WARNING: other computers can reach this server. It has no password and no encryption: anyone in the "
            "network can have images scored. Use it behind a firewall, or serve 127.0.0.1 and open an SSH tunnel"
        ]
    return "\n".join(lines)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    timeout = 60
    """Seconds that a client may be silent."""

    def owner(self) -> RewardServer:
        """The server that made this connection."""
        assert isinstance(self.server, RewardServer)
        return self.server

    def do_GET(self) -> None:
        """``/health``."""
        if self.path != "/health":
            return self.answer(404, {"error": f"there is no {self.path[:100]}; ask for /health or POST to /compute"})
        return self.answer(200, {"status": "ok", "rewards": [one.label for one in self.owner().members]})

    def do_POST(self) -> None:
        """``/compute``."""
        try:
            scores, reasons = self.owner().scores(read_request(self.body()))
        except RequestError as problem:
            return self.answer(problem.status, {"error": str(problem)})
        except Exception as problem:  # one request must not end the server
            log.exception("a request failed")
            return self.answer(500, {"error": f"{type(problem).__name__}: {problem}"})
        return self.answer(200, {"rewards": scores, "errors": reasons})

    def body(self) -> bytes:
        """What was sent. Raises RequestError."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 12):
            raise RequestError("the request needs a Content-Length", 411)
        if int(length) > MAX_REQUEST:
            self.discard(min(int(length), 4 * MAX_REQUEST))
            raise RequestError(f"the request has more than {MAX_REQUEST // 2**20} MiB; lower batch_size", 413)
        data = self.rfile.read(int(length))
        if self.path != "/compute":
            raise RequestError(f"there is no {self.path[:100]}; POST to /compute", 404)
        # A page in a browser on this machine cannot send this type to another address without asking first.
        if self.headers.get_content_type() != "application/json":
            raise RequestError("the request must have the Content-Type application/json", 415)
        return data

    def discard(self, length: int) -> None:
        """Read what is refused: a client that still writes would not see the answer."""
        while length > 0 and (part := self.rfile.read(min(length, 2**20))):
            length -= len(part)

    def answer(self, status: int, data: Mapping[str, Any]) -> None:
        """Send JSON; a client that has gone is no problem of ours."""
        body = json.dumps(data, allow_nan=False).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """To the log instead of the terminal."""
        log.debug("%s " + format, self.address_string(), *args)


def read_request(body: bytes) -> Order:
    """The images to score. Raises RequestError that names what is wrong."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as problem:
        raise RequestError(f"the request is not JSON ({problem})") from None
    if not isinstance(data, dict):
        raise RequestError('the request must be an object with "prompt" and "image"')
    prompts, images = listed(data, "prompt"), listed(data, "image")
    metadata = [{}] * len(prompts) if data.get("metadata") is None else listed(data, "metadata")
    if not len(prompts) == len(images) == len(metadata) or len(images) > MAX_IMAGES:
        raise RequestError(
            f'"prompt", "image" and "metadata" must have the same length, {MAX_IMAGES} at most; they have '
            f"{len(prompts)}, {len(images)} and {len(metadata)}"
        )
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError('"prompt" must hold texts')
    if not all(isinstance(entry, dict) for entry in metadata):
        raise RequestError('"metadata" must hold objects')
    return Order(prompts, read_pngs(images), metadata)


def listed(data: Mapping[str, Any], key: str) -> list[Any]:
    """A list of the request."""
    value = data.get(key)
    if not isinstance(value, list):
        raise RequestError(f'the request needs a list "{key}"')
    return value


def read_pngs(texts: Sequence[Any]) -> list[Tensor]:
    """All images of a request. Raises RequestError, also when they are small files of too many pixels."""
    images, pixels = [], 0
    for index, text in enumerate(texts):
        images.append(read_png(text, index))
        pixels += images[-1][0].numel()
        if pixels > MAX_REQUEST_PIXELS:
            raise RequestError(f"the images have more than {MAX_REQUEST_PIXELS} pixels; send fewer at a time", 413)
    return images


def read_png(text: Any, index: int) -> Tensor:
    """[3, H, W] in 0..1 of a base64 PNG file, RGB with 8 bits. Raises RequestError."""
    try:
        file = base64.b64decode(text, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a stricter limit of our own
            with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise RequestError(f"image {index} has more than {MAX_PIXELS} pixels", 413)
                if image.mode != "RGB":
                    raise RequestError(f"image {index} must be a PNG file in RGB with 8 bits, this is {image.mode}")
                return to_tensor(image)
    except RequestError:
        raise
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as problem:
        raise RequestError(f"image {index} is not the base64 text of a PNG file ({problem})") from None
