"""Which servers may be asked, and with which key. A workflow is untrusted input, and asking uploads images.

This machine is always allowed. Any other host must be named in the user's own settings: the environment variable
``DENSEGRPO_REWARD_HOSTS``, or a source in ``HOST_SOURCES``. Keys are never part of a configuration; it names an
environment variable that was set for this purpose, ``DENSEGRPO_..._API_KEY``, so that a workflow cannot ask for the
keys of other programs.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

HOSTS_VARIABLE = "DENSEGRPO_REWARD_HOSTS"
"""Environment variable: hosts that may be asked, ``host`` or ``host:port``, separated by commas."""
HOST_SOURCES: list[Callable[[], Iterable[str]]] = []
"""A host program appends a function that names more of them, e.g. from a local settings file; asked each time."""
KEY_VARIABLE = re.compile(r"DENSEGRPO_([A-Z0-9]+_)*API_KEY", re.ASCII)
PATH = re.compile(r"[A-Za-z0-9._~/-]*", re.ASCII)
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.ASCII)
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Server:
    """An address that may be asked."""

    url: str
    """Without a slash at the end."""
    loopback: bool
    """Whether it is on this machine."""
    key: str = field(default="", repr=False)
    """Sent as a bearer token; empty: none."""

    def without_key(self, data: bytes) -> bytes:
        """What the server sent, without the key: some repeat it in their error messages."""
        return data.replace(self.key.encode(), b"***") if self.key else data


def connect(url: str, key_variable: str = "") -> Server:
    """The server at ``url``, with the key in the environment variable of that name; nothing is sent yet.

    Raises ValueError for an address that is no plain http(s) URL, a host that is not allowed, a variable that may not
    be read or is not set, and a key that would travel unencrypted.
    """
    parts = parse(url)
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    loopback = is_loopback(host)
    if not loopback and not allowed(host, port):
        raise ValueError(
            f"host {host!r} of {url} is not allowed: it would get your images and prompts, and a workflow made by "
            f"somebody else can name any host. If you trust it, set the environment variable {HOSTS_VARIABLE} to "
            f"{shown(host)}:{port} where this program is started (several: separated by commas)"
        )
    key = read_key(key_variable)
    if key and parts.scheme == "http" and not loopback:
        raise ValueError(
            f"the key in {key_variable} would travel unencrypted to {shown(host)}; use its https address, or a tunnel "
            "that ends on this machine, or leave api_key_variable empty"
        )
    return Server(url.rstrip("/"), loopback, key)


def parse(url: str) -> SplitResult:
    """The parts of a URL. Raises ValueError unless it is scheme, host, port and path, in plain letters."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as problem:
        raise ValueError(f"{url!r} is no address ({problem}); write it like http://127.0.0.1:8000") from None
    plain = url.isascii() and url.isprintable() and not set(url) & set(" @\\?#")
    host = parts.hostname or ""
    good = plain and parts.scheme in PORTS and port != 0 and PATH.fullmatch(parts.path)
    if not good or not (NAME.fullmatch(host) or is_ipv6(host)):
        raise ValueError(
            f"{url!r} must be http:// or https://, a host, perhaps a port and a path, such as http://127.0.0.1:8000; "
            "without user, question mark or #"
        )
    return parts


def is_ipv6(host: str) -> bool:
    """Whether ``host`` is the number of an IPv6 interface."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine: ``localhost``, 127.0.0.0/8 or ::1, and nothing that only looks like it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed(host: str, port: int) -> bool:
    """Whether the user's settings name the host. Raises ValueError for a setting that is none."""
    named = [*os.environ.get(HOSTS_VARIABLE, "").split(","), *(name for source in HOST_SOURCES for name in source())]
    entries = [entry(text) for text in named if text.strip()]
    return (host, port) in entries or (host, None) in entries


def entry(text: str) -> tuple[str, int | None]:
    """``host`` or ``host:port`` -> both; None is any port."""
    parts = urlsplit(f"//{text.strip().lower()}")
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if parts.netloc != text.strip().lower() or "@" in text or not (NAME.fullmatch(host) or is_ipv6(host)):
        raise ValueError(f"{HOSTS_VARIABLE}: {text.strip()!r} must be a host or host:port, such as judge.lan:8000")
    return host, port


def read_key(variable: str) -> str:
    """The key in that environment variable; empty for no name. Raises ValueError, which never shows the key."""
    if not variable:
        return ""
    if not KEY_VARIABLE.fullmatch(variable):
        raise ValueError(
            "api_key_variable is the name of an environment variable that holds the key, and must start with "
            "DENSEGRPO_ and end with API_KEY, such as DENSEGRPO_API_KEY (not the key itself): others belong to "
            "other programs, and a workflow must not be able to send them away"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"environment variable {variable} is not set; set it where this program is started")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"environment variable {variable} holds characters that no key has; copy the key again")
    return key


def shortened(name: str) -> str:
    """The beginning of what may be a key that was written where a name belongs."""
    return repr(name if len(name) <= 8 else f"{name[:4]}...")


def shown(host: str) -> str:
    """As in a URL."""
    return f"[{host}]" if ":" in host else host
