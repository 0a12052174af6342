"""Training graphs: a method on the demo model, SD3.5 or FLUX. The methods and their values are in methods.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from graph import Graph, Group, Node, Output
from methods import Method, Values
from notes import DEMO_NOTE, FLUX_FILES, HELD_OUT_PROMPTS, SD35_FILES, TRAINING_PROMPTS, WHAT_TO_CHANGE

MODELS = {"demo": "Demo model, no download", "sd35": "Stable Diffusion 3.5 Medium", "flux": "FLUX.1-dev"}
DEMO_SIZE = {"width": 64, "height": 64}
DEMO_SAMPLER = {"num_steps": 8}
DEMO_UPDATE = {
    "lr": 1e-3,
    "rank": 8,
    "alpha": 16.0,
    "clip_range": 0.01,
    "kl": "velocity",
    "kl_weight": 0.0,
    "beta2": 0.99,
    "ema_every": 1,
}
HELD_OUT_TITLE = "Training Prompts (held out: only to measure)"
ROOM = {"ocr": (440, 160), "clipscore": (440, 294), "pickscore": (440, 294), "geneval partial": (440, 294)}
"""Sizes of a Reward Model with room for the text that says what is not installed."""


MakeReward = Callable[[Graph], tuple[Node, Sequence[Node]]]
"""Makes the nodes of a reward: (the one that is linked, those it is made of)."""


class Base(NamedTuple):
    """What is trained, on what, for what: everything but the method."""

    start: Node
    columns: Sequence[Sequence[Node]]
    """Loaders and prompts."""
    model: Output
    vae: Output
    train: Node
    held_out: Node
    reward: Node
    watched: Node
    parts: Sequence[Node] = ()
    """What ``reward`` is made of."""


class Task(NamedTuple):
    """What a large model is to learn."""

    train: Mapping[str, Any]
    """Widgets of its Training Prompts."""
    held_out: Mapping[str, Any]
    reward: MakeReward
    watched: str = "jpeg compressible"


def training(graph: Graph, base: Base, method: Method, values: Values, name: str, lora: str, look: bool) -> None:
    """The whole graph: a run called ``name`` that saves the LoRA as ``lora``."""
    parts = method_nodes(graph, method, values)
    links = {socket: node[0] for socket, node in parts.items()}
    seen = [see(graph, base, links, values)] if look else []
    loop = train_loop(graph, base, links, values, name)
    second = [parts.pop(socket) for socket in ("update", "credit") if socket in parts]
    rewards = [*base.parts, base.reward, base.watched]
    apart = any(node.size[0] > 300 for node in rewards)
    columns = [rewards, [*parts.values()], second] if apart else [[*rewards, *parts.values()], second]
    number = iter(range(3, 6))
    graph.arrange(
        [Group("Read me", "grey", [[base.start]])],
        [Group("1  Model and prompts", "blue", base.columns)],
        [Group("2  Reward and method", "green", columns)],
        *([Group(f"{next(number)}  See what is compared", "grey", [column])] for column in seen),
        [Group(f"{next(number)}  Train", "purple", [[loop]])],
        [results(graph, loop, lora, next(number))],
    )


def method_nodes(graph: Graph, method: Method, values: Values) -> dict[str, Node]:
    """The parts of a method by the socket they go to."""
    parts = {"sampler": graph.add(method.kind, **{**method.sampler, **values.sampler})}
    if method.probe:
        parts["probe"] = graph.add("DenseGRPORewardProbe", size=(340, 0), **method.probe)
    if method.credit:
        parts["credit"] = graph.add("DenseGRPOTurningPoints", **method.credit)
    parts["update"] = graph.add("DenseGRPOPolicyUpdate", **{**method.update, **values.update})
    return parts


def train_loop(graph: Graph, base: Base, links: Mapping[str, Output], values: Values, name: str) -> Node:
    """GRPO Train Loop; ``links`` are the parts of the method by socket."""
    return graph.add(
        "DenseGRPOTrainLoop",
        size=(380, 990),
        model=base.model,
        vae=base.vae,
        prompts=base.train[0],
        reward=base.reward[0],
        **links,
        held_out_prompts=base.held_out[0],
        held_out_reward=base.watched[0],
        run_name=name,
        images_per_prompt=2,
        **values.loop,
    )


def see(graph: Graph, base: Base, links: Mapping[str, Output], values: Values) -> list[Node]:
    """Inspect Rollout with its picture."""
    inspect = graph.add(
        "DenseGRPOInspectRollout",
        size=(560, 450),
        model=base.model,
        vae=base.vae,
        prompts=base.train[0],
        reward=base.reward[0],
        **{socket: link for socket, link in links.items() if socket != "update"},
        **{name: values.loop[name] for name in ("width", "height") if name in values.loop},
    )
    return [inspect, graph.add("PreviewImage", "What is compared", images=inspect[0], size=(560, 560))]


def results(graph: Graph, loop: Node, name: str, number: int) -> Group:
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
    return Group(f"{number}  Result", "orange", [[note, save, curve], [pictures]])


def demo_base(graph: Graph, text: str, reward: str | MakeReward, **prompts: Any) -> Base:
    """The demo model and its prompts; ``reward``: one of the menu, or what makes its nodes."""
    start = graph.note(text, 480, title="Start here")
    model = graph.add("DenseGRPOLoadDemoModel", size=(340, 0))
    train = graph.add("DenseGRPOTrainingPrompts", clip=model[1], size=(340, 0), **prompts)
    held_out = graph.add("DenseGRPOTrainingPrompts", HELD_OUT_TITLE, clip=model[1], file="demo:held_out", size=(340, 0))
    rewarded, parts = from_menu(reward)(graph) if isinstance(reward, str) else reward(graph)
    watched = graph.add("DenseGRPORewardModel", "Reward Model (only measured)", reward="shapes strict")
    return Base(start, [[model, train, held_out]], model[0], model[2], train, held_out, rewarded, watched, parts)


def reward_model(graph: Graph, label: str, title: str = "", **widgets: Any) -> Node:
    """A Reward Model."""
    return graph.add("DenseGRPORewardModel", title, size=ROOM.get(label, (300, 0)), reward=label, **widgets)


def from_menu(label: str) -> MakeReward:
    """One Reward Model."""
    return lambda graph: (reward_model(graph, label), ())


def demo_values(method: Method, **update: Any) -> Values:
    """The values of a method for the demo model."""
    size = {} if "num_seeds" in method.sampler else {"group_size": 12}
    loop = {"resume": False, **DEMO_SIZE, "train_batch": 64, "evaluate_every": 20}
    sampler, own = method.demo.sampler, method.demo
    return Values({**DEMO_SAMPLER, **size, **sampler}, {**DEMO_UPDATE, **own.update, **update}, {**loop, **own.loop})


def on_demo(graph: Graph, name: str, method: Method) -> None:
    """A method on the demo model."""
    text = f"{title(method, 'the demo model')}\n{DEMO_NOTE.format(after=method.demo.after)}"
    base = demo_base(graph, text, "colourfulness", file="demo:train")
    training(graph, base, method, demo_values(method), name, f"my_{name}", look=True)


def title(method: Method, model: str) -> str:
    """The first lines of a note."""
    return f"# {method.title} on {model}\n\n{method.idea} (arXiv {method.paper})\n"


def large_base(
    graph: Graph, text: str, loaders: Sequence[Node], parts: Sequence[Output], task: Task | None = None
) -> Base:
    """A large model; ``parts`` are its MODEL, CLIP and VAE."""
    start = graph.note(text, 680, 400, "Start here")
    model, clip, vae = parts
    task = task or Task({"text": TRAINING_PROMPTS}, {"text": HELD_OUT_PROMPTS}, from_menu("colourfulness"))
    train = graph.add("DenseGRPOTrainingPrompts", clip=clip, **task.train, size=(340, 320))
    held_out = graph.add("DenseGRPOTrainingPrompts", HELD_OUT_TITLE, clip=clip, **task.held_out, size=(340, 250))
    reward, made_of = task.reward(graph)
    watched = reward_model(graph, task.watched, "Reward Model (only measured)")
    return Base(start, [loaders, [train, held_out]], model, vae, train, held_out, reward, watched, made_of)


def sd35_base(graph: Graph, text: str, task: Task | None = None) -> Base:
    """Stable Diffusion 3.5 Medium and its prompts."""
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name="sd3.5_medium.safetensors", size=(320, 0))
    names = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
    encoders = {f"clip_name{i}": name for i, name in enumerate(names, start=1)}
    clip = graph.add("TripleCLIPLoader", **encoders, size=(320, 0))
    return large_base(graph, text, [checkpoint, clip], (checkpoint[0], clip[0], checkpoint[2]), task)


def sd35_values(method: Method) -> Values:
    """The values of a method for Stable Diffusion 3.5 Medium."""
    own = method.sd35
    loop = {"width": 512, "height": 512, "cfg": 4.5, "sample_batch": 12, "train_batch": 4, "iterations": 300}
    return Values({"num_steps": 10, **own.sampler}, own.update, {**loop, **own.loop})


def on_sd35(graph: Graph, name: str, method: Method) -> None:
    """A method on Stable Diffusion 3.5 Medium."""
    text = f"{title(method, 'SD3.5 Medium')}\n{method.sd35.note}\n\n{SD35_FILES}{WHAT_TO_CHANGE}"
    training(graph, sd35_base(graph, text), method, sd35_values(method), name, name, look=False)


def on_flux(graph: Graph, name: str, method: Method) -> None:
    """A method on FLUX.1-dev."""
    own = method.flux or Values()
    unet = graph.add("UNETLoader", unet_name="flux1-dev.safetensors", size=(320, 0))
    names = {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors"}
    clip = graph.add("DualCLIPLoader", **names, type="flux", device="default", size=(320, 0))
    vae = graph.add("VAELoader", vae_name="ae.safetensors", size=(320, 0))
    text = f"{title(method, 'FLUX.1-dev')}\n{own.note}\n\n{FLUX_FILES}{WHAT_TO_CHANGE}"
    base = large_base(graph, text, [unet, clip, vae], (unet[0], clip[0], vae[0]))
    loop = {"width": 512, "height": 512, "cfg": 1.0, "guidance": 3.5, "sample_batch": 6, "train_batch": 1}
    values = Values(own.sampler, own.update, {**loop, "iterations": 300, **own.loop})
    training(graph, base, method, values, name, name, look=False)
