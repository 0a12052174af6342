"""Where reward models are looked for, what is refused, and what the messages say."""

import json
import os
from collections import OrderedDict

import pytest
import torch
from densegrpo.engine.rewards import MODEL_REWARDS, files, make_reward
from densegrpo.engine.rewards.clip import load_clip
from densegrpo.engine.rewards.files import choose, folders, locate, read_shapes, read_weights, resolve, roots
from densegrpo.engine.rewards.pickscore import PICKSCORE
from safetensors.torch import load_file
from tiny_clip import save_weights, write_clip, write_heads, write_hps, write_tokenizer

every_reward = pytest.mark.parametrize("name", sorted(MODEL_REWARDS))


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", str(folder))
    return folder


def problem_with(name, **options):
    (problem,) = make_reward(name, **options).validate(["a cat"], [{}])
    return problem


def test_folders_come_from_the_environment_then_the_host_then_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", os.pathsep.join(["/first", "", "/second"]))
    monkeypatch.setattr(files, "ROOT_SOURCES", [lambda: ["/host"]])
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in roots()] == ["/first", "/second", "/host", str(tmp_path / "models/reward_models")]
    monkeypatch.delenv("DENSEGRPO_REWARD_MODELS")
    assert str(roots()[0]) == "/host"


def test_the_first_folder_that_has_it_wins(root, tmp_path, monkeypatch):
    for folder in ("models", "other"):
        (tmp_path / folder / "both").mkdir(parents=True)
    (tmp_path / "other/only").mkdir()
    monkeypatch.setattr(files, "ROOT_SOURCES", [lambda: [tmp_path / "other"]])
    assert resolve("both") == (root / "both").resolve()
    assert resolve("only") == (tmp_path / "other/only").resolve()
    assert resolve("none") is None


@pytest.mark.parametrize(
    "name", ["", ".", "/etc", "../x", "a/../../x", r"..\x", r"a\..\..\x", "C:x", r"C:\x", r"\\s\x"]
)
def test_names_that_lead_out_of_the_folders_are_refused(name):
    with pytest.raises(ValueError, match=r"must be the name of a folder or file inside one of .*such as PickScore_v1"):
        resolve(name)
    assert "must be the name of a folder" in problem_with("pickscore", model=name)


def test_links_may_not_lead_out_of_the_folders(root, tmp_path):
    (tmp_path / "secret").mkdir()
    (root / "inside").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "alias").symlink_to(root / "inside")
    with pytest.raises(ValueError, match=r"'link' is a link to .*secret, outside of .*add the folder that holds it to"):
        resolve("link")
    assert resolve("alias") == (root / "inside").resolve()


def test_a_file_of_a_model_may_not_be_a_link_to_elsewhere(root, tmp_path):
    write_clip(root / "PickScore_v1")
    (root / "PickScore_v1/model.safetensors").rename(tmp_path / "weights.safetensors")
    (root / "PickScore_v1/model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    assert "is a link to" in problem_with("pickscore")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pickscore", ["yuvalkirstain/PickScore_v1", "3.9 GB", "licence none stated", "PickScore_v1"]),
        ("clipscore", ["openai/clip-vit-large-patch14", "1.7 GB", "licence MIT", "clip-vit-large-patch14"]),
        ("hpsv2", ["xswu/HPSv2", "2.0 GB", "licence Apache-2.0", "HPSv2.1", "openai/clip-vit-large-patch14"]),
        ("aesthetic", ["openai/clip-vit-large-patch14", "improved-aesthetic-predictor", "3.7 MB", "sac%2Blogos"]),
    ],
)
def test_a_missing_model_is_described_with_the_command_that_gets_it(root, name, parts):
    problem = problem_with(name)
    for part in ["is not there (looked in", str(root), *parts]:
        assert part in problem
    command = "hf download " + ("xswu/HPSv2 HPS_v2.1_compressed.pt" if name == "hpsv2" else parts[0])
    assert command in problem
    assert f"--local-dir {root / make_reward(name).needs()[0].folder}" in problem


def test_the_command_for_a_head_writes_the_file_that_is_looked_for(root):
    write_clip(root / "clip-vit-large-patch14")
    problem = problem_with("aesthetic", version="v1")
    target = root / "aesthetic/sa_0_4_vit_l_14_linear.pth"
    assert f"curl -L --create-dirs -o {target} https://github.com/LAION-AI/aesthetic-predictor/raw/" in problem
    assert problem.count("Get them with") == 1


def test_folders_with_spaces_are_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", str(tmp_path / "my models"))
    assert f'--local-dir "{tmp_path}/my models/PickScore_v1"' in problem_with("pickscore")


def test_the_folders_that_are_offered_hold_a_model(root, tmp_path, monkeypatch):
    for file in (
        "PickScore_v1/config.json",
        "HPSv2.1/HPS_v2.1_compressed.pt",
        ".download-x/config.json",
        "y/notes.txt",
    ):
        (root / file).parent.mkdir()
        (root / file).touch()
    (tmp_path / "other/PickScore_v1").mkdir(parents=True)
    monkeypatch.setattr(files, "ROOT_SOURCES", [lambda: [tmp_path / "other", tmp_path / "nowhere"]])
    (root / "empty").mkdir()
    assert folders() == ["HPSv2.1", "PickScore_v1"]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_files_of_a_folder_are_named(root, file):
    write_clip(root / "PickScore_v1")
    (root / "PickScore_v1" / file).unlink()
    assert f"{root / 'PickScore_v1'} has no {file}; needed are" in problem_with("pickscore")
    assert f"--local-dir {root / 'PickScore_v1'}" in problem_with("pickscore")


def test_a_folder_of_ones_own_is_not_advertised_as_published(root):
    write_heads(root / "mine")
    write_clip(root / "fine-tuned")
    problem = problem_with("pickscore", model="other")
    assert "hf download" not in problem
    assert problem.endswith("the folders there are: fine-tuned, mine")
    assert make_reward("pickscore", model="fine-tuned").validate(["a"], [{}]) == []
    assert locate([PICKSCORE.for_folder("fine-tuned")]) == [(root / "fine-tuned").resolve()]


def test_either_form_of_the_tokenizer_will_do(root):
    write_clip(root / "PickScore_v1")
    assert choose(root / "PickScore_v1", ("tokenizer.json", "vocab.json")).name == "vocab.json"
    (root / "PickScore_v1/vocab.json").unlink()
    assert "has no tokenizer.json or vocab.json" in problem_with("pickscore")


def test_hpsv2_wants_a_tokenizer_of_its_own_or_of_another_clip(root):
    write_hps(root / "HPSv2.1")
    (root / "HPSv2.1/vocab.json").unlink()
    assert "has no tokenizer.json or vocab.json" in problem_with("hpsv2")
    assert "hf download openai/clip-vit-large-patch14 tokenizer.json" in problem_with("hpsv2")
    write_tokenizer(root / "clip-vit-large-patch14")
    assert make_reward("hpsv2").validate(["a"], [{}]) == []


def changed(path, change):
    weights = load_file(path)
    change(weights)
    save_weights(path, weights)


def loads(folder):
    return load_clip.__wrapped__(folder, "float32", "swap")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("visual_projection.weight"), r"lacks visual_projection\.weight; it is another model"),
        (
            lambda w: [w.pop(n) for n in list(w) if "layers.1." in n],
            r"lacks text_model\.encoder\.layers\.1\..* and \d+ more; it is another model, or cut off",
        ),
        (
            lambda w: w.update({"text_projection.weight": torch.zeros(5, 48)}),
            r"other shapes than expected: text_projection\.weight \(5, 48\) instead of \(32, 48\)",
        ),
        (
            lambda w: w.update({"vision_model.encoder.layers.2.mlp.fc1.bias": torch.zeros(3)}),
            r"has more than the model that config\.json describes: vision_model\.encoder\.layers\.2\.mlp\.fc1\.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_named(root, change, message):
    write_clip(root / "PickScore_v1")
    changed(root / "PickScore_v1/model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        loads(root / "PickScore_v1")
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem_with("pickscore"))


def test_position_ids_of_old_checkpoints_do_no_harm(root):
    write_clip(root / "PickScore_v1")
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    changed(root / "PickScore_v1/model.safetensors", lambda w: w.update(ids))
    assert make_reward("pickscore").validate(["a"], [{}]) == []
    assert loads(root / "PickScore_v1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"model_type": "siglip"}), "describes a model of type 'siglip', this reward needs 'clip'"),
        ("[]", "describes a model of type None"),
        ("{", "cannot be read"),
    ],
)
def test_a_configuration_of_something_else_is_refused(root, text, message):
    write_clip(root / "PickScore_v1")
    (root / "PickScore_v1/config.json").write_text(text)
    assert message in problem_with("pickscore")


def test_an_end_token_that_never_occurs_is_refused(root):
    """CLIP would take the first token's state for every prompt, which is always the same."""
    model = write_clip(root / "PickScore_v1")
    file, end = root / "PickScore_v1/config.json", model.config.text_config.eos_token_id
    file.write_text(file.read_text().replace(f'"eos_token_id": {end}', '"eos_token_id": 49407'))
    message = rf"eos_token_id is 49407, that of the tokenizer in .*PickScore_v1 is {end}; every prompt would get the"
    with pytest.raises(ValueError, match=message):
        loads(root / "PickScore_v1")
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem_with("pickscore"))


def test_a_damaged_tokenizer_is_named(root):
    write_clip(root / "PickScore_v1")
    (root / "PickScore_v1/vocab.json").write_text("{")
    assert problem_with("pickscore").startswith(f"the tokenizer in {root / 'PickScore_v1'} cannot be read (")


def test_the_files_of_a_model_are_not_gathered_from_several_folders(root, tmp_path, monkeypatch):
    write_clip(root / "PickScore_v1")
    write_clip(tmp_path / "other/PickScore_v1")
    monkeypatch.setattr(files, "ROOT_SOURCES", [lambda: [tmp_path / "other"]])
    (root / "PickScore_v1/model.safetensors").unlink()
    assert f"{root / 'PickScore_v1'} has no model.safetensors" in problem_with("pickscore")


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_hpsv2_ignores_a_configuration_of_something_else(root, text):
    """Other publications put their own config.json beside it; then the weights must be a ViT-H-14."""
    write_hps(root / "HPSv2.1")
    (root / "HPSv2.1/config.json").write_text(text)
    assert "other shapes than expected" in problem_with("hpsv2") or "lacks" in problem_with("hpsv2")
    (root / "HPSv2.1/config.json").write_text("{")
    assert "config.json cannot be read" in problem_with("hpsv2")


@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "old.pth"])
def test_pickled_tensors_are_read_whether_wrapped_mapped_or_old(root, name):
    tensors = OrderedDict(a=torch.arange(3.0), b=torch.ones(2, 2).half())
    old = name == "old.pth"
    torch.save(tensors if old else {"state_dict": tensors}, root / name, _use_new_zipfile_serialization=not old)
    found = read_weights(root / name)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert {key: (value.shape, value.device.type) for key, value in read_shapes(root / name).items()} == {
        "a": ((3,), "meta"),
        "b": ((2, 2), "meta"),
    }


def test_shapes_of_safetensors_are_read_from_the_header(root):
    save_weights(root / "x.safetensors", {"a": torch.ones(2, 3)})
    found = read_shapes(root / "x.safetensors")
    assert (found["a"].shape, found["a"].device.type) == ((2, 3), "meta")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("read", [read_weights, read_shapes])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_executed(root, zipped, read):
    file = root / "evil.pt"
    torch.save({"a": torch.zeros(1), "x": Evil(root / "pwned")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pt holds more than tensors, or is damaged; it was not executed"):
        read(file)
    assert not (root / "pwned").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_executed(root, file):
    write_clip(root / "PickScore_v1")
    (root / "PickScore_v1/evil.py").write_text(f"import os\nos.mkdir({str(root / 'pwned')!r})\n")
    path, kinds = root / "PickScore_v1" / file, ("AutoConfig", "AutoModel")
    named = {**dict.fromkeys(kinds, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": named}))
    assert make_reward("pickscore").validate(["a"], [{}]) == []
    assert loads(root / "PickScore_v1")
    assert not (root / "pwned").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>\n<html>", "a web page instead of the weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"hello\n", "cannot be read as weights|damaged"),
    ],
)
def test_what_a_failed_download_left_is_said(root, content, said, suffix):
    (root / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_weights(root / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("length", [0, 100])
def test_a_file_that_is_cut_off_is_named(root, suffix, length):
    file = root / f"x{suffix}"
    tensors = {"a": torch.ones(1000)}
    save_weights(file, tensors) if suffix == ".safetensors" else torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut off|damaged"):
        read_weights(file)


def test_other_kinds_of_files_are_refused(root):
    torch.save({"a": torch.ones(1)}, root / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a \.safetensors, \.pt, \.pth file; convert it"):
        read_weights(root / "pytorch_model.bin")
    torch.save([torch.ones(1)], root / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt does not hold named tensors; expected a state_dict"):
        read_weights(root / "list.pt")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_head_of_another_model_is_refused(root, version):
    write_clip(root / "clip-vit-large-patch14")
    write_heads(root / "aesthetic")
    (file,) = make_reward("aesthetic", version=version).needs()[1].files[0]
    torch.save({"weight": torch.ones(1, 7), "bias": torch.ones(1)}, root / "aesthetic" / file)
    message = "weight (1, 7) instead of (1, 32)" if version == "v1" else "lacks layers.0.weight, layers.0.bias"
    assert message in problem_with("aesthetic", version=version)


@every_reward
def test_a_missing_model_gives_nan_with_the_reason_and_never_0(name):
    from densegrpo.engine.protocols import RewardBatch
    from densegrpo.engine.rewards import ask

    found = ask(name, make_reward(name), RewardBatch(torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}]))
    assert found.scores.isnan().all()
    assert "is not there (looked in" in found.errors[1]
