"""Workflows about rewards: several with a held-out one, reading text, GenEval's compositions, people's votes."""

from graph import Graph, Node
from methods import METHODS
from notes import GENEVAL_COMPOSITION, HUMAN_VOTES, OCR_TEXT_RENDERING, REWARD_MIX
from training import MakeReward, Task, demo_base, demo_values, from_menu, reward_model, sd35_base, sd35_values, training

QUOTED = """\
a shop window with the words "OPEN LATE"
a birthday cake with "Happy 30th" in icing
a chalkboard that says "Soup of the day"
a road sign reading "SLOW DOWN"
a neon sign "Jazz Club" above a door
a book cover titled "The Quiet Sea\""""
"""Held-out prompts of text rendering."""


GUARD = {"evaluate_every": 10, "keep": "best held-out"}


def reward_mix_with_holdout(graph: Graph) -> None:
    """Two rewards at once, a third that only watches, and a run that stops when they part."""
    mixed = mix(("shapes partial", 1.0, "Reward Model"), ("shapes dense", 0.05, "Reward Model (easily gamed)"))
    base = demo_base(graph, REWARD_MIX, mixed, file="demo:train")
    values = demo_values(METHODS["flow_grpo_fast"], lr=3e-4)
    values = values._replace(loop={**values.loop, **GUARD, "iterations": 40, "when_gamed": "stop"})
    name = "reward_mix_with_holdout"
    training(graph, base, METHODS["flow_grpo_fast"], values, name, f"my_{name}", look=False)


def human_votes(graph: Graph) -> None:
    """You are the reward."""
    base = demo_base(graph, HUMAN_VOTES, people, file="demo:train")
    values = demo_values(METHODS["flow_grpo"], lr=3e-3)
    values = values._replace(
        sampler={**values.sampler, "group_size": 8},
        loop={**values.loop, "iterations": 10, "groups": 1, "evaluate_every": 5},
    )
    training(graph, base, METHODS["flow_grpo"], values, "human_votes", "my_human_votes", look=False)


def ocr_text_rendering(graph: Graph) -> None:
    """SD3.5 learns to write what the prompt quotes."""
    mixed = mix(("ocr", 1.0, "Reward Model"), ("clipscore", 0.3, "Reward Model"))
    task = Task({"file": "set:text"}, {"text": QUOTED}, mixed, "pickscore")
    on_sd35_task(graph, "ocr_text_rendering", "flow_grpo", OCR_TEXT_RENDERING, task, look=False)


def geneval_composition(graph: Graph) -> None:
    """SD3.5 learns to count and to put things in their places."""
    task = Task({"file": "set:counting"}, {"file": "set:position"}, from_menu("geneval partial"), "pickscore")
    on_sd35_task(graph, "geneval_composition", "dense_grpo", GENEVAL_COMPOSITION, task, look=True)


def on_sd35_task(graph: Graph, name: str, method: str, text: str, task: Task, look: bool) -> None:
    """A task for Stable Diffusion 3.5 Medium."""
    values = sd35_values(METHODS[method])
    values = values._replace(sampler={**values.sampler, "group_size": 12}, loop={**values.loop, **GUARD})
    training(graph, sd35_base(graph, text, task), METHODS[method], values, name, name, look=look)


def mix(*named: tuple[str, float, str]) -> MakeReward:
    """(label, weight, title) each, all normalised by themselves and added."""

    def make(graph: Graph) -> tuple[Node, list[Node]]:
        parts = [reward_model(graph, label, title, weight=weight) for label, weight, title in named]
        links = {f"reward_{i}": part[0] for i, part in enumerate(parts, 1)}
        return graph.add("DenseGRPOCombineRewards", **links, mode="gdpo"), parts

    return make


def people(graph: Graph) -> tuple[Node, list[Node]]:
    """Human Vote."""
    return graph.add("DenseGRPOHumanVote", mode="like", timeout=600, min_voters=1), []
