"""Runs of the engine on a host's MODEL: what the nodes call."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora  # pyright: ignore[reportMissingImports]
import comfy.sd  # pyright: ignore[reportMissingImports]
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..calibrate import Round, calibrate, make_calibration
from ..calibration_picture import draw_table, save_table
from ..checkpoint import SaveError, checkpoints
from ..config import RunConfig, check_name, make_config
from ..curves import plot
from ..data import Prompt
from ..filmstrip import Filmstrip, look
from ..lora import LoraSettings, LoraTensors, read_lora, write_lora
from ..noise_table import check_table, describe, make_table, read_table
from ..pictures import to_tensor
from ..recipes import make_recipe
from ..rewards import make_panel, what_is_scored
from ..run import Run
from ..session import BEST_LORA, Progress, Session
from .comfy import training_session
from .comfy_settings import ComfySettings
from .comfy_training import gives_memory_back

log = logging.getLogger("densegrpo.comfy")


class Encoded(NamedTuple):
    """Prompts with the host's CONDITIONING of each."""

    prompts: Sequence[Prompt]
    conditioning: Sequence[Any]
    negative: Any


class Trained(NamedTuple):
    """What a training node returns."""

    model: Any
    """MODEL with the LoRA."""
    lora: LoraTensors
    """LORA_MODEL"""
    curve: Tensor
    """[1, H, W, 3] learning curve."""
    samples: Tensor
    """[2, H, W, 3] held-out images before and after; the learning curve when there are none."""
    run: Run
    """Where everything is; with ``resume`` off its name may have got a number."""


@gives_memory_back
def train_model(
    model: Any,
    vae: Any,
    prompts: Encoded,
    held_out: Encoded | None,
    settings: ComfySettings,
    config: Mapping[str, Any],
    out: Path,
    resume: bool,
    follow: Callable[[Session, Progress], None],
    best: bool = False,
) -> Trained:
    """Train a LoRA for ``model`` as ``config`` says, in ``out/<name>``; ``follow`` sees every progress.

    ``best``: hand out the LoRA that was best on held-out rewards, if any was better than the untrained model.

    ``config`` lacks prompts and model: they come as objects of the host. Raises ValueError, SaveError, RewardError or
    OutOfMemoryError for what a user can mend, and whatever the host raises to cancel: all that was learnt is then
    saved.
    """
    full = full_config(config, settings, prompts, held_out)
    check_table(full.method.get("noise_table"), section(model, settings), full.training.num_steps)
    run = find_run(full, out, resume)
    conditionings = by_text(prompts) | (by_text(held_out) if held_out else {})
    seed = run.config.training.seed
    opened = training_session(model, vae, conditionings, prompts.negative, settings, run.config.lora, seed)
    with memory_advice("lower width and height, under another run_name"), opened as flow:
        difference = flow.check_gradients()
        log.info("gradients agree with finite differences to %.1f %%", 100 * difference)
        session = Session(run, model=flow, resume=bool(checkpoints(run.folder / "checkpoints")))
        for progress in session.execute():
            follow(session, progress)
        lora = read_lora(run.folder / BEST_LORA) if best and (run.folder / BEST_LORA).exists() else session.trained()
        lora.metadata["densegrpo.base_model"] = type(model.model).__name__
    return Trained(with_lora(model, lora), lora, curve_of(run), samples_of(run), run)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Say what to do when memory runs out; still the error that makes the host unload its models."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise torch.OutOfMemoryError(f"out of memory even in the smallest batches ({problem}); {advice}") from problem


def full_config(
    config: Mapping[str, Any], settings: ComfySettings, prompts: Encoded, held_out: Encoded | None
) -> RunConfig:
    """The configuration with model and prompts written down."""
    data = {**config, "model": {"name": "comfy", **asdict(settings)}, "prompts": records(prompts)}
    if held_out:
        data["held_out_prompts"] = records(held_out)
    return make_config(data)


def records(prompts: Encoded) -> list[dict[str, Any]]:
    """Plain JSON of prompts."""
    return [{"prompt": p.text, **p.metadata} for p in prompts.prompts]


def by_text(prompts: Encoded) -> dict[str, Any]:
    """Text -> CONDITIONING."""
    return {p.text: cond for p, cond in zip(prompts.prompts, prompts.conditioning, strict=True)}


def find_run(config: RunConfig, out: Path, resume: bool) -> Run:
    """The run of that name to continue, or a new one; without ``resume`` a number is added to a name in use.

    Raises ValueError when the run was started with other settings than ``iterations``.
    """
    folder = out / config.name
    if not folder.exists():
        return Run.create(config, out, out)
    if not resume:
        number = next(n for n in range(2, 100_000) if not (out / f"{config.name}_{n}").exists())
        return Run.create(replace(config, name=f"{config.name}_{number}"), out, out)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is in the way and is no run; move it elsewhere or choose another run_name")
    run = Run.open(folder)
    changed = differences(run.config, config)
    if changed:
        raise ValueError(
            f"run {config.name!r} was started with other settings ({', '.join(changed)}); set them back, "
            "choose another run_name, or turn resume off"
        )
    return run.adopt(config)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Names of settings that differ and matter."""
    harmless = {"iterations", "sample_batch", "train_batch", "stop_when_gamed", "alarm_after", "max_missing"}
    found = []
    for key, before in asdict(old).items():
        after = asdict(new)[key]
        if key in ("rewards", "held_out_rewards"):
            before, after = (list(map(what_is_scored, entries)) for entries in (before, after))
        if isinstance(before, dict) and isinstance(after, dict):
            found += [k for k in before.keys() | after.keys() if before.get(k) != after.get(k) and k not in harmless]
        elif before != after and key != "name":
            found.append(key)
    return sorted(found)


def with_lora(model: Any, lora: Mapping[str, Tensor]) -> Any:
    """MODEL as the stock loader would patch it."""
    return comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0)[0]


def curve_of(run: Run) -> Tensor:
    """Learning curve as IMAGE."""
    rows = run.metrics()
    lines = {"training reward": [(row["iteration"], row["reward"]) for row in rows if row.get("reward") is not None]}
    for name in next((list(row["evaluation"]) for row in rows if "evaluation" in row), []):
        label = f"held-out {name.removeprefix('held-out/')}"
        scored = [row for row in rows if row.get("evaluation", {}).get(name) is not None]
        lines[label] = [(row["iteration"], row["evaluation"][name]) for row in scored]
    return to_tensor(plot(run.config.name, lines)).movedim(0, -1)[None]


def samples_of(run: Run) -> Tensor:
    """Grids of held-out images before and after as IMAGE."""
    from PIL import Image

    paths = [run.folder / "samples" / f"{name}.png" for name in ("before", "after")]
    found = [to_tensor(Image.open(path)).movedim(0, -1) for path in paths if path.exists()]
    return torch.stack(found) if found else curve_of(run)


@gives_memory_back
def inspect_model(
    model: Any,
    vae: Any,
    prompts: Encoded,
    settings: ComfySettings,
    rewards: Sequence[Mapping[str, Any]],
    mode: str,
    method: Mapping[str, Any],
    num_steps: int,
    seed: int,
    batch: int,
) -> Filmstrip:
    """One group of the first prompt, without any training."""
    recipe = make_recipe(**method)
    only = Encoded(prompts.prompts[:1], prompts.conditioning[:1], prompts.negative)
    opened = training_session(model, vae, by_text(only), only.negative, settings, LoraSettings(rank=1), seed)
    with memory_advice("lower sample_batch, width or height"), opened as flow, torch.no_grad():
        cond = flow.encode([only.prompts[0].text])
        panel = make_panel(rewards, mode)
        return look(flow, cond, only.prompts[0], panel, recipe, num_steps=num_steps, seed=seed, batch=batch)


class Calibrated(NamedTuple):
    """What a calibration node returns."""

    table: dict[str, Any]
    picture: Tensor
    """[1, H, W, 3]"""
    report: str


@gives_memory_back
def calibrate_model(
    model: Any,
    vae: Any,
    prompts: Encoded,
    settings: ComfySettings,
    rewards: Sequence[Mapping[str, Any]],
    mode: str,
    method: Mapping[str, Any],
    num_steps: int,
    seed: int,
    batch: int,
    options: Mapping[str, Any],
    folder: Path,
    name: str,
    follow: Callable[[Round], None],
) -> Calibrated:
    """Calibrate the noise of ``method``, save the table in ``folder``, with a number; ``follow`` sees every round.

    ``options`` are those of ``calibrate.make_calibration``. Raises ValueError, SaveError, RewardError or
    OutOfMemoryError for what a user can mend, and whatever the host raises to cancel: nothing is saved then.
    """
    check_name(name)
    recipe, (size, rule) = make_recipe(**method), make_calibration(options)
    opened = training_session(model, vae, by_text(prompts), prompts.negative, settings, LoraSettings(rank=1), seed)
    with memory_advice("lower sample_batch, width or height"), opened as flow:
        cond, panel = flow.encode([p.text for p in prompts.prompts]), make_panel(rewards, mode)
        found = calibrate(
            flow, cond, prompts.prompts, panel, recipe, size, rule, num_steps=num_steps, seed=seed, batch=batch
        )
        what = {"kernel": recipe.noise.kernel, "model": section(model, settings), "rewards": rewards}
        table = make_table(found, follow, size, **what)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise SaveError(f"could not make the folder {folder}: {problem}; make room for it") from problem
    path = next(p for n in range(1, 100_000) if not (p := folder / f"{name}_{n:05d}.json").exists())
    save_table(path, table)
    return Calibrated(table, picture_of(table), f"{describe(table)}\nsaved {path.name}")


def reuse_table(model: Any, settings: ComfySettings, num_steps: int, path: Path) -> Calibrated:
    """A table saved earlier. Raises ValueError when it is damaged or was made for another model or size."""
    table = read_table(path)
    check_table(table, section(model, settings), num_steps)
    return Calibrated(table, picture_of(table), f"{describe(table)}\nread from {path.name}")


def section(model: Any, settings: ComfySettings) -> dict[str, Any]:
    """What a table is bound to. Weights of one architecture cannot be told apart: a MODEL does not say its file."""
    return {"name": "comfy", **asdict(settings), "base_model": type(model.model).__name__}


def picture_of(table: Mapping[str, Any]) -> Tensor:
    """The table drawn, as IMAGE."""
    return to_tensor(draw_table(table)).movedim(0, -1)[None]


def save_lora(lora: Mapping[str, Tensor], folder: Path, name: str, layout: str, model: Any) -> Path:
    """Write a LORA_MODEL into ``folder`` under a name not yet in use, read it back and compare.

    ``layout`` ``diffusers`` renames the layers as diffusers calls them; that needs the MODEL it was trained on.
    Raises ValueError for a name that is no file name or a model without such names, SaveError for a full disk.
    """
    check_name(name)
    metadata = lora.metadata if isinstance(lora, LoraTensors) else {"format": "pt"}
    tensors = LoraTensors(lora if layout == "comfy" else in_diffusers_names(lora, model), metadata)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (folder / f"{name}_{n:05d}.safetensors" for n in range(1, 100_000))
    path = next(p for p in numbers if not p.exists())
    try:
        write_lora(path, tensors)
        back = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise SaveError(f"could not save {path}: {problem}; free some space, then queue again") from problem
    if back.keys() != tensors.keys() or not all(torch.equal(back[key], tensors[key]) for key in tensors):
        path.unlink()
        raise SaveError(f"{path} did not read back as it was written; check the disk and save again")
    return path


def in_diffusers_names(lora: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The same LoRA for diffusers' layers, by the host's own table of names; fused layers are cut apart."""
    if model is None:
        raise ValueError("diffusers keys need the MODEL the LoRA was trained on; connect it")
    names: dict[str, tuple[str, slice]] = {}
    for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        if key.startswith("transformer."):
            native, part = (target, None) if isinstance(target, str) else (target[0], target[1])
            rows = slice(None) if part is None else slice(part[1], part[1] + part[2])
            names[key] = (native.removesuffix(".weight"), rows)
    found = {}
    for key, (native, rows) in names.items():
        if f"{native}.lora_A.weight" in lora:
            found[f"{key}.lora_A.weight"] = lora[f"{native}.lora_A.weight"].clone()
            found[f"{key}.lora_B.weight"] = lora[f"{native}.lora_B.weight"][rows].clone().contiguous()
    covered = {names[key.rpartition(".lora_")[0]][0] for key in found}
    missing = {key.rpartition(".lora_")[0] for key in lora} - covered
    if missing:
        raise ValueError(
            f"this model's layer {sorted(missing)[0]} has no name in diffusers; save with comfy keys instead"
        )
    return found
