"""Aesthetic predictor v2.5 against transformers' SigLIP, and what is refused when it is loaded."""

import json

import numpy as np
import pytest
import torch
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.aesthetic_siglip import AestheticSiglip, load_siglip, squash
from densegrpo.engine.rewards.files import ROOTS_VARIABLE
from PIL import Image
from safetensors.torch import load_file
from tiny_clip import save_weights, write_clip
from tiny_reward_models import SIZE, some_images, write_siglip, write_siglip_head
from torch.nn.functional import normalize
from transformers import SiglipImageProcessor, SiglipVisionModel

FOLDER = "siglip-so400m-patch14-384"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOTS_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def written(root):
    return write_siglip(root / FOLDER), write_siglip_head(root / "aesthetic")


def scores(images, **options):
    return AestheticSiglip(**options)(RewardBatch(images, [""] * len(images), [{}] * len(images))).scores


def problem():
    (found,) = AestheticSiglip().validate([], [])
    return found


@pytest.mark.parametrize("size", [(48, 48), (40, 96)])
def test_the_score_is_the_head_on_unit_pooled_features(root, written, size):
    images, (tower, head) = some_images(3, *size), written
    with torch.no_grad():
        pooled = tower(pixel_values=squash(images, SIZE)).pooler_output
        expected = head(pooled / pooled.norm(dim=1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(scores(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (512, 512), (96, 64), (300, 517), (20, 31)])
def test_squashing_is_transformers_image_processor_to_one_grey_level(size):
    images = some_images(2, *size)
    pictures = [Image.fromarray((i.movedim(0, -1).numpy() * 255).round().astype(np.uint8)) for i in images]
    processor = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    expected = torch.as_tensor(np.stack(processor(images=pictures, return_tensors="np")["pixel_values"]))
    grey_levels = (squash(images, SIZE) - expected).abs() / 2 * 255
    assert grey_levels.max() < 1.01
    assert grey_levels.mean() < 0.02


def test_the_whole_image_counts_not_its_middle(root, written):
    images = some_images(1, 48, 96)
    other = images.clone()
    other[..., :12] = 0
    assert not torch.equal(scores(images), scores(other))


def test_a_file_with_the_image_encoder_alone_gives_the_same_score(root, written):
    images = some_images(2)
    expected = scores(images)
    load_siglip.cache_clear()
    SiglipVisionModel.from_pretrained(root / FOLDER).save_pretrained(root / FOLDER)
    config = json.loads((root / FOLDER / "config.json").read_text())
    assert config["model_type"] == "siglip_vision_model"
    assert not any(name.startswith("text_model") for name in load_file(root / FOLDER / "model.safetensors"))
    assert AestheticSiglip().validate([], []) == []
    torch.testing.assert_close(scores(images), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_both_names_of_the_image_encoders_tensors_are_read(root, written, prefix):
    """Transformers 5 leaves the prefix out where 4 wrote it."""
    images = some_images(2)
    expected = scores(images)
    load_siglip.cache_clear()
    weights = load_file(root / FOLDER / "model.safetensors")
    weights = {n.removeprefix("vision_model."): v for n, v in weights.items() if n.startswith("vision_model.")}
    save_weights(root / FOLDER / "model.safetensors", {prefix + name: value for name, value in weights.items()})
    torch.testing.assert_close(scores(images), expected, atol=1e-6, rtol=1e-6)


def test_half_precision_weights_still_give_float32_scores(root, written):
    images = some_images(3)
    exact, half = scores(images), scores(images, precision="bfloat16")
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.1)


def test_the_head_is_computed_in_float32(root, written, monkeypatch):
    siglip = load_siglip(root / FOLDER, "bfloat16", "swap")
    seen, original = [], type(siglip.model).forward

    def listen(*given, **options):
        seen.append(original(*given, **options).pooler_output)
        return seen[-1]

    monkeypatch.setattr(type(siglip.model), "forward", listen)
    found = scores(some_images(3), precision="bfloat16")
    assert seen[0].dtype == torch.bfloat16
    _, head = written
    torch.testing.assert_close(found, head(normalize(seen[0].float(), dim=1)).squeeze(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("vision_model.head.probe"), r"describes: 1 of the shape \(1, 1, 32\); it is another"),
        (
            lambda w: [w.pop(n) for n in list(w) if "layers.1." in n],
            r"describes: \d+ of the shape .*, \d+ of the shape",
        ),
        (
            lambda w: w.update({"vision_model.post_layernorm.bias": torch.zeros(7)}),
            r"lacks tensors of the model that config\.json describes: 1 of the shape \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(root, written, change, message):
    path = root / FOLDER / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if name.startswith("vision_model.")}
    change(weights)
    save_weights(path, weights)
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem())
    with pytest.raises(ValueError, match=r"model\.safetensors (lacks .*(head|layers\.1)|cannot be loaded as)"):
        load_siglip.__wrapped__(root / FOLDER, "float32", "swap")


def test_another_kind_of_model_is_refused(root, written):
    write_clip(root / "clip")
    (found,) = AestheticSiglip(model="clip").validate([], [])
    assert "describes a model of type 'clip', this reward needs 'siglip' or 'siglip_vision_model'" in found
    with pytest.raises(ValueError, match="describes a model of type 'clip'"):
        load_siglip(root / "clip", "float32", "swap")


def test_another_head_is_refused(root, written):
    torch.save({"layers.0.weight": torch.ones(1)}, root / "aesthetic/aesthetic_predictor_v2_5.pth")
    assert "lacks scoring_head.0.weight, scoring_head.0.bias" in problem()


def test_the_head_is_for_the_user_to_bring_and_its_licence_is_named(root, written):
    (root / "aesthetic/aesthetic_predictor_v2_5.pth").unlink()
    assert "(2.6 MB, licence AGPL-3.0)" in problem()
    assert f"curl -L --create-dirs -o {root}/aesthetic/aesthetic_predictor_v2_5.pth https://github.com/" in problem()
