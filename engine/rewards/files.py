"""Where the files of reward models are, and how they are read: inside known folders only, and never executed."""

import importlib.util
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..packages import pip_install, quoted

ROOTS_VARIABLE = "DENSEGRPO_REWARD_MODELS"
"""Environment variable: folders that hold reward models, separated like those of PATH."""
DEFAULT_ROOT = Path("models/reward_models")
"""Searched last, relative to the folder a command is started in."""
SUFFIXES = (".safetensors", ".pt", ".pth")
ROOT_SOURCES: list[Callable[[], Iterable[str | os.PathLike[str]]]] = []
"""A host appends a function that names its own folders; asked each time, after the environment variable."""


class Need(NamedTuple):
    """Files a reward cannot do without, and how to get them."""

    folder: str
    """Inside one of the roots."""
    files: tuple[tuple[str, ...], ...]
    """Of each tuple one file must be there."""
    repository: str
    """Where the published files come from; empty when the folder is the user's own choice."""
    size: str
    licence: str
    command: str
    """Gets the published files into ``{folder}``."""

    def for_folder(self, folder: str) -> "Need":
        """The same files in another folder, which is then nothing that was published."""
        return self if folder == self.folder else self._replace(folder=folder, repository="", command="")


TOKENIZER = ("tokenizer.json", "vocab.json")


def from_hub(folder: str, repository: str, size: str, licence: str) -> Need:
    """A CLIP on the Hugging Face hub: configuration, weights and tokenizer."""
    files = "config.json model.safetensors tokenizer.json tokenizer_config.json vocab.json merges.txt"
    command = f"hf download {repository} {files} --local-dir {{folder}}"
    return Need(folder, (("config.json",), ("model.safetensors",), TOKENIZER), repository, size, licence, command)


def roots() -> list[Path]:
    """The folders that are searched, best first."""
    named = [part for part in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if part.strip()]
    hosts = [path for source in ROOT_SOURCES for path in source()]
    return list(dict.fromkeys(Path(path).expanduser().absolute() for path in (*named, *hosts, DEFAULT_ROOT)))


def resolve(name: str) -> Path | None:
    """The real path of a file or folder inside the roots, the first that has it; None when none does.

    Raises ValueError for a name that leads outside of them: absolute, with ``..``, or a link to somewhere else.
    """
    pure = PureWindowsPath(name)  # knows both kinds of separators, and drives
    if not pure.parts or pure.anchor or ".." in pure.parts:
        raise ValueError(
            f"reward model {name!r} must be the name of a folder or file inside one of {listed(roots())}, such as "
            f"PickScore_v1; to use another place set {ROOTS_VARIABLE} to the folder that holds it"
        )
    found = next((path for root in roots() if (path := root.joinpath(*pure.parts)).exists()), None)
    return found and inside(found)


def inside(path: Path) -> Path:
    """The real path. Raises ValueError when it is outside of the roots."""
    real = path.resolve()
    if not any(real.is_relative_to(allowed.resolve()) for allowed in roots()):
        raise ValueError(
            f"reward model {path.name!r} is a link to {real}, outside of {listed(roots())}; add the folder that "
            f"holds it to {ROOTS_VARIABLE}, or copy the files"
        )
    return real


def locate(needs: Sequence[Need]) -> list[Path]:
    """The folder of each need. Raises ValueError that says all that is missing and how to get it."""
    problems = [problem for need in needs if (problem := missing(need))]
    if problems:
        raise ValueError("; ".join(problems))
    return [folder for need in needs if (folder := resolve(need.folder))]


def missing(need: Need) -> str | None:
    """What is missing of one need and how to get it, or None."""
    try:
        folder = resolve(need.folder)
        if folder is None or not folder.is_dir():
            return f"folder {need.folder!r} is not there (looked in {listed(roots())}); {advice(need, None)}"
        lacking = [" or ".join(names) for names in need.files if choose(folder, names) is None]
    except ValueError as problem:
        return str(problem)
    return f"{folder} has no {', no '.join(lacking)}; {advice(need, folder)}" if lacking else None


def choose(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these files that ``folder`` has. Raises ValueError when it is a link out of the roots."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None:
        inside(found)
    return found


def advice(need: Need, folder: Path | None) -> str:
    """What to do about missing files."""
    if not need.repository:
        return f"needed are {files_of(need)}; the folders there are: {', '.join(folders()) or 'none'}"
    target = folder or roots()[0] / need.folder
    return f"needed are {described(need)}. Get them with:  {need.command.format(folder=quoted(target))}"


def folders() -> list[str]:
    """The names of the folders in the roots that hold a model; those of unfinished downloads begin with a dot."""
    entries = [entry for root in roots() if root.is_dir() for entry in root.iterdir() if entry.is_dir()]
    return sorted({entry.name for entry in entries if entry.name[0] != "." and holds_model(entry)})


def holds_model(folder: Path) -> bool:
    """Whether there is a configuration or a file of weights; not in a folder that cannot be read."""
    return any(file.name == "config.json" or file.suffix in SUFFIXES for file in folder.glob("*"))


def described(need: Need) -> str:
    """Files, repository, size and licence in one line."""
    return f"{files_of(need)} of {need.repository} ({need.size}, licence {need.licence})"


def files_of(need: Need) -> str:
    """The file names of a need."""
    return ", ".join(" or ".join(names) for names in need.files)


def listed(paths: Iterable[Path]) -> str:
    """For a message."""
    return ", ".join(map(str, paths))


def require_transformers() -> None:
    """Raise ValueError with the remedy when CLIP cannot be imported from transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "the package transformers, 4.46 or newer, is not installed; get it with:  "
            f"{pip_install('transformers>=4.46')}"
        )
    try:
        from transformers import CLIPModel  # noqa: F401
    except (ImportError, RuntimeError) as problem:
        raise ValueError(
            f"transformers is installed but its CLIP cannot be imported ({problem}); the usual cause is a torchvision "
            "that does not fit this torch: install the torchvision of the same release, or remove it (it is not needed)"
        ) from problem


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file by name.

    Raises ValueError for any other kind of file, a damaged one, and a pickle that holds more than tensors.
    """
    return reading(path, load_file, "cpu")


def read_shapes(path: Path) -> dict[str, Tensor]:
    """As ``read_weights``, but tensors without contents (device ``meta``), so that it takes no time."""
    return reading(path, safetensors_shapes, "meta")


def reading(path: Path, load_safetensors: Callable[[Path], dict[str, Tensor]], device: str) -> dict[str, Tensor]:
    """Read one file with the reader that its suffix names."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not a {', '.join(SUFFIXES)} file; convert it to safetensors first")
    other = not_weights(path)
    if other:
        raise ValueError(f"{path} is {other} instead of the weights; delete it and get the file again")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be mapped
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; it was not executed. Use a .safetensors file, or a "
            f".pt file that loads with weights_only=True"
        ) from None
    except MemoryError:
        raise
    except Exception as problem:  # a damaged pickle fails in any way: KeyError, IndexError, struct.error, ...
        raise ValueError(
            f"{path} cannot be read as weights ({type(problem).__name__}: {problem}); it may be cut off, get it again"
        ) from None
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} does not hold named tensors; expected a state_dict")
    return {name: value.detach().to(device) for name, value in found.items()}


def not_weights(path: Path) -> str | None:
    """What downloads that went wrong leave in the place of weights, in words; None when it may be weights."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        return None  # reading says why
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (a few lines of text)"
    return "a web page" if start.startswith((b"<!doctype", b"<html")) else None


def safetensors_shapes(path: Path) -> dict[str, Tensor]:
    """Only the header is read."""
    with safe_open(path, "pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}


def check_tensors(path: Path, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming tensors of ``expected`` that ``given`` lacks, or has in another shape."""
    lacking = [name for name in expected if name not in given]
    if lacking:
        raise ValueError(f"{path} lacks {some(lacking)}; it is another model, or cut off")
    wrong = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if given[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{path} has other shapes than expected: {some(wrong)}; it is another model")


def some(names: Sequence[str]) -> str:
    """The first few of a list."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
