"""A real ComfyUI server trains the demo model from a posted graph, and stock nodes use the LoRA.

See comfy_host.py for which ComfyUI, host_client.py for the server and the page. Every run has a name of its own,
so that tests can run alone or in any order.
"""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from comfy_host import ROOT
from densegrpo.engine.cli import main
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import make_reward
from flat_rows import flat
from host_client import STEPS, host, sampling, server, training  # noqa: F401
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy


def latents(server, done, name):  # noqa: F811
    """What a prompt saved, to the last bit."""
    found = done.outputs[f"latents {name}"]["latents"]
    return load_file(server.base / "output" / found[0]["subfolder"] / found[0]["filename"])["latent_tensor"]


def darkness(server, done, name):  # noqa: F811
    """Mean reward of the images a prompt saved."""
    files = [server.base / "output" / f["subfolder"] / f["filename"] for f in done.outputs[f"images {name}"]["images"]]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0) / 255 for file in files])
    return float(make_reward("brightness", target=0.0)(RewardBatch(images, [""] * 8, [{}] * 8)).scores.mean())


def lora_menu(server):  # noqa: F811
    """What the stock loader offers."""
    return server.get("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]["input"]["required"]["lora_name"][0]


def numbers(rows):
    """Metrics without times."""
    return [flat({k: v for k, v in row.items() if not k.startswith("seconds")}) for row in rows]


def assert_close(rows, others, tolerance):
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(numbers(rows), numbers(others), strict=True):
        for name in row:
            assert row[name] == pytest.approx(other[name], abs=tolerance), (row["iteration"], name)


@pytest.fixture(scope="module")
def story(server):  # noqa: F811
    """Pictures before, a training, pictures after with and without the LoRA: three prompts, one after the other."""
    node = server.node
    before = server.run(sampling(server, "before", ["demo", 0]))
    graph = training(server, "story", iterations=12, images_per_prompt=8)
    graph |= {
        "save": node("DenseGRPOSaveLoRA", lora=["train", 1], name="story"),
        "save stock": node("SaveLoRANode", lora=["train", 1], prefix="loras/stock"),
        "save diffusers": node(
            "DenseGRPOSaveLoRA", lora=["train", 1], name="other", keys="diffusers", model=["demo", 0]
        ),
        "loader": node("LoraModelLoader", model=["demo", 0], lora=["train", 1], strength_model=1.0),
        "curve": node("SaveImage", images=["train", 2], filename_prefix="curve"),
        "grids": node("SaveImage", images=["train", 3], filename_prefix="grids"),
    }
    graph |= sampling(server, "trained", ["train", 0]) | sampling(server, "loaded", ["loader", 0])
    trained = server.run(graph)
    assert trained.status == "success", trained.error
    menu = lora_menu(server)
    after_graph = sampling(server, "after", ["demo", 0])
    for name, file in (("file", "story_00001"), ("stock", "stock_00001_"), ("diffusers", "other_00001")):
        after_graph[f"lora {name}"] = node(
            "LoraLoaderModelOnly", model=["demo", 0], lora_name=f"{file}.safetensors", strength_model=1.0
        )
        after_graph |= sampling(server, name, [f"lora {name}", 0])
    return {"before": before, "trained": trained, "menu": menu, "after": server.run(after_graph)}


def test_a_posted_graph_raises_the_held_out_reward(server, story):  # noqa: F811
    rows = server.metrics("story")
    scores = [row["evaluation_reward"] for row in rows if "evaluation_reward" in row]
    assert len(rows) == 13
    assert scores[-1] > scores[0] + 0.1, scores


def test_the_page_sees_progress_numbers_and_pictures(story):
    done = story["trained"]
    shown = done.of("densegrpo.progress")
    assert [event["row"]["iteration"] for event in shown] == list(range(13))
    assert all((event["node"], event["run"], event["total"]) == ("train", "story", 12) for event in shown)
    bars = [event for event in done.of("progress") if event["node"] == "train"]
    assert [event["value"] for event in bars] == list(range(13))
    assert {event["max"] for event in bars} == {12}
    kinds = [int.from_bytes(data[:4], "big") for data in done.of("binary")]
    assert kinds.count(3) == 13  # the text on the node
    previews = [data for data in done.of("binary") if int.from_bytes(data[:4], "big") == 1 and b"\xff\xd8" in data[:12]]
    assert len(previews) >= 13
    assert any(b"12/12  reward 0." in data and b"held-out" in data for data in done.of("binary"))


def test_the_status_route_lists_runs_and_refuses_what_is_none(server, story):  # noqa: F811
    assert "story" in server.get("/densegrpo/status")["runs"]
    whole = server.get("/api/densegrpo/status?run=story")
    assert (whole["run"], whole["total"], len(whole["rows"])) == ("story", 12, 13)
    for wrong in ("nowhere", "..", "../densegrpo/story", ""):
        with pytest.raises(OSError, match="404"):
            server.get(f"/densegrpo/status?run={wrong}")


def test_the_lora_is_in_the_menu_of_the_stock_loader(server, story):  # noqa: F811
    assert {"story_00001.safetensors", "other_00001.safetensors", "stock_00001_.safetensors"} <= set(story["menu"])
    assert story["trained"].outputs["save"]["text"] == ["saved story_00001.safetensors"]
    folder = server.base / "models" / "loras"
    assert sorted(path.name for path in folder.iterdir()) == ["other_00001.safetensors", "story_00001.safetensors"]
    with safe_open(folder / "story_00001.safetensors", "pt") as file:
        said = file.metadata()
    rows = server.metrics("story")
    assert said["densegrpo.run"] == "story"
    assert said["densegrpo.iterations"] == "12"
    assert float(said["densegrpo.held_out_reward_after"]) == pytest.approx(rows[-1]["evaluation_reward"], abs=1e-4)


def test_stock_nodes_paint_darker_pictures_with_the_lora(server, story):  # noqa: F811
    done = story["after"]
    assert done.status == "success", done.error
    assert (latents(server, done, "file") - latents(server, done, "after")).abs().max() > 0.1
    assert darkness(server, done, "file") > darkness(server, done, "after") + 0.1


def test_the_model_is_bit_for_bit_as_before_training(server, story):  # noqa: F811
    done = story["after"]
    assert "demo" not in done.executed, "the MODEL must be the very object that was trained"
    assert "sample after" in done.executed
    assert torch.equal(latents(server, story["before"], "before"), latents(server, done, "after"))


def test_every_way_to_the_lora_gives_the_same_pictures(server, story):  # noqa: F811
    found = {name: latents(server, story["trained"], name) for name in ("trained", "loaded")}
    found |= {name: latents(server, story["after"], name) for name in ("file", "stock", "diffusers")}
    for name, value in found.items():
        assert torch.equal(value, found["file"]), name


def test_curve_and_grids_are_pictures(server, story):  # noqa: F811
    for name, number in (("curve", 1), ("grids", 2)):
        files = story["trained"].outputs[name]["images"]
        assert len(files) == number
        assert min(Image.open(server.base / "output" / files[0]["filename"]).size) > 200


def test_inspect_and_score_answer_in_seconds(server):  # noqa: F811
    graph = training(server, "unused")
    links = {k: v for k, v in graph.pop("train")["inputs"].items() if k in ("model", "vae", "prompts", "reward")}
    links |= {"sampler": ["sampler", 0], "probe": ["probe", 0], "width": 64, "height": 64}
    graph["inspect"] = server.node("DenseGRPOInspectRollout", **links)
    graph |= sampling(server, "scored", ["demo", 0])
    graph["score"] = server.node(
        "DenseGRPORewardScore", images=["decode scored", 0], reward=["reward", 0], prompt="a red circle"
    )
    done = server.run(graph, seconds=20)
    assert done.status == "success", done.error
    report = done.outputs["inspect"]["text"][0].splitlines()
    assert [line.partition(":")[0] for line in report] == [f"state {k} of {STEPS}" for k in range(STEPS + 1)]
    mean, *scores = [float(line.rpartition(" ")[2]) for line in done.outputs["score"]["text"][0].splitlines()]
    assert sum(scores) / 8 == pytest.approx(mean, abs=1e-3)
    assert sum(scores) / 8 == pytest.approx(darkness(server, done, "scored"), abs=2e-3)


@pytest.fixture(scope="module")
def whole(server):  # noqa: F811
    """A run that nobody disturbs."""
    done = server.run(training(server, "whole", iterations=5, evaluate_every=2))
    assert done.status == "success", done.error
    return server.metrics("whole")


def test_cancel_keeps_what_was_learnt_and_the_same_graph_resumes(server, whole):  # noqa: F811
    graph = training(server, "cut", iterations=5, evaluate_every=2)
    asked = []

    def cancel(kind, data):
        if kind == "densegrpo.progress" and data["row"]["iteration"] == 2:
            time.sleep(0.1)  # into the middle of the third iteration
            asked.append(time.monotonic())
            server.post("/interrupt", {})

    cut = server.run(graph, cancel)
    assert time.monotonic() - asked[0] < 2
    assert cut.status == "interrupted"
    folder = server.runs / "cut"
    kept = [row["iteration"] for row in server.metrics("cut")]
    assert kept == list(range(len(kept)))
    assert 3 <= len(kept) <= 5, "cancelled at the wrong moment"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{kept[-1]:06d}"]
    # The file of the run folder is a LoRA that stock nodes take.
    shutil.copy(folder / "lora.safetensors", server.base / "models" / "loras" / "cut.safetensors")
    use = sampling(server, "plain", ["demo", 0]) | sampling(server, "cut", ["lora", 0])
    use["lora"] = server.node("LoraLoaderModelOnly", model=["demo", 0], lora_name="cut.safetensors", strength_model=1.0)
    used = server.run(use)
    assert used.status == "success", used.error
    assert (latents(server, used, "cut") - latents(server, used, "plain")).abs().max() > 1e-3

    again = server.run(graph)
    assert again.status == "success", again.error
    assert {event["row"]["iteration"] for event in again.of("densegrpo.progress")} - {kept[-1]} == {
        *range(len(kept), 6)
    }
    assert_close(server.metrics("cut"), whole, 1e-6)


def test_more_iterations_continue_the_run(server):  # noqa: F811
    assert server.run(training(server, "longer", iterations=1)).status == "success"
    more = server.run(training(server, "longer", iterations=2))
    assert [event["row"]["iteration"] for event in more.of("densegrpo.progress")] == [2]
    fresh = server.run(training(server, "longer", iterations=1, resume=False))
    assert [event["run"] for event in fresh.of("densegrpo.progress")] == ["longer_2"] * 2
    assert_close(server.metrics("longer_2")[:1], server.metrics("longer")[:1], 1e-6)


def test_the_command_line_gives_the_metrics_of_the_server(server, whole, tmp_path):  # noqa: F811
    config = json.loads((server.runs / "whole" / "config.json").read_text())
    assert config["model"]["name"] == "comfy"
    config["model"] = {"name": "demo"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["train", str(tmp_path / "config.json"), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert_close(whole, rows, 1e-4)
    there, here = (load_file(folder / "lora.safetensors") for folder in (server.runs / "whole", tmp_path / "whole"))
    assert there.keys() == here.keys()
    length = sum(float(here[key].square().sum()) for key in here)
    assert sum(float((there[key] - here[key]).square().sum()) for key in here) < 1e-4 * length


def test_two_runs_queued_behind_each_other_and_the_cache(server):  # noqa: F811
    graphs = [training(server, f"queued {number}", iterations=1, seed=number) for number in (1, 2)]
    for graph in graphs:
        graph["curve"] = server.node("SaveImage", images=["train", 2], filename_prefix="queued")
    with server.page() as page:
        ids = [page.post(graph) for graph in graphs]
        done = [page.follow(number) for number in ids]
        assert [d.status for d in done] == ["success", "success"], [d.error for d in done]
        assert numbers(server.metrics("queued 1")) != numbers(server.metrics("queued 2"))
        again = page.follow(page.post(graphs[1]))
    assert again.status == "success"
    assert again.executed == set()
    resent = {event["node"]: event["output"] for event in again.of("executed")}
    assert resent["curve"] == done[1].outputs["curve"]
    assert resent["train"] == done[1].outputs["train"]
    assert resent["train"]["run"] == ["queued 2"]


WORKFLOWS = ("quickstart_demo", "try_a_reward", "use_the_lora")  # the methods: test_host_methods.py


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_of_the_first_steps_runs(server, story, name):  # noqa: F811
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.api.json").read_text(encoding="utf-8"))
    shorter = {
        "DenseGRPOTrainLoop": {"iterations": 1, "groups": 1, "images_per_prompt": 1},
        "DenseGRPOTrainingPrompts": {"limit": 4},
        "LoraLoaderModelOnly": {"lora_name": "story_00001.safetensors"},
    }
    for entry in graph.values():
        entry["inputs"] |= shorter.get(entry["class_type"], {})
    done = server.run(graph, seconds=60)
    assert done.status == "success", done.error
    pictures = [picture for output in done.outputs.values() for picture in output.get("images", [])]
    assert pictures
