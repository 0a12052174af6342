"""SD3, SD3.5 and FLUX.1 as diffusers stores them: a local folder, or the id of a repository on the Hugging Face hub.

What is on the GPU: only the text encoders while prompts are encoded, only the transformer and the VAE afterwards.
Shapes: R rows, C latent channels, h x w latent size, P prompts, D distinct prompts, L text tokens.
"""

import gc
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..guidance import CFG_GRADS, guided
from ..knobs import Choice, Knob, Text, flag
from ..lora import LoraSettings, add_lora
from ..packages import pip_install
from ..schedule import flux_shifted, sd3_twice_shifted, shifted_linear

TEXT_BATCH = 16
"""Prompts that go through the text encoders at once."""
FLOAT16_SCALE = 64
"""Gradients travel through a float16 transformer this much larger, times the latent elements the loss averages over.

One element's share of GRPO's gradient is around 1e-8; float16 ends at 6e-8. The LoRA's are scaled back in float32.
"""
ATTENTION = r"\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
NEEDED = {"transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
"""Folders of both families; SD3 may lack its third text encoder."""
FEED_FORWARD = r"\.ff(_context)?\.net\.(0\.proj|2)$"


class Encoded(NamedTuple):
    """Conditioning of P prompts, on the CPU: thousands of prompts take gigabytes."""

    context: Tensor
    """[D, L, width]; with classifier-free guidance the last row is the empty prompt."""
    pooled: Tensor
    """[D, width]"""
    place: Tensor
    """[P] the row of each prompt."""

    def rows(self, rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Context and pooled [R, ...] of ``rows`` on ``like``'s device; each distinct row is moved once."""
        distinct, inverse = rows.unique(return_inverse=True)
        inverse = inverse.to(like.device)
        return self.context[distinct].to(like.device)[inverse], self.pooled[distinct].to(like.device)[inverse]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersSettings:
    """SD3.5 or FLUX.1 in diffusers' layout; nothing is downloaded unless ``path`` is a hub id."""

    path: Annotated[str, Text("a folder with model_index.json, or a hub id; must be given")] = ""
    dtype: Annotated[
        str, Choice(("bfloat16", "float16", "float32"), "precision of the base weights; the LoRA stays float32")
    ] = "bfloat16"
    resolution: Annotated[int, Knob(16, 4096, "width and height in pixels, a multiple of 16")] = 512
    guidance: Annotated[
        float, Knob(0.0, 30.0, "guidance scale; 0 = usual for the model (SD3 4.5, FLUX.1-dev 3.5), 1 = off for SD3")
    ] = 0.0
    cfg_grad: Annotated[
        str, Choice(CFG_GRADS, "whether SD3's unconditional half gets gradients; detach is cheaper")
    ] = "full"
    schedule: Annotated[
        str, Choice(("pipeline", "single_shift"), "noise levels: as diffusers' pipeline samples, or one fixed shift")
    ] = "pipeline"
    gradient_checkpointing: Annotated[bool, flag("compute activations twice to save memory")] = True
    decode_batch: Annotated[int, Knob(1, 1024, "most latents the VAE decodes at once")] = 4

    def load(self, lora: LoraSettings, seed: int) -> "DiffusersModel":
        """The pipeline's transformer and VAE with a fresh LoRA; ValueError says what is missing."""
        if find_spec("diffusers") is None or find_spec("transformers") is None:
            packages = ("diffusers>=0.35", "transformers>=4.45")
            raise ValueError(f"model diffusers needs two more packages; get them with:  {pip_install(*packages)}")
        folder = find_folder(self.path)
        return DiffusersModel(folder, read_family(folder), self, lora, seed)


class Family(NamedTuple):
    """What differs between the architectures."""

    title: str
    pipeline: str
    """Class in diffusers."""
    guidance: float
    is_guided: bool
    """Whether guidance takes a second, unconditional evaluation."""
    targets: str
    """Layers that Flow-GRPO's scripts give a LoRA."""
    size: Callable[[Mapping[str, Any]], tuple[int, float]]
    """Transformer config -> latent channels and largest latent side."""
    encode: Callable[[Any, list[str], torch.device], tuple[Tensor, Tensor]]
    predict: Callable[[Any, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    """(transformer, x [R, C, h, w], sigma [R], context, pooled, guidance) -> velocity [R, C, h, w]."""
    schedule: Callable[[int, int, Mapping[str, Any]], Tensor]
    """(steps, image tokens, scheduler config) -> the pipeline's noise levels."""
    refused: tuple[str, ...]
    """Scheduler options with which ``schedule`` would not be the pipeline's."""


def sd3_encode(pipeline: Any, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Both CLIPs and T5; without a T5 its part is zeros, as in the pipeline."""
    found = pipeline.encode_prompt(texts, None, None, device=device, do_classifier_free_guidance=False)
    return found[0], found[2]


def sd3_predict(network: Any, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, guidance: float) -> Tensor:
    """The transformer counts time in thousandths."""
    return network(x, context, pooled, sigma * 1000, return_dict=False)[0]


def sd3_schedule(num_steps: int, num_tokens: int, config: Mapping[str, Any]) -> Tensor:
    """The shift acts twice, in diffusers' pipeline and so in Flow-GRPO's runs."""
    return sd3_twice_shifted(num_steps, config["shift"], config["num_train_timesteps"])


def flux_encode(pipeline: Any, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """T5 for the context, CLIP for the pooled vector."""
    context, pooled, _ = pipeline.encode_prompt(texts, device=device)
    return context, pooled


def flux_predict(network: Any, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, guidance: float) -> Tensor:
    """The transformer sees 2 x 2 patches as tokens, with their places; guidance is one of its inputs."""
    size, (height, width) = len(x), (side // 2 for side in x.shape[-2:])
    tokens = x.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5)
    places = torch.cartesian_prod(*(torch.arange(float(n), device=x.device) for n in (1, height, width)))
    tokens, text_places = tokens.reshape(size, height * width, -1), places.new_zeros(context.shape[1], 3)
    scale = torch.full_like(sigma, guidance) if network.config.guidance_embeds else None
    out = network(tokens, context, pooled, sigma, places, text_places, scale, return_dict=False)[0]
    return out.view(size, height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def flux_schedule(num_steps: int, num_tokens: int, config: Mapping[str, Any]) -> Tensor:
    """FLUX.1-dev shifts more for larger images, FLUX.1-schnell by a fixed factor."""
    if not config["use_dynamic_shifting"]:
        return shifted_linear(num_steps, config["shift"])
    low = (config["base_image_seq_len"], config["base_shift"])
    return flux_shifted(num_steps, num_tokens, low, (config["max_image_seq_len"], config["max_shift"]))


NOT_PLAIN = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")
FAMILIES = {
    "SD3Transformer2DModel": Family(
        title="SD3",
        pipeline="StableDiffusion3Pipeline",
        guidance=4.5,
        is_guided=True,
        targets=ATTENTION,
        size=lambda config: (config["in_channels"], config["pos_embed_max_size"] * config["patch_size"]),
        encode=sd3_encode,
        predict=sd3_predict,
        schedule=sd3_schedule,
        refused=(*NOT_PLAIN, "use_dynamic_shifting"),
    ),
    "FluxTransformer2DModel": Family(
        title="FLUX.1",
        pipeline="FluxPipeline",
        guidance=3.5,
        is_guided=False,
        targets=f"({ATTENTION})|({FEED_FORWARD})",
        size=lambda config: (config["in_channels"] // 4, math.inf),
        encode=flux_encode,
        predict=flux_predict,
        schedule=flux_schedule,
        refused=NOT_PLAIN,
    ),
}


class DiffusersModel:
    """``FlowModel`` over the parts of a diffusers pipeline."""

    lora_prefix = "transformer"

    def __init__(self, folder: Path, family: Family, settings: DiffusersSettings, lora: LoraSettings, seed: int = 0):
        self.folder, self.family, self.settings = folder, family, settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, settings.dtype)
        self.scheduler = read_part(folder, "scheduler", local_files_only=True).config
        self.vae = read_part(folder, "vae", **weights_in(torch.float32)).eval().requires_grad_(False)
        self.network = read_part(folder, "transformer", **weights_in(self.dtype)).eval()
        reduction = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = settings.resolution // reduction
        self.latent_shape: tuple[int, ...] = (self.vae.config.latent_channels, side, side)
        self.guidance = settings.guidance or family.guidance
        self.cfg_scale = self.guidance if family.is_guided else 1.0
        check_use(self, reduction)
        if settings.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.lora = add_lora(self.network, lora, family.targets, seed).to(self.device)
        self.gradient_scale = FLOAT16_SCALE * math.prod(self.latent_shape) if self.dtype == torch.float16 else 1
        for parameter in self.lora.parameters() if self.gradient_scale != 1 else ():
            parameter.register_hook(lambda gradient: gradient / self.gradient_scale)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Read the text encoders, encode each distinct prompt once, and let the encoders go."""
        number = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        texts = [*number, ""] if self.cfg_scale != 1 else list(number)
        move(self.network, torch.device("cpu"))
        move(self.vae, torch.device("cpu"))
        context, pooled = self.embed(texts)
        gc.collect()
        torch.cuda.empty_cache()
        return Encoded(context, pooled, torch.tensor([number[text] for text in prompts]))

    def embed(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """[D, L, width] and [D, width] on the CPU; nothing of the encoders outlives the call."""
        given: dict[str, Any] = {name: None for name, kind in read_index(self.folder).items() if kind is None}
        given |= {"transformer": self.network, "vae": self.vae} | weights_in(self.dtype)
        with reading(self.folder):
            pipeline = getattr(import_module("diffusers"), self.family.pipeline).from_pretrained(self.folder, **given)
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(self.device)
        parts = [
            [t.to("cpu", self.dtype) for t in self.family.encode(pipeline, texts[i : i + TEXT_BATCH], self.device)]
            for i in range(0, len(texts), TEXT_BATCH)
        ]
        return torch.cat([context for context, _ in parts]), torch.cat([pooled for _, pooled in parts])

    def velocity(self, x: Tensor, sigma: Tensor, cond: Encoded, rows: Tensor) -> Tensor:
        """[R, C, h, w] -> [R, C, h, w] float32."""
        move(self.network, self.device)

        def predict(x: Tensor, sigma: Tensor, rows: Tensor, conditional: bool) -> Tensor:
            places = cond.place[rows.cpu()] if conditional else torch.full((len(x),), len(cond.context) - 1)
            inputs = (x.to(self.dtype), sigma, *cond.rows(places, x), self.guidance)
            return self.family.predict(self.network, *inputs).float()

        velocity = guided(predict, x, sigma, rows, self.cfg_scale, self.settings.cfg_grad)
        if self.gradient_scale != 1 and velocity.requires_grad:
            velocity.register_hook(lambda gradient: gradient * self.gradient_scale)
        return velocity

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """In float32: SD3's and FLUX.1's VAEs are not exact in less."""
        move(self.vae, self.device)
        config, latents = self.vae.config, latents.to(self.device, torch.float32)
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        parts = [self.vae.decode(part, return_dict=False)[0] for part in latents.split(self.settings.decode_batch)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def schedule(self, num_steps: int) -> Tensor:
        """Those of the pipeline by default: the published noise rates and clip ranges were tuned on them.

        ``single_shift`` is SD3's schedule as ComfyUI and the paper have it, and DanceGRPO's for FLUX.1.
        """
        if self.settings.schedule == "single_shift":
            return shifted_linear(num_steps, self.scheduler["shift"])
        return self.family.schedule(num_steps, (self.latent_shape[-1] // 2) ** 2, self.scheduler)


def move(module: nn.Module, device: torch.device) -> None:
    """Bring a part where it is needed, if it is not there."""
    if next(module.parameters()).device.type != device.type:
        module.to(device)


def find_folder(path: str) -> Path:
    """The local folder of a model; a hub id is downloaded, or found in diffusers' cache."""
    if not path:
        raise ValueError(
            'model diffusers: path is empty; give a folder such as "/models/sd3.5-medium" or a hub id such as '
            '"stabilityai/stable-diffusion-3.5-medium"'
        )
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) or folder.parent.is_dir():
        raise ValueError(f"model diffusers: path {path!r} does not exist; give a folder with model_index.json")
    try:
        return Path(import_module("diffusers").DiffusionPipeline.download(path, use_safetensors=True))
    except OSError as problem:
        raise ValueError(
            f"model diffusers: path {path!r} is no folder here, and as a hub id it could not be downloaded "
            f"({one_line(problem)}); check the spelling, log in with `hf auth login` if the model asks for it, or "
            "give a local folder"
        ) from problem


def read_index(folder: Path) -> dict[str, str | None]:
    """Part -> its class; None where a pipeline goes without. ``_class_name`` is the pipeline's own."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(
            f"model diffusers: {folder} has no model_index.json; give a folder in diffusers' layout (from a single "
            ".safetensors file: diffusers' from_single_file, then save_pretrained)"
        )
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"model diffusers: {path} is damaged: {problem}; download or save the model again") from None
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return parts | {"_class_name": index.get("_class_name", "pipeline")}


def read_family(folder: Path) -> Family:
    """Which architecture is in ``folder``; ValueError when it is another one, or parts are missing."""
    index = read_index(folder)
    pipeline, kind, scheduler = index.pop("_class_name"), index.get("transformer"), index.get("scheduler")
    if kind not in FAMILIES:
        known = ", ".join(f"{name} ({family.title})" for name, family in FAMILIES.items())
        raise ValueError(f"model diffusers: {folder} is a {pipeline} with transformer {kind}; supported: {known}")
    missing = sorted(name for name in NEEDED | {n for n, part in index.items() if part} if not (folder / name).is_dir())
    if missing:
        raise ValueError(f"model diffusers: {folder} lacks the folders {', '.join(missing)}; download or save it again")
    if scheduler != SCHEDULER:
        raise ValueError(f"model diffusers: {folder} has scheduler {scheduler}; supported: {SCHEDULER}")
    return FAMILIES[kind]


def read_part(folder: Path, name: str, **how: Any) -> Any:
    """One part of a pipeline, of the class that model_index.json says."""
    part = getattr(import_module("diffusers"), str(read_index(folder)[name]))
    with reading(folder / name):
        return part.from_pretrained(folder, subfolder=name, **how)


def weights_in(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of diffusers' loaders: in this precision, never a pickle, never from the network."""
    major, minor = import_module("diffusers").__version__.split(".")[:2]
    name = "dtype" if (int(major), int(minor)) >= (0, 40) else "torch_dtype"
    return {name: dtype, "use_safetensors": True, "local_files_only": True}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a library's many ways of failing to read a file into one sentence."""
    try:
        yield
    except OSError as problem:
        raise ValueError(
            f"model diffusers: {path} cannot be read ({one_line(problem)}); download or save the model again"
        ) from problem


def one_line(problem: Exception) -> str:
    """The first line of a message."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def check_use(model: "DiffusersModel", reduction: int) -> None:
    """Raise ValueError for settings that this model cannot follow or that have no effect on it."""
    settings, family, config = model.settings, model.family, model.network.config
    for problem in (
        *wrong_size(settings.resolution, 2 * reduction, model.latent_shape, *family.size(config)),
        *wrong_guidance(settings, family, config),
        *wrong_scheduler(settings, family, model.scheduler),
    ):
        raise ValueError(f"model diffusers: {problem}")


def wrong_size(
    resolution: int, multiple: int, latent_shape: tuple[int, ...], channels: int, largest: float
) -> Iterator[str]:
    """What is wrong with the resolution; ``largest`` is the transformer's largest latent side."""
    if channels != latent_shape[0]:
        yield (
            f"the transformer takes {channels} channels but the VAE makes {latent_shape[0]}: it expects an input "
            "image; give a plain text-to-image model"
        )
    if resolution % multiple:
        below = max(resolution // multiple, 1) * multiple
        yield f"resolution must be a multiple of {multiple}, got {resolution}; take {below} or {below + multiple}"
    if latent_shape[1] > largest:
        limit = largest * multiple / 2
        yield f"resolution {resolution} is too large for this model; it was made for at most {limit:.0f}"


def wrong_guidance(settings: DiffusersSettings, family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the guidance."""
    scale, title = settings.guidance, family.title
    if 0 < scale < 1:
        yield f"guidance must be 0 (usual for the model) or at least 1, got {scale}"
    if scale and not family.is_guided and not config["guidance_embeds"]:
        yield f"guidance {scale} has no effect: this {title} was distilled to run without (schnell); leave it at 0"
    if settings.cfg_grad != "full" and (scale == 1 or not family.is_guided):
        yield f"cfg_grad {settings.cfg_grad!r} has no effect: this {title} runs no unconditional half; leave it out"


def wrong_scheduler(settings: DiffusersSettings, family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """Scheduler options with which the pipeline would sample on noise levels that we do not know."""
    unknown = [f"{name}={config[name]}" for name in family.refused if config[name]]
    if config["use_dynamic_shifting"] and config["time_shift_type"] != "exponential":
        unknown.append(f"time_shift_type={config['time_shift_type']}")
    if unknown and settings.schedule == "pipeline":
        yield f'the scheduler has {", ".join(unknown)}, which is not supported; set schedule to "single_shift"'
