"""What the page asks and gets, the same for every server that carries it. All that comes in is taken for hostile.

GET ``page`` and the files it loads, ``images/<name>.png``, and ``open``, which says in JSON whether a run asks for
votes. POST, in JSON, by a voter (any name a page chose)::

    look {"voter": V, "active": whether its user moved since the last time}
    vote {"voter": V, "group": GROUP, "ballot": {...} or null to skip}
    stop {"voter": V, "run": the key from the state}

``"showing": GROUP`` in any of them says what is on the page. Each is answered with the state, see ``Room.state``;
without a run that asks for votes it is ``{"state": "idle"}``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint import SaveError
from .board import ClosedError

if TYPE_CHECKING:
    from .room import Room

PREFIX = "/densegrpo/votes/"
"""Before every path, on every server."""
FOLDER = Path(__file__).resolve().parents[2] / "web" / "votes"
HTML, SCRIPT, STYLE = "text/html; charset=utf-8", "text/javascript; charset=utf-8", "text/css; charset=utf-8"
FILES = {
    "page": ("page.html", HTML),
    "page.mjs": ("page.mjs", SCRIPT),
    "panel.js": ("panel.js", SCRIPT),
    "drafts.js": ("drafts.js", SCRIPT),
    "votes.css": ("votes.css", STYLE),
}
JSON = "application/json"
MOST_BYTES = 65536
"""Of a request; a ballot on 500 images fits."""
MOST_LETTERS = 128
"""Of a voter, a group or a key."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer; there is no header that would let other sites read it."""


class Reply(NamedTuple):
    """An answer to a request."""

    status: int
    body: bytes
    kind: str = JSON
    cache: str = "no-store"

    def headers(self) -> dict[str, str]:
        """All headers but the length."""
        return {**HEADERS, "Content-Type": self.kind, "Cache-Control": self.cache}


class RequestError(Exception):
    """A request that no page of ours would send: (status, sentence)."""


def refusal(status: int, reason: str) -> Reply:
    """Why not."""
    return Reply(status, json.dumps({"error": reason}).encode())


def get(room: "Room | None", path: str) -> Reply:
    """Answer a GET of ``path`` (after the prefix) while ``room``, or nothing, asks for votes."""
    if path in FILES:
        file, kind = FILES[path]
        return Reply(200, (FOLDER / file).read_bytes(), kind)
    if path == "open":
        return Reply(200, json.dumps({"open": room is not None}).encode())
    image = room.image(path.removeprefix("images/").removesuffix(".png")) if room else None
    if image is None:
        return refusal(404, "there is nothing here (any more)")
    return Reply(200, image, "image/png", "private, max-age=86400, immutable")


def post(room: "Room | None", path: str, kind: str | None, body: bytes) -> Reply:
    """Answer a POST of ``body``, of content type ``kind``, to ``path`` (after the prefix)."""
    try:
        data = parse(kind, body)
        voter = text(data, "voter")
        if path not in ("look", "vote", "stop"):
            return refusal(404, "there is nothing here")
        if room is None:
            return Reply(200, b'{"state": "idle"}')
        showing = text(data, "showing") if data.get("showing") is not None else None
        act(room, path, voter, data)
    except RequestError as problem:
        return refusal(*problem.args)
    except ClosedError as problem:
        return refusal(409, str(problem))
    except ValueError as problem:
        return refusal(400, str(problem))
    except SaveError as problem:
        return refusal(507, str(problem))
    return Reply(200, json.dumps(room.state(voter, showing)).encode())


def act(room: "Room", path: str, voter: str, data: Mapping[str, Any]) -> None:
    """Do what is asked."""
    if path == "look":
        if data.get("active") is True:
            room.board.move()
    elif path == "vote":
        if "ballot" not in data:
            raise RequestError(400, "a vote needs a ballot, or null to skip")
        room.board.answer(voter, text(data, "group"), data["ballot"])
    elif text(data, "run") != room.key:
        raise RequestError(409, "this page belongs to another run; look again")
    else:
        room.stop()


def parse(kind: str | None, body: bytes) -> dict[str, Any]:
    """The object in a request. A page of another site cannot send this content type without being asked first."""
    if (kind or "").partition(";")[0].strip().lower() != JSON:
        raise RequestError(415, f"the content type must be {JSON}")
    if len(body) > MOST_BYTES:
        raise RequestError(413, f"the request is longer than {MOST_BYTES} bytes")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "the request is not JSON") from None
    if not isinstance(data, dict):
        raise RequestError(400, "the request must be an object")
    return data


def text(data: Mapping[str, Any], name: str) -> str:
    """A short text of a request."""
    value = data.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= MOST_LETTERS or not value.isascii() or not value.isalnum():
        raise RequestError(400, f"{name} must be letters and digits, {MOST_LETTERS} at most")
    return value
