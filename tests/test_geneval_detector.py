"""GenEval's detector: its network is transformers', its boxes are as in the official one, and what is refused."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from densegrpo.engine.rewards.files import ROOTS_VARIABLE
from densegrpo.engine.rewards.geneval_detector import check_detector, instances, load_detector, prepared
from densegrpo.engine.rewards.geneval_reward import GenEval
from densegrpo.engine.rewards.geneval_words import CLASSES, COCO_CLASSES
from PIL import Image
from safetensors.torch import load_file
from tiny_clip import save_weights, write_clip
from tiny_reward_models import DETECTOR_SIZE, mask2former_config, some_images, write_mask2former
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former import modeling_mask2former

DETECTOR, CLIP = "mask2former-swin-small-coco-instance", "clip-vit-large-patch14"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOTS_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def written(root):
    write_clip(root / CLIP)
    return write_mask2former(root / DETECTOR)


class NoLoss(torch.nn.Module):
    """The real one needs scipy, even to be made."""

    def __init__(self, config, weight_dict):
        super().__init__()
        self.num_labels, self.eos_coef = config.num_labels, 0.1
        self.register_buffer("empty_weight", torch.ones(config.num_labels + 1))


def test_the_network_is_transformers_own_without_its_loss(root, written, monkeypatch):
    monkeypatch.setattr(modeling_mask2former, "Mask2FormerLoss", NoLoss)
    stock = Mask2FormerForUniversalSegmentation.from_pretrained(root / DETECTOR).eval()
    pixels = prepared(some_images(2, 48, 60), DETECTOR_SIZE)
    with torch.no_grad():
        expected, (classes, masks) = stock(pixel_values=pixels), load_detector(root / DETECTOR, "swap").model(pixels)
    assert torch.equal(classes, expected.class_queries_logits)
    assert torch.equal(masks, expected.masks_queries_logits)
    assert classes.shape == (2, 12, 81)
    assert classes.std() > 1


def test_neither_scipy_nor_torchvision_is_needed(root, written, monkeypatch):
    for name in ("scipy", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    load_detector.cache_clear()
    load_detector(root / DETECTOR, "swap").find(some_images(1), DETECTOR_SIZE)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (800, 800)),
        ((100, 150), (800, 1216)),
        ((150, 100), (1216, 800)),
        ((30, 300), (800, 1344)),
        ((1000, 1000), (800, 800)),
    ],
)
def test_images_keep_their_proportions_within_limits(size, expected):
    assert prepared(some_images(1, *size), 800).shape == (1, 3, *expected)


def test_images_are_resized_as_pillow_does_and_normalised():
    image = some_images(1, 300, 200)[0]
    picture = Image.fromarray((image.movedim(0, -1).numpy() * 255).round().astype(np.uint8))
    expected = torch.from_numpy(np.asarray(picture.resize((64, 96), Image.Resampling.BILINEAR)).copy()).movedim(-1, 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    grey_levels = (prepared(image[None], 64)[0] * std + mean) * 255 - expected
    assert grey_levels.abs().max() < 1.01
    assert grey_levels.abs().mean() < 0.02


def logits_of(*queries, size=8):
    """(class, probability, mask logits inside, box in cells) of each query -> class and mask logits."""
    classes = torch.full((len(queries), 81), -30.0)
    masks = torch.full((len(queries), size, size), -20.0)
    for i, (name, probability, inside, (left, top, right, bottom)) in enumerate(queries):
        classes[i, COCO_CLASSES.index(name)] = torch.tensor(probability).logit()
        classes[i, 80] = 0
        masks[i, top:bottom, left:right] = inside
    return classes, masks


def test_an_object_scores_its_class_times_its_mean_mask_and_has_the_box_of_its_mask():
    queries = [("cat", 0.9, 1.0, (0, 0, 8, 4)), ("mouse", 0.95, 4.0, (4, 2, 8, 6)), ("dog", 0.2, 9.0, (0, 0, 8, 8))]
    found = instances(*logits_of(*queries), (8, 8), CLASSES)
    assert [one.name for one in found] == ["computer mouse", "cat"]
    expected = [0.95 / (1 + math.exp(-4)), 0.9 / (1 + math.exp(-1))]
    assert [one.score for one in found] == pytest.approx(expected, abs=1e-5)
    assert [one.box for one in found] == [(4, 2, 8, 6), (0, 0, 8, 4)]
    assert all(one.mask.all() for one in found)


def test_masks_have_the_size_of_the_image_and_boxes_its_pixels():
    (one,) = instances(*logits_of(("cat", 0.9, 20.0, (0, 2, 4, 4))), (80, 40), CLASSES)
    left, top, right, bottom = one.box
    assert (left, right) == (0, 20)
    assert abs(top - 20) <= 1
    assert abs(bottom - 40) <= 1
    assert one.mask.shape == (bottom - top, right - left)
    assert one.mask.dtype == torch.bool


def test_a_weak_mask_or_an_empty_one_is_no_object():
    weak, empty = ("cat", 0.55, 0.1, (0, 0, 8, 8)), ("dog", 0.9, -1.0, (0, 0, 8, 8))
    assert instances(*logits_of(weak, empty), (8, 8), CLASSES) == []
    (one,) = instances(*logits_of(("cat", 0.65, 0.1, (0, 0, 8, 8))), (8, 8), CLASSES)
    assert one.score == pytest.approx(0.65 / (1 + math.exp(-0.1)), abs=1e-5)


def test_one_query_may_be_two_objects_and_two_queries_the_same():
    """As in the official one: nothing is merged."""
    classes, masks = logits_of(("cat", 0.5, 20.0, (0, 0, 4, 4)), ("cat", 0.9, 20.0, (0, 0, 4, 4)))
    classes[0, COCO_CLASSES.index("dog")] = classes[0, COCO_CLASSES.index("cat")] = 10
    found = instances(classes, masks, (8, 8), CLASSES)
    assert [one.name for one in found] in (["cat", "cat"], ["cat", "dog"])
    assert len(found) == len(masks)


def test_the_detector_knows_the_80_classes_by_genevals_names_however_its_labels_are_spelled(root):
    spellings = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "tv": "tvmonitor"}
    spellings |= {"potted plant": "pottedplant", "dining table": "diningtable"}
    for folder, labels in [("a", COCO_CLASSES), ("b", [spellings.get(name, name) for name in COCO_CLASSES])]:
        write_mask2former(root / folder, labels=labels)
        assert tuple(load_detector(root / folder, "swap").names) == CLASSES
    assert len(set(CLASSES)) == 80


def problem_with(root):
    (problem,) = GenEval().validate([], [])
    with pytest.raises(ValueError, match=r".") as raised:
        load_detector.__wrapped__(root / DETECTOR, "swap")
    return problem, str(raised.value)


def test_a_detector_of_other_classes_is_refused(root):
    write_clip(root / CLIP)
    write_mask2former(root / DETECTOR, labels=["cat", *COCO_CLASSES[:60]])
    for problem in problem_with(root):
        assert "lists 61 classes without dining table, toilet, tv, laptop, computer mouse and 15 more" in problem


def test_another_kind_of_model_is_refused(root):
    write_clip(root / CLIP)
    write_clip(root / DETECTOR)
    for problem in problem_with(root):
        assert "describes a model of type 'clip', this reward needs 'mask2former'" in problem


@pytest.mark.parametrize(
    ("gone", "before", "loaded"),
    [
        ("class_predictor.bias", "lacks class_predictor.bias", "lacks class_predictor.bias"),
        ("transformer_module.queries_features.weight", "lacks tensors of the model", "lacks .*queries_features"),
        ("attention.self.query.bias", "lacks tensors of the model", "lacks .*attention"),
        ("hidden_states_norms.stage2.weight", "1 of the shape (32,)", "lacks .*hidden_states_norms.stage2.weight"),
    ],
)
def test_missing_weights_are_refused(root, written, gone, before, loaded):
    path = root / DETECTOR / "model.safetensors"
    weights = load_file(path)
    kept = {name: value for name, value in weights.items() if not name.endswith(gone)}
    assert len(kept) < len(weights)
    save_weights(path, kept)
    problem, raised = problem_with(root)
    assert before in problem
    assert re.search(loaded, raised)


def test_weights_of_another_shape_are_refused(root, written):
    path = root / DETECTOR / "model.safetensors"
    weights = load_file(path)
    weights["model.transformer_module.queries_features.weight"] = torch.zeros(5, 32)
    save_weights(path, weights)
    problem, raised = problem_with(root)
    assert "lacks tensors of the model that config.json describes: 1 of the shape (12, 32)" in problem
    assert "cannot be loaded as the model that config.json describes" in raised


def test_files_saved_by_this_transformers_are_read_as_well(root, written):
    """Transformers 5 saves a norm more, which is never used."""
    images = some_images(2)
    expected = load_detector(root / DETECTOR, "swap").find(images, DETECTOR_SIZE)
    load_detector.cache_clear()
    model, head = written
    model.save_pretrained(root / "saved")
    weights = {f"model.{name}": value for name, value in load_file(root / "saved/model.safetensors").items()}
    weights |= {f"class_predictor.{name}": value for name, value in head.state_dict().items()}
    save_weights(root / DETECTOR / "model.safetensors", weights)
    check_detector(root / DETECTOR)
    found = load_detector(root / DETECTOR, "swap").find(images, DETECTOR_SIZE)
    assert [[one[:3] for one in row] for row in found] == [[one[:3] for one in row] for row in expected]


def test_what_is_computed_is_no_weight(root, written):
    """Files of transformers 4 hold indices of Swin's windows, those of 5 do not."""
    path = root / DETECTOR / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "relative_position_index" not in name}
    save_weights(path, weights)
    assert GenEval().validate([], []) == []
    assert load_detector(root / DETECTOR, "swap")


def test_an_unknown_label_list_without_names_is_refused(root):
    config = mask2former_config([f"LABEL_{i}" for i in range(80)])
    write_clip(root / CLIP)
    write_mask2former(root / DETECTOR)
    config.save_pretrained(root / DETECTOR)
    for problem in problem_with(root):
        assert "lists 80 classes without person, bicycle, car, motorcycle, airplane and 75 more" in problem
