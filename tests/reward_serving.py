"""A reward server of our own in a thread, and ways to talk to it."""

import base64
import io
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import torch
from densegrpo.engine.rewards.remote.http_reward import RemoteHttp
from densegrpo.engine.serve import make_server
from PIL import Image


@contextmanager
def serving(*entries, members=None):
    server = make_server(entries or [{"name": "brightness"}], "127.0.0.1", 0)
    if members:
        server.members = members
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def client(url, **options):
    return RemoteHttp(**{"url": url, "timeout": 5.0, "patience": 0.0, **options})


def eight_bit_images(num=6, height=24, width=20, seed=0):
    return torch.randint(0, 256, (num, 3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


def png(mode="RGB", size=(4, 4), kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def post(url, data, path="/compute", content_type="application/json"):
    """(status, answer) of a raw request."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as problem:
        return problem.code, json.loads(problem.read())


@contextmanager
def raw_connection(url, text):
    """A socket on which ``text`` was sent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(text.encode())
        yield connection
