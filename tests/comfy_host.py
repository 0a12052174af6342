"""Find a real ComfyUI to test against, and run a script inside its Python."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISSING_LIBRARY = 3
"""Exit status of a script whose Python cannot import the host."""
HOW_TO = (
    "tests inside ComfyUI need one: set COMFYUI_PATH to its folder and COMFYUI_PYTHON to the Python it runs with, or "
    "put this package into its custom_nodes, or ComfyUI into ~/comfy/ComfyUI (its virtual environment in ~/comfy/venv)"
)


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the Python that runs it."""

    folder: Path
    python: str

    def run(self, script: Path, answer: Path, *arguments: str, timeout: float = 900) -> dict[str, Any]:
        """Run ``script FOLDER ROOT ANSWER arguments`` on the CPU; returns the JSON it wrote to ``answer``."""
        command = [self.python, str(script), str(self.folder), str(ROOT), str(answer), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        if done.returncode == MISSING_LIBRARY:
            pytest.skip(f"{self.python} cannot import {self.folder} ({tail.splitlines()[-1]}); {HOW_TO}")
        assert done.returncode == 0, tail
        return json.loads(answer.read_text(encoding="utf-8"))


def find_host() -> Host | None:
    """The host named by COMFYUI_PATH, or around this package, or in comfy-cli's default place."""
    named = os.environ.get("COMFYUI_PATH")
    around = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    places = [Path(named).expanduser()] if named else [*around, Path.home() / "comfy" / "ComfyUI"]
    folder = next((p for p in places if (p / "main.py").is_file() and (p / "comfy").is_dir()), None)
    if folder is None:
        assert not named, f"COMFYUI_PATH is {named}, which is no ComfyUI folder (no main.py and comfy/ in it)"
        return None
    default = Path.home() / "comfy" / "venv" / "bin" / "python"
    python = os.environ.get("COMFYUI_PYTHON") or (str(default) if default.exists() else sys.executable)
    return Host(folder.resolve(), python)


@pytest.fixture(scope="session")
def host() -> Host:
    """A real ComfyUI; without one the test is skipped and says how to get it."""
    found = find_host()
    if found is None:
        pytest.skip(HOW_TO)
    return found
