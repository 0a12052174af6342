"""What every reward with model files has in common, on tiny random models in the published layouts."""

import logging
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from densegrpo.engine.knobs import options_of
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import placement
from densegrpo.engine.rewards.aesthetic import Aesthetic
from densegrpo.engine.rewards.aesthetic_siglip import AestheticSiglip, load_siglip
from densegrpo.engine.rewards.clip import Clip, load_clip
from densegrpo.engine.rewards.clipscore import ClipScore
from densegrpo.engine.rewards.files import ROOTS_VARIABLE, described, missing
from densegrpo.engine.rewards.geneval_detector import load_detector
from densegrpo.engine.rewards.geneval_reward import GenEval
from densegrpo.engine.rewards.hpsv2 import Hpsv2, load_hps
from densegrpo.engine.rewards.imagereward import ImageReward, load_scorer
from densegrpo.engine.rewards.pickscore import PickScore
from densegrpo.engine.rewards.placement import computing_device, placed
from tiny_reward_models import DETECTOR_SIZE, some_images, write_every_model
from torch.nn.modules.module import register_module_forward_pre_hook

KINDS = {
    "aesthetic": Aesthetic,
    "aesthetic_siglip": AestheticSiglip,
    "clipscore": ClipScore,
    "geneval": GenEval,
    "hpsv2": Hpsv2,
    "imagereward": ImageReward,
    "pickscore": PickScore,
}
OPTIONS = {"geneval": {"size": DETECTOR_SIZE}}
LOADERS = (load_clip, load_detector, load_hps, load_scorer, load_siglip)
MODULES = ("clip", "hpsv2", "imagereward", "aesthetic_siglip", "geneval_detector")
PROMPTS = ["a red cat", "a dog", "a red cat", "photo of a dog &amp; a cat"]
WANTED = {
    "tag": "two_object",
    "include": [
        {"class": "sheep", "count": 12},
        {"class": "donut", "count": 9, "color": "red"},
        {"class": "skis", "count": 7},
    ],
}
"""What the tiny detector takes the pictures for."""
every_reward = pytest.mark.parametrize("name", sorted(KINDS))
with_text = pytest.mark.parametrize("name", ["clipscore", "hpsv2", "imagereward", "pickscore"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_models")
    write_every_model(folder)
    return folder


@pytest.fixture(autouse=True)
def use_root(root, monkeypatch):
    monkeypatch.setenv(ROOTS_VARIABLE, str(root))


def make(name, **options):
    return KINDS[name](**{**OPTIONS.get(name, {}), **options})


def ask(reward, images, prompts=None):
    prompts = prompts or PROMPTS[: len(images)]
    return reward(RewardBatch(images, prompts, [WANTED] * len(prompts)))


@every_reward
@pytest.mark.parametrize("size", [(48, 48), (40, 96), (20, 16)])
def test_a_reward_gives_one_finite_float_per_image(name, size):
    result = ask(make(name), some_images(3, *size))
    assert result.scores.shape == (3,)
    assert result.scores.dtype == torch.float32
    assert result.scores.isfinite().all()
    assert result.scores.unique().numel() == 3
    assert all(values.shape == (3,) for values in result.details.values())
    assert not result.errors


@every_reward
def test_an_images_score_does_not_depend_on_the_others_their_order_or_the_batch_size(name):
    images, order = some_images(4, 60, 48), [2, 0, 3, 1]
    whole = ask(make(name), images).scores
    shuffled = ask(make(name), images[order], [PROMPTS[i] for i in order]).scores
    torch.testing.assert_close(shuffled, whole[order], atol=1e-5, rtol=1e-5)
    for batch_size in (1, 3):
        parts = ask(make(name, batch_size=batch_size), images).scores
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@every_reward
def test_a_reward_changes_neither_its_images_nor_the_random_state_and_leaves_no_graph(name):
    images = some_images(2)
    for loader in LOADERS:
        loader.cache_clear()
    kept, state = images.clone(), torch.get_rng_state()
    assert make(name).validate(PROMPTS, [WANTED] * 4) == []
    assert not ask(make(name), images).scores.requires_grad
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)


@every_reward
def test_no_images_no_scores(name):
    assert ask(make(name), torch.zeros(0, 3, 8, 8), []).scores.shape == (0,)


@every_reward
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_image_with_pixels_that_are_no_numbers_gets_nan_and_the_others_their_score(name, bad):
    images = some_images(3)
    whole = ask(make(name), images).scores
    images[1, 2, 5, 5] = bad
    result = ask(make(name), images)
    assert result.scores.isnan().tolist() == [False, True, False]
    assert result.errors == {1: "the image has pixels that are not numbers"}
    torch.testing.assert_close(result.scores[[0, 2]], whole[[0, 2]], atol=1e-5, rtol=1e-5)


@every_reward
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (2, 8, 8)])
def test_images_that_are_not_rgb_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"images must be float \[B, 3, H, W\] in 0\.\.1 \(RGB\), got .*convert grey"):
        ask(make(name), torch.zeros(shape), ["a", "b"])


class Moved:
    """Remembers where it was put."""

    def __init__(self):
        self.places = []

    def to(self, device):
        self.places.append(str(device))


@pytest.mark.parametrize(("kind", "places"), [("swap", ["cuda:1", "cpu"]), ("resident", ["cuda:1"]), ("cpu", ["cpu"])])
def test_weights_go_to_the_images_and_back(kind, places):
    clip = Clip(Moved(), None, kind)
    with pytest.raises(RuntimeError, match="out of memory"), placed(clip.model, torch.device("cuda:1"), clip.placement):
        raise RuntimeError("out of memory")
    assert clip.model.places == places


@every_reward
def test_a_model_computes_only_while_it_is_placed(name, monkeypatch):
    """Outside of it its weights may be on another device than its images."""
    inside, outside, entered = [], set(), []

    @contextmanager
    def manager(model, placement):
        entered.append(placement)
        inside.append(set(model.modules()))
        yield torch.device("cpu")
        inside.pop()

    def look(module, inputs):
        if next(module.parameters(), None) is not None and not any(module in modules for modules in inside):
            outside.add(type(module).__name__)

    monkeypatch.setattr(placement, "MANAGERS", [manager])
    for loader in LOADERS:
        loader.cache_clear()
    hook = register_module_forward_pre_hook(look)
    try:
        ask(make(name, placement="resident"), some_images(2))
    finally:
        hook.remove()
    assert entered == ["resident"] * (2 if name == "geneval" else 1)
    assert outside == set()


def test_images_on_the_cpu_are_scored_on_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert computing_device(torch.device("cpu"), "swap") == torch.device("cuda:3")
    assert computing_device(torch.device("cpu"), "cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert computing_device(torch.device("cpu"), "resident") == torch.device("cpu")


@every_reward
def test_a_reward_has_nothing_against_good_prompts(name):
    assert make(name).validate(PROMPTS, [WANTED] * 4) == []
    assert make(name).validate([], []) == []


@with_text
def test_an_empty_prompt_is_named(name):
    expected = ["prompt 2 is empty; it compares an image with a text"]
    assert make(name).validate(["a", "  "], [{}, {}]) == expected


@with_text
def test_prompts_that_are_cut_are_logged(name, caplog):
    with caplog.at_level(logging.WARNING, "densegrpo.rewards"):
        assert make(name).validate(["a cat", "a dog " * 60], [{}, {}]) == []
    length = 35 if name == "imagereward" else 77
    assert f"1 of 2 prompts have more than {length} tokens; the model sees only their beginning" in caplog.text
    assert "a dog a dog" in caplog.text


@every_reward
def test_checking_does_not_read_large_files(name, monkeypatch):
    def refuse(path):
        raise AssertionError(f"read {path}")

    for module in MODULES:
        monkeypatch.setattr(f"densegrpo.engine.rewards.{module}.read_weights", refuse)
    for loader in LOADERS:
        loader.cache_clear()
    assert make(name).validate(["a"], [WANTED]) == []


@every_reward
def test_a_missing_transformers_is_named_with_the_remedy(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (problem,) = make(name).validate(["a"], [{}])
    assert problem.endswith(
        "transformers, 4.46 or newer, is not installed; get it with:  "
        f'{sys.executable} -m pip install "transformers>=4.46"'
    )


@every_reward
def test_a_torchvision_that_does_not_fit_is_named(name, monkeypatch):
    """Transformers then says that it could not import CLIPModel, and why only far above."""

    class Broken:
        __spec__ = sys.modules["transformers"].__spec__

        def __getattr__(self, attribute):
            raise RuntimeError(f"operator torchvision::nms does not exist ({attribute})")

    monkeypatch.setitem(sys.modules, "transformers", Broken())
    (problem,) = make(name).validate(["a"], [{}])
    assert "its CLIP cannot be imported (operator torchvision::nms does not exist" in problem
    assert "install the torchvision of the same release, or remove it" in problem


def test_transformers_is_imported_only_when_a_model_is_loaded():
    imports = "; ".join(f"from {kind.__module__} import {kind.__name__}" for kind in KINDS.values())
    asked = "; ".join(f"{kind.__name__}().needs()" for kind in KINDS.values())
    code = f"import sys; {imports}; {asked}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@every_reward
def test_every_option_has_a_tip_and_an_allowed_default(name):
    for option, declared in options_of(KINDS[name]).items():
        assert declared.limits.tip, option
        assert declared.limits.wrong(declared.default, declared.kind) is None
    assert KINDS[name].__doc__


@every_reward
def test_what_a_reward_needs_is_named_with_size_licence_and_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv(ROOTS_VARIABLE, str(tmp_path))
    for need in make(name).needs():
        assert need.repository in described(need)
        assert f"({need.size}, licence {need.licence})" in missing(need)
        assert need.command.format(folder=tmp_path / need.folder) in missing(need)
    assert "is not there (looked in" in make(name).validate([], [])[0]


@every_reward
def test_equal_configurations_share_one_model(name):
    for loader in LOADERS:
        loader.cache_clear()
    images = some_images(2)
    for _ in range(2):
        ask(make(name, placement="cpu"), images)
    assert [loader.cache_info().misses for loader in LOADERS if loader.cache_info().misses] in ([1], [1, 1])


@every_reward
def test_a_model_loaded_in_inference_mode_can_be_used_and_moved_outside_of_it(name):
    """ComfyUI runs nodes in that mode."""
    for loader in LOADERS:
        loader.cache_clear()
    images = some_images(2)
    with torch.inference_mode():
        first = ask(make(name), images).scores
    assert torch.equal(ask(make(name), images).scores, first)
