"""What the host's models compute in training, and whether they stay as they were."""

import tempfile
from dataclasses import replace
from pathlib import Path

import comfy.conds
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import torch
from comfy_families import FAMILIES, build
from comfy_inside import (
    RANK4,
    ROWS,
    SIGMA,
    SMALL,
    TEXTS,
    demo_session,
    encoded,
    family_session,
    fingerprint,
    gap,
    normal,
    refusal,
    same,
    spoil,
    stock,
    velocity,
)
from densegrpo.engine.lora import LoraSettings, export
from densegrpo.engine.models.comfy_conditioning import can_share_a_call
from densegrpo.engine.models.comfy_demo import load_demo
from densegrpo.engine.models.tiny import DemoSettings
from densegrpo.engine.rollout import finish_by_ode

STOCK_LOADED = ("sd3", "wan")
"""Families that the host's own loader takes at these sizes."""


def case_demo():
    """MODEL and VAE built of the demo's files against the engine's own demo model."""
    demo, found = load_demo(), {}
    for cfg in (1.0, 3.0):
        own = DemoSettings(guidance=cfg).load(RANK4, 0)
        with demo_session(demo, cfg=cfg) as flow:
            found[f"velocity_cfg_{cfg:g}"] = gap(velocity(flow), velocity(own))
            found["schedule"] = float((flow.schedule(10) - own.schedule(10)).abs().max())
            found["layers_equal"] = flow.lora.names == own.lora.names
            latents = normal((2, *flow.latent_shape))
            found["decode"] = gap(flow.decode(latents), own.decode(latents))
            found["self_test"] = flow.check_gradients()
    return found


def case_stock_nodes():
    """The demo's CLIP and VAE in stock nodes."""
    demo = load_demo()
    own = DemoSettings().load(RANK4, 0).encode(TEXTS)
    prompts = encoded(demo.clip)
    image = normal((2, 68, 64, 3), 1).sigmoid()
    latents = stock.VAEEncode().encode(demo.vae, image)[0]["samples"]
    odd = ["(red:1.3) circle", "((a \\(red\\) circle", "embedding:x (a:b) )", "", "x" * 5000, "(:1.2)"]
    weighted, plain = (encoded(demo.clip, [t])[t][0] for t in ("a (red:1.3) circle", "a red circle"))
    return {
        "context": max(gap(prompts[t][0][0], own.context[i : i + 1]) for i, t in enumerate(TEXTS)),
        "pooled": max(gap(prompts[t][0][1]["pooled_output"], own.pooled[i : i + 1]) for i, t in enumerate(TEXTS)),
        "shapes": [list(encoded(demo.clip, [t])[t][0][0].shape) for t in odd],
        "weights_ignored": gap(weighted[0], plain[0]),
        "word_ids": len(demo.clip.tokenize("a red circle", return_word_ids=True)["demo"][0][0]),
        "latent_shape": list(latents.shape),
        "decoded_shape": list(stock.VAEDecode().decode(demo.vae, {"samples": latents})[0].shape),
        "tiled": gap(
            stock.VAEDecodeTiled().decode(demo.vae, {"samples": latents}, 512)[0],
            stock.VAEDecode().decode(demo.vae, {"samples": latents})[0],
        ),
        "round_trip": gap(demo.vae.encode(demo.vae.decode(latents * 0.1)), latents * 0.1),
    }


def case_ksampler():
    """The host's own sampler and our ODE, from the same noise."""
    demo, found = load_demo(), {}
    prompts = encoded(demo.clip)
    empty = {"samples": torch.zeros(1, 16, 8, 8)}
    noise = comfy.sample.prepare_noise(empty["samples"], 7).clone()
    for cfg, scheduler in ((1.0, "simple"), (3.0, "simple"), (1.0, "beta")):
        options = (7, 10, cfg, "euler", scheduler, prompts[TEXTS[0]], prompts[""], empty)
        theirs = stock.common_ksampler(demo.model, *options)[0]["samples"]
        with demo_session(demo, cfg=cfg, scheduler=scheduler) as flow:
            ours = finish_by_ode(flow, flow.encode(TEXTS), noise, flow.schedule(10), torch.tensor([0]))
            found[f"{scheduler}_{cfg:g}"] = gap(flow.patcher.model.process_latent_out(ours), theirs)
    return found


def case_untouched():
    """The MODEL after sessions, also one that fails, and with another LoRA patched in upstream."""
    demo = load_demo()
    plain = fingerprint(demo.model)
    with demo_session(demo) as flow:
        spoil(flow.lora)
        velocity(flow)
        flow.velocity(normal((1, *flow.latent_shape)), SIGMA[:1], flow.encode(TEXTS), ROWS[:1]).sum().backward()
    after = same(plain, fingerprint(demo.model))
    refusal(interrupted, demo, kind=KeyError)
    after_error = same(plain, fingerprint(demo.model))
    rank = LoraSettings(rank=4, targets="no such layer")
    refused = refusal(lambda: demo_session(demo, lora=rank).__enter__())
    layer = "joint_blocks.0.x_block.attn.qkv"
    outs, ins = demo.model.model.diffusion_model.get_submodule(layer).weight.shape
    upstream = {f"diffusion_model.{layer}.lora_A.weight": normal((2, ins), 1)}
    upstream[f"diffusion_model.{layer}.lora_B.weight"] = normal((outs, 2), 2, 0.05)
    patched = demo._replace(model=comfy.sd.load_lora_for_models(demo.model, None, upstream, 1.0, 0.0)[0])
    with demo_session(demo) as flow:
        without = velocity(flow)
    with demo_session(patched) as flow:
        first = velocity(flow)
        spoil(flow.lora)
        trained = velocity(flow)
    with demo_session(patched) as flow:
        again = velocity(flow)
    with demo_session(demo) as flow:
        removed = velocity(flow)
    comfy.model_management.unload_all_models()
    return {
        "after": after,
        "after_error": after_error,
        "refused": refused,
        "upstream_counts": gap(first, without),
        "lora_counts": gap(trained, first),
        "patched_again": torch.equal(again, first),
        "removed_again": torch.equal(removed, without),
        "at_the_end": same(plain, fingerprint(demo.model)),
    }


def interrupted(demo):
    with demo_session(demo) as flow:
        spoil(flow.lora)
        velocity(flow)
        raise KeyError("in the middle")


def case_interrupt():
    """Cancel takes effect at the next model call, and leaves the MODEL as it was."""
    demo = load_demo()
    plain = fingerprint(demo.model)

    def cancel():
        with demo_session(demo) as flow:
            velocity(flow)
            comfy.model_management.interrupt_current_processing()
            velocity(flow)

    stopped = refusal(cancel, kind=comfy.model_management.InterruptProcessingException)
    return {"stopped": stopped, "untouched": same(plain, fingerprint(demo.model))}


def case_families():
    """Every family: batches, gradients, checkpointing, the exported file in the stock loader."""
    return {family: measure_family(family) for family in FAMILIES}


def measure_family(family):
    try:
        model = build(family, stock_loader=family in STOCK_LOADED)
    except TypeError as problem:  # this host's classes take other sizes
        return {"unavailable": str(problem)}
    plain, found, gradients = fingerprint(model), {}, []
    for checkpointing in (True, False):
        settings = replace(SMALL, cfg=2.0, gradient_checkpointing=checkpointing)
        with family_session(model, family, settings) as flow:
            cond, x = flow.encode("abc"), normal((len(ROWS), *flow.latent_shape), 5)
            found["shape"], found["self_test"] = list(flow.latent_shape), flow.check_gradients()
            spoil(flow.lora)
            batch = flow.velocity(x, SIGMA, cond, ROWS)
            with torch.no_grad():
                parts = [flow.velocity(x[i : i + 1], SIGMA[i : i + 1], cond, ROWS[i : i + 1]) for i in range(len(x))]
            found["batch"] = gap(batch.detach(), torch.cat(parts))
            (batch * normal(batch.shape, 6)).mean().backward()
            gradients.append(torch.cat([torch.zeros(0) if p.grad is None else p.grad.flatten() for p in flow.lora.up]))
            found["decode"] = list(flow.decode(x).shape)
            trained = batch.detach()
            with tempfile.TemporaryDirectory() as folder:
                export(flow.lora, Path(folder) / "lora.safetensors", flow.lora_prefix, {})
                file = comfy.utils.load_torch_file(str(Path(folder) / "lora.safetensors"), safe_load=True)
            found["layers"] = len(flow.lora.names)
    found["checkpointing"] = gap(gradients[0], gradients[1])
    found["untouched"] = same(plain, fingerprint(model))
    loaded = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)[0]
    found["patches"] = len(loaded.patches)
    with family_session(loaded, family, settings) as flow, torch.no_grad():
        found["stock_loader"] = gap(flow.velocity(x, SIGMA, flow.encode("abc"), ROWS), trained)
    with family_session(model, family, settings) as flow, torch.no_grad():
        found["lora_counts"] = gap(flow.velocity(x, SIGMA, flow.encode("abc"), ROWS), trained)
    return found


def case_precisions():
    """Bases in 16 and 8 bit: the self-test passes and gradients agree with float32."""
    found, reference = {}, None
    for name, dtype, compute in (
        ("float32", torch.float32, None),
        ("bfloat16", torch.bfloat16, None),
        ("float16", torch.float16, None),
        ("fp8", torch.float8_e4m3fn, torch.bfloat16),
    ):
        with family_session(build("sd3", dtype, compute), "sd3") as flow:
            self_test = flow.check_gradients()
            spoil(flow.lora)
            x = normal((3, *flow.latent_shape), 5)
            out = flow.velocity(x, SIGMA[:3], flow.encode("abc"), ROWS[:3])
            (out * normal(out.shape, 6)).mean().mul(1e-3).backward()
            gradient = torch.cat([p.grad.flatten() for p in flow.lora.parameters()])
            reference = gradient if reference is None else reference
            cosine = torch.nn.functional.cosine_similarity(gradient, reference, 0)
            length = float(gradient.norm() / reference.norm())
            found[name] = {"self_test": self_test, "cosine": float(cosine), "length": length, "dtype": str(out.dtype)}
    return found


def case_lengths():
    """What the network sees of six rows of prompts with 6, 9 and 6 tokens."""
    model, seen = build("sd3"), []
    with family_session(model, "sd3", replace(SMALL, cfg=2.0)) as flow:
        hook = model.model.diffusion_model.register_forward_pre_hook(
            lambda _, inputs, keywords: seen.append([len(inputs[0]), keywords["context"].shape[1]]), with_kwargs=True
        )
        velocity(flow, "abc")
        hook.remove()
    short, long = (comfy.conds.CONDCrossAttn(normal((1, tokens, 4))) for tokens in (6, 12))
    return {"calls": seen, "host_would": short.can_concat(long), "shared": can_share_a_call({"c": short}, {"c": long})}
