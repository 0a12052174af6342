"""Back ends that satisfy ``FlowModel``, by name. Each is imported on demand: it pulls in its own library."""

from importlib import import_module
from typing import Any

from ..knobs import Option, check, options_of, suggest
from ..lora import LoraSettings
from ..protocols import FlowModel

MODELS = {
    "comfy": ".comfy_settings:ComfySettings",
    "demo": ".tiny:DemoSettings",
    "diffusers": ".diffusers:DiffusersSettings",
}


def model_settings(name: str) -> type[Any]:
    """The settings dataclass of a back end; its ``load(lora, seed)`` makes the model."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{suggest(name, MODELS)}; known: {', '.join(sorted(MODELS))}")
    module, _, attribute = MODELS[name].partition(":")
    return getattr(import_module(module, __package__), attribute)


def model_options(name: str) -> dict[str, Option]:
    """The options of a back end."""
    return options_of(model_settings(name))


def load_model(name: str, lora: LoraSettings, seed: int, **options: Any) -> FlowModel:
    """The model of that name with a fresh LoRA; ValueError names what is allowed."""
    check(f"model {name}", model_options(name), options)
    return model_settings(name)(**options).load(lora, seed)
