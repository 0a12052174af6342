"""The noise of each step, found by trial, and a training with it."""

from graph import Graph, Group
from methods import EVERY_STATE, METHODS
from notes import CALIBRATE
from training import DEMO_SIZE, demo_base, demo_values, method_nodes, results, train_loop

SEARCH = {"rounds": 12, "trajectories": 24, "measured": 64}


def calibrate_demo(graph: Graph) -> None:
    """Calibrate Exploration, then DenseGRPO with the table it found."""
    method = METHODS["dense_grpo"]
    base = demo_base(graph, CALIBRATE, "shapes dense", file="demo:train")
    first = graph.add("DenseGRPODenseSampler", "Dense SDE Sampler (start)", num_steps=8, group_size=12)
    probe = graph.add("DenseGRPORewardProbe", **EVERY_STATE)
    calibrate = graph.add(
        "DenseGRPOCalibrateExploration",
        size=(380, 0),
        model=base.model,
        vae=base.vae,
        prompts=base.train[0],
        reward=base.reward[0],
        sampler=first[0],
        probe=probe[0],
        file_name="demo_noise_table",
        **SEARCH,
        **DEMO_SIZE,
    )
    shown = graph.add("PreviewImage", "Balance and noise, before and after", images=calibrate[1], size=(560, 560))
    values = demo_values(method)
    values = values._replace(sampler={**values.sampler, "noise_table": calibrate[0]})
    parts = method_nodes(graph, method._replace(probe=None), values)
    parts["sampler"].title = "Dense SDE Sampler (table)"
    links = {"probe": probe[0], **{socket: node[0] for socket, node in parts.items()}}
    loop = train_loop(graph, base, links, values, "calibrate_demo")
    graph.arrange(
        [Group("Read me", "grey", [[base.start]])],
        [Group("1  Model and prompts", "blue", base.columns)],
        [Group("2  Reward and start", "green", [[base.reward, base.watched, probe, first]])],
        [Group("3  Calibrate", "green", [[calibrate], [shown]])],
        [Group("4  Method", "green", [[parts["sampler"]], [parts["update"]]])],
        [Group("5  Train", "purple", [[loop]])],
        [results(graph, loop, "my_calibrate_demo", 6)],
    )
