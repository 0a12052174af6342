"""Low-rank adapters on chosen linear layers of any module tree, by forward hooks.

Base weights and module names never change; with ``enabled`` False the model is exactly the untrained one.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .knobs import Knob, Text
from .randomness import Purpose, rng


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Size and place of the adapter."""

    rank: Annotated[int, Knob(1, 512, "rank of the update of each layer")] = 32
    alpha: Annotated[float, Knob(0.0, 4096.0, "the update is scaled by alpha / rank")] = 64.0
    targets: Annotated[str, Text("regular expression; linear layers whose name contains a match get a LoRA")] = ""


class Lora(nn.Module):
    """The trainable parameters: for each layer y = W x becomes W x + (alpha / rank) B A x."""

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int, alpha: float, seed: int):
        super().__init__()
        self.scale, self.enabled = alpha / rank, True
        self.names = sorted(layers)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for i, name in enumerate(self.names):
            size_out, size_in = layers[name].weight.shape
            values = rng(Purpose.LORA, seed, slot=i).standard_normal((rank, size_in), dtype="float32") / rank
            device = layers[name].weight.device
            self.down.append(nn.Parameter(torch.from_numpy(values).to(device)))
            self.up.append(nn.Parameter(torch.zeros(size_out, rank, device=device)))

    def delta(self, index: int, x: Tensor) -> Tensor:
        """What layer ``index`` adds for input ``x``, in ``x``'s dtype."""
        down, up = self.down[index].to(x.dtype), self.up[index].to(x.dtype)
        return F.linear(F.linear(x, down), up) * self.scale

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model is the untrained one: the reference policy."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


def add_lora(model: nn.Module, settings: LoraSettings, default_targets: str, seed: int = 0) -> Lora:
    """Put a LoRA (B = 0: no change yet) on the linear layers of ``model`` that match the targets.

    Raises ValueError when no layer matches.
    """
    lora = make_lora(model, settings, default_targets, seed)
    attach(lora, model)
    return lora


def make_lora(model: nn.Module, settings: LoraSettings, default_targets: str, seed: int = 0) -> Lora:
    """The parameters alone, and a frozen ``model``; ``attach`` makes them count. Raises as ``add_lora``."""
    targets = settings.targets or default_targets
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    try:
        chosen = {name: m for name, m in linear.items() if re.search(targets, name)}
    except re.error as problem:
        raise ValueError(f"lora: targets {targets!r} is not a regular expression: {problem}") from None
    if not chosen:
        example = ", ".join(list(linear)[:5])
        raise ValueError(f"lora: targets {targets!r} match no linear layer; the model has, among others: {example}")
    model.requires_grad_(False)
    return Lora(chosen, settings.rank, settings.alpha, seed)


def attach(lora: Lora, model: nn.Module) -> list[Any]:
    """Hook the layers; call ``.remove()`` on what is returned to leave the model as it was."""

    def hook(index: int) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + lora.delta(index, inputs[0]) if lora.enabled else output

        return add

    return [model.get_submodule(name).register_forward_hook(hook(i)) for i, name in enumerate(lora.names)]


class LoraTensors(dict[str, Tensor]):
    """The tensors of a LoRA file by key, and what its header says; hosts take it for a plain dict."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]):
        super().__init__(tensors)
        self.metadata = dict(metadata)


def tensors_of(lora: Lora, prefix: str, metadata: Mapping[str, str]) -> LoraTensors:
    """``<prefix>.<layer>.lora_A/B.weight`` on the CPU, the scale folded into B.

    Stock ComfyUI loads ``diffusion_model.<native layer>``; diffusers loads ``transformer.<its layer>``.
    """
    tensors = {}
    for name, down, up in zip(lora.names, lora.down, lora.up, strict=True):
        tensors[f"{prefix}.{name}.lora_A.weight"] = down.detach().cpu().clone().contiguous()
        tensors[f"{prefix}.{name}.lora_B.weight"] = (up.detach() * lora.scale).cpu().contiguous()
    return LoraTensors(tensors, metadata)


def export(lora: Lora, path: Path, prefix: str, metadata: Mapping[str, str]) -> None:
    """Write the file that generation loads, in one step; see ``tensors_of``."""
    write_lora(path, tensors_of(lora, prefix, metadata))


def write_lora(path: Path, tensors: LoraTensors) -> None:
    """Replace ``path`` in one step."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(dict(tensors), temporary, tensors.metadata)
    temporary.replace(path)


def read_lora(path: Path) -> LoraTensors:
    """What ``write_lora`` wrote."""
    with safe_open(path, "pt") as file:
        return LoraTensors({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})
