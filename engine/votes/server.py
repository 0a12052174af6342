"""A small web server on this machine only, for runs without a host that shows the page."""

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from threading import Thread
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from ..checkpoint import SaveError
from .pages import MOST_BYTES, PREFIX, Reply, get, post, refusal

if TYPE_CHECKING:
    from .room import Room

log = logging.getLogger("densegrpo.votes")
LOCAL = ("127.0.0.1", "localhost")
"""Names of this machine, with any port: it may be forwarded (ssh -L). Any other name is a page of the internet that
had its own name point here (DNS rebinding)."""


class Server(ThreadingTCPServer):
    """Answers each request in a thread, none of which outlives the process."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it would let two servers share a port
    room: "Room"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pages come and go: a broken connection is worth no traceback on the terminal."""
        log.debug("a page hung up", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server_version, sys_version = "densegrpo", ""
    timeout = 10

    @property
    def room(self) -> "Room":
        """Whose page it is."""
        return cast(Server, self.server).room

    def do_GET(self) -> None:
        """Files and images."""
        path = urlsplit(self.path).path
        if not self.is_ours():
            self.send(refusal(403, "this page is for this machine only; open it as http://127.0.0.1"))
        elif path == "/":
            self.send(Reply(302, b""), {"Location": f"{PREFIX}page"})
        else:
            self.send(get(self.room, path.removeprefix(PREFIX)) if path.startswith(PREFIX) else nothing())

    def do_POST(self) -> None:
        """Requests of the page."""
        path, length = urlsplit(self.path).path, self.headers.get("Content-Length", "")
        if not self.is_ours() or not self.is_from_here():
            self.send(refusal(403, "only a page from this machine may ask that"))
        elif not path.startswith(PREFIX):
            self.send(nothing())
        elif not (length.isascii() and length.isdigit()):
            self.send(refusal(411, "the request must say how long it is"))
        elif len(length) > 9 or int(length) > MOST_BYTES:
            self.send(refusal(413, f"the request is longer than {MOST_BYTES} bytes"))
        else:
            body = self.rfile.read(int(length))
            self.send(post(self.room, path.removeprefix(PREFIX), self.headers.get("Content-Type"), body))

    def is_ours(self) -> bool:
        """Whether the browser was told to go to this machine."""
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in LOCAL
        except ValueError:
            return False

    def is_from_here(self) -> bool:
        """Whether a page of this server asks; programs, which have no origin, may ask, too."""
        return self.headers.get("Origin") in (None, f"http://{self.headers.get('Host')}")

    def send(self, reply: Reply, more: Mapping[str, str] | None = None) -> None:
        """Answer, with ``more`` headers."""
        self.send_response(reply.status)
        for name, value in {**reply.headers(), "Content-Length": str(len(reply.body)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Not on the terminal."""
        log.debug(format, *args)


def nothing() -> Reply:
    """There is no such page."""
    return refusal(404, "there is nothing here; the page is at /")


@contextmanager
def serve(room: "Room", port: int) -> Iterator[str]:
    """The page of ``room`` while the work within goes on; gives its address.

    When ``port`` is in use it takes any free one, as it does for 0. Raises SaveError when there is none.
    """
    with listen(port) as server:
        server.room = room
        thread = Thread(target=server.serve_forever, args=(0.1,), name="densegrpo votes", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def listen(port: int) -> Server:
    """A server that listens but does not answer yet."""
    try:
        return Server(("127.0.0.1", port), Handler)
    except OSError as problem:
        if port and problem.errno in (errno.EADDRINUSE, errno.EACCES):
            return listen(0)
        raise SaveError(f"could not open a page for votes on this machine: {problem}") from problem
