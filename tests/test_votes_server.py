"""What the page may ask, and what nobody else may."""

import http.client
import json
import socket
import time

import pytest
import torch
from densegrpo.engine.votes.board import Group, group_id
from densegrpo.engine.votes.pages import MOST_BYTES, post
from densegrpo.engine.votes.room import Room
from densegrpo.engine.votes.server import serve
from densegrpo.engine.votes.store import encode

NAME, FILE = encode(torch.zeros(3, 8, 8))
GROUP = Group(group_id("like", "p", [NAME]), "like", "p", [NAME], 1, 1, None, 1, 60.0)
P = "/densegrpo/votes/"


@pytest.fixture
def room(tmp_path):
    room = Room(tmp_path / "my_run")
    room.files[NAME] = FILE
    room.board.put(GROUP, {})
    return room


@pytest.fixture
def ask(room):
    """``ask(method, path, body, **headers)`` -> (status, headers, body)."""
    with serve(room, 0) as address:
        port = int(address.rstrip("/").rpartition(":")[2])

        def ask(method, path, data=None, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            body = data if data is None or isinstance(data, bytes) else json.dumps(data)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            kind = {"Content-Type": "application/json"} if method == "POST" else {}
            connection.request(method, path, body, kind | named)
            answer = connection.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read()
            connection.close()
            return found

        ask.port = port
        yield ask


def test_the_page_and_what_it_loads_are_served(ask):
    status, headers, _ = ask("GET", "/")
    assert (status, headers["Location"]) == (302, f"{P}page")
    page = ask("GET", f"{P}page")[2].decode()
    for file in ("page.mjs", "panel.js", "drafts.js", "votes.css"):
        status, headers, body = ask("GET", P + file)
        assert status == 200
        assert headers["Content-Type"].startswith("text/css" if file.endswith("css") else "text/javascript")
        assert body
    assert 'src="page.mjs"' in page
    assert json.loads(ask("GET", f"{P}open")[2]) == {"open": True}


def test_an_open_image_is_served_as_it_is(ask):
    status, headers, body = ask("GET", f"{P}images/{NAME}.png")
    assert (status, headers["Content-Type"], body) == (200, "image/png", FILE)


@pytest.mark.parametrize(
    "path",
    [
        f"{P}images/{'0' * 64}.png",
        f"{P}images/../../votes.jsonl",
        f"{P}images/%2e%2e/%2e%2e/votes.jsonl",
        f"{P}../../../etc/passwd",
        f"{P}pages.py",
        f"{P}",
        "/etc/passwd",
        "//etc/passwd",
        "/C:/Windows/win.ini",
    ],
)
def test_nothing_else_is_served(ask, path):
    assert ask("GET", path)[0] == 404


def test_a_vote_settles_the_group_and_is_kept(ask, room):
    status, _, body = ask("POST", f"{P}look", {"voter": "me"})
    state = json.loads(body)
    assert (status, state["state"], state["group"]["prompt"]) == (200, "voting", "p")
    assert 0 < state["group"]["left"] <= 60
    status, _, body = ask("POST", f"{P}vote", {"voter": "me", "group": GROUP.id, "ballot": {"likes": [NAME]}})
    assert (status, json.loads(body)["state"]) == (200, "waiting")
    assert room.board.settled()
    assert room.store.answers(GROUP.id) == {"me": {"likes": [NAME], "dislikes": []}}
    status, _, body = ask("POST", f"{P}vote", {"voter": "you", "group": GROUP.id, "ballot": None})
    assert (status, json.loads(body)["error"]) == (409, "this group is closed already")


def test_every_answer_forbids_foreign_use(ask):
    for method, path in (("GET", f"{P}page"), ("GET", f"{P}images/{NAME}.png"), ("POST", f"{P}look"), ("GET", "/no")):
        headers = ask(method, path, {"voter": "me"} if method == "POST" else None)[1]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("name", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1", "", "10.0.0.1"])
def test_a_name_that_was_made_to_point_here_is_refused(ask, name):
    assert ask("GET", f"{P}page", Host=name)[0] == 403
    assert ask("POST", f"{P}look", {"voter": "me"}, Host=name)[0] == 403


@pytest.mark.parametrize("name", ["localhost", "localhost:9000", "127.0.0.1:9000"])
def test_a_forwarded_port_is_served(ask, name):
    assert ask("GET", f"{P}page", Host=name)[0] == 200
    assert ask("POST", f"{P}look", {"voter": "me"}, Host=name, Origin=f"http://{name}")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost"])
def test_a_page_from_elsewhere_cannot_act(ask, room, origin):
    assert ask("POST", f"{P}stop", {"voter": "me", "run": room.key}, Origin=origin)[0] == 403
    assert not room.stopped


def test_no_form_of_another_page_passes_for_ours(ask, room):
    body = {"voter": "me", "run": room.key}
    assert ask("POST", f"{P}stop", body, Content_Type="text/plain")[0] == 415
    assert ask("POST", f"{P}stop", body, Content_Type="text/plain; application/json")[0] == 415
    assert not room.stopped
    assert ask("OPTIONS", f"{P}stop", Origin="http://evil.example")[0] == 501


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("look", b"{", 400),
        ("look", b"\xff", 400),
        ("look", b"[" * 50_000, 400),
        ("look", [], 400),
        ("look", {}, 400),
        ("look", {"voter": 5}, 400),
        ("look", {"voter": ""}, 400),
        ("look", {"voter": "a/b"}, 400),
        ("look", {"voter": "m" * 129}, 400),
        ("look", {"voter": "me", "showing": ["g"]}, 400),
        ("vote", {"voter": "me", "group": GROUP.id}, 400),
        ("vote", {"voter": "me", "group": GROUP.id, "ballot": {"likes": ["../x"]}}, 400),
        ("vote", {"voter": "me", "group": GROUP.id, "ballot": 3}, 400),
        ("vote", {"voter": "me", "group": "unknown", "ballot": None}, 409),
        ("stop", {"voter": "me", "run": "another"}, 409),
        ("stop", {"voter": "me"}, 400),
        ("dance", {"voter": "me"}, 404),
    ],
)
def test_requests_that_no_page_sends_are_refused(ask, room, path, body, status):
    found, _, answer = ask("POST", P + path, body)
    assert found == status
    assert json.loads(answer)["error"]
    assert not room.board.settled()
    assert not room.stopped


def test_long_requests_are_not_read(ask):
    assert ask("POST", f"{P}look", b" " * (MOST_BYTES + 1))[0] == 413
    assert post(None, "look", "application/json", b" " * (MOST_BYTES + 1)).status == 413
    assert ask("POST", f"{P}look", b"", Content_Length=str(MOST_BYTES + 1))[0] == 413, "it waits for what never comes"
    assert ask("POST", f"{P}look", b"", Content_Length="9" * 5000)[0] == 413
    assert ask("POST", f"{P}look", b"", Content_Length="-1")[0] == 411
    assert ask("POST", f"{P}look", b"{}", Content_Length="\u00b2")[0] == 411


def test_a_vote_that_cannot_be_kept_is_said_and_the_group_stays_open(ask, room, tmp_path):
    (tmp_path / "my_run" / "votes" / "votes.jsonl").mkdir()
    status, _, body = ask("POST", f"{P}vote", {"voter": "me", "group": GROUP.id, "ballot": None})
    assert status == 507
    assert "could not save the vote" in json.loads(body)["error"]
    assert not room.board.settled()


def test_only_this_machine_is_listened_to(ask):
    with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
        socket.create_connection(("127.0.0.2", ask.port), timeout=2)


def test_a_silent_connection_keeps_nobody_waiting(ask):
    with socket.create_connection(("127.0.0.1", ask.port)):
        start = time.monotonic()
        assert ask("GET", f"{P}open")[0] == 200
        assert time.monotonic() - start < 5


def test_a_port_in_use_is_replaced(room):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serve(room, port) as address:
            assert f":{port}/" not in address


def test_the_port_is_free_again_afterwards(room):
    with serve(room, 0) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
    with serve(room, port) as again:
        assert again == address


def test_at_no_moment_are_images_gone_that_were_just_voted_on(tmp_path):
    """A page may ask between any two lines."""
    found = []

    class Watched(Room):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name in ("files", "late") and getattr(self, "asking", False):
                found.append(self.image(NAME))

    room = Watched(tmp_path)
    room.files[NAME] = FILE
    room.asking = True
    room.ask(iter(()))
    assert found == [FILE, FILE]
