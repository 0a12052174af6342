"""How long reward models stay in a real ComfyUI: ``python comfy_kept_cases.py COMFYUI PACKAGE ANSWER``.

The host's own executor runs prompts, as its server would. Without other garbage collections than after ``POST /free``,
so that what goes with a prompt goes before the next model is loaded.
"""

import asyncio
import gc
import itertools
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import comfy_inside  # first: it loads the host

sys.path.insert(0, comfy_inside.COMFYUI)  # the host's nodes have put its own comfy/utils.py before its utils/

import comfy.model_management as host
import execution
import folder_paths
from comfy_reward_cases import register
from densegrpo.engine.rewards import hpsv2
from densegrpo.engine.rewards.clip import load_clip
from densegrpo.engine.rewards.kept import PROCESS
from densegrpo.nodes import DenseGRPOExtension
from densegrpo.nodes.rewards import CombineRewards
from densegrpo.nodes.sockets import RewardChoice
from server import PromptServer
from tiny_clip import write_all

from nodes import NODE_CLASS_MAPPINGS  # noqa: TID251

SERVER = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *_: None)
PromptServer.instance = None
NUMBERS = itertools.count()
OTHER_NODES = {
    "DenseGRPOCalibrateExploration": {"rounds": 1, "trajectories": 6, "measured": 1, "averaged": 1},
    "DenseGRPOInspectRollout": {},
}
"""That score, and options that make them quick."""
NODE_CLASS_MAPPINGS |= {node.GET_SCHEMA().node_id: node for node in asyncio.run(DenseGRPOExtension().get_node_list())}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def whole(kind, **given):
    """A node with the defaults that a page would fill in."""
    found = NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()["required"]
    return node(
        kind, **{key: options["default"] for key, (_, options) in found.items() if "default" in options} | given
    )


def reward(name):
    return node("DenseGRPORewardModel", reward=name, weight=1.0)


def scoring(prompt="a red cat", **rewards):
    """A graph that scores an image with each of these."""
    graph = {"image": node("EmptyImage", width=40, height=40, batch_size=2, color=255)} | rewards
    for name in rewards:
        graph[f"score {name}"] = node("DenseGRPORewardScore", images=["image", 0], reward=[name, 0], prompt=prompt)
    return graph


def working(kind, first, **given):
    """A graph in which a node of that kind works on the demo model."""
    links = {"model": ["demo", 0], "vae": ["demo", 2], "prompts": ["prompts", 0], "reward": ["first", 0]}
    return {
        "demo": node("DenseGRPOLoadDemoModel"),
        "prompts": whole("DenseGRPOTrainingPrompts", clip=["demo", 1], text="a red cat"),
        "sampler": whole("DenseGRPODenseSampler", num_steps=2, group_size=2),
        "first": first,
        "work": whole(kind, sampler=["sampler", 0], width=64, height=64, **links, **given),
    }


def training(name, first, second):
    """A graph that trains for one iteration."""
    held_out = {"held_out_prompts": ["prompts", 0], "held_out_reward": ["second", 0]}
    sizes = {"iterations": 1, "groups": 1, "images_per_prompt": 2}
    return {"second": second} | working("DenseGRPOTrainLoop", first, run_name=name, **held_out, **sizes)


class Executor(execution.PromptExecutor):
    """As the host's server has it."""

    def __init__(self):
        super().__init__(SERVER)
        self.before = loads()

    def run(self, graph):
        """[how often models were loaded, models in memory, their patchers in memory] after one more prompt."""
        wanted = [name for name, one in graph.items() if name == "work" or "Score" in one["class_type"]]
        self.execute(graph, f"prompt {next(NUMBERS)}", {}, wanted)
        assert self.success, self.status_messages[-1][1].get("traceback")
        return self.state()

    def free(self):
        """The same after what ``POST /free`` makes the server do; the caches themselves refer to each other."""
        host.unload_all_models()
        self.reset()
        gc.collect()
        return self.state()

    def state(self):
        return [loads() - self.before, in_memory("CLIPModel"), in_memory("WholePatcher")]


def loads():
    return load_clip.misses + hpsv2.load_hps.misses


def in_memory(kind):
    return sum(type(found).__name__ == kind for found in gc.get_objects())


def case_scoring():
    executor, original, seen = Executor(), hpsv2.read_weights, []
    found = {
        "one": executor.run(scoring(a=reward("clipscore"))),
        "the same": executor.run(scoring(a=reward("clipscore"))),
        "another prompt": executor.run(scoring("a dog", a=reward("clipscore"))),
    }
    hpsv2.read_weights = lambda path: seen.append(executor.state()) or original(path)
    found["another reward"] = executor.run(scoring(a=reward("hpsv2")))
    hpsv2.read_weights = original
    return found | {"before it is loaded": seen[0], "freed": executor.free()}


def case_one_clip_for_several():
    executor, both = Executor(), {"a": reward("clipscore"), "b": reward("aesthetic")}
    both["c"] = node("DenseGRPOCombineRewards", reward_1=["a", 0], reward_2=["b", 0], mode="each")
    return {
        "all": executor.run(scoring(**both)),
        "one": executor.run(scoring(b=reward("aesthetic"))),
        "none": executor.run(scoring(b=reward("brightness"))),
    }


def case_training():
    executor = Executor()
    return {
        "first": executor.run(training("first", reward("clipscore"), reward("hpsv2"))),
        "again": executor.run(training("again", reward("clipscore"), reward("hpsv2"))),
        "another held-out reward": executor.run(training("other", reward("clipscore"), reward("brightness"))),
        "freed": executor.free(),
    }


def case_other_nodes():
    """With one reward, and then with another."""
    found = {}
    for kind, sizes in OTHER_NODES.items():
        executor = Executor()
        graphs = [working(kind, reward(name), **sizes) for name in ("clipscore", "brightness")]
        found[kind] = [executor.run(graph) for graph in graphs]
    return found


def case_choices():
    one, same = RewardChoice(({"name": "jpeg"},)), RewardChoice(({"name": "jpeg"},))
    parts = CombineRewards.execute("each", reward_1=one, reward_2=None, reward_3=same).result[0].kept.parts
    return {
        "equal": one == same,
        "text": str(one),
        "parts": [part is kept.kept for part, kept in zip(parts, (one, same), strict=True)],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_all(Path(name))
        register(Path(name))
        folder_paths.set_output_directory(name)
        gc.collect()
        gc.disable()
        cases = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}
        answer = {name: case() for name, case in cases.items()} | {"process": len(PROCESS.models)}
    Path(comfy_inside.ANSWER).write_text(json.dumps(answer, indent=1), encoding="utf-8")
