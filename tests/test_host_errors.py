"""What a user can do wrong in a real ComfyUI: one sentence names the node and the remedy, and the host goes on."""

from pathlib import Path

import pytest
from host_client import RefusedError, host, server, training  # noqa: F401

pytestmark = pytest.mark.comfy


def usable(server):  # noqa: F811
    """Something of ours still works."""
    graph = training(server, "unused")
    links = {k: v for k, v in graph.pop("train")["inputs"].items() if k in ("model", "vae", "prompts", "reward")}
    links |= {"sampler": ["sampler", 0], "width": 64, "height": 64}
    done = server.run(graph | {"inspect": server.node("DenseGRPOInspectRollout", **links)})
    assert done.status == "success", done.error


def without_vae(graph, server):  # noqa: F811
    del graph["train"]["inputs"]["vae"]


def group_of_one(graph, server):  # noqa: F811
    graph["sampler"]["inputs"]["group_size"] = 1


def run_elsewhere(graph, server):  # noqa: F811
    graph["train"]["inputs"]["run_name"] = "../x"


def wrong_link(graph, server):  # noqa: F811
    graph["train"]["inputs"]["reward"] = ["sampler", 0]


def odd_strides(graph, server):  # noqa: F811
    graph["probe"]["inputs"]["strides"] = "1, two"


@pytest.mark.parametrize(
    ("spoil", "node", "message"),
    [
        (without_vae, "train", "Required input is missing: vae"),
        (group_of_one, "sampler", "Value 1 smaller than min of 2: group_size"),
        (run_elsewhere, "train", "run_name - name '../x' must be a folder name: 1 to 100 characters, none of"),
        (wrong_link, "train", "DENSEGRPO_SAMPLER) mismatch input_type(DENSEGRPO_REWARD)"),
        (odd_strides, "probe", "must be whole numbers in 1..16 such as \"1, 2, 3\", got '1, two'"),
    ],
)
def test_a_mistake_in_the_graph_is_refused_before_anything_runs(server, spoil, node, message):  # noqa: F811
    graph = training(server, f"refused {spoil.__name__}")
    spoil(graph, server)
    with pytest.raises(RefusedError) as caught:
        server.run(graph)
    status, answer = caught.value.args
    assert status == 400
    said = [f"{error['message']}: {error['details']}" for error in answer["node_errors"][node]["errors"]]
    assert message in said[0]
    assert not (server.runs / f"refused {spoil.__name__}").exists()
    usable(server)


def test_a_lora_name_with_a_path_is_named_at_once(server):  # noqa: F811
    """The host goes on with the other output nodes: the training, which Save LoRA then takes from the cache."""
    graph = training(server, "lora name", iterations=0)
    graph["save"] = server.node("DenseGRPOSaveLoRA", lora=["train", 1], name="sub/../../x")
    with server.page() as page:
        answer = server.post("/prompt", {"prompt": graph, "client_id": page.client})
        assert "name 'sub/../../x' must be a folder name" in answer["node_errors"]["save"]["errors"][0]["details"]
        assert page.follow(answer["prompt_id"]).status == "success"
        graph["save"]["inputs"]["name"] = "x"
        assert page.follow(page.post(graph)).executed == {"save"}
    assert [path.name for path in server.base.rglob("x*.safetensors")] == ["x_00001.safetensors"]


def no_prompts(graph, server):  # noqa: F811
    graph["prompts"]["inputs"]["text"] = " \n \n"


def no_metadata(graph, server):  # noqa: F811
    graph["prompts"]["inputs"]["text"] = "a red circle\na cat"
    graph["reward"]["inputs"]["reward"] = "shapes partial"


def not_flow_matching(graph, server):  # noqa: F811
    graph["eps"] = server.node("ModelSamplingDiscrete", model=["demo", 0], sampling="eps")
    graph["train"]["inputs"]["model"] = ["eps", 0]


def odd_size(graph, server):  # noqa: F811
    graph["train"]["inputs"]["width"] = 72


def bad_targets(graph, server):  # noqa: F811
    graph["update"]["inputs"]["targets"] = "nothing like this"


def states_of_another_version(graph, server):  # noqa: F811
    graph["probe"]["inputs"]["states"] = "all"


def branches_and_every_state(graph, server):  # noqa: F811
    graph["sampler"] = server.node("DenseGRPOBranchSampler", num_steps=4)


def assigner_without_probe(graph, server):  # noqa: F811
    graph["turning"] = server.node("DenseGRPOTurningPoints")
    del graph["train"]["inputs"]["probe"]
    graph["train"]["inputs"]["credit"] = ["turning", 0]


def window_too_long(graph, server):  # noqa: F811
    graph["sampler"]["inputs"] |= {"window": "sliding", "window_size": 30}


def file_in_the_way(graph, server):  # noqa: F811
    server.runs.mkdir(parents=True, exist_ok=True)
    (server.runs / graph["train"]["inputs"]["run_name"]).write_text("mine")


def no_memory(graph, server):  # noqa: F811
    graph["limit"] = server.node("TestMemoryLimit", model=["demo", 0], rows=0)
    graph["train"]["inputs"]["model"] = ["limit", 0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_prompts, "Training Prompts: the list of prompts has no prompts; add at least one line"),
        (no_metadata, "GRPO Train Loop: reward shapes partial: prompt 2: prompt 'a cat': "),
        (not_flow_matching, "GRPO Train Loop: this MODEL (SD3, of kind EPS) is not a flow-matching model"),
        (odd_size, "GRPO Train Loop: width must be a multiple of 16 for this model, got 72; take 64 or 80"),
        (bad_targets, "GRPO Train Loop: lora: targets 'nothing like this' match no linear layer"),
        (states_of_another_version, "ODE Reward Probe: states must be one of 'every state', 'after the noise, several"),
        (branches_and_every_state, "GRPO Train Loop: Branch SDE Sampler does not go with an ODE Reward Probe for"),
        (assigner_without_probe, "GRPO Train Loop: Turning-Point Assigner needs the reward of every state: connect an"),
        (window_too_long, "GRPO Train Loop: a window that reaches to step 30 does not fit: of 5 denoising steps 4"),
        (file_in_the_way, "is in the way and is no run; move it elsewhere or choose another run_name"),
        (no_memory, "GRPO Train Loop: out of memory even in the smallest batches"),
    ],
)
def test_a_mistake_found_while_running_is_one_sentence_with_its_remedy(server, spoil, message):  # noqa: F811
    graph = training(server, f"failed {spoil.__name__}")
    spoil(graph, server)
    done = server.run(graph)
    assert done.status == "error"
    assert message in done.error.splitlines()[0]
    usable(server)


def test_changed_settings_do_not_continue_a_run(server):  # noqa: F811
    assert server.run(training(server, "changed", iterations=1)).status == "success"
    before = server.metrics("changed")
    other = training(server, "changed", iterations=1, seed=5)
    other["update"]["inputs"]["lr"] = 1e-4
    done = server.run(other)
    assert done.status == "error"
    assert done.error.startswith(
        "GRPO Train Loop: run 'changed' was started with other settings (lr, seed); set them back, choose another "
        "run_name, or turn resume off"
    )
    assert server.metrics("changed") == before
    other["train"]["inputs"]["resume"] = False
    assert server.run(other).outputs["train"]["run"] == ["changed_2"]


def test_batches_shrink_until_they_fit(server):  # noqa: F811
    """The self-test needs a few rows, training would like 24."""
    plain = server.run(training(server, "roomy", iterations=1))
    graph = training(server, "tight", iterations=1)
    graph["limit"] = server.node("TestMemoryLimit", model=["demo", 0], rows=5)
    graph["train"]["inputs"]["model"] = ["limit", 0]
    done = server.run(graph)
    assert (plain.status, done.status) == ("success", "success"), done.error
    roomy, tight = server.metrics("roomy"), server.metrics("tight")
    assert tight[-1]["reward"] == pytest.approx(roomy[-1]["reward"], abs=1e-4)
    assert tight[-1]["evaluation_reward"] == pytest.approx(roomy[-1]["evaluation_reward"], abs=1e-3)


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_while_training_keeps_what_was_saved(server):  # noqa: F811
    assert server.run(training(server, "full", iterations=1)).status == "success"
    picture = server.runs / "full" / "samples" / "after.png"
    picture.unlink()
    picture.symlink_to(FULL)
    graph = training(server, "full", iterations=2)
    done = server.run(graph)
    assert done.status == "error"
    assert done.error.startswith("GRPO Train Loop: could not save")
    assert done.error.endswith("free some space, then resume the run")
    assert "No space left on device" in done.error
    picture.unlink(missing_ok=True)
    again = server.run(graph)
    assert again.status == "success", again.error
    rows = server.metrics("full")
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert {"reward", "evaluation_reward"} <= rows[2].keys()
    assert again.of("densegrpo.progress")[0]["row"] == rows[2]
    assert picture.stat().st_size > 1000


def test_a_lora_that_cannot_be_written(server):  # noqa: F811
    graph = training(server, "full lora", iterations=1)
    graph["save"] = server.node("DenseGRPOSaveLoRA", lora=["train", 1], name="full")
    folder = server.base / "models" / "loras"
    temporary = folder / "full_00001.safetensors.tmp"
    temporary.mkdir()  # in the way
    done = server.run(graph)
    assert done.status == "error"
    assert done.error.startswith("Save LoRA (GRPO): could not save ")
    assert "full_00001.safetensors: " in done.error
    assert done.error.endswith("free some space, then queue again")
    temporary.rmdir()
    again = server.run(graph)
    assert again.executed == {"save"}  # the training is not repeated
    assert again.outputs["save"]["text"] == ["saved full_00001.safetensors"]


def test_the_server_wrote_nothing_outside_its_folders(server):  # noqa: F811
    assert not (server.base.parent / "x").exists()
    assert not list(server.base.glob("x*"))
