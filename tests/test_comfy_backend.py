"""The ComfyUI back end in a real ComfyUI: it samples what the host samples, learns, and leaves no trace.

What is measured is in the files that comfy_cases.py names; it runs once, inside the host's Python. See comfy_host.py
for the host.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
from comfy_host import HOW_TO, find_host, host  # noqa: F401
from flat_rows import flat

pytestmark = pytest.mark.comfy
FAMILIES = ("sd3", "wan", "flux", "chroma", "qwen", "lumina", "aura", "hidream")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def measured(host, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("comfy")
    found = host.run(Path(__file__).with_name("comfy_cases.py"), folder / "answer.json")

    def of(case):
        assert "error" not in found[case], found[case]["error"]
        return found[case]

    return of


def test_the_demo_model_in_the_host_is_the_engines_own(measured):
    demo = measured("demo")
    assert demo["velocity_cfg_1"] < CLOSE
    assert demo["velocity_cfg_3"] < CLOSE
    assert demo["decode"] < CLOSE
    assert demo["schedule"] < 1e-6
    assert demo["layers_equal"]
    assert demo["self_test"] < 0.01


def test_the_demo_model_works_in_stock_nodes(measured):
    demo = measured("stock_nodes")
    assert demo["context"] < CLOSE
    assert demo["pooled"] < CLOSE
    assert demo["latent_shape"] == [2, 16, 8, 8]
    assert demo["decoded_shape"] == [2, 64, 64, 3]
    assert demo["tiled"] == 0
    assert demo["round_trip"] < CLOSE


def test_prompts_with_weights_and_brackets_are_encoded(measured):
    demo = measured("stock_nodes")
    assert all(shape == [1, 8, 64] for shape in demo["shapes"])
    assert demo["weights_ignored"] == 0
    assert demo["word_ids"] == 3


def test_an_ode_by_our_steps_ends_where_ksampler_ends(measured):
    assert measured("ksampler").keys() == {"simple_1", "simple_3", "beta_1"}
    assert max(measured("ksampler").values()) < CLOSE


def test_training_in_the_host_gives_the_numbers_of_training_outside(measured):
    runs = measured("training")
    assert len(runs["host"]) == len(runs["own"]) == 4
    for there, here in zip(map(flat, runs["host"]), map(flat, runs["own"]), strict=True):
        assert there.keys() == here.keys()
        assert all(there[name] == pytest.approx(here[name], abs=1e-4) for name in here), (there, here)
        assert there["grad_norm"] > 0


def test_the_model_is_bit_for_bit_as_before(measured):
    model = measured("untouched")
    assert model["after"]
    assert model["after_error"]
    assert model["at_the_end"]
    assert measured("interrupt")["untouched"]


def test_a_lora_patched_in_upstream_counts_and_stays(measured):
    model = measured("untouched")
    assert model["upstream_counts"] > 1e-2
    assert model["lora_counts"] > 1e-2
    assert model["patched_again"]
    assert model["removed_again"]


def test_cancel_stops_the_next_model_call(measured):
    assert measured("interrupt")["stopped"] != "not refused"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_samples_and_learns(measured, family):
    found = available(measured, family)
    assert found["shape"] == {"wan": [16, 1, 8, 8], "qwen": [16, 1, 8, 8], "aura": [4, 8, 8]}.get(family, [16, 8, 8])
    assert found["decode"] == [6, 3, 8, 8]
    assert found["batch"] < CLOSE
    assert found["self_test"] < 0.01
    assert found["checkpointing"] < CLOSE
    assert found["untouched"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_loader_gives_the_velocity_of_training(measured, family):
    found = available(measured, family)
    assert found["patches"] == found["layers"] > 0
    assert found["stock_loader"] < CLOSE
    assert found["lora_counts"] > 1e-2


def available(measured, family):
    found = measured("families")[family]
    if "unavailable" in found and family not in ("sd3", "wan"):
        pytest.skip(f"this ComfyUI cannot build a tiny {family}: {found['unavailable']}")
    return found


@pytest.mark.parametrize(("base", "cosine"), [("bfloat16", 0.999), ("float16", 0.9999), ("fp8", 0.97)])
def test_bases_of_low_precision_get_the_gradient_of_float32(measured, base, cosine):
    found = measured("precisions")[base]
    assert found["self_test"] < 0.15
    assert found["cosine"] > cosine
    assert found["length"] == pytest.approx(1, abs=0.05)
    assert found["dtype"] == "torch.float32"


def test_prompts_of_different_length_take_separate_calls_and_no_padding(measured):
    """Rows 0, 2, 1, 0, 2, 1 of prompts with 6, 9 and 6 tokens; each call is followed by its unconditional half."""
    found = measured("lengths")
    assert found["calls"] == [[4, 6], [4, 6], [2, 9], [2, 6]]
    assert found["host_would"]
    assert not found["shared"]


def test_a_layer_that_takes_the_conditioning_itself_can_be_trained(measured):
    found = measured("text_layers")
    assert found["layers"] == ["context_embedder"]
    assert found["gradient"] > 0


def test_embedded_guidance_counts_only_where_the_model_has_it(measured):
    found = measured("guidance")
    assert found["3.5"] == 0  # the host's default for FLUX
    assert found["8"] > 1e-2
    assert "guidance has no effect: this MODEL does not take it as an input" in found["refused"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("detached", "gives 10 layers of SD3 no gradient (joint_blocks.0"),
        ("wrong", "computes wrong gradients of SD3 (slope"),
        ("overwritten", "cannot compute gradients of SD3 (one of the variables needed for gradient computation"),
    ],
)
def test_the_self_test_stops_training_on_wrong_gradients(measured, damage, message):
    found = measured("self_test")
    assert message in found[damage]
    assert "it was not started. Remove nodes" in found[damage]
    assert found[f"{damage}_kept"]
    assert found[f"{damage}_repaired"] < 0.01


def test_an_attention_without_backward_pass_is_replaced_while_training(measured):
    found = measured("attention")
    assert found["self_test"] < 0.01
    assert "no gradient" in found["without"]
    assert found["during"] is True
    assert found["after"] is False


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("sd15", "this MODEL (BaseModel, of kind EPS) is not a flow-matching model: it was trained on another kind"),
        ("sigma", "noise levels up to 80, flow matching ends at 1; remove the node that changed its sampling"),
        ("two parts", "prompt 'x' has a conditioning of 2 parts; training needs exactly one per prompt"),
        ("mask", "prompt 'x' has a conditioning with mask; training needs plain text encodings"),
        ("vae", "the VAE makes latents of 4 channels but the MODEL takes 16; connect the VAE that belongs to it"),
        ("negative", "cfg 3.0 needs a negative prompt; connect one (it may be empty) or set cfg to 1"),
        ("size", "width must be a multiple of 16 for this model, got 72; take 64 or 80"),
        ("cfg_grad", "cfg_grad 'detach' has no effect: cfg is 1"),
        ("scheduler", "unknown scheduler 'simpel'; this ComfyUI has: simple"),
        ("levels", "scheduler 'ddim_uniform' does not give 10 falling steps from 1 to 0 for this model"),
        ("prompt", "prompt 'never seen' has not been encoded with CLIP"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(measured, mistake, message):
    assert message in measured("refusals")[mistake]


ENDINGS = {
    "goes_well": None,
    "is_cancelled": "InterruptProcessingException",
    "fails": "KeyError",
    "finds_no_room": "OutOfMemoryError",
}
each_base = pytest.mark.parametrize("base", ["demo", "half"])


@each_base
@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_of_a_training_stays_however_it_ends(measured, base, ending):
    left = measured("memory")[f"training {base} {ending}"]
    assert left["problem"] == ENDINGS[ending]
    assert len(left["parts"]) == 8, "it ended before anything was seen of it"
    assert left["alive"] == []
    assert_as_before(left)


@each_base
@pytest.mark.parametrize("run", ["inspected", "calibrated"])
def test_nothing_of_an_inspection_or_calibration_stays(measured, base, run):
    left = measured("memory")[f"{run} {base}"]
    assert left["problem"] is None
    assert left["handed out"] > 0
    assert_as_before(left)


def assert_as_before(left):
    assert left["bytes"] == 0, "tensors besides those handed out"
    assert left["graphs"] == 0
    assert left["clones"] == 0, "the host still has the MODEL that was trained in its list of loaded ones"
    assert left["untouched"]


@each_base
def test_memory_is_given_back_once_nothing_holds_it_any_more(measured, base):
    """After an error, the traceback that the host prints may still name the model and its LoRA, but no more."""
    found = measured("memory")
    for well in (f"training {base} goes_well", f"inspected {base}", f"calibrated {base}"):
        assert found[well]["when given back"] == []
        assert found[well]["bytes when given back"] == 0
    for ending in ENDINGS:
        assert set(found[f"training {base} {ending}"]["when given back"]) <= {"clone", "lora", "model"}


def test_training_happens_where_the_host_puts_the_model(measured):
    """An accelerator that is pretended: each operation of tensors on two devices would fail, as on a real one."""
    found = measured("devices")
    assert "two devices" in found["two devices"]
    for place, name in (("cpu", "cpu"), ("accelerator", "meta")):
        assert found[place]["places"] == {part: [name] for part in ("lora", "average", "moments", "weights")}
        assert found[place]["handed out"] == ["Tensor cpu"]
        assert found[place]["untouched"], "back on the CPU, weights are those from before"
    assert found["difference"] < CLOSE


def test_a_reward_model_is_found_and_scores_the_same_inside_and_outside_of_nodes(measured):
    """Nodes run in inference mode, training does not; in between the host moves the weights about."""
    found = measured("reward_models")
    assert found["roots"] == 0, "a folder of extra_model_paths.yaml is searched first"
    assert found["last root"] == "reward_models"
    assert found["listed"] == ["clip-vit-large-patch14/model.safetensors"]
    for moment in ("first", "again", "training"):
        assert found[moment] == pytest.approx(found["alone"], abs=1e-6), moment
    assert len({round(score, 3) for score in found["alone"]}) == 3


def test_the_hosts_tokenizer_serves_hpsv2(measured):
    found = measured("reward_models")
    assert found["hpsv2 needs"] == ["xswu/HPSv2"]
    assert found["ids"] == [49406, 320, 736, 7117, 49407], "as OpenAI's CLIP splits it"


def test_the_host_knows_of_a_reward_models_memory(measured):
    found = measured("reward_models")
    assert (found["loaded"], found["loaded twice"], found["name"]) == (1, 1, "CLIPModel")


def test_a_reward_model_computes_where_the_host_puts_it_and_leaves_as_a_whole(measured):
    found = measured("reward_models_on_an_accelerator")
    assert found["places"] == {"scoring": ["meta"], "unloaded": ["cpu"]}
    assert found["freed in part"] == 0
    assert found["found"] == pytest.approx(found["expected"], abs=1e-5)


def test_cancel_is_heard_while_something_is_waited_for(measured):
    assert measured("cancel_while_waiting") == {"before": "not refused", "after": ""}


def test_a_target_that_matches_nothing_is_refused(measured):
    assert "match no linear layer" in measured("untouched")["refused"]


def test_the_back_end_is_not_imported_without_a_host():
    """Whoever asks for it anyway learns what is missing; the rest of the engine does not need it."""
    if importlib.util.find_spec("comfy") is not None:
        pytest.skip("this Python has a comfy package")
    with pytest.raises(ModuleNotFoundError, match="comfy"):
        importlib.import_module("densegrpo.engine.models.comfy")


def test_a_host_that_was_named_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(AssertionError, match=r"COMFYUI_PATH is .*, which is no ComfyUI folder"):
        find_host()


def test_a_named_host_and_python_win(monkeypatch, tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", "/some/python")
    found = find_host()
    assert (found.folder, found.python) == (tmp_path.resolve(), "/some/python")


def test_a_python_without_the_hosts_libraries_is_a_skip_that_says_so(tmp_path, monkeypatch):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(\"No module named 'torchsde'\", file=sys.stderr)\nsys.exit(3)\n")
    with pytest.raises(pytest.skip.Exception, match=r"torchsde.*COMFYUI_PYTHON"):
        find_host().run(script, tmp_path / "answer.json")
    assert "COMFYUI_PATH" in HOW_TO
