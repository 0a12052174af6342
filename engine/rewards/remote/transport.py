"""JSON over HTTP with patience that ends: urllib only, a limit on everything, and no redirects.

What passes by itself (no connection, no answer in time, HTTP 408, 409, 425, 429, 5xx, a damaged answer) is tried again,
later each time, or when the server says (see ``patience.py``); any other answer fails at once.
"""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotYet
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException, HTTPResponse
from threading import Event
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.error import URLError
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from ...knobs import Text
from ...waiting import Worker
from .address import Server
from .patience import ABSENCES, Attempts, Limits, PassingError, RemoteError

MAX_ANSWER = 8 * 2**20
"""Bytes of one answer."""
PASSING = (408, 409, 425, 429)
"""Statuses below 500 that are tried again."""
BUSY = (429, 502, 503, 504)
"""Statuses that would meet any request now; 500 may be the fault of one image."""

KeyVariable = Annotated[str, Text("environment variable that holds the key, DENSEGRPO_..._API_KEY; empty: no key")]

T = TypeVar("T")


class Received(NamedTuple):
    """An answer."""

    status: int
    retry_after: str | None
    data: bytes


def parse_json(data: bytes) -> Any:
    """The value. Raises PassingError, for an answer may have been cut off."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise PassingError(f"the answer is not JSON: {excerpt(data)}", answered=True) from None


def exchange(
    server: Server,
    path: str,
    payload: Any,
    limits: Limits,
    given_up: Event,
    parse: Callable[[bytes], T] = parse_json,
) -> T:
    """POST ``payload`` as JSON, or GET when it is None, and parse the answer.

    ``given_up``: when it is set there are no new attempts, and waiting for one ends at once.
    Raises UnreachableError when all attempts failed in a way that others would as well, RemoteError when the server
    refuses or fails on this request.
    """
    body = None if payload is None else json.dumps(payload, allow_nan=False).encode()
    attempts = Attempts(server.url, limits)
    while isinstance(answer := once(server, path, body, limits.timeout, parse), PassingError):
        pause = attempts.pause(answer)
        if pause is None or given_up.wait(pause):
            raise attempts.failure(path, answer)
    return answer


def once(
    server: Server, path: str, body: bytes | None, timeout: float, parse: Callable[[bytes], T]
) -> T | PassingError:
    """The parsed answer, or a problem that may pass. Raises RemoteError for one that will not."""
    try:
        return parse(attempt(server, path, body, timeout))
    except PassingError as problem:
        return problem
    except RemoteError as problem:
        raise RemoteError(f"{server.url}{path}: {problem}") from None


def attempt(server: Server, path: str, body: bytes | None, timeout: float) -> bytes:
    """The body of one answer. Raises PassingError or RemoteError."""
    # urllib's own limit is for each piece of an answer, and looking up names has none. Whoever is late is left alone.
    worker = Worker()
    try:
        status, wait, data = worker.submit(partial(received, server, path, body, timeout)).result(timeout)
    except (NotYet, OSError, HTTPException) as problem:
        reason = why(problem, timeout).encode(errors="replace")
        raise PassingError(excerpt(server.without_key(reason))) from None  # it may quote what the server sent
    finally:
        worker.close()
    if status not in BUSY:
        ABSENCES.over(server.url)
    if 200 <= status < 300:
        return data
    reason = f"HTTP {status}: {excerpt(data)}"
    if status in PASSING or status >= 500:
        raise PassingError(reason, retry_after(wait), answered=status not in BUSY)
    if 300 <= status < 400:
        reason = (
            f"HTTP {status}: it sends us elsewhere, which could be a host that is not allowed; use the final address"
        )
    if status in (401, 403):
        reason += "; api_key_variable names the environment variable that holds the key"
    raise RemoteError(reason)


def received(server: Server, path: str, body: bytes | None, timeout: float) -> Received:
    """What a server answers. Raises OSError, HTTPException or RemoteError."""
    headers = {"Accept": "application/json", "User-Agent": "densegrpo"}
    headers |= {} if body is None else {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {server.key}"} if server.key else {}
    end = time.monotonic() + timeout
    with opener(server).open(Request(server.url + path, body, headers), timeout=timeout) as response:
        data = server.without_key(read(response, end))
    return Received(response.status, response.headers.get("Retry-After"), data)


def opener(server: Server) -> OpenerDirector:
    """Nothing but http and https: no redirects, files or FTP, and no proxy for this machine."""
    made = OpenerDirector()
    for handler in (ProxyHandler({} if server.loopback else None), HTTPHandler(), HTTPSHandler()):
        made.add_handler(handler)
    return made


def read(response: HTTPResponse, end: float) -> bytes:
    """The whole body. Raises RemoteError when it is too large, TimeoutError when it is not there at ``end``."""
    expected, body = response.length, bytearray()  # read1 itself does not complain about a body that was cut off
    while (expected is None or len(body) < expected) and (part := response.read1(2**16)):
        body += part
        if len(body) > MAX_ANSWER:
            raise RemoteError(f"it answers with more than {MAX_ANSWER // 2**20} MiB")
        if time.monotonic() > end:
            raise TimeoutError
    if expected is not None and len(body) < expected:
        raise HTTPException(f"the answer was cut off after {len(body)} of {expected} bytes")
    return bytes(body)


def why(problem: Exception, timeout: float) -> str:
    """A failed connection in words."""
    reason = problem.reason if isinstance(problem, URLError) else problem
    if isinstance(reason, (TimeoutError, NotYet)):
        return f"no answer within {timeout:g} s"
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)


def retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date; None when it says nothing."""
    text = (text or "").strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


def excerpt(data: bytes | str, length: int = 200) -> str:
    """The beginning of what a server sent, on one line and printable."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    text = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * length])
    if text.lstrip().lower().startswith(("<!doctype", "<html")):
        text = "a web page: " + re.sub(r"<[^<>]*>", " ", text)
    text = " ".join(text.split())
    return (f"{text[:length]}..." if len(text) > length else text) or "(empty)"
