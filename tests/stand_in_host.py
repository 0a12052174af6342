"""Builds the schemas of our nodes without ComfyUI: ``python stand_in_host.py PACKAGE`` prints them as /object_info.

``comfy_api`` is on no package index, so its part that our nodes need to say what they are is written again here, and
is as strict: an unknown option is an error. All other modules of the host are empty: nothing runs here.
Keep it in a process of its own, so that no test takes these modules for real ones.
"""

import asyncio
import importlib.util
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

HOST = ("aiohttp", "comfy", "comfy_api", "folder_paths", "server")
WIDGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "Int": ("INT", {"default": None, "min": None, "max": None, "step": None, "control_after_generate": None}),
    "Float": ("FLOAT", {"default": None, "min": None, "max": None, "step": None, "round": None}),
    "Boolean": ("BOOLEAN", {"default": None}),
    "String": ("STRING", {"default": None, "multiline": False}),
    "Combo": ("COMBO", {"default": None, "options": None, "multiselect": False}),
}
"""Name -> (type, options with what they are when not given); None stands for none."""
LINKS = {
    "Clip": "CLIP",
    "Conditioning": "CONDITIONING",
    "Image": "IMAGE",
    "Latent": "LATENT",
    "LoraModel": "LORA_MODEL",
    "Model": "MODEL",
    "Vae": "VAE",
}


class Input:
    """An input; nodes may change its attributes until the schema is read."""

    kind: str
    presets: dict[str, Any]

    def __init__(self, name: str, /, *, optional: bool = False, tooltip: str | None = None, **given: Any):
        unknown = sorted(given.keys() - self.presets.keys())
        if unknown:
            raise TypeError(f"{self.kind} input {name!r} got unknown options: {', '.join(unknown)}")
        self.id, self.optional, self.tooltip = name, optional, tooltip
        vars(self).update(self.presets | given)

    def spec(self) -> list[Any]:
        values = {name: getattr(self, name) for name in ("tooltip", *self.presets)}
        return [self.kind, {name: value for name, value in values.items() if value is not None}]


class Output:
    """An output."""

    kind: str

    def __init__(
        self,
        name: str | None = None,
        /,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ):
        self.id, self.display_name, self.tooltip, self.is_output_list = name, display_name, tooltip, is_output_list


def kind(name: str, presets: dict[str, Any] | None = None) -> Any:
    """A type of link or widget, as ``io.Int`` or what ``io.Custom`` returns."""
    made = {"kind": name, "presets": presets or {}}
    return SimpleNamespace(Input=type("Input", (Input,), made), Output=type("Output", (Output,), made))


class Hidden(Enum):
    """What the host hands over besides the inputs."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


@dataclass
class Schema:
    """What ``define_schema`` returns."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False


class Node:
    """Base class of nodes."""

    hidden: Any = None


class Extension:
    """Base class of extensions."""


class Anything:
    """Stands for a class or function of the host that a module only names while it is imported."""


IO = SimpleNamespace(
    ComfyNode=Node,
    NodeOutput=Anything,
    Schema=Schema,
    Hidden=Hidden,
    Custom=kind,
    **{name: kind(*known) for name, known in WIDGETS.items()},
    **{name: kind(known) for name, known in LINKS.items()},
)


class HostModule(ModuleType):
    """A module that has whatever is asked of it."""

    __path__: list[str] = []  # noqa: RUF012  # every one may have submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Anything,), {})


class HostModules:
    """Finds the modules of the host, before any that are installed."""

    def __init__(self, contents: dict[str, dict[str, Any]]):
        self.contents = contents

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.partition(".")[0] in HOST else None

    def create_module(self, spec: ModuleSpec) -> HostModule:
        return HostModule(spec.name)

    def exec_module(self, module: HostModule) -> None:
        vars(module).update(self.contents.get(module.__name__, {}))


def info(node: type[Any]) -> dict[str, Any]:
    """What /object_info says of a node. Raises when a host would refuse it or could not run it."""
    schema = node.define_schema()
    check(schema, node.execute)
    inputs: dict[str, dict[str, Any]] = {"required": {}}
    for entry in schema.inputs:
        inputs.setdefault("optional" if entry.optional else "required", {})[entry.id] = entry.spec()
    return {
        "input": inputs,
        "input_order": {part: list(known) for part, known in inputs.items()},
        "output": [output.kind for output in schema.outputs],
        "output_name": [output.display_name or output.kind for output in schema.outputs],
        "output_is_list": [output.is_output_list for output in schema.outputs],
        "output_tooltips": [output.tooltip for output in schema.outputs],
        "name": schema.node_id,
        "display_name": schema.display_name,
        "category": schema.category,
        "description": schema.description,
        "output_node": schema.is_output_node,
    }


def check(schema: Schema, execute: Callable[..., Any]) -> None:
    """Names are unique, and ``execute`` takes the inputs, with and without the optional ones."""
    names = [entry.id for entry in (*schema.inputs, *schema.outputs) if entry.id is not None]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{schema.node_id} has more than one {', '.join(twice)}")
    required = {entry.id: None for entry in schema.inputs if not entry.optional}
    try:
        for inputs in (required, required | {entry.id: None for entry in schema.inputs}):
            inspect.signature(execute).bind(**inputs)
    except TypeError as problem:
        raise TypeError(f"execute of {schema.node_id} does not take its inputs: {problem}") from None


def load(package: Path) -> list[type[Any]]:
    """The nodes of the package, by its entry point."""
    spec = importlib.util.spec_from_file_location("densegrpo", package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["densegrpo"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return asyncio.run(nodes_of(module))


async def nodes_of(module: Any) -> list[type[Any]]:
    """As the host asks for them."""
    return await (await module.comfy_entrypoint()).get_node_list()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        contents = {
            "aiohttp": {"web": HostModule("aiohttp.web")},
            "comfy_api.latest": {"io": IO, "ComfyExtension": Extension},
            "folder_paths": {f"get_{kind}_directory": lambda: empty for kind in ("input", "output")}
            | {"models_dir": empty, "folder_names_and_paths": {"reward_models": ([], set())}}
            | {"get_folder_paths": lambda _: [], "add_model_folder_path": lambda *_, **__: None},
        }
        sys.meta_path.insert(0, HostModules(contents))
        found = [info(node) for node in load(Path(sys.argv[1]).resolve())]
    print(json.dumps({entry["name"]: entry for entry in found}))
