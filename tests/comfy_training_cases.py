"""Gradients, whole trainings, and what a user is told when something does not fit."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy_families import FakeVAE, build
from comfy_inside import (
    RANK4,
    ROWS,
    SIGMA,
    SMALL,
    demo_session,
    encoded,
    family_session,
    gap,
    normal,
    refusal,
    spoil,
    velocity,
)
from densegrpo.engine.learner import Learner, OptimizerSettings
from densegrpo.engine.lora import LoraSettings
from densegrpo.engine.models.comfy import training_session
from densegrpo.engine.models.comfy_demo import load_demo
from densegrpo.engine.models.tiny import DemoSettings
from densegrpo.engine.prompts import load_prompts
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.rewards import Panel, make_reward
from densegrpo.engine.train import TrainSettings, train


def case_text_layers():
    """A LoRA on the layer that takes the conditioning itself, which upstream nodes made as inference tensors."""
    with family_session(build("sd3"), "sd3", lora=LoraSettings(rank=4, targets="^context_embedder$")) as flow:
        spoil(flow.lora)
        out = flow.velocity(normal((1, *flow.latent_shape)), SIGMA[1:2], flow.encode("a"), ROWS[:1])
        out.mean().backward()
        return {"layers": flow.lora.names, "gradient": float(flow.lora.down[0].grad.abs().max())}


def case_guidance():
    """Embedded guidance counts where the model has it, and is refused where it does not."""
    found = {}
    with family_session(build("flux"), "flux") as flow:
        default = velocity(flow, "abc")
    for value in (3.5, 8.0):
        with family_session(build("flux"), "flux", replace(SMALL, guidance=value)) as flow:
            found[f"{value:g}"] = gap(velocity(flow, "abc"), default)
    with family_session(build("sd3"), "sd3", replace(SMALL, guidance=3.5)) as flow:
        found["refused"] = refusal(velocity, flow, "abc")
    return found


def case_self_test():
    """The self-test finds blocks that autograd cannot see through, or sees wrongly; the LoRA is left as it was."""
    found = {}
    damages = {
        "detached": (0, lambda t: t.detach()),
        "wrong": (1, lambda t: t / 2 + t.detach() / 2),
        "overwritten": (1, lambda t: t.mul_(1.0) if t.requires_grad else t),
    }
    for name, (number, damage) in damages.items():
        model = build("sd3")
        block = model.model.diffusion_model.joint_blocks[number]
        with family_session(model, "sd3", replace(SMALL, gradient_checkpointing=False)) as flow:
            spoil(flow.lora)
            before = [p.detach().clone() for p in flow.lora.parameters()]
            part = block.x_block.mlp.act if name == "overwritten" else block
            hook = part.register_forward_hook(partial(damaged, damage))
            found[name] = refusal(flow.check_gradients, kind=RuntimeError)
            hook.remove()
            found[f"{name}_kept"] = all(map(torch.equal, before, flow.lora.parameters()))
            found[f"{name}_repaired"] = flow.check_gradients()
    return found


def damaged(damage, _, inputs, out):
    if isinstance(out, torch.Tensor):
        damage(inputs[0])  # an activation overwrites its input, which its gradient needs
        return out
    return tuple(t if t is None else damage(t) for t in out)


def case_attention():
    """A host started with an attention that has no backward pass; and the flag of hosts that have one."""
    attention = comfy.ldm.modules.attention
    mmdit = comfy.ldm.modules.diffusionmodules.mmdit
    usual = mmdit.optimized_attention
    found = {}
    try:
        mmdit.optimized_attention = attention.wrap_attn(torch.no_grad()(attention.attention_basic))
        comfy.model_management.in_training = False
        with family_session(build("sd3"), "sd3") as flow:
            found["self_test"] = flow.check_gradients()
            found["during"] = comfy.model_management.in_training
            del flow.patcher.model_options["transformer_options"]["optimized_attention_override"]
            found["without"] = refusal(flow.check_gradients, kind=RuntimeError)
        found["after"] = comfy.model_management.in_training
    finally:
        mmdit.optimized_attention = usual
        del comfy.model_management.in_training
    return found


def case_training():
    """Two iterations of DenseGRPO in the host and without it, from the same seed."""
    demo, runs = load_demo(), []
    prompts = load_prompts("demo:train", Path())[::40][:4]
    texts = [p.text for p in prompts]
    recipe = make_recipe("dense_grpo", group_size=3)
    sizes = TrainSettings(iterations=2, groups=2, num_steps=4, sample_batch=64, train_batch=8)

    def run(flow):
        panel = Panel([("shapes", make_reward("shapes", score="dense"), 1.0)], "each")
        learner = Learner(flow.lora, OptimizerSettings(lr=1e-3))
        steps = train(flow, flow.encode(texts), prompts, panel, recipe, learner, sizes)
        runs.append([{k: v for k, v in step.stats.items() if not k.startswith("seconds")} for step in steps])

    conds = encoded(demo.clip, [*texts, ""])
    for cfg, cfg_grad in ((1.0, "full"), (2.0, "detach")):
        settings = replace(SMALL, cfg=cfg, cfg_grad=cfg_grad)
        with training_session(demo.model, demo.vae, conds, conds[""], settings, RANK4) as flow:
            run(flow)
        with torch.inference_mode(False), torch.enable_grad():
            run(DemoSettings(guidance=cfg, cfg_grad=cfg_grad).load(RANK4, 0))
    return {"host": runs[0] + runs[2], "own": runs[1] + runs[3]}


def case_refusals():
    """What a user is told."""
    demo, sd3 = load_demo(), build("sd3")
    prompts = encoded(demo.clip)
    plain = (demo.model, demo.vae, prompts, prompts[""])

    def opened(model, vae, conditionings, negative, settings=SMALL):
        with training_session(model, vae, conditionings, negative, settings, RANK4) as flow:
            return flow.schedule(10)

    def changed(**options):
        return refusal(opened, *plain, replace(SMALL, **options))

    two_parts = {**prompts, "x": [*prompts[""], *prompts[""]]}
    masked = {**prompts, "x": [[prompts[""][0][0], {"mask": torch.ones(1, 8, 8)}]]}
    wrong_vae = FakeVAE(sd3)
    wrong_vae.latent_channels = 4
    with demo_session(demo) as flow:
        unknown_prompt = refusal(flow.encode, ["never seen"])
    return {
        "sd15": refusal(opened, sd15(), *plain[1:]),
        "sigma": refusal(opened, shifted_sigmas(demo.model), *plain[1:]),
        "two parts": refusal(opened, demo.model, demo.vae, two_parts, prompts[""]),
        "mask": refusal(opened, demo.model, demo.vae, masked, prompts[""]),
        "vae": refusal(opened, demo.model, wrong_vae, *plain[2:]),
        "negative": refusal(opened, demo.model, demo.vae, prompts, None, replace(SMALL, cfg=3.0)),
        "size": changed(width=72),
        "cfg_grad": changed(cfg_grad="detach"),
        "scheduler": changed(scheduler="simpel"),
        "levels": changed(scheduler="ddim_uniform", width=64),
        "prompt": unknown_prompt,
    }


def sd15():
    """A MODEL of SD1.5's kind: noise prediction with sigmas far above 1."""
    config = comfy.supported_models.SD15({"disable_unet_model_creation": True, "in_channels": 4})
    return comfy.model_patcher.ModelPatcher(config.get_model({}, ""), torch.device("cpu"), torch.device("cpu"))


def shifted_sigmas(model):
    """A flow MODEL whose noise levels a node has stretched."""
    model = model.clone()
    sampling = type(model.get_model_object("model_sampling"))(model.model.model_config)
    sampling.register_buffer("sigmas", sampling.sigmas * 80)
    model.add_object_patch("model_sampling", sampling)
    return model
