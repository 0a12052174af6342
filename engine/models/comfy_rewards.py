"""Reward models inside ComfyUI: their folders, its memory manager, its Cancel button."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as host  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]
import torch
from comfy.model_patcher import ModelPatcher  # pyright: ignore[reportMissingImports]
from torch import nn

from ..rewards.files import ROOT_SOURCES, SUFFIXES
from ..rewards.hpsv2 import TOKENIZER_SOURCES
from ..rewards.kept import Kept
from ..rewards.placement import MANAGERS
from ..waiting import INTERRUPTS

FOLDER = "reward_models"
"""Below the host's models folder, and the key for extra_model_paths.yaml."""


def register() -> None:
    """Tell the host of our folder, and the rewards of the host, when the nodes are loaded; a second time is none."""
    if managed in MANAGERS:
        return
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=False)
    # A new key has no suffixes, which would mean all files.
    folder_paths.folder_names_and_paths[FOLDER][1].update(SUFFIXES)
    ROOT_SOURCES.append(lambda: folder_paths.get_folder_paths(FOLDER))
    TOKENIZER_SOURCES.append(lambda: Path(str(host.__file__)).with_name("sd1_tokenizer"))
    MANAGERS.append(managed)
    INTERRUPTS.append(host.throw_exception_if_processing_interrupted)


@contextmanager
def managed(model: nn.Module, placement: str) -> Iterator[torch.device]:
    """Load ``model`` as the host loads its own; whichever placement, it stays until the host needs the room."""
    patcher = patcher_of(model)
    with torch.inference_mode(False):
        host.load_models_gpu([patcher], force_full_load=True)
        patcher.model.to(patcher.load_device)
    yield patcher.load_device


@Kept
def patcher_of(model: nn.Module) -> "WholePatcher":
    """The same for the same model, so that the host recognises it.

    It is held where the model is held, not by the model: what refers to itself stays until the next garbage collection.
    """
    return WholePatcher(Held(model), host.get_torch_device(), torch.device("cpu"))


class Held(nn.Module):
    """The host sets ``device`` on what it moves; models of transformers have a property of that name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "Held":
        # Moved in inference mode, where the host may do it, weights could not be moved outside of it again.
        with torch.inference_mode(False):
            return super()._apply(fn, recurse)


class WholePatcher(ModelPatcher):
    """Loaded and unloaded as a whole: only layers of the host can compute with weights that are elsewhere."""

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0) -> int:
        """Free nothing, which makes the host unload all of it."""
        return 0
