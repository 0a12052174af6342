"""``densegrpo rewards --download NAME``: get the published files of a reward, and only then and there.

Nothing else in the package imports this module: training never downloads. The files go into a folder of their own
first and are moved when all of them are there.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from ..packages import pip_install
from . import reward_class
from .files import Need, choose, described, missing, resolve, roots

STAGING = ".download-"
"""Prefix of the folder that files are received in; kept after a failure, so that the next try goes on."""
Fetch = Callable[[str, list[str], Path], object]
"""(repository, file names, folder) -> the files are in that folder."""


def download_reward(name: str, say: Callable[[str], object], agreed: Callable[[str], bool]) -> bool:
    """Get what a reward needs and does not have; whether it is complete now.

    ``agreed`` is asked before anything is fetched. Raises ValueError when there is nothing published to get, or when
    getting it fails.
    """
    needs = reward_class(name)().needs() if hasattr(reward_class(name), "needs") else ()
    if not needs:
        raise ValueError(f"reward {name} needs no files; there is nothing to download")
    fetch = hub_fetch()
    for need in needs:
        if not missing(need):
            say(f"{need.folder} is complete: {resolve(need.folder)}")
            continue
        files, target = published_files(need), resolve(need.folder) or roots()[0] / need.folder
        say(f"{described(need)}\nfiles: {', '.join(files)}\nto: {target}")
        if not agreed("Download?"):
            say("nothing was downloaded; answer y, or give --yes")
            return False
        get(need, files, target, fetch)
        say(f"done: {target}")
    return True


def typed_yes(question: str) -> bool:
    """Ask at the terminal; without one the answer is no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def published_files(need: Need) -> list[str]:
    """What the need's own command fetches from the hub. Raises ValueError when it is another kind of command."""
    words = need.command.split()
    start = ["hf", "download", need.repository]
    if words[:3] != start or words[-2:] != ["--local-dir", "{folder}"]:
        where = roots()[0] / need.folder
        advice = f"get it with:  {need.command.format(folder=where)}" if need.command else f"put the files into {where}"
        raise ValueError(f"{need.folder} is not on the Hugging Face hub; {advice}")
    return words[3:-2]


def get(need: Need, files: list[str], target: Path, fetch: Fetch) -> None:
    """Receive the files beside the target and move them there. Raises ValueError when that fails or some lack."""
    staging = target.with_name(f"{STAGING}{target.name}")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        fetch(need.repository, files, staging)
    except Exception as problem:  # of the hub's library, the network or the disk: all end here, in one sentence
        raise ValueError(
            f"{need.repository} could not be downloaded ({type(problem).__name__}: {problem}); {target} is as it was. "
            f"Try again: what was received is kept in {staging}"
        ) from problem
    lacking = [" or ".join(names) for names in need.files if choose(staging, names) is None]
    if lacking:
        raise ValueError(f"{need.repository} has no {', no '.join(lacking)}; {target} is as it was, see {staging}")
    move(staging, files, target)


def move(staging: Path, files: list[str], target: Path) -> None:
    """Rename the staged folder, or its files when the target has others already; nothing there is replaced."""
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the hub library's notes on its downloads
    if not target.exists():
        staging.rename(target)
        return
    for name in files:
        if (staging / name).is_file() and not (target / name).exists():
            (staging / name).rename(target / name)
    shutil.rmtree(staging)


def hub_fetch() -> Fetch:
    """Download with huggingface_hub. Raises ValueError when it is not installed."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as problem:
        raise ValueError(
            f"the package huggingface_hub cannot be imported ({problem}); get it with:  "
            f"{pip_install('huggingface_hub')}"
        ) from problem
    return lambda repository, files, folder: snapshot_download(repository, allow_patterns=files, local_dir=folder)
