"""What the ComfyUI page sees of a run: progress bar, preview, text, events, and a route to rebuild from."""

import time
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
from aiohttp import web
from server import PromptServer

from ..engine.pictures import grid
from ..engine.run import Run
from ..engine.session import Progress, Session
from ..engine.watch import postfix

EVENT = "densegrpo.progress"
PREVIEW_SIZE = 512


def runs_folder() -> Path:
    """Where all runs of this host are."""
    return Path(folder_paths.get_output_directory()) / "densegrpo"


class Follower:
    """Shows the progress of one run on its node."""

    def __init__(self, node_id: str):
        self.node_id, self.start, self.first = node_id, time.monotonic(), 0
        self.bar: Any = None

    def __call__(self, session: Session, progress: Progress) -> None:
        """Update the bar, the preview and the text, and tell every open page."""
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(max(progress.total, 1), node_id=self.node_id)
            self.first = progress.number - (progress.iteration is not None)
        images = progress.iteration.images if progress.iteration else None
        if images is None and progress.evaluation:
            images = progress.evaluation.images
        preview = None if images is None else ("JPEG", grid(images[:16], columns=4, smallest=96), PREVIEW_SIZE)
        self.bar.update_absolute(progress.number, max(progress.total, 1), preview)
        text = f"{progress.number}/{progress.total}  {postfix(progress)}  {self.remaining(progress)}"
        if PromptServer.instance is not None:
            PromptServer.instance.send_progress_text(text, self.node_id)
            rows = session.run.metrics()
            data = {"node": self.node_id, "run": session.run.folder.name, "total": progress.total, "row": rows[-1]}
            PromptServer.instance.send_sync(EVENT, data)

    def remaining(self, progress: Progress) -> str:
        """Time to go at the speed so far."""
        done = progress.number - self.first
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self.start) / done * (progress.total - progress.number)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


async def status(request: web.Request) -> web.Response:
    """``GET /densegrpo/status?run=NAME``: all metrics of a run; without ``run`` the names of all runs."""
    folder, name = runs_folder(), request.query.get("run")
    names = sorted(p.name for p in folder.iterdir() if (p / "config.json").is_file()) if folder.is_dir() else []
    if name is None:
        return web.json_response({"runs": names})
    if name not in names:
        return web.json_response({"error": f"no run {name!r}", "runs": names}, status=404)
    run = Run.open(folder / name)
    return web.json_response({"run": name, "total": run.config.training.iterations, "rows": run.metrics()})


def add_routes() -> None:
    """Called once when the nodes are loaded; there is no server when a tool only reads the nodes."""
    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.routes.get("/densegrpo/status")(status)
