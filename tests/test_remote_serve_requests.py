"""What the example reward server takes, and what it refuses."""

import base64
import io
import json
import pickle
import socket
import struct
import time
import urllib.error
import urllib.request
import warnings
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from densegrpo.engine import serve as serve_module
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.serve import make_server
from PIL import Image
from reward_serving import client, eight_bit_images, png, post, raw_connection, serving


def test_flow_factorys_request_is_understood():
    """Its client sends null for what it does not have."""
    nothing = dict.fromkeys(("video", "condition_images", "condition_videos", "metadata"))
    with serving() as url:
        assert post(url, {"prompt": ["a"], "image": [png()], **nothing})[1]["rewards"] == [0.0]


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"{", 400, "is not JSON"),
        (pickle.dumps({"prompt": ["a"]}), 400, "is not JSON"),
        (b"[" * 100_000, 400, "is not JSON"),
        ([], 400, "must be an object"),
        ({}, 400, 'needs a list "prompt"'),
        ({"prompt": "a", "image": "b"}, 400, 'needs a list "prompt"'),
        ({"prompt": ["a"]}, 400, 'needs a list "image"'),
        ({"prompt": ["a", "b"], "image": [png()]}, 400, "they have 2, 1 and 2"),
        ({"prompt": ["a"], "image": [png()], "metadata": []}, 400, "they have 1, 1 and 0"),
        ({"prompt": ["a"], "image": [png()], "metadata": {}}, 400, 'needs a list "metadata"'),
        ({"prompt": ["a"], "image": [png()], "metadata": [5]}, 400, '"metadata" must hold objects'),
        ({"prompt": [5], "image": [png()]}, 400, '"prompt" must hold texts'),
        ({"prompt": ["a"], "image": [5]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": ["*" + png()]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": ["!!"]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": [png()[:60]]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": [png(kind="JPEG")]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": [png("RGBA")]}, 400, "image 0 must be a PNG file in RGB with 8 bits, this is RGBA"),
        ({"prompt": ["a"], "image": [png("L")]}, 400, "this is L"),
        ({"prompt": ["a"] * 2, "image": [png(), png(size=(5000, 5000))]}, 413, "image 1 has more than 16777216 pixels"),
        ({"prompt": ["a"] * 1025, "image": ["x"] * 1025}, 400, "1024 at most"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_with_the_reason_and_the_server_lives_on(data, status, reason):
    with serving() as url:
        found, answer = post(url, data)
        assert (found, set(answer)) == (status, {"error"})
        assert reason in answer["error"]
        assert post(url, {"prompt": ["a"], "image": [png()]})[0] == 200


def test_a_request_may_have_exactly_the_most_images_and_pixels(monkeypatch):
    monkeypatch.setattr(serve_module, "MAX_IMAGES", 2)
    monkeypatch.setattr(serve_module, "MAX_PIXELS", 16)
    with serving() as url:
        assert [post(url, {"prompt": ["a"] * n, "image": [png()] * n})[0] for n in (2, 3)] == [200, 400]
        sizes = ((4, 4), (2, 8), (4, 5))
        assert [post(url, {"prompt": ["a"], "image": [png(size=size)]})[0] for size in sizes] == [200, 200, 413]


def test_pillows_own_limits_neither_warn_nor_break(monkeypatch):
    """It warns of more pixels than its limit, and refuses more than twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert serve_module.read_png(png(size=(4, 4)), 0).shape == (3, 4, 4)
        with pytest.raises(serve_module.RequestError, match=r"image 0 is not .*25 pixels"):
            serve_module.read_png(png(size=(5, 5)), 0)


def test_other_paths_and_types_are_refused():
    with serving() as url:
        good = {"prompt": ["a"], "image": [png()]}
        assert post(url, good, "/other")[0] == 404
        for kind in ("text/plain", "text/json", "application/json5"):
            assert post(url, good, content_type=kind)[0] == 415
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/secret", timeout=5)


def test_a_request_that_is_too_large_is_refused_before_it_is_held(monkeypatch):
    monkeypatch.setattr(serve_module, "MAX_REQUEST", 1000)
    with serving() as url:
        status, answer = post(url, b"x" * 3000)
        assert (status, answer["error"]) == (413, "the request has more than 0 MiB; lower batch_size")
        found = client(url)(RewardBatch(eight_bit_images(1), ["a"], [{}]))
    assert "HTTP 413" in found.errors[0]


@pytest.mark.parametrize(("less", "status"), [(0, 200), (1, 413)])
def test_a_request_may_have_exactly_the_most_bytes(less, status, monkeypatch):
    order = {"prompt": ["a"], "image": [png()]}
    monkeypatch.setattr(serve_module, "MAX_REQUEST", len(json.dumps(order)) - less)
    with serving() as url:
        assert post(url, order)[0] == status


def test_a_client_that_still_writes_sees_why_its_request_is_refused(monkeypatch):
    monkeypatch.setattr(serve_module, "MAX_REQUEST", 2**21)
    with serving() as url:
        assert post(url, b"x" * (7 * 2**20))[0] == 413


def test_a_client_cannot_make_the_server_read_for_ever(monkeypatch):
    monkeypatch.setattr(serve_module, "MAX_REQUEST", 1000)
    request = f"POST /compute HTTP/1.1\r\nContent-Length: {10**9}\r\n\r\n" + "x" * 4000
    with serving() as url, raw_connection(url, request) as connection:
        assert b" 413 " in connection.recv(100)


def test_a_client_that_falls_silent_is_left(monkeypatch):
    monkeypatch.setattr(serve_module.Handler, "timeout", serve_module.Handler.timeout / 300)
    with serving() as url, raw_connection(url, "POST /compute HTTP/1.1\r\nContent-Length: 5\r\n") as connection:
        assert connection.recv(100) == b""


@pytest.mark.parametrize("length", ["", "x", "-5", "\u00b2", "1" * 20])
def test_a_request_without_a_length_is_refused(length):
    with serving() as url:
        request = urllib.request.Request(f"{url}/compute", b"{}", {"Content-Type": "application/json"})
        request.add_unredirected_header("Content-length", length)
        with pytest.raises(urllib.error.HTTPError, match="411"):
            urllib.request.urlopen(request, timeout=5)


def test_what_is_decoded_is_what_was_sent():
    images = eight_bit_images(1, 5, 7)
    pixels = (images[0] * 255).round().byte().movedim(0, -1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found = serve_module.read_png(base64.b64encode(file.getvalue()).decode(), 0)
    assert torch.equal(found, images[0])
    assert np.array_equal((found * 255).round().byte().movedim(0, -1).numpy(), pixels)


def test_the_end_does_not_wait_for_a_client(monkeypatch):
    monkeypatch.setattr(serve_module.Handler, "timeout", 30)
    with ExitStack() as stack:
        with serving() as url:
            stack.enter_context(raw_connection(url, "POST /compute HTTP/1.1\r\nContent-Length: 5\r\n"))
            assert post(url, {"prompt": ["a"], "image": [png()]})[0] == 200
            start = time.monotonic()
        assert time.monotonic() - start < 15


def test_a_client_that_has_gone_and_requests_are_not_written_to_the_terminal(capsys):
    body = json.dumps({"prompt": ["a"], "image": [png(size=(500, 500))]})
    request = f"POST /compute HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    with serving() as url:
        with raw_connection(url, request) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # hang up at once
        time.sleep(0.3)
        assert post(url, {"prompt": ["a"], "image": [png()]})[0] == 200
    assert capsys.readouterr() == ("", "")


def test_small_files_of_too_many_pixels_together_are_refused(monkeypatch):
    monkeypatch.setattr(serve_module, "MAX_REQUEST_PIXELS", 40)
    assert len(serve_module.read_pngs([png(size=(4, 4))] * 2)) == 2
    with pytest.raises(serve_module.RequestError, match="more than 40 pixels; send fewer at a time"):
        serve_module.read_pngs([png(size=(4, 4))] * 3)


def test_many_clients_may_connect_at_once():
    """Nobody is there yet to welcome them."""
    server = make_server([{"name": "brightness"}], "127.0.0.1", 0)
    with ExitStack() as stack:
        stack.callback(server.server_close)
        for _ in range(100):
            stack.enter_context(socket.create_connection(server.server_address, timeout=1))
