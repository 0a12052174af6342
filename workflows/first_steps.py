"""Workflows for the first minutes: quickstart, rewards, use of the LoRA. No download, only the demo model."""

from graph import Graph, Group, Node, Output
from methods import METHODS
from notes import QUICKSTART, TRY_A_REWARD, USE_THE_LORA
from training import DEMO_SIZE, demo_base, demo_values, training

DEMO_PROMPT = "a yellow circle and a green square"


def quickstart_demo(graph: Graph) -> None:
    """The demo model learns to paint what the prompt says."""
    base = demo_base(graph, QUICKSTART, "shapes partial", file="demo:train")
    values = demo_values(METHODS["dense_grpo"], lr=3e-4)
    values = values._replace(loop={**values.loop, "iterations": 40})
    training(graph, base, METHODS["dense_grpo"], values, "quickstart_demo", "my_demo_lora", look=False)


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
    start = graph.note(TRY_A_REWARD, 480, title="Start here")
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
    start = graph.note(USE_THE_LORA, 480, title="Start here")
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
