"""What is measured inside a real ComfyUI: ``python comfy_cases.py COMFYUI PACKAGE ANSWER [case ...]``.

Each case returns numbers and texts that test_comfy_backend.py judges. All run under ``torch.inference_mode``,
as ComfyUI runs nodes.
"""

# ruff: noqa: E402

import importlib.util
import json
import sys
import tempfile
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

COMFYUI, PACKAGE, ANSWER, *WANTED = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, COMFYUI)
try:
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.conds
    import comfy.ldm.modules.attention
    import comfy.ldm.modules.diffusionmodules.mmdit
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sample
    import comfy.sd
    import comfy.supported_models
    import comfy.utils
    import torch
    from comfy_families import FAMILIES, FakeVAE, build, conditioning

    import nodes as stock  # noqa: TID251
except ModuleNotFoundError as problem:
    print(problem, file=sys.stderr)
    sys.exit(3)

spec = importlib.util.spec_from_file_location("densegrpo", Path(PACKAGE) / "__init__.py")
sys.modules["densegrpo"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["densegrpo"])

from densegrpo.engine.learner import Learner, OptimizerSettings
from densegrpo.engine.lora import LoraSettings, export
from densegrpo.engine.models.comfy import training_session
from densegrpo.engine.models.comfy_conditioning import can_share_a_call
from densegrpo.engine.models.comfy_demo import load_demo
from densegrpo.engine.models.comfy_settings import ComfySettings
from densegrpo.engine.models.tiny import DemoSettings
from densegrpo.engine.prompts import load_prompts
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.rewards import Panel, make_reward
from densegrpo.engine.rollout import finish_by_ode
from densegrpo.engine.train import TrainSettings, train

STOCK_LOADED = ("sd3", "wan")
"""Families that the host's own loader takes at these sizes."""
SMALL = ComfySettings(width=64, height=64)
RANK4 = LoraSettings(rank=4)
TEXTS = ["a red circle", "two blue squares and a green triangle", "three yellow stars"]
ROWS = torch.tensor([0, 2, 1, 0, 2, 1])
SIGMA = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.6])


def normal(shape, seed=0, scale=1.0):
    with torch.inference_mode(False):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def encoded(clip, texts=(*TEXTS, "")):
    return {text: stock.CLIPTextEncode().encode(clip, text)[0] for text in texts}


def demo_session(demo, settings=SMALL, lora=RANK4, **changes):
    prompts = encoded(demo.clip)
    return training_session(demo.model, demo.vae, prompts, prompts[""], replace(settings, **changes), lora)


def family_session(model, family, settings=SMALL, lora=RANK4):
    """Two prompts of 6 tokens, one of 9."""
    prompts = {
        text: conditioning(family, tokens, seed) for text, tokens, seed in (("a", 6, 0), ("b", 9, 1), ("c", 6, 2))
    }
    return training_session(model, FakeVAE(model), prompts, conditioning(family, 6, 9), settings, lora)


def spoil(lora, scale=0.02):
    """As if it had been trained."""
    with torch.no_grad():
        for i, up in enumerate(lora.up):
            up.copy_(normal(up.shape, i, scale))


def velocity(flow, texts=TEXTS, scale=1.0):
    with torch.no_grad():
        return flow.velocity(normal((len(ROWS), *flow.latent_shape), 5) * scale, SIGMA, flow.encode(texts), ROWS)


def gap(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def fingerprint(model):
    network = model.model.diffusion_model
    return {
        "weights": {k: v.detach().clone() for k, v in model.model.state_dict().items()},
        "flags": {k: p.requires_grad for k, p in network.named_parameters()},
        "hooks": {k: len(m._forward_hooks) + len(m._forward_pre_hooks) for k, m in network.named_modules()},
        "methods": {k: "forward" in vars(m) for k, m in network.named_modules()},
        "options": repr(model.model_options),
    }


def same(before, after):
    def equal(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)

    whole = {k: v[None] if v.ndim == 0 else v for k, v in before["weights"].items()}
    now = {k: v[None] if v.ndim == 0 else v for k, v in after["weights"].items()}
    return equal(whole, now) and all(before[k] == after[k] for k in before if k != "weights")


def refusal(action, *arguments, kind=ValueError):
    try:
        action(*arguments)
    except kind as problem:
        return str(problem)
    return "not refused"


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


def measured(case):
    try:
        with torch.inference_mode():
            return case()
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    wanted = WANTED or [name.removeprefix("case_") for name in globals() if name.startswith("case_")]
    answer = {name: measured(globals()[f"case_{name}"]) for name in wanted}
    Path(ANSWER).write_text(json.dumps(answer, indent=1), encoding="utf-8")
