"""The page for people's votes inside ComfyUI: the engine's answers, carried by the host's server."""

import asyncio

import comfy.model_management
from aiohttp import web
from server import PromptServer

from ..engine.votes import pages
from ..engine.votes.room import HOSTS, ROOMS, Host, Room

EVENT = "densegrpo.votes"
WHERE = f"in the ComfyUI page, or at {pages.PREFIX}page of its address"


def room() -> Room | None:
    """The run that asks for votes now."""
    return ROOMS[-1] if ROOMS else None


async def get(request: web.Request) -> web.Response:
    """``GET /densegrpo/votes/...``: the page, what it loads, and images."""
    return response(pages.get(room(), request.match_info["path"]))


async def post(request: web.Request) -> web.Response:
    """``POST /densegrpo/votes/...``: what a page asks; the host refuses those of other sites before."""
    if request.content_length is None:
        return response(pages.refusal(411, "the request must say how long it is"))
    if request.content_length > pages.MOST_BYTES:
        return response(pages.refusal(413, f"the request is longer than {pages.MOST_BYTES} bytes"))
    body, kind = await request.read(), request.headers.get("Content-Type")
    # A vote is written to the disk, which must not keep the host's other pages waiting.
    return response(await asyncio.to_thread(pages.post, room(), request.match_info["path"], kind, body))


def response(reply: pages.Reply) -> web.Response:
    """As the host's server has it."""
    return web.Response(status=reply.status, body=reply.body, headers=reply.headers())


def add_routes() -> None:
    """Called once when the nodes are loaded; there is no server when a tool only reads the nodes."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    server.routes.get(f"{pages.PREFIX}{{path:.+}}")(get)
    server.routes.post(f"{pages.PREFIX}{{path:.+}}")(post)

    def changed() -> None:
        server.send_sync(EVENT, {})

    HOSTS.append(Host(WHERE, changed, comfy.model_management.interrupt_current_processing))
