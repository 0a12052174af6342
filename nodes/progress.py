"""What the ComfyUI page sees of a run: progress bar, preview, text, events, and a route to rebuild from."""

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
        self.node_id = node_id
        self.bar: Any = None

    def __call__(self, session: Session, progress: Progress) -> None:
        """Update the bar, the preview and the text, and tell every open page."""
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(max(progress.total, 1), node_id=self.node_id)
        images = progress.iteration.images if progress.iteration else None
        if images is None and progress.evaluation:
            images = progress.evaluation.images
        preview = None if images is None else ("JPEG", grid(images[:16], columns=4, smallest=96), PREVIEW_SIZE)
        self.bar.update_absolute(progress.number, max(progress.total, 1), preview)
        text = f"{progress.number}/{progress.total}  {postfix(progress)}"  # the time left is in the page's own text
        if PromptServer.instance is not None:
            PromptServer.instance.send_progress_text(text, self.node_id)
            run = session.run
            data = {"node": self.node_id, "run": run.folder.name, "total": progress.total, "row": run.last_row()}
            PromptServer.instance.send_sync(EVENT, data)


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
