"""The shipped workflows: nodes, values, links, notes and where they stand. See build.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graph import Graph, Group, Node, Output
from notes import QUICKSTART

DEMO_SIZE = {"width": 64, "height": 64}


def method(graph: Graph, probed: bool, size: Mapping[str, int], steps: int, **update: Any) -> tuple[Node | None, ...]:
    """Sampler, probe and update."""
    sampler = graph.add("DenseGRPODenseSampler", num_steps=steps, group_size=size["group"])
    probe = graph.add("DenseGRPORewardProbe") if probed else None
    return sampler, probe, graph.add("DenseGRPOPolicyUpdate", **update)


def results(graph: Graph, loop: Node, name: str) -> Group:
    """Save the LoRA, show the pictures."""
    note = graph.note(
        "The LoRA goes into `models/loras`; the node says under which number.\n\n"
        "**Curve**: training reward and held-out scores. **Before and after**: two pictures, the same prompts and "
        "noise without and with the LoRA.",
        150,
        400,
        "What comes out",
    )
    save = graph.add("DenseGRPOSaveLoRA", lora=loop[1], name=name, size=(400, 170))
    curve = graph.add("PreviewImage", "Learning curve", images=loop[2], size=(400, 320))
    pictures = graph.add("SaveImage", "Before and after", images=loop[3], size=(560, 640))
    pictures.inputs = {**pictures.inputs, "filename_prefix": f"{name}_before_after"}
    return Group("4  Result", "orange", [[note, save, curve], [pictures]])


def quickstart_demo(graph: Graph) -> None:
    """The demo model learns to paint what the prompt says."""
    start = graph.note(
        QUICKSTART,
        480,
        title="Start here",
    )
    model = graph.add("DenseGRPOLoadDemoModel", size=(340, 0))
    train = graph.add("DenseGRPOTrainingPrompts", clip=model[1], file="demo:train", size=(340, 0))
    held_out = graph.add(
        "DenseGRPOTrainingPrompts",
        "Training Prompts (held out: only to measure)",
        clip=model[1],
        file="demo:held_out",
        size=(340, 0),
    )
    reward = graph.add("DenseGRPORewardModel", reward="shapes partial")
    strict = graph.add("DenseGRPORewardModel", "Reward Model (only measured)", reward="shapes strict")
    sampler, probe, update = method(
        graph,
        True,
        {"group": 12},
        8,
        lr=3e-4,
        rank=8,
        alpha=16.0,
        clip_range=0.01,
        kl="velocity",
        kl_weight=0.0,
        beta2=0.99,
        ema_every=1,
    )
    loop = graph.add(
        "DenseGRPOTrainLoop",
        size=(380, 910),
        model=model[0],
        vae=model[2],
        prompts=train[0],
        reward=reward[0],
        sampler=sampler[0],
        probe=probe[0],
        update=update[0],
        held_out_prompts=held_out[0],
        held_out_reward=strict[0],
        run_name="quickstart_demo",
        resume=False,
        iterations=40,
        **DEMO_SIZE,
        train_batch=64,
        evaluate_every=20,
        images_per_prompt=2,
    )
    graph.arrange(
        [Group("Read me", "grey", [[start]])],
        [Group("1  Model and prompts", "blue", [[model, train, held_out]])],
        [Group("2  Reward and method", "green", [[reward, strict, sampler, probe], [update]])],
        [Group("3  Train", "purple", [[loop]])],
        [results(graph, loop, "my_demo_lora")],
    )


DEMO_PROMPT = "a yellow circle and a green square"


def sample(graph: Graph, model: Output, demo: Node, text: Node, latent: Node, seed: Node, title: str) -> list[Node]:
    """KSampler and VAE Decode for the demo model."""
    sampler = graph.add(
        "KSampler",
        title,
        model=model,
        positive=text[0],
        negative=text[0],
        latent_image=latent[0],
        seed=seed[0],
        steps=8,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
    )
    return [sampler, graph.add("VAEDecode", samples=sampler[0], vae=demo[2])]


def question(graph: Graph) -> tuple[Node, Node, Node, Node, Node]:
    """Demo model, prompt, encoded prompt, empty latents and seed."""
    demo = graph.add("DenseGRPOLoadDemoModel", size=(320, 0))
    prompt = graph.add("PrimitiveStringMultiline", "Prompt", value=DEMO_PROMPT, size=(320, 0))
    encoded = graph.add("CLIPTextEncode", clip=demo[1], text=prompt[0], size=(320, 0))
    latent = graph.add("EmptySD3LatentImage", "64 x 64 pixels, 4 images", **DEMO_SIZE, batch_size=4, size=(320, 0))
    return demo, prompt, encoded, latent, graph.add("PrimitiveInt", "Seed", value=7, size=(320, 0))


def try_a_reward(graph: Graph) -> None:
    """What a reward says of images, and of each step of their making."""
    start = graph.note(
        """
# Try a reward before you train on it

No download, no training: seconds on a CPU. Press **Run**.

**Reward Score** (top) writes the score on finished images. Do you agree with it? If not, training on it will not \
give what you want.

**Inspect Rollout** (bottom) shows one group as training sees it: a row per image, a column per denoising step, each \
state finished and scored; the signed number is what the step added. If all rows score the same, there is nothing to \
learn from.

## What to change

- `Prompt`, e.g. *two red triangles* or *a blue circle above a black square*
- `reward`; the three `shapes` ones need prompts of the demo kind
- `noise`: how far the images of a group differ
- your own images: link *Load Image* to Reward Score
""",
        480,
        title="Start here",
    )
    demo, prompt, encoded, latent, seed = question(graph)
    reward = graph.add("DenseGRPORewardModel", reward="shapes partial")
    sampled = sample(graph, demo[0], demo, encoded, latent, seed, "KSampler")
    score = graph.add("DenseGRPORewardScore", images=sampled[1][0], reward=reward[0], prompt=prompt[0], size=(300, 210))
    scored = graph.add("PreviewImage", "Images with scores", images=score[0], size=(520, 560))
    prompts = graph.add("DenseGRPOTrainingPrompts", clip=demo[1], text=prompt[0], size=(300, 0))
    sampler, probe = graph.add("DenseGRPODenseSampler", num_steps=8, group_size=6), graph.add("DenseGRPORewardProbe")
    inspect = graph.add(
        "DenseGRPOInspectRollout",
        size=(300, 420),
        model=demo[0],
        vae=demo[2],
        prompts=prompts[0],
        reward=reward[0],
        sampler=sampler[0],
        probe=probe[0],
        **DEMO_SIZE,
    )
    strip = graph.add("PreviewImage", "One group, step by step", images=inspect[0], size=(640, 560))
    graph.arrange(
        [Group("Read me", "grey", [[start]])],
        [Group("1  Question", "blue", [[demo, prompt, encoded, latent, seed], [reward]])],
        [
            Group("2  Score finished images", "green", [sampled, [score], [scored]]),
            Group("3  Look into a rollout", "purple", [[prompts, sampler, probe], [inspect], [strip]]),
        ],
    )


def use_the_lora(graph: Graph) -> None:
    """The same prompt and noise without and with the LoRA."""
    start = graph.note(
        """
# Use the LoRA

Run *quickstart_demo* first: it saves the LoRA that *LoraLoaderModelOnly* loads here. If the list shows another \
number, choose the newest; press **R** when the file is not in the list yet.

Both rows sample the same prompt from the same noise with stock nodes; only the lower one has the LoRA. **Reward \
Score** judges both.

**Expect** more of the pictures below to show what the prompt says, and a higher mean score.

## What to change

- `Prompt` and `Seed`: one place for both rows
- `strength_model`: 0 = no LoRA
- your own model: a LoRA from GRPO Train Loop is an ordinary LoRA, so put *LoraLoaderModelOnly* into the graph you \
use every day
""",
        480,
        title="Start here",
    )
    demo, prompt, encoded, latent, seed = question(graph)
    latent.inputs, latent.title = {**latent.inputs, "batch_size": 16}, "64 x 64 pixels, 16 images"
    reward = graph.add("DenseGRPORewardModel", reward="shapes partial")
    lora = graph.add(
        "LoraLoaderModelOnly", model=demo[0], lora_name="my_demo_lora_00001.safetensors", strength_model=1.0
    )
    rows = []
    for name, model in (("without", demo[0]), ("with", lora[0])):
        sampled = sample(graph, model, demo, encoded, latent, seed, f"KSampler ({name} the LoRA)")
        score = graph.add(
            "DenseGRPORewardScore", images=sampled[1][0], reward=reward[0], prompt=prompt[0], size=(300, 210)
        )
        shown = graph.add("PreviewImage", f"{name.capitalize()} the LoRA", images=score[0], size=(560, 520))
        rows.append((sampled, [score], [shown]))
    graph.arrange(
        [Group("Read me", "grey", [[start]])],
        [Group("1  Question", "blue", [[demo, prompt, encoded, latent, seed], [reward, lora]])],
        [
            Group("2  Without the LoRA", "grey", rows[0]),
            Group("3  With the LoRA", "green", rows[1]),
        ],
    )


TRAINING_PROMPTS = """\
a lighthouse on a cliff at dusk
a bowl of fruit on a kitchen table
an old street in the rain
a dog running through a meadow
a sailing boat in a harbour
a portrait of an elderly fisherman
a castle above a misty valley
a bicycle leaning against a brick wall
a market stall full of spices
a snowy cabin in the woods
a hot-air balloon over a desert
a cup of coffee beside a book"""
HELD_OUT_PROMPTS = """\
a train crossing a stone bridge
a cat sleeping on a windowsill
a fountain in a town square
a field of sunflowers
a fox in the snow
a wooden boat on a lake"""


def large(graph: Graph, start: Node, loaders: Sequence[Node], parts: Sequence[Output], **chosen: Any) -> None:
    """Training of a large model; ``parts`` are its MODEL, CLIP and VAE."""
    model, clip, vae = parts
    probed, name, group, steps = (chosen.pop(key) for key in ("probed", "name", "group", "steps"))
    train = graph.add("DenseGRPOTrainingPrompts", clip=clip, text=TRAINING_PROMPTS, size=(340, 320))
    held_out = graph.add(
        "DenseGRPOTrainingPrompts",
        "Training Prompts (held out: only to measure)",
        clip=clip,
        text=HELD_OUT_PROMPTS,
        size=(340, 250),
    )
    reward = graph.add("DenseGRPORewardModel", reward="colourfulness")
    watched = graph.add("DenseGRPORewardModel", "Reward Model (only measured)", reward="jpeg compressible")
    sampler, probe, update = method(graph, probed, {"group": group}, steps, kl="velocity", kl_weight=0.001)
    links = {"probe": probe[0]} if probe else {}
    loop = graph.add(
        "DenseGRPOTrainLoop",
        size=(380, 910),
        model=model,
        vae=vae,
        prompts=train[0],
        reward=reward[0],
        sampler=sampler[0],
        **links,
        update=update[0],
        held_out_prompts=held_out[0],
        held_out_reward=watched[0],
        run_name=name,
        iterations=100,
        images_per_prompt=2,
        **chosen,
    )
    parts_of_method = [reward, watched, sampler, *([probe] if probe else [])]
    graph.arrange(
        [Group("Read me", "grey", [[start]])],
        [Group("1  Model and prompts", "blue", [loaders, [train, held_out]])],
        [Group("2  Reward and method", "green", [parts_of_method, [update]])],
        [Group("3  Train", "purple", [[loop]])],
        [results(graph, loop, name)],
    )


WHAT_TO_CHANGE = """
## What to change

- prompts: yours, one per line, or a `.txt` / `.jsonl` file in the `input` folder
- reward: try it first with the workflow *try_a_reward*
- out of memory: lower `train_batch`, then `sample_batch`; neither changes what is learnt. Then `width`, `height`
- `run_name`: a run of that name is continued; other settings need another name

## What to expect

A long run: hours, depending on the card. Try `iterations` 2 first. Cancel keeps everything, and the next Run goes on \
where it stopped. The colourfulness reward is a first test; it can be overdone, so watch the images.
"""


def sd35(graph: Graph, text: str, **chosen: Any) -> None:
    """Stable Diffusion 3.5 Medium."""
    start = graph.note(text.strip() + "\n\n" + SD35_FILES + WHAT_TO_CHANGE, 640, 400, "Start here")
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name="sd3.5_medium.safetensors", size=(320, 0))
    names = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
    clip = graph.add(
        "TripleCLIPLoader", **{f"clip_name{i}": name for i, name in enumerate(names, start=1)}, size=(320, 0)
    )
    size = {"width": 512, "height": 512, "cfg": 4.5, "sample_batch": 12, "train_batch": 4}
    large(graph, start, [checkpoint, clip], (checkpoint[0], clip[0], checkpoint[2]), steps=10, **size, **chosen)


SD35_FILES = """\
## Files

From *stabilityai/stable-diffusion-3.5-medium* on Hugging Face:

- `models/checkpoints/sd3.5_medium.safetensors`
- `models/text_encoders/`: `clip_l`, `clip_g`, `t5xxl_fp16` (or an fp8 version)
"""


def flow_grpo_sd35(graph: Graph) -> None:
    """The baseline."""
    text = """
# Flow-GRPO on SD3.5 Medium

Noise at every step, one reward at the end, shared by all steps (arXiv 2505.05470). The baseline: *dense_grpo_sd35* is \
the same graph with an *ODE Reward Probe*.
"""
    sd35(graph, text, probed=False, name="sd35_flow_grpo", group=24)


def dense_grpo_sd35(graph: Graph) -> None:
    """Step-wise rewards."""
    text = """
# DenseGRPO on SD3.5 Medium

Every step is paid the reward it added, measured by ODE probes (arXiv 2601.20218). Sampling costs about five times \
Flow-GRPO's; without the link to `probe` it is Flow-GRPO. The paper compares 24 images per group; 12 is cheaper.
"""
    sd35(graph, text, probed=True, name="sd35_dense_grpo", group=12)


def dense_grpo_flux(graph: Graph) -> None:
    """FLUX.1-dev."""
    text = """
# DenseGRPO on FLUX.1-dev

Every step is paid the reward it added, measured by ODE probes (arXiv 2601.20218). FLUX.1-dev takes `guidance` as an \
input (3.5), so `cfg` stays 1.

## Files

- `models/diffusion_models/flux1-dev.safetensors` and `models/vae/ae.safetensors` from \
*black-forest-labs/FLUX.1-dev* on Hugging Face
- `models/text_encoders/`: `clip_l`, `t5xxl_fp16` (or an fp8 version) from *comfyanonymous/flux_text_encoders*

Less memory: `weight_dtype` fp8_e4m3fn.
"""
    start = graph.note(text.strip() + "\n" + WHAT_TO_CHANGE, 640, 400, "Start here")
    unet = graph.add("UNETLoader", unet_name="flux1-dev.safetensors", size=(320, 0))
    names = {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors"}
    clip = graph.add("DualCLIPLoader", **names, type="flux", device="default", size=(320, 0))
    vae = graph.add("VAELoader", vae_name="ae.safetensors", size=(320, 0))
    size = {"width": 512, "height": 512, "cfg": 1.0, "guidance": 3.5, "sample_batch": 6, "train_batch": 1}
    chosen = {"probed": True, "name": "flux_dense_grpo", "group": 12, "steps": 8}
    large(graph, start, [unet, clip, vae], (unet[0], clip[0], vae[0]), **size, **chosen)


WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    make.__name__: make
    for make in (quickstart_demo, try_a_reward, use_the_lora, flow_grpo_sd35, dense_grpo_sd35, dense_grpo_flux)
}
