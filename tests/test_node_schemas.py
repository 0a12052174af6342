"""Every node builds, and says what ``golden/object_info.json`` says, which all workflows are checked against.

No ComfyUI is needed: stand_in_host.py builds the schemas in a process of its own. Where there is a ComfyUI, what it
says must be what the stand-in says.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_host import ROOT, host  # noqa: F401
from host_client import server  # noqa: F401

FROZEN = json.loads((ROOT / "tests" / "golden" / "object_info.json").read_text(encoding="utf-8"))
OURS = sorted(name for name in FROZEN if name.startswith("DenseGRPO"))
REMEDY = "if that is meant: python workflows/build.py --host ADDRESS"
MENU = {
    "DenseGRPO": {"InspectRollout", "LoadDemoModel", "SaveLoRA", "TrainLoop", "TrainingPrompts"},
    "DenseGRPO/method": {
        *("BranchSampler", "CalibrateExploration", "DenseSampler", "PolicyUpdate", "RewardProbe", "TurningPoints"),
    },
    "DenseGRPO/reward": {
        *("CombineRewards", "HumanVote", "Judge", "RemoteReward", "RewardModel", "RewardOptions", "RewardScore"),
    },
}
"""Where the nodes are in the menu of the canvas, by their id without "DenseGRPO"."""
Info = dict[str, Any]


def build(package: Path = ROOT) -> dict[str, Info]:
    """What the nodes of a package say of themselves, by their id."""
    command = [sys.executable, "-B", str(Path(__file__).with_name("stand_in_host.py")), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def built() -> dict[str, Info]:
    return build()


def inputs(info: Info) -> dict[str, tuple[bool, Any, Info]]:
    """Name -> (is it required, type, options), in the order of the canvas; hidden ones are no inputs."""
    return {
        name: (part == "required", *info["input"][part][name])
        for part in ("required", "optional")
        for name in info["input_order"].get(part, [])
    }


def without_files(info: Info) -> Info:
    """The same without what only this machine has: menus list files of its folders."""
    info = copy.deepcopy(info)
    for name, (_, _, options) in inputs(info).items():
        if name in ("file", "reuse"):
            options["options"] = [x for x in options["options"] if not x.endswith((".txt", ".jsonl", ".json"))]
    return info


def differences(here: Info, there: Info, fields: tuple[str, ...], ignored: tuple[str, ...] = ()) -> Iterator[str]:
    """What two descriptions of a node do not agree on; ``ignored`` are options of inputs."""
    ours, theirs = inputs(here), inputs(there)
    if list(ours) != list(theirs):
        yield f"inputs {list(ours)} against {list(theirs)}"
    for name in ours.keys() & theirs.keys():
        a, b = (
            (*spec[:2], {key: value for key, value in spec[2].items() if key not in ignored})
            for spec in (ours[name], theirs[name])
        )
        if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):  # to JSON, 1 and 1.0 are not the same
            yield f"input {name}: {a} against {b}"
    for field in fields:
        if here[field] != there[field]:
            yield f"{field}: {here[field]} against {there[field]}"


KEPT = ("output", "output_name", "output_is_list", "display_name", "output_node")
"""What is frozen besides the inputs; texts are not."""


def test_the_nodes_are_those_that_are_frozen(built):
    assert sorted(built) == OURS, f"{set(built) ^ set(OURS)}; {REMEDY}"


@pytest.mark.parametrize("name", OURS)
def test_a_node_builds_as_it_is_frozen(built, name):
    found = list(differences(built[name], FROZEN[name], KEPT, ("tooltip",)))
    assert not found, f"{found}; {REMEDY}"


def test_nodes_are_where_the_menu_has_them(built):
    found = {category: set() for category in MENU}
    for name, info in built.items():
        found.setdefault(info["category"], set()).add(name.removeprefix("DenseGRPO"))
    assert found == MENU


@pytest.mark.parametrize("name", OURS)
def test_a_node_explains_itself_and_its_inputs(built, name):
    tips = {key: options.get("tooltip", "") for key, (_, _, options) in inputs(built[name]).items()}
    for what, text in {"the node": built[name]["description"], **tips}.items():
        assert text.endswith("."), f"{what} needs a sentence, has {text!r}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info["input_order"]["required"].reverse(), "inputs"),
        (lambda info: info["input"]["required"]["noise"][1].update(default=0.8), "input noise"),
        (lambda info: info["input"]["required"]["num_steps"][1].update(max=100.0), "input num_steps"),
        (lambda info: info["input"]["required"]["kernel"][1]["options"].append("ode"), "input kernel"),
        (lambda info: info["output"].pop(), "output"),
        (lambda info: info.update(output_node=True), "output_node"),
    ],
)
def test_a_node_that_changed_is_found(change, message):
    changed = copy.deepcopy(FROZEN["DenseGRPODenseSampler"])
    change(changed)
    (found,) = differences(changed, FROZEN["DenseGRPODenseSampler"], KEPT)
    assert found.startswith(message)


@pytest.mark.comfy
def test_a_host_says_what_the_stand_in_says(built, server):  # noqa: F811
    live = server.get("/object_info")
    for name, info in built.items():
        fields = (*KEPT, "output_tooltips", "name", "category", "description")
        assert list(differences(without_files(live[name]), info, fields)) == [], name
