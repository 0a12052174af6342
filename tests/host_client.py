"""A ComfyUI server of our own, with its own folders, and a page that posts graphs to it and follows them.

Only the standard library: the WebSocket reader understands what a ComfyUI server sends, nothing more.
"""

import base64
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from comfy_host import HOW_TO, ROOT, Host, host  # noqa: F401

BOOT_SECONDS = 120
ENDS = ("execution_success", "execution_error", "execution_interrupted")
Graph = dict[str, dict[str, Any]]
TEXTS = "a red circle\na blue square"
"""Of the demo model's words; the darkness reward needs none of their meaning."""
STEPS = 5
"""A divisor of 1000: only then the host's "simple" noise levels are exactly those of the demo model outside."""


class RefusedError(Exception):
    """The server did not accept a graph: its answer."""


@dataclass(frozen=True)
class Done:
    """How one prompt went."""

    prompt_id: str
    status: str
    """``success``, ``error`` or ``interrupted``"""
    events: list[tuple[str, Any]]
    """(type, data) as they came; ("binary", bytes) for previews."""
    outputs: dict[str, Any]
    """From the history: node -> ui."""
    error: str
    """What the failing node says; empty when it went well."""
    wall: float

    def of(self, kind: str) -> list[Any]:
        """The data of all events of a type."""
        return [data for found, data in self.events if found == kind]

    @property
    def executed(self) -> set[str]:
        """Nodes that ran, in contrast to those served from the cache."""
        return {d["node"] for d in self.of("executing") if d["prompt_id"] == self.prompt_id and d["node"]}


@dataclass
class Server:
    """A running ComfyUI."""

    address: str
    base: Path
    """Holds output, models, user, ... of this server alone."""
    log: Path
    schemas: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        """Our run folders."""
        return self.base / "output" / "densegrpo"

    def get(self, path: str) -> Any:
        """JSON of a route."""
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> Any:
        """JSON answer to a POST. Raises RefusedError."""
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}{path}", json.dumps(data).encode(), header)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as problem:
            raise RefusedError(problem.code, json.loads(problem.read())) from None
        return json.loads(body) if body else None

    def node(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """A node with the defaults a page would fill in."""
        if kind not in self.schemas:
            self.schemas |= self.get(f"/object_info/{kind}")
        needed = self.schemas[kind]["input"]
        known = needed["required"] | needed.get("optional", {})
        assert inputs.keys() <= known.keys(), inputs.keys() - known.keys()
        return {"class_type": kind, "inputs": defaults(needed["required"]) | inputs}

    def run(self, graph: Graph, on_event: Any = None, seconds: float = 120) -> Done:
        """Post a graph and follow it to its end."""
        with self.page() as page:
            return page.follow(page.post(graph), on_event, seconds)

    @contextmanager
    def page(self) -> "Iterator[Page]":
        """An open page."""
        page = Page(self)
        try:
            yield page
        finally:
            page.close()

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """Rows of a run, through the status route."""
        return self.get(f"/densegrpo/status?run={urllib.parse.quote(run)}")["rows"]


def defaults(inputs: dict[str, Any]) -> dict[str, Any]:
    """Values of the widgets among the inputs of a node."""
    found = {}
    for name, (kind, *rest) in inputs.items():
        options = rest[0] if rest else {}
        if isinstance(kind, list) or "options" in options:
            found[name] = options.get("default", (kind if isinstance(kind, list) else options["options"])[:1])
            found[name] = found[name][0] if isinstance(found[name], list) else found[name]
        elif "default" in options:
            found[name] = options["default"]
    return {name: value for name, value in found.items() if value is not None}


class Page:
    """One WebSocket, as an open browser page has it."""

    def __init__(self, server: Server):
        self.server, self.client = server, uuid.uuid4().hex
        name, _, port = server.address.partition(":")
        self.socket = socket.create_connection((name, int(port)), timeout=120)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET /ws?clientId={self.client} HTTP/1.1",
            f"Host: {server.address}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        )
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        self.file = self.socket.makefile("rb")
        assert b" 101 " in self.file.readline()
        while self.file.readline().strip():
            pass

    def close(self) -> None:
        """Hang up."""
        self.file.close()
        self.socket.close()

    def frame(self) -> tuple[int, bytes]:
        """(opcode, payload) of one frame; servers do not mask theirs."""
        first, second = self.file.read(2)
        assert first & 0x80, "a message in parts"
        size = second & 0x7F
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        return first & 0x0F, self.file.read(size)

    def event(self) -> tuple[str, Any]:
        """The next message: (type, data), or ("binary", bytes)."""
        while True:
            opcode, payload = self.frame()
            assert opcode != 8, "the server hung up"
            if opcode == 2:
                return "binary", payload
            if opcode == 1:
                message = json.loads(payload)
                return message["type"], message["data"]

    def post(self, graph: Graph) -> str:
        """Queue a graph; returns its id. Raises RefusedError."""
        return self.server.post("/prompt", {"prompt": graph, "client_id": self.client})["prompt_id"]

    def follow(self, prompt_id: str, on_event: Any = None, seconds: float = 120) -> Done:
        """All that happens until that prompt ends; ``on_event(type, data)`` sees it as it happens."""
        start, events = time.monotonic(), []
        while True:
            kind, data = self.event()
            events.append((kind, data))
            if on_event:
                on_event(kind, data)
            if kind in ENDS and data["prompt_id"] == prompt_id:
                break
            assert time.monotonic() - start < seconds, f"not done after {seconds} s; last: {events[-5:]}"
        error = data.get("exception_message", "").strip() if kind == "execution_error" else ""
        outputs = self.history(prompt_id)["outputs"]
        return Done(
            prompt_id, kind.removeprefix("execution_"), events, outputs, error, round(time.monotonic() - start, 1)
        )

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The entry in the history, which is made a moment after the last event."""
        for _ in range(100):
            found = self.server.get(f"/history/{prompt_id}")
            if prompt_id in found:
                return found[prompt_id]
            time.sleep(0.05)
        raise AssertionError(f"no history of {prompt_id}")


@contextmanager
def serve(host: Host, base: Path) -> Iterator[Server]:  # noqa: F811
    """A server on a free port that writes only below ``base``; stopped at the end."""
    for name in ("custom_nodes", "user", "input", "models/loras"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "ComfyUI-DenseGRPO").symlink_to(ROOT, target_is_directory=True)
    (base / "custom_nodes" / "memory_limit.py").symlink_to(ROOT / "tests" / "host_memory_limit.py")
    # Whatever folders the user configured: LoRAs of these tests go below ``base``.
    (base / "paths.yaml").write_text(f"tests:\n  is_default: true\n  base_path: {base}\n  loras: models/loras\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [host.python, str(host.folder / "main.py"), "--cpu", "--listen", "127.0.0.1"]
    command += ["--port", address.partition(":")[2], "--disable-api-nodes", "--disable-auto-launch"]
    command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base / 'comfy.db'}"]
    command += ["--extra-model-paths-config", str(base / "paths.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    log = base / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=base, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            server = Server(address, base, log)
            wait_for(server, process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(server: Server, process: subprocess.Popen) -> None:
    """Until it answers."""
    start = time.monotonic()
    while time.monotonic() - start < BOOT_SECONDS:
        if process.poll() is not None:
            tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-20:])
            if "ModuleNotFoundError" in tail:
                pytest.skip(f"this ComfyUI does not start ({tail.splitlines()[-1]}); {HOW_TO}")
            pytest.fail(f"ComfyUI ended while starting:\n{tail}")
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"ComfyUI did not answer within {BOOT_SECONDS} s, see {server.log}")


@pytest.fixture(scope="module")
def server(host, tmp_path_factory):  # noqa: F811
    """A real ComfyUI with this package, for one module."""
    with serve(host, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


def training(server: Server, name: str, **options: Any) -> Graph:
    """A small graph that trains the demo model to paint dark pictures."""
    node = server.node
    update = node("DenseGRPOPolicyUpdate", lr=1e-3, clip_range=1e-2, kl_weight=0.0, rank=8, alpha=16.0)
    sizes = {"iterations": 2, "groups": 2, "width": 64, "height": 64, "images_per_prompt": 4, "train_batch": 64}
    links = {
        "model": ["demo", 0],
        "vae": ["demo", 2],
        "prompts": ["prompts", 0],
        "held_out_prompts": ["prompts", 0],
        "reward": ["reward", 0],
        "sampler": ["sampler", 0],
        "probe": ["probe", 0],
        "update": ["update", 0],
    }
    return {
        "demo": node("DenseGRPOLoadDemoModel"),
        "prompts": node("DenseGRPOTrainingPrompts", clip=["demo", 1], text=TEXTS),
        "reward": node("DenseGRPORewardModel", reward="darkness"),
        "sampler": node("DenseGRPODenseSampler", num_steps=STEPS, group_size=6),
        "probe": node("DenseGRPORewardProbe"),
        "update": update,
        "train": node("DenseGRPOTrainLoop", run_name=name, **(links | sizes | options)),
    }


def sampling(server: Server, name: str, model: list[Any], seed: int = 7) -> Graph:
    """Stock nodes that sample ``model`` and save images and latents as ``name``."""
    node = server.node
    links = {"model": model, "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    settings = {"seed": seed, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "demo": node("DenseGRPOLoadDemoModel"),
        "text": node("CLIPTextEncode", clip=["demo", 1], text="a red circle"),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=8),
        f"sample {name}": node("KSampler", **links, **settings),
        f"decode {name}": node("VAEDecode", samples=[f"sample {name}", 0], vae=["demo", 2]),
        f"images {name}": node("SaveImage", images=[f"decode {name}", 0], filename_prefix=name),
        f"latents {name}": node("SaveLatent", samples=[f"sample {name}", 0], filename_prefix=name),
    }
