"""The user's own MODEL and VAE inside ComfyUI as a ``FlowModel``, for every flow-matching family the host loads.

Everything happens within ``training_session``: the host loads, patches, moves and runs the model; this file
only asks it for velocities. Shapes: R rows, C latent channels, h x w latent size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import comfy.model_management as host  # pyright: ignore[reportMissingImports]
import comfy.model_sampling  # pyright: ignore[reportMissingImports]
import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn

from ..data import expand
from ..lora import Lora, LoraSettings, attach, make_lora
from . import comfy_selftest, comfy_training
from .comfy_conditioning import check_conditioning, groups, merged
from .comfy_settings import ComfySettings

TARGETS = r"^\w*(blocks|layers)\.\d+\.(?!.*(ada|mod|norm|embed|time|router|gate(?!_proj)))"
"""Attention and feed-forward layers of the transformer blocks, in the names of every family of the host."""
Conditioning = Sequence[Any]
"""The host's CONDITIONING: a list of [tensor, dict]."""


class Encoded(NamedTuple):
    """Conditioning of P prompts."""

    prompts: Sequence[Conditioning]
    """[P]"""


@contextmanager
def training_session(
    model: Any,
    vae: Any,
    conditionings: Mapping[str, Conditioning],
    negative: Conditioning | None,
    settings: ComfySettings,
    lora: LoraSettings,
    seed: int = 0,
) -> "Iterator[ComfyModel]":
    """A MODEL with a fresh LoRA that can be sampled and trained; afterwards MODEL is bit for bit as before.

    ``conditionings`` are the prompts' CONDITIONING by their text, ``negative`` that of the negative prompt.
    Raises ValueError when model, VAE, prompts and settings do not fit each other.
    """
    check_use(model, vae, settings, negative)
    for text, conditioning in conditionings.items():
        check_conditioning(conditioning, f"prompt {text!r}")
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        patcher = comfy_training.clone(model)
        comfy_training.use_differentiable_attention(patcher)
        calculate_halves_apart(patcher, settings.cfg_grad)
        network = patcher.model.diffusion_model
        stack.enter_context(comfy_training.trainable(network, settings.gradient_checkpointing))
        adapter = put_on(network, lora, seed, stack).to(patcher.load_device)
        yield ComfyModel(patcher, vae, adapter, conditionings, negative, settings)


def put_on(network: nn.Module, settings: LoraSettings, seed: int, stack: ExitStack) -> Lora:
    """A LoRA that ``stack`` takes off again."""
    lora = make_lora(network, settings, TARGETS, seed)
    for handle in attach(lora, network):
        stack.callback(handle.remove)
    return lora


class ComfyModel:
    """``FlowModel`` over a host's MODEL and VAE; made by ``training_session``."""

    lora_prefix = "diffusion_model"

    def __init__(
        self,
        patcher: Any,
        vae: Any,
        lora: Lora,
        conditionings: Mapping[str, Conditioning],
        negative: Conditioning | None,
        settings: ComfySettings,
    ):
        self.patcher, self.vae, self.lora, self.settings = patcher, vae, lora, settings
        self.conditionings, self.negative = conditionings, negative
        self.device: torch.device = patcher.load_device
        self.latent_shape: tuple[int, ...] = latent_shape(patcher, vae, settings)
        self.dtype: torch.dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
        self.gradient_scale = scale = math.prod(self.latent_shape) if self.dtype == torch.float16 else 1
        for parameter in lora.parameters() if scale != 1 else ():
            parameter.register_hook(lambda gradient: gradient / scale)  # by self, the LoRA would refer to its owner

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Find the conditioning of texts that were encoded before the session."""
        missing = [text for text in prompts if text not in self.conditionings]
        if missing:
            raise ValueError(f"prompt {missing[0]!r} has not been encoded with CLIP; give its CONDITIONING")
        return Encoded([self.conditionings[text] for text in prompts])

    def velocity(self, x: Tensor, sigma: Tensor, cond: Encoded, rows: Tensor) -> Tensor:
        """[R, C, h, w] -> [R, C, h, w] float32; what the host's own sampler would see at these noise levels."""
        host.throw_exception_if_processing_interrupted()
        numbers, place = rows.cpu().unique(return_inverse=True)
        prompts = [self.usable(cond.prompts[i]) for i in numbers.tolist()]
        guider = comfy.samplers.CFGGuider(self.patcher)
        conds = {"positive": prompts}
        if self.negative is not None:
            conds["negative"] = [self.usable(self.negative)]
        guider.inner_set_conds(conds)
        guider.set_cfg(self.settings.cfg)
        call = Call(sigma, place, self.settings.guidance > 0)
        levels = torch.stack([sigma.max(), torch.zeros_like(sigma[0])])
        guider.sample(x.float(), torch.zeros_like(x), call, levels, disable_pbar=True, seed=0)
        return self.scaled(call.velocity)

    def usable(self, conditioning: Conditioning) -> Any:
        """One entry of a conditioning, free of inference tensors, with the embedded guidance of the settings."""
        tensor, extras = conditioning[0]
        guidance = {"guidance": self.settings.guidance} if self.settings.guidance > 0 else {}
        return [comfy_training.plain(tensor), {**comfy_training.plain(extras), **guidance}]

    def scaled(self, output: Tensor) -> Tensor:
        """The same numbers; in float16, gradients grow into its range on the way back and shrink at the LoRA.

        The loss is a mean over latent elements, so each gets a gradient around 1e-9, below float16's smallest.
        """
        if self.gradient_scale != 1 and output.requires_grad:
            output.register_hook(lambda gradient: gradient * self.gradient_scale)
        return output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """By the host's VAE, which looks after memory; of a video VAE the first frame."""
        host.throw_exception_if_processing_interrupted()
        images = self.vae.decode(self.patcher.model.process_latent_out(latents.float()))
        if images.ndim == 5:
            images = images[:, 0]
        if images.ndim != 4 or images.shape[-1] < 3:
            raise ValueError(f"the VAE gives {tuple(images.shape)} instead of images; connect an image model's VAE")
        return images[..., :3].movedim(-1, 1).float().clamp(0, 1)

    def schedule(self, num_steps: int) -> Tensor:
        """The noise levels KSampler would take, with the shift of the MODEL's own sampling object."""
        sampling = self.patcher.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, self.settings.scheduler, num_steps).float().cpu()
        good = len(sigmas) == num_steps + 1 and 0.98 < sigmas[0] <= 1 + 1e-5 and sigmas[-1] == 0
        if not good or not (sigmas.diff() < 0).all():
            levels = ", ".join(f"{level:.3f}" for level in sigmas.tolist())
            raise ValueError(
                f"scheduler {self.settings.scheduler!r} does not give {num_steps} falling steps from 1 to 0 for this "
                f"model (but {levels}); choose another, such as simple, or another number of steps"
            )
        return sigmas.clamp(max=1)

    def check_gradients(self) -> float:
        """Compare gradients with a finite difference before training; RuntimeError when they are wrong."""
        cond = self.encode([next(iter(self.conditionings))])
        return comfy_selftest.check_gradients(self, cond, self.dtype, type(self.patcher.model).__name__)


class Call(comfy.samplers.Sampler):
    """One model call as a sampler: the host loads the model and prepares the conditioning before it."""

    velocity: Tensor

    def __init__(self, sigma: Tensor, place: Tensor, needs_guidance: bool):
        self.sigma, self.place, self.needs_guidance = sigma, place, needs_guidance

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *_: Any) -> Tensor:
        """Called by the host; the result is left in ``velocity``. Rows of unlike prompts take several calls."""
        comfy_training.make_plain(model_wrap.inner_model)
        prepared = dict(model_wrap.conds)
        entries = prepared["positive"]
        if self.needs_guidance and "guidance" not in entries[0]["model_conds"]:
            raise ValueError(
                "guidance has no effect: this MODEL does not take it as an input; set guidance to 0, use cfg"
            )
        sigma, parts, order = self.sigma.to(noise), [], []
        for rows in groups(entries, self.place):
            model_wrap.conds = {**prepared, "positive": [merged(entries, self.place[rows])]}
            here = rows.to(noise.device)
            denoised = model_wrap(noise[here], sigma[here], **extra_args)
            parts.append((noise[here] - denoised) / expand(sigma[here], denoised))
            order.append(rows)
        self.velocity = torch.cat(parts)[torch.cat(order).argsort().to(noise.device)]
        return torch.zeros_like(noise)


def calculate_halves_apart(patcher: Any, cfg_grad: str) -> None:
    """Let the host run the conditional and the unconditional half one after the other, never as one batch.

    Together or apart, the host decides by free memory; apart always, results do not depend on it, and prompts
    of unlike lengths are not repeated to a common one.
    """
    if "sampler_calc_cond_batch_function" in patcher.model_options:
        if cfg_grad != "full":
            raise ValueError(f"cfg_grad {cfg_grad!r} is impossible with a patch of this MODEL; set it to 'full'")
        return

    def halves(args: dict[str, Any]) -> list[Tensor]:
        found = []
        for half in args["conds"]:
            positive = half is args["conds"][0]
            with torch.set_grad_enabled(torch.is_grad_enabled() and (positive or cfg_grad == "full")):
                inputs = (args["input"], args["sigma"], args["model_options"])
                found += comfy.samplers.calc_cond_batch(args["model"], [half], *inputs) if half else [0 * inputs[0]]
        return found

    patcher.set_model_sampler_calc_cond_batch_function(halves)


def check_use(model: Any, vae: Any, settings: ComfySettings, negative: Conditioning | None) -> None:
    """Raise ValueError when the MODEL cannot be trained or settings do not fit it."""
    check_flow(model)
    if settings.cfg > 1 and negative is None:
        raise ValueError(f"cfg {settings.cfg} needs a negative prompt; connect one (it may be empty) or set cfg to 1")
    if settings.cfg == 1 and settings.cfg_grad != "full":
        raise ValueError(f"cfg_grad {settings.cfg_grad!r} has no effect: cfg is 1; set cfg_grad to 'full'")
    if negative is not None:
        check_conditioning(negative, "the negative prompt")
    if settings.scheduler not in comfy.samplers.SCHEDULER_NAMES:
        known = ", ".join(comfy.samplers.SCHEDULER_NAMES)
        raise ValueError(f"unknown scheduler {settings.scheduler!r}; this ComfyUI has: {known}")
    channels = model.get_model_object("latent_format").latent_channels
    if vae.latent_channels != channels:
        raise ValueError(
            f"the VAE makes latents of {vae.latent_channels} channels but the MODEL takes {channels}; connect the VAE "
            "that belongs to it"
        )
    multiple = max(16, 2 * vae.spacial_compression_decode())
    for side, value in (("width", settings.width), ("height", settings.height)):
        if value % multiple:
            below = max(value // multiple, 1) * multiple
            raise ValueError(
                f"{side} must be a multiple of {multiple} for this model, got {value}; "
                f"take {below} or {below + multiple}"
            )


def check_flow(model: Any) -> None:
    """Raise ValueError for a model that does not predict the velocity between noise and image."""
    sampling = model.get_model_object("model_sampling")
    name = type(model.model).__name__
    if not isinstance(sampling, comfy.model_sampling.CONST):
        kind = next(k.__name__ for k in type(sampling).__mro__ if "calculate_denoised" in vars(k))
        raise ValueError(
            f"this MODEL ({name}, of kind {kind}) is not a flow-matching model: it was trained on another kind of "
            "noise, as SD1.5 and SDXL were, and GRPO's noise levels from 1 to 0 mean nothing to it; load one like "
            "SD3.5, FLUX.1, Qwen-Image, Lumina 2 or Wan"
        )
    if float(sampling.sigma_max) > 1 + 1e-3:
        raise ValueError(
            f"this MODEL ({name}) has noise levels up to {float(sampling.sigma_max):.3g}, flow matching ends at 1; "
            "remove the node that changed its sampling"
        )


def latent_shape(patcher: Any, vae: Any, settings: ComfySettings) -> tuple[int, ...]:
    """(C, h, w); models of video get one frame, (C, 1, h, w)."""
    latents = patcher.get_model_object("latent_format")
    ratio = vae.spacial_compression_decode()
    frames = (1,) * (latents.latent_dimensions - 2)
    return (latents.latent_channels, *frames, settings.height // ratio, settings.width // ratio)
