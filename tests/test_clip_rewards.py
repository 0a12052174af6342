"""Numbers of PickScore, HPSv2.1, CLIPScore and LAION's aesthetic predictors, and how they keep and share models."""

import shutil

import numpy as np
import pytest
import torch
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import clip as clip_module
from densegrpo.engine.rewards import hpsv2, make_reward
from densegrpo.engine.rewards.aesthetic import load_head
from densegrpo.engine.rewards.clip import crop, letterbox, load_clip
from densegrpo.engine.rewards.files import resolve
from densegrpo.engine.rewards.hpsv2 import hps_config, hps_files, load_hps, open_clip_text, to_transformers
from PIL import Image
from tiny_clip import LENGTH, MEAN, SIZE, STD, OpenClip, save_weights, write_all, write_clip, write_tokenizer
from tiny_reward_models import some_images
from torch.nn.functional import normalize, pad
from transformers import CLIPImageProcessor, CLIPModel

every_reward = pytest.mark.parametrize("name", ["aesthetic", "clipscore", "hpsv2", "pickscore"])
PROMPTS = ["a red cat", "a dog", "a red cat", "photo of a dog &amp; a cat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("reward_models")


@pytest.fixture(scope="module")
def written(root):
    return write_all(root)


@pytest.fixture(autouse=True)
def use_root(root, written, monkeypatch):
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", str(root))


def ask(reward, images, prompts=None):
    prompts = prompts or PROMPTS[: len(images)]
    return reward(RewardBatch(images, prompts, [{}] * len(images)))


def token_ids(folder, prompts):
    tokenizer = clip_module.read_tokenizer(folder)
    found = tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return found["input_ids"]


def from_features(found):
    return normalize(found if torch.is_tensor(found) else found.pooler_output, dim=-1)


def test_pickscore_is_the_models_own_logit_divided_by_26(root, written):
    images, folder = some_images(4, 40, 60), root / "PickScore_v1"
    with torch.no_grad():
        logits = written["pickscore"](
            input_ids=token_ids(folder, PROMPTS), pixel_values=crop(images, SIZE)
        ).logits_per_image.diagonal()
    result = ask(make_reward("pickscore"), images)
    torch.testing.assert_close(result.scores, logits / 26, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.details["published"], logits, atol=1e-4, rtol=1e-5)


def test_clipscore_is_the_cosine_of_the_models_features(root, written):
    images, model = some_images(4, 60, 40), written["clipscore"]
    with torch.no_grad():
        of_images = from_features(model.get_image_features(pixel_values=crop(images, SIZE)))
        of_texts = from_features(model.get_text_features(input_ids=token_ids(root / "clip-vit-large-patch14", PROMPTS)))
    expected = (of_images * of_texts).sum(1)
    torch.testing.assert_close(ask(make_reward("clipscore"), images).scores, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (40, 60)])
def test_hpsv2_is_what_open_clips_model_computes(root, written, size):
    """Zero padding behind the end token and its largest id, and HTML entities undone, as in open_clip."""
    images, model = some_images(4, *size), written["hpsv2"]
    ids = token_ids(root / "HPSv2.1", [*PROMPTS[:3], "photo of a dog & a cat"])
    ids = torch.stack([torch.where(torch.arange(LENGTH) <= row.argmax(), row, 0) for row in ids])
    with torch.no_grad():
        of_images = normalize(model.visual(letterbox(images, SIZE)), dim=-1)
        of_texts = normalize(model.encode_text(ids), dim=-1)
    expected = (of_images * of_texts).sum(1)
    torch.testing.assert_close(ask(make_reward("hpsv2"), images).scores, expected, atol=1e-5, rtol=1e-4)


def by_hand(weights):
    """open_clip's tensors under transformers' names, written out."""
    found = {"logit_scale": weights["logit_scale"]}
    found["text_projection.weight"] = weights["text_projection"].T
    found["visual_projection.weight"] = weights["visual.proj"].T
    for tower, source in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            old, new = f"{source}transformer.resblocks.{layer}.", f"{tower}.encoder.layers.{layer}."
            for kind in ("weight", "bias"):
                thirds = weights[f"{old}attn.in_proj_{kind}"].split(64 if source else 48)
                for letter, third in zip("qkv", thirds, strict=True):
                    found[f"{new}self_attn.{letter}_proj.{kind}"] = third
                found[f"{new}self_attn.out_proj.{kind}"] = weights[f"{old}attn.out_proj.{kind}"]
                found[f"{new}layer_norm1.{kind}"] = weights[f"{old}ln_1.{kind}"]
                found[f"{new}layer_norm2.{kind}"] = weights[f"{old}ln_2.{kind}"]
                found[f"{new}mlp.fc1.{kind}"] = weights[f"{old}mlp.c_fc.{kind}"]
                found[f"{new}mlp.fc2.{kind}"] = weights[f"{old}mlp.c_proj.{kind}"]
    for kind in ("weight", "bias"):
        found[f"text_model.final_layer_norm.{kind}"] = weights[f"ln_final.{kind}"]
        found[f"vision_model.pre_layrnorm.{kind}"] = weights[f"visual.ln_pre.{kind}"]
        found[f"vision_model.post_layernorm.{kind}"] = weights[f"visual.ln_post.{kind}"]
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    found[f"{text}.token_embedding.weight"] = weights["token_embedding.weight"]
    found[f"{text}.position_embedding.weight"] = weights["positional_embedding"]
    found[f"{vision}.class_embedding"] = weights["visual.class_embedding"]
    found[f"{vision}.patch_embedding.weight"] = weights["visual.conv1.weight"]
    found[f"{vision}.position_embedding.weight"] = weights["visual.positional_embedding"]
    return found


def test_open_clips_names_become_those_of_transformers(written):
    expected = by_hand(written["hpsv2"].state_dict())
    converted = to_transformers(written["hpsv2"].state_dict())
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], value) for name, value in expected.items())


@pytest.mark.parametrize("layout", ["wrapped", "transformers", "half"])
def test_other_layouts_of_hpsv2_give_the_same_scores(root, written, tmp_path, monkeypatch, layout):
    weights, folder = written["hpsv2"].state_dict(), tmp_path / "HPSv2.1"
    folder.mkdir()
    (folder / "config.json").write_bytes((root / "HPSv2.1/config.json").read_bytes())
    write_clip(tmp_path / "PickScore_v1")  # its tokenizer serves too
    if layout == "half":
        torch.save({name: value.half() for name, value in weights.items()}, folder / "HPS_v2.1_compressed.pt")
    else:
        given = to_transformers(weights) if layout == "transformers" else {f"model.{k}": v for k, v in weights.items()}
        save_weights(folder / "model.safetensors", given)
    images = some_images(2)
    expected = ask(make_reward("hpsv2"), images).scores
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", str(tmp_path))
    found = ask(make_reward("hpsv2"), images).scores
    torch.testing.assert_close(found, expected, atol=5e-3 if layout == "half" else 1e-6, rtol=0)


def test_hpsv2_alone_takes_the_tokenizer_that_a_host_brings(root, tmp_path, monkeypatch):
    models, brought = tmp_path / "models", tmp_path / "host"
    shutil.copytree(root / "HPSv2.1", models / "HPSv2.1", ignore=shutil.ignore_patterns("*vocab*", "merges*", "tok*"))
    write_tokenizer(brought)
    expected = ask(make_reward("hpsv2"), some_images(2)).scores
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", str(models))
    assert "tokenizer.json or vocab.json" in make_reward("hpsv2").validate(["a"], [{}])[0]
    monkeypatch.setattr(hpsv2, "TOKENIZER_SOURCES", [lambda: tmp_path / "none", lambda: brought])
    assert make_reward("hpsv2").validate(["a"], [{}]) == []
    torch.testing.assert_close(ask(make_reward("hpsv2"), some_images(2)).scores, expected, atol=1e-6, rtol=0)


def test_a_bare_hpsv2_checkpoint_is_a_vit_h_14(tmp_path):
    config = hps_config(tmp_path)
    with torch.device("meta"):
        model = CLIPModel(config)
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == 986
    assert model.get_parameter("vision_model.embeddings.position_embedding.weight").shape == (257, 1280)
    assert model.get_parameter("text_model.embeddings.token_embedding.weight").shape == (49408, 1024)
    assert model.get_parameter("visual_projection.weight").shape == (1024, 1280)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)
    assert config.text_config.hidden_act == config.vision_config.hidden_act == "gelu"
    assert config.text_config.eos_token_id == 49407


def test_open_clips_tokenizer_undoes_html_entities_twice():
    assert open_clip_text(" cats &amp;amp; dogs ") == "cats & dogs"


@pytest.mark.parametrize("version", ["v2", "v1"])
def test_the_aesthetic_score_is_the_head_on_unit_image_features(written, version):
    images = some_images(3, 50, 40)
    head = written["aesthetic v1" if version == "v1" else "aesthetic"]
    with torch.no_grad():
        features = written["clipscore"].get_image_features(pixel_values=crop(images, SIZE))
        expected = head(from_features(features)).squeeze(1)
    found = ask(make_reward("aesthetic", version=version), images).scores
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_aesthetic_score_reads_no_prompt():
    images = some_images(2)
    assert torch.equal(
        ask(make_reward("aesthetic"), images, ["", "a"]).scores, ask(make_reward("aesthetic"), images).scores
    )
    assert make_reward("aesthetic").validate(["", "a"], [{}, {}]) == []


@pytest.mark.parametrize("size", [(28, 28), (512, 512), (96, 64), (300, 517), (20, 31)])
@pytest.mark.parametrize("smooth", [True, False])
def test_cropping_is_transformers_image_processor_to_one_grey_level(size, smooth):
    images = some_images(2, *size) if smooth else torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    pictures = [Image.fromarray((i.movedim(0, -1).numpy() * 255).round().astype(np.uint8)) for i in images]
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    expected = torch.as_tensor(np.stack(processor(images=pictures, return_tensors="np")["pixel_values"]))
    grey_levels = (crop(images, SIZE) - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert grey_levels.max() < 1.01
    assert grey_levels.mean() < 0.02


@pytest.mark.parametrize("size", [(56, 84), (100, 30), (20, 31)])
def test_letterboxing_is_a_float_resize_with_black_borders(size):
    """Against Pillow's resize of float images, which also antialiases."""
    image = some_images(1, *size)[0]
    height, width = (round(edge * SIZE / max(size)) for edge in size)
    levels = ((image * 255).round() / 255).numpy()
    small = [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in levels]
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    framed = pad(torch.from_numpy(np.stack(small)), (left, SIZE - width - left, top, SIZE - height - top))
    expected = (framed - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(letterbox(image[None], SIZE)[0], expected, atol=2e-5, rtol=0)


def test_square_images_are_cropped_and_letterboxed_alike():
    images = 0.3 + 0.4 * some_images(2, 64, 64)  # no overshoot is cut off
    assert ((crop(images, SIZE) - letterbox(images, SIZE)).abs() * max(STD) * 255).max() < 1.01


@pytest.mark.parametrize("prepare", [crop, letterbox])
def test_values_outside_the_range_count_as_its_ends(prepare):
    white = torch.ones(1, 3, 40, 40)
    assert torch.equal(prepare(white * 1.3, SIZE), prepare(white, SIZE))
    assert torch.equal(prepare(white * -0.3, SIZE), prepare(white * 0, SIZE))


def test_each_prompt_is_encoded_once_and_kept(root, written, monkeypatch):
    clip = load_clip(root / "PickScore_v1", "float32", "swap")
    clip.kept.clear()
    encoded, original = [], clip.model.get_text_features

    def count(**tokens):
        encoded.append(len(tokens["input_ids"]))
        return original(**tokens)

    monkeypatch.setattr(clip.model, "get_text_features", count)
    reward, images = make_reward("pickscore", batch_size=2), some_images(4)
    first = ask(reward, images).scores
    assert sum(encoded) == 3
    assert torch.equal(ask(reward, images).scores, first)
    assert sum(encoded) == 3


def test_the_oldest_text_features_are_forgotten(root, monkeypatch):
    monkeypatch.setattr(clip_module, "MAX_KEPT", 2)
    clip = load_clip(root / "PickScore_v1", "float32", "swap")
    clip.kept.clear()
    expected = ask(make_reward("pickscore"), some_images(4)).scores
    assert list(clip.kept) == ["a dog", "photo of a dog &amp; a cat"]
    torch.testing.assert_close(ask(make_reward("pickscore"), some_images(4)).scores, expected, atol=1e-5, rtol=1e-5)


def test_equal_configurations_share_one_model(monkeypatch):
    load_clip.cache_clear()
    images = some_images(2)
    for name in ("clipscore", "aesthetic", "clipscore"):
        ask(make_reward(name), images)
    assert load_clip.cache_info().misses == 1
    ask(make_reward("clipscore", precision="bfloat16"), images)
    assert load_clip.cache_info().misses == 2


@every_reward
def test_half_precision_weights_still_give_float32_scores(name):
    images = some_images(3)
    exact = ask(make_reward(name), images).scores
    half = ask(make_reward(name, precision="bfloat16"), images).scores
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.25, rtol=0.1)


def listened(monkeypatch, model, part):
    """What ``part`` of a model answers, in order."""
    answers, original = [], getattr(model, part)

    def listen(**given):
        answers.append(original(**given))
        return answers[-1]

    monkeypatch.setattr(model, part, listen)
    return answers


@every_reward
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_from_features_in_half_precision_on_all_is_computed_in_float32(written, monkeypatch, name, precision):
    """In bfloat16 a score of 21 would be 20.75 or 21.25: more than images of a prompt differ."""
    reward, images, prompts = make_reward(name, precision=precision), some_images(3), ["a dog", "a red cat", "photo"]
    folder = resolve(reward.needs()[0].folder)
    clip = load_hps(*hps_files(reward), precision, "swap") if name == "hpsv2" else load_clip(folder, precision, "swap")
    clip.kept.clear()
    of_images = listened(monkeypatch, clip.model, "get_image_features")
    of_texts = listened(monkeypatch, clip.model, "get_text_features")
    found = ask(reward, images, prompts).scores
    parts = [part[0] if torch.is_tensor(part[0]) else part[0].pooler_output for part in (of_images, of_texts) if part]
    assert {part.dtype for part in parts} == {getattr(torch, precision)}
    units = [normalize(part.double(), dim=1) for part in parts]
    if name == "aesthetic":
        expected = written["aesthetic"].double()(units[0]).squeeze(1)
        written["aesthetic"].float()
    else:
        expected = (units[0] * units[1]).sum(1) * (100 / 26 if name == "pickscore" else 1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_half_precision_files_are_computed_in_float32(root, written, tmp_path):
    write_clip(tmp_path / "PickScore_v1")
    weights = {name: value.half() for name, value in written["pickscore"].state_dict().items()}
    save_weights(tmp_path / "PickScore_v1/model.safetensors", weights)
    clip = load_clip(tmp_path / "PickScore_v1", "float32", "swap")
    assert {weight.dtype for weight in clip.model.parameters()} == {torch.float32}
    assert (
        load_hps.__wrapped__(root / "HPSv2.1/HPS_v2.1_compressed.pt", root / "HPSv2.1", "float16", "swap").model.dtype
        == torch.float16
    )


def test_old_configurations_name_another_end_token(root, written, tmp_path, monkeypatch):
    """Those of CLIP-H on the hub say 2; transformers then takes the largest id, which is the end token."""
    write_clip(tmp_path / "PickScore_v1", 1)
    file, end = tmp_path / "PickScore_v1/config.json", written["pickscore"].config.text_config.eos_token_id
    file.write_text(file.read_text().replace(f'"eos_token_id": {end}', '"eos_token_id": 2'))
    expected = ask(make_reward("pickscore"), some_images(4)).scores
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", str(tmp_path))
    torch.testing.assert_close(ask(make_reward("pickscore"), some_images(4)).scores, expected, atol=1e-5, rtol=1e-5)


@every_reward
def test_a_model_loaded_in_inference_mode_can_be_used_and_moved_outside_of_it(name):
    """ComfyUI runs nodes in that mode."""
    for cached in (load_clip, load_hps, load_head):
        cached.cache_clear()
    reward, images = make_reward(name, precision="float16"), some_images(2)
    with torch.inference_mode():
        first = ask(reward, images).scores
    assert torch.equal(ask(reward, images).scores, first)
    folder = reward.needs()[0].folder
    clip = (
        load_hps(*hps_files(reward), "float16", "swap")
        if name == "hpsv2"
        else load_clip(resolve(folder), "float16", "swap")
    )
    assert not any(weight.is_inference() for weight in clip.model.parameters())


def test_the_reference_model_is_no_copy_of_the_converted_one(written):
    """open_clip's class computes by itself: with its own weights it differs from a fresh one."""
    images = crop(some_images(1), SIZE)
    assert not torch.equal(written["hpsv2"].visual(images), OpenClip().visual(images))
