"""Every demo workflow of every method runs through a real ComfyUI server to a LoRA that stock nodes load.

What is shorter here than in the shipped files stands in ``SHORTER``.
"""

import json
import math

import pytest
import torch
from comfy_host import ROOT
from densegrpo.engine.recipes import RECIPES
from host_client import host, sampling, server, training  # noqa: F401
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy
SHORTER = {
    "DenseGRPOTrainLoop": {"iterations": 2, "groups": 2, "images_per_prompt": 1, "evaluate_every": 0},
    "DenseGRPOTrainingPrompts": {"limit": 4},
    "DenseGRPOCalibrateExploration": {"rounds": 2, "trajectories": 8, "measured": 8},
}
NAMES = [*(f"{name}_demo" for name in sorted(RECIPES)), "calibrate_demo"]


def shipped(name):
    """A shipped workflow, shortened, and its inputs by kind of node."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.api.json").read_text(encoding="utf-8"))
    for node in graph.values():
        node["inputs"] |= SHORTER.get(node["class_type"], {})
    return graph, {node["class_type"]: node["inputs"] for node in graph.values()}


def pictures(server, done, node):  # noqa: F811
    """Latents a prompt saved."""
    found = done.outputs[node]["latents"][0]
    return load_file(server.base / "output" / found["subfolder"] / found["filename"])["latent_tensor"]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_runs_to_a_lora_that_stock_nodes_load(server, name):  # noqa: F811
    graph, inputs = shipped(name)
    done = server.run(graph, seconds=120)
    assert done.status == "success", done.error
    run = json.loads((server.runs / name / "config.json").read_text())
    assert run["method"]["name"] == {"calibrate_demo": "dense_grpo"}.get(name, name.removesuffix("_demo"))
    rows = server.metrics(name)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(row["reward"]) for row in rows[1:])

    file = f"{inputs['DenseGRPOSaveLoRA']['name']}_00001.safetensors"
    tensors = load_file(server.base / "models" / "loras" / file)
    assert max(float(t.abs().max()) for key, t in tensors.items() if "lora_B" in key) > 0, "nothing was learnt"
    said = len(server.log.read_text(errors="replace"))
    use = sampling(server, "plain", ["demo", 0]) | sampling(server, name, ["lora", 0])
    use["lora"] = server.node("LoraLoaderModelOnly", model=["demo", 0], lora_name=file, strength_model=1.0)
    used = server.run(use)
    assert used.status == "success", used.error
    assert "lora key not loaded" not in server.log.read_text(errors="replace")[said:]
    moved = pictures(server, used, f"latents {name}") - pictures(server, used, "latents plain")
    assert torch.isfinite(moved).all()
    assert moved.abs().max() > 1e-4


def test_the_noise_that_was_calibrated_is_trained_with(server):  # noqa: F811
    """Also when its saved file is chosen instead of a new search."""
    graph, inputs = shipped("calibrate_demo")
    inputs["DenseGRPOCalibrateExploration"] |= {"file_name": "chosen", "seed": 5}
    inputs["DenseGRPOTrainLoop"] |= {"run_name": "calibrated", "iterations": 1}
    assert server.run(graph, seconds=120).status == "success"
    (file,) = (server.runs / "noise_tables").glob("chosen*.json")
    table = json.loads(file.read_text())
    used = json.loads((server.runs / "calibrated" / "config.json").read_text())["method"]["noise_table"]
    assert (used["rates"], used["kernel"]) == (table["rates"], "sde")
    inputs["DenseGRPOCalibrateExploration"] |= {"reuse": file.name}
    inputs["DenseGRPOTrainLoop"] |= {"run_name": "reused"}
    assert server.run(graph, seconds=120).status == "success"
    assert json.loads((server.runs / "reused" / "config.json").read_text())["method"]["noise_table"] == used
    assert [path.name for path in (server.runs / "noise_tables").glob("chosen*.json")] == [file.name]


def test_without_policy_update_the_methods_own_values_hold(server):  # noqa: F811
    graph = training(server, "own values", iterations=1)
    del graph["update"], graph["train"]["inputs"]["update"], graph["train"]["inputs"]["probe"]
    graph["sampler"] = server.node("DenseGRPOBranchSampler", num_steps=4, group_size=3, num_seeds=1)
    assert server.run(graph).status == "success"
    method = json.loads((server.runs / "own values" / "config.json").read_text())["method"]
    assert method["name"] == "tempflow_grpo"
    assert method.keys().isdisjoint({"step_weight", "kl_weight", "clip_range"})
    assert method["group_size"] == 3


def test_inspect_rollout_counts_turning_points_and_lists_branches(server):  # noqa: F811
    for name, line in (("tp_grpo_demo", "turning points: "), ("g2rpo_demo", "branches at step 0, stride 1: mean ")):
        graph, _ = shipped(name)
        kept = {key: node for key, node in graph.items() if node["class_type"] not in TRAINS}
        number = next(key for key, node in kept.items() if node["class_type"] == "DenseGRPOInspectRollout")
        done = server.run({k: v for k, v in kept.items() if not set(sources(v)) - kept.keys()})
        assert done.status == "success", done.error
        assert done.outputs[number]["text"][0].startswith(line)


TRAINS = ("DenseGRPOTrainLoop", "DenseGRPOSaveLoRA", "SaveImage")


def sources(node):
    """Nodes a node is linked to."""
    return [value[0] for value in node["inputs"].values() if isinstance(value, list)]
