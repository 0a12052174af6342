"""Rewards from elsewhere: a server, a vision-language judge, people; and what any reward can be told besides."""

from collections import Counter
from typing import Any

from comfy_api.latest import io

from ..engine.errors import errors_named
from ..engine.knobs import Option
from ..engine.rewards import COMMON, make_reward, reward_class, reward_options
from ..engine.rewards.files import folders
from . import sockets
from .widgets import CATEGORY, widget, widgets

REMOTE = ("url", "api_key_variable", "batch_size", "timeout", "patience")
JUDGE = ("base_url", "model", "preset", "mode", "question", "labels", "low", "high", "max_tokens")
SERVER = ("thinking", "api_key_variable", "workers", "timeout", "patience")
VOTE = ("mode", "timeout", "min_voters")
COMPUTING = ("placement", "precision")
AS_IT_IS = "default"
FAILURES: Counter[str] = Counter()
"""How often the trial of a connection failed."""


def weight() -> Any:
    """The widget of every reward."""
    return widget("weight", COMMON["weight"])


def test_connection() -> Any:
    """The widget of rewards that are asked over the network."""
    return io.Boolean.Input(
        "test_connection", default=True, tooltip="Ask for the score of a grey image when the node runs, and show it."
    )


def connected(name: str, options: dict[str, Any], test: bool) -> io.NodeOutput:
    """A reward over the network, and what a trial of it says."""
    reward = make_reward(name, **{key: value for key, value in options.items() if key != "weight"})
    said = reward.test_connection() if test else "not tested"  # pyright: ignore[reportAttributeAccessIssue]
    if test and not said.startswith("OK"):
        FAILURES[key_of(options)] += 1
    return io.NodeOutput(sockets.RewardChoice(({"name": name, **options},)), said, ui={"text": [said]})


def key_of(options: dict[str, Any]) -> str:
    """What was tried."""
    return repr(sorted(options.items()))


def failures(inputs: dict[str, Any]) -> int:
    """For ``fingerprint_inputs``: another number after a trial that failed, so that the host tries again."""
    return FAILURES[key_of({name: value for name, value in inputs.items() if name != "test_connection"})]


class RemoteReward(io.ComfyNode):
    """Scores from a JSON reward server."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPORemoteReward",
            display_name="Remote Reward",
            category=f"{CATEGORY}/reward",
            description="Scores from a reward server (densegrpo serve, Flow-Factory), on this machine or one allowed.",
            is_output_node=True,
            inputs=[*widgets(reward_options("remote_http"), REMOTE), weight(), test_connection()],
            outputs=[
                sockets.Reward.Output("choice", display_name="reward"),
                io.String.Output("connection", display_name="connection", tooltip="What the trial said."),
            ],
        )

    @classmethod
    def execute(cls, test_connection: bool, **options: Any) -> io.NodeOutput:
        return connected("remote_http", options, test_connection)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        return failures(inputs)


class Judge(io.ComfyNode):
    """Scores from a vision-language model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOJudge",
            display_name="VLM Judge",
            category=f"{CATEGORY}/reward",
            description="A vision-language model scores images, behind vLLM, SGLang, Ollama, LM Studio or llama.cpp.",
            is_output_node=True,
            inputs=[*widgets(reward_options("vlm_judge"), (*JUDGE, *SERVER)), weight(), test_connection()],
            outputs=[
                sockets.Reward.Output("choice", display_name="reward"),
                io.String.Output("connection", display_name="connection", tooltip="What the trial said."),
            ],
        )

    @classmethod
    def execute(cls, test_connection: bool, **options: Any) -> io.NodeOutput:
        return connected("vlm_judge", options, test_connection)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        return failures(inputs)


class HumanVote(io.ComfyNode):
    """People vote while a run trains."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOHumanVote",
            display_name="Human Vote",
            category=f"{CATEGORY}/reward",
            description="You are the reward: while training, like or rank the images of each prompt in this page.",
            inputs=[*widgets(reward_options("human_vote"), VOTE), weight()],
            outputs=[sockets.Reward.Output("choice", display_name="reward")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(sockets.RewardChoice(({"name": "human_vote", **options},)))


class RewardOptions(io.ComfyNode):
    """What a reward can be told besides its name and weight."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        models = io.Combo.Input(
            "model",
            options=[AS_IT_IS, *folders()],
            default=AS_IT_IS,
            tooltip="Folder in models/reward_models, for rewards that can use another model than their own.",
        )
        limit = io.Boolean.Input("limit", default=False, tooltip="Whether scores above the cap count as the cap.")
        cap = Option(float, COMMON["cap"].limits, 1.0)
        return io.Schema(
            node_id="DenseGRPORewardOptions",
            display_name="Reward Options",
            category=f"{CATEGORY}/reward",
            description="Where a reward computes and which model it uses; cap, smallest spread that counts, ranks.",
            inputs=[
                sockets.Reward.Input("reward", tooltip="The reward to change; of several, each."),
                models,
                *widgets(reward_options("clipscore"), COMPUTING),
                io.Int.Input(
                    "batch_size", default=0, min=0, max=1024, tooltip="Images that are scored at once; 0: the usual."
                ),
                limit,
                widget("cap", cap),
                *widgets(COMMON, ("min_std", "rank")),
            ],
            outputs=[sockets.Reward.Output("choice", display_name="reward")],
        )

    @classmethod
    def execute(cls, reward: sockets.RewardChoice, limit: bool, cap: float, **options: Any) -> io.NodeOutput:
        defaults = {name: o.default for name, o in {**reward_options("clipscore"), **COMMON}.items()}
        defaults |= {"model": AS_IT_IS, "batch_size": 0}
        changed = {name: value for name, value in options.items() if value != defaults[name]}
        if limit:
            changed["cap"] = cap
        with errors_named("Reward Options"):
            entries = tuple(told(entry, changed) for entry in reward.entries)
        return io.NodeOutput(sockets.RewardChoice(entries, reward.mode))


def told(entry: sockets.Options, changed: dict[str, Any]) -> dict[str, Any]:
    """A reward with more options. Raises ValueError when it has one not."""
    known = {**reward_options(entry["name"]), **COMMON}
    if not hasattr(reward_class(entry["name"]), "needs"):
        known.pop("model", None)  # it is the name of a model on a server, not a folder
    for name in changed:
        if name not in known:
            raise ValueError(f"reward {entry['name']} has no {name}; leave it at its default")
    return {**entry, **changed}
