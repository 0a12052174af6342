"""The shipped workflows fit the nodes, read well, and say the same on the canvas and to the API.

What a host says of the nodes is kept in ``golden/object_info.json``; ``python workflows/build.py --host ADDRESS`` asks
a running host anew and rewrites all workflows.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from densegrpo.engine.config import make_config
from densegrpo.engine.knobs import options_of
from densegrpo.engine.learner import OptimizerSettings
from densegrpo.engine.lora import LoraSettings
from densegrpo.engine.recipes import RECIPES, make_recipe, parts_of, recipe_options
from host_client import host, server  # noqa: F401
from node_mapping import mapping

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"
NODES = json.loads((ROOT / "tests" / "golden" / "object_info.json").read_text(encoding="utf-8"))
METHODS = sorted(RECIPES)
ON_FLUX = ["dense_grpo", "g2rpo", "tempflow_grpo", "tp_grpo"]
FIRST_STEPS = ["quickstart_demo", "try_a_reward", "use_the_lora", "calibrate_demo"]
REWARDS_ON_DEMO = ["reward_mix_with_holdout", "human_votes"]
REWARDS_ON_SD35 = ["ocr_text_rendering", "geneval_composition"]
TRAININGS = [
    *(f"{name}_{model}" for name in METHODS for model in ("demo", "sd35")),
    *(f"{name}_flux" for name in ON_FLUX),
]
NAMES = sorted([*FIRST_STEPS, *REWARDS_ON_DEMO, *REWARDS_ON_SD35, *TRAININGS])
DEMOS = [*FIRST_STEPS, *REWARDS_ON_DEMO, *(name for name in TRAININGS if name.endswith("_demo"))]
NOTES = ("MarkdownNote", "Note")
FILES = ("ckpt_name", "clip_name1", "clip_name2", "clip_name3", "lora_name", "unet_name", "vae_name")
TITLE_HEIGHT = 30

each_workflow = pytest.mark.parametrize("name", NAMES)


def canvas(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.api.json").read_text(encoding="utf-8"))


def specs(info: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Input name -> (type, options), in the order of the canvas."""
    order = [name for part in ("required", "optional") for name in info["input_order"].get(part, [])]
    known = info["input"].get("required", {}) | info["input"].get("optional", {})
    return {name: (known[name][0], known[name][1] if len(known[name]) > 1 else {}) for name in order}


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widget_names(info: dict[str, Any]) -> Iterator[str]:
    """Names of a node's values as the frontend lays them out, with its own after every seed."""
    for name, (kind, options) in specs(info).items():
        if is_widget(kind):
            yield name
            if kind == "INT" and options.get("control_after_generate", name in ("seed", "noise_seed")):
                yield "control_after_generate"


def to_prompt(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """The prompt that the frontend would send for a workflow."""
    start = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        info = nodes[node["type"]]
        names, values = list(widget_names(info)), node["widgets_values"]
        assert len(values) == len(names), f"{node['type']} has {names}, got {values}"
        inputs = dict(zip(names, values, strict=True))
        inputs.pop("control_after_generate", None)
        inputs |= {i["name"]: start[i["link"]] for i in node["inputs"] if i["link"] is not None}
        title = node.get("title", info["display_name"])
        prompt[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return prompt


def check_value(where: str, name: str, value: Any, kind: Any, options: dict[str, Any]) -> None:
    """A typed value is one the host takes."""
    allowed = kind if isinstance(kind, list) else options.get("options", []) if kind == "COMBO" else None
    if allowed is not None:
        assert name in FILES or value in allowed, f"{where}: {value!r} is not in {allowed}"
    elif kind in ("INT", "FLOAT"):
        assert isinstance(value, int if kind == "INT" else (int, float)), where
        assert not isinstance(value, bool), where
        assert options.get("min", value) <= value <= options.get("max", value), f"{where}: {value} is out of range"
    else:
        assert isinstance(value, bool if kind == "BOOLEAN" else str), where


def check_prompt(prompt: dict[str, Any], nodes: dict[str, Any]) -> None:
    """Nodes exist, required inputs are there, values and link types fit."""
    for key, node in prompt.items():
        assert node["class_type"] in nodes, f"no node {node['class_type']}"
        info = nodes[node["class_type"]]
        known, inputs = specs(info), node["inputs"]
        where = f"{key} {node['class_type']}"
        assert inputs.keys() <= known.keys(), f"{where} has no {sorted(inputs.keys() - known.keys())}"
        missing = set(info["input"].get("required", {})) - inputs.keys()
        assert not missing, f"{where} lacks {sorted(missing)}"
        for name, value in inputs.items():
            kind, options = known[name]
            if isinstance(value, list):
                source = nodes[prompt[value[0]]["class_type"]]
                assert source["output"][value[1]] == kind, f"{where}.{name} needs {kind}"
            else:
                assert is_widget(kind), f"{where}.{name} must be linked"
                check_value(f"{where}.{name}", name, value, kind, options)


def test_the_folder_holds_exactly_the_known_workflows():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES
    assert sorted(path.name for path in (FOLDER / "api").iterdir()) == [f"{name}.api.json" for name in NAMES]


def test_building_again_changes_nothing(tmp_path: Path):
    subprocess.run([sys.executable, "-B", str(FOLDER / "build.py"), "--out", str(tmp_path)], check=True, timeout=60)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert len(made) == 2 * len(NAMES)
    for path in made:
        assert (FOLDER / path).read_bytes() == (tmp_path / path).read_bytes(), f"{path}: run python workflows/build.py"


@each_workflow
def test_api_workflows_fit_the_nodes(name: str):
    check_prompt(api(name), NODES)
    assert any(NODES[node["class_type"]]["output_node"] for node in api(name).values())


@each_workflow
def test_canvas_and_api_say_the_same(name: str):
    assert to_prompt(canvas(name), NODES) == api(name)


@each_workflow
def test_links_agree_at_both_ends(name: str):
    workflow = canvas(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["last_node_id"] == max(nodes)
    assert len(nodes) == len(workflow["nodes"])
    for number, source, slot, target, place, kind in workflow["links"]:
        start, end = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert start["type"] == end["type"] == kind
        assert number in start["links"]
        assert end["link"] == number
        assert nodes[source]["order"] < nodes[target]["order"]
    assert workflow["last_link_id"] == len(workflow["links"])


@each_workflow
def test_the_layout_reads_from_left_to_right_and_nothing_overlaps(name: str):
    workflow = canvas(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    boxes = [(*node["pos"], *node["size"]) for node in nodes.values()]
    boxes = [(x, y - TITLE_HEIGHT, x + width, y + height) for x, y, width, height in boxes]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]
    for a, b in combinations(groups, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    for x, y, right, bottom in boxes:
        assert sum(g[0] <= x and g[1] <= y and right <= g[2] and bottom <= g[3] for g in groups) == 1
    for _, source, _, target, _, _ in workflow["links"]:
        assert nodes[source]["pos"][0] <= nodes[target]["pos"][0]


@each_workflow
def test_a_note_tells_a_newcomer_what_to_change_and_to_expect(name: str):
    notes = [node["widgets_values"][0] for node in canvas(name)["nodes"] if node["type"] in NOTES]
    first = min((node for node in canvas(name)["nodes"]), key=lambda node: node["pos"])
    assert first["type"] in NOTES
    assert any("What to change" in text and len(text) > 300 for text in notes)


@each_workflow
def test_a_picture_shows_it_in_the_template_browser(name: str):
    data = (FOLDER / f"{name}.jpg").read_bytes()
    assert data[:3] == b"\xff\xd8\xff"
    assert len(data) < 60_000


@each_workflow
def test_seeds_stay_fixed(name: str):
    for node in canvas(name)["nodes"]:
        if node["type"] not in NOTES:
            values = dict(zip(widget_names(NODES[node["type"]]), node["widgets_values"], strict=True))
            assert values.get("control_after_generate", "fixed") == "fixed"


def test_the_workflows_show_our_nodes_and_no_unused_one_is_frozen():
    used = {node["class_type"] for name in NAMES for node in api(name).values()}
    assert NODES.keys() - used == {"DenseGRPOJudge", "DenseGRPORemoteReward", "DenseGRPORewardOptions"}


def test_the_lora_that_is_used_is_the_one_the_quickstart_saves():
    saved = next(n["inputs"]["name"] for n in api("quickstart_demo").values() if n["class_type"] == "DenseGRPOSaveLoRA")
    used = [n["inputs"]["lora_name"] for n in api("use_the_lora").values() if n["class_type"] == "LoraLoaderModelOnly"]
    assert used == [f"{saved}_00001.safetensors"]


@pytest.mark.parametrize("name", DEMOS)
def test_demos_need_no_download(name: str):
    files = {key for node in api(name).values() for key in node["inputs"] if key in FILES}
    assert files <= {"lora_name"}


def only(name: str, kind: str) -> dict[str, Any] | None:
    """Inputs of the node of a kind that a workflow trains with; None when there is none."""
    nodes = {key: node for key, node in api(name).items() if node["class_type"] == kind}
    trained = next(node for node in api(name).values() if node["class_type"] == "DenseGRPOTrainLoop")["inputs"]
    linked = {value[0] for value in trained.values() if isinstance(value, list)}
    return next((node["inputs"] for key, node in nodes.items() if key in linked), None)


def method_on_canvas(name: str) -> dict[str, Any]:
    """The method a workflow trains with, as GRPO Train Loop puts it together."""
    sampler = only(name, "DenseGRPODenseSampler") or only(name, "DenseGRPOBranchSampler")
    probe, credit = only(name, "DenseGRPORewardProbe"), only(name, "DenseGRPOTurningPoints")
    probe, credit = probe and mapping.probe_of(probe), credit and mapping.credit_of(credit)
    chosen = mapping.method_of(sampler, probe, credit)
    update = only(name, "DenseGRPOPolicyUpdate")
    return chosen | {key: update[key] for key in update.keys() & recipe_options(chosen["name"]).keys()}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_workflow_is_the_method_it_is_named_after(name: str):
    given = method_on_canvas(name)
    assert f"{given['name']}_{name.rpartition('_')[2]}" == name
    update = only(name, "DenseGRPOPolicyUpdate")
    assert update.keys() - given.keys() == (
        options_of(OptimizerSettings).keys() - {"beta1", "weight_decay"} | options_of(LoraSettings).keys()
    ), "a value of Policy Update that nobody reads"
    loop = only_loop(name)
    steps = (only(name, "DenseGRPODenseSampler") or only(name, "DenseGRPOBranchSampler"))["num_steps"]
    config = make_config(
        {
            "name": loop["run_name"],
            "model": {"name": "demo"},
            "method": given,
            "prompts": ["a"],
            "rewards": [{"name": "brightness"}],
            "training": {"num_steps": steps},
        }
    )
    sigmas = torch.linspace(1, 0, steps + 1)
    for iteration in (0, 1, loop["iterations"] - 1):
        plan = make_recipe(**config.method).plan((1, 2, 2), sigmas, (0, iteration, 0))
        assert plan.train.any(1).all(), "every chain teaches something"


def only_loop(name: str) -> dict[str, Any]:
    return next(node["inputs"] for node in api(name).values() if node["class_type"] == "DenseGRPOTrainLoop")


DIFFERENT = {
    "dance_grpo_sd35": {"num_updates": 1},  # advised for models with guidance
    "mix_grpo_sd35": {"group_size": 24, "window_every": 150, "kl": "flow_grpo", "kl_weight": 0.001},
    "mix_grpo_flash_sd35": {"group_size": 24, "window_every": 150, "kl": "flow_grpo", "kl_weight": 0.001},
    "tempflow_grpo_flux": {"noise": 0.9},
    "dense_grpo_flux": {"noise": 0.9, "kl_weight": 0.01, "group_size": 12},
    "tp_grpo_flux": {"noise": 0.8},
}
"""What a workflow of a large model says otherwise than the recipe, see the notes in it."""


@pytest.mark.parametrize("name", [name for name in TRAININGS if not name.endswith("_demo")])
def test_large_models_train_with_the_values_of_the_method(name: str):
    given = method_on_canvas(name)
    options = recipe_options(given["name"])
    differs = {key: value for key, value in given.items() if key != "name" and value != options[key].default}
    assert differs == DIFFERENT.get(name, {})
    optimizer = only(name, "DenseGRPOPolicyUpdate")
    assert (optimizer["rank"], optimizer["alpha"]) == (32, 64)
    assert optimizer["lr"] == (1e-4 if name == "g2rpo_flux" else 3e-4)
    loop = only_loop(name)
    guidance = (loop["cfg"], loop["guidance"])
    assert guidance == ((1, 3.5) if name.endswith("flux") else (1 if name == "flow_grpo_fast_sd35" else 4.5, 0))


def test_demo_workflows_differ_only_in_the_method():
    """Nodes of the method aside, and how long they train."""
    method = {"DenseGRPODenseSampler", "DenseGRPOBranchSampler", "DenseGRPORewardProbe", "DenseGRPOTurningPoints"}
    of_the_update = {key for name in METHODS for key in update_options(name)}
    same = []
    for name in METHODS:
        found = {}
        for node in api(f"{name}_demo").values():
            if node["class_type"] not in method:
                own = {"iterations", "run_name", "name", "filename_prefix"} | (of_the_update - {"clip_range", "kl"})
                values = {k: v for k, v in node["inputs"].items() if k not in own and not isinstance(v, list)}
                found.setdefault(node["class_type"], []).append(values)
        same.append(found)
    assert all(found == same[0] for found in same)


def update_options(name: str) -> set[str]:
    parts = parts_of(name)
    return {key for part in ("normalise", "update") for key in options_of(type(parts[part]))}


def test_what_is_compared_is_what_is_trained():
    for name in METHODS:
        nodes = list(api(f"{name}_demo").values())
        inspect = next(node["inputs"] for node in nodes if node["class_type"] == "DenseGRPOInspectRollout")
        loop = only_loop(f"{name}_demo")
        for key in ("model", "vae", "prompts", "reward", "sampler", "probe", "credit", "width", "height", "cfg"):
            assert inspect.get(key) == loop.get(key), (name, key)


def test_a_wrong_value_type_or_link_is_found():
    for change, message in [
        (("DenseGRPOTrainLoop", "iterations", -1), "out of range"),
        (("DenseGRPOTrainLoop", "iterations", 1.5), "iterations"),
        (("DenseGRPORewardModel", "reward", "beauty"), "is not in"),
        (("DenseGRPOTrainLoop", "vae", ["2", 0]), "needs VAE"),
        (("DenseGRPOTrainLoop", "vae", 1), "must be linked"),
        (("DenseGRPOTrainLoop", "speed", 1), "has no"),
    ]:
        prompt = api("quickstart_demo")
        kind, name, value = change
        next(node for node in prompt.values() if node["class_type"] == kind)["inputs"][name] = value
        with pytest.raises(AssertionError, match=message):
            check_prompt(prompt, NODES)
    prompt = api("quickstart_demo")
    del next(node for node in prompt.values() if node["class_type"] == "DenseGRPOTrainLoop")["inputs"]["model"]
    with pytest.raises(AssertionError, match="lacks"):
        check_prompt(prompt, NODES)


@pytest.mark.comfy
class TestOnAHost:
    """What the frozen description cannot know."""

    def test_our_nodes_are_as_frozen(self, server):  # noqa: F811
        live = server.get("/object_info")
        for name in {name for name in NODES.keys() | live.keys() if name.startswith("DenseGRPO")}:
            frozen = specs(NODES[name])
            assert list(specs(live[name])) == list(frozen), f"{name}: run python workflows/build.py --host ADDRESS"
            for key, (kind, options) in specs(live[name]).items():
                ignored = {"tooltip", *(["options"] if key in ("file", "reuse", "model") else [])}
                live_options = {k: v for k, v in options.items() if k not in ignored}
                assert (kind, live_options) == (
                    frozen[key][0],
                    {k: v for k, v in frozen[key][1].items() if k not in ignored},
                )
            for key in ("output", "output_name", "output_is_list", "display_name", "output_node"):
                assert live[name][key] == NODES[name][key], name

    @each_workflow
    def test_workflows_fit_the_nodes_of_this_host(self, server, name: str):  # noqa: F811
        live = server.get("/object_info")
        check_prompt(api(name), live)
        assert to_prompt(canvas(name), live) == api(name)

    def test_templates_are_listed_with_their_pictures(self, server):  # noqa: F811
        ours = [names for names in server.get("/workflow_templates").values() if "quickstart_demo" in names]
        assert [sorted(names) for names in ours] == [NAMES]
