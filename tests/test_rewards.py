"""The panel's contract, and the rewards that need no model."""

import io
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from densegrpo.engine.data import Prompt
from densegrpo.engine.protocols import RewardBatch, RewardResult
from densegrpo.engine.rewards import REWARDS, VARIANTS, Panel, make_reward, members, reward_class
from densegrpo.engine.rewards.brightness import Brightness, luma
from densegrpo.engine.rewards.colourfulness import Colourfulness
from densegrpo.engine.rewards.jpeg import Jpeg
from PIL import Image

RED_CIRCLE = Prompt("a red circle", {"include": [{"class": "circle", "count": 1, "color": "red"}]})
BLUE_SQUARES = Prompt("two blue squares", {"include": [{"class": "square", "count": 2, "color": "blue"}]})
every_reward = pytest.mark.parametrize("name", sorted(REWARDS))


def some_images(num=4, height=48, width=48, seed=0):
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(seed))


def prompts_for(images):
    return [(RED_CIRCLE, BLUE_SQUARES)[i % 2] for i in range(len(images))]


def batch(images, prompts=None):
    prompts = prompts or prompts_for(images)
    return RewardBatch(images, [p.text for p in prompts], [p.metadata for p in prompts])


def score(reward, images):
    return reward(batch(images)).scores


@dataclass
class Fake:
    """A reward that does what it is told."""

    answer: object
    errors: dict = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    complaints: tuple = ()

    def __call__(self, given):
        scores = self.answer(given) if callable(self.answer) else torch.tensor(self.answer)
        return RewardResult(scores, self.details, self.errors)

    def validate(self, prompts, metadata):
        return list(self.complaints)


def fails(_):
    raise OSError("out of reach")


def ask(*members, mode="each", images=None):
    """(label, reward, weight) members -> Scored."""
    images = some_images(3) if images is None else images
    return Panel(members, mode)(images, prompts_for(images))


@every_reward
@pytest.mark.parametrize("size", [(48, 48), (64, 64), (40, 96), (512, 512)])
def test_a_reward_gives_one_finite_float_per_image(name, size):
    images = some_images(3, *size)
    result = make_reward(name)(batch(images))
    assert result.scores.shape == (3,)
    assert result.scores.dtype == torch.float32
    assert result.scores.isfinite().all()
    assert all(values.shape == (3,) for values in result.details.values())
    assert not result.errors


@every_reward
def test_an_images_score_does_not_depend_on_the_others_or_their_order(name):
    reward, images = make_reward(name), some_images(4)
    whole = score(reward, images)
    order = torch.tensor([2, 0, 3, 1])
    prompts = prompts_for(images)
    shuffled = reward(batch(images[order], [prompts[i] for i in order])).scores
    torch.testing.assert_close(shuffled, whole[order], atol=1e-6, rtol=0)
    single = torch.cat([reward(batch(images[i : i + 1], [prompts[i]])).scores for i in range(4)])
    torch.testing.assert_close(single, whole, atol=1e-6, rtol=0)
    assert torch.equal(score(reward, images), whole)


@every_reward
def test_a_reward_changes_neither_its_images_nor_the_random_state(name):
    images = some_images(2)
    kept, state = images.clone(), torch.get_rng_state()
    make_reward(name)(batch(images))
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)


@every_reward
@pytest.mark.filterwarnings("ignore:var")
def test_no_images_no_scores(name):
    assert score(make_reward(name), torch.zeros(0, 3, 16, 16)).shape == (0,)


@pytest.mark.parametrize("label", [label for label, entry in VARIANTS.items() if entry["name"] in REWARDS])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_image_with_pixels_that_are_no_numbers_has_no_score_and_the_others_theirs(label, bad):
    """A model whose training went wrong makes such images: black ones would compress well."""
    (member,), images = members([VARIANTS[label]]), some_images(3)
    whole = ask(member, images=images)
    images[1, 2, 5, 5] = bad
    found = ask(member, images=images)
    for now, before in zip(found.by_reward.values(), whole.by_reward.values(), strict=True):
        assert torch.equal(now[[0, 2]], before[[0, 2]])
        assert now[1].isnan()
    assert found.reasons == {label: ["the image has pixels that are not numbers"]}


def test_an_image_with_pixels_that_are_no_numbers_has_no_sub_scores_either():
    images = some_images(3)
    images[1] = torch.nan
    found = ask(("x", Fake([1.0, 2.0, 3.0], details={"part": torch.ones(3)}), 1.0), images=images)
    assert {label: values.isnan().tolist() for label, values in found.by_reward.items()} == {
        "x": [False, True, False],
        "x/part": [False, True, False],
    }


@every_reward
@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 1, 8, 8), torch.zeros(3, 4, 8, 8), torch.zeros(3, 8, 8), torch.zeros(3, 3, 8, 8).byte()],
    ids=["grey", "transparent", "one", "whole numbers"],
)
def test_images_that_are_not_rgb_in_0_to_1_have_no_score(name, images):
    found = ask((name, make_reward(name), 1.0), images=images)
    assert found.scores.isnan().all()
    assert all("images must be float [B, 3, H, W] in 0..1 (RGB), got" in reason for reason in found.reasons[name])


@every_reward
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images_have_a_score_too(name, value):
    assert score(make_reward(name), torch.full((2, 3, 32, 32), value)).isfinite().all()


@every_reward
def test_a_reward_has_nothing_against_good_prompts(name):
    Panel([(name, make_reward(name), 1.0)]).validate([RED_CIRCLE, BLUE_SQUARES])


@every_reward
def test_a_reward_class_is_imported_by_name_and_documented(name):
    assert reward_class(name).__doc__
    assert reward_class(name)() == make_reward(name)


def test_brightness_is_the_mean_luma():
    images = torch.zeros(5, 3, 4, 4)
    images[0] = 1
    for i in range(3):
        images[i + 1, i] = 1
    assert score(Brightness(), images).tolist() == pytest.approx([1, 0.299, 0.587, 0.114, 0])
    half = torch.zeros(1, 3, 4, 4)
    half[..., :2] = 1
    assert score(Brightness(), half).item() == pytest.approx(0.5)
    assert luma(images).shape == (5, 4, 4)


def test_the_target_brightness_is_worth_most():
    greys = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert score(Brightness(target=0.25), greys).tolist() == pytest.approx([0.75, 1, 0.75, 0.25])
    assert score(Brightness(target=0.0), greys).tolist() == pytest.approx([1, 0.75, 0.5, 0])


def test_colourfulness_is_the_published_index():
    """Hasler and Suesstrunk on 0..255, divided by 100."""
    images = some_images(3, 20, 30)
    red, green, blue = np.moveaxis(images.numpy().astype(np.float64) * 255, 1, 0)
    rg, yb = red - green, 0.5 * (red + green) - blue

    def over_pixels(f, values):
        return f(values, axis=(1, 2))

    spread = np.sqrt(over_pixels(np.std, rg) ** 2 + over_pixels(np.std, yb) ** 2)
    mean = np.sqrt(over_pixels(np.mean, rg) ** 2 + over_pixels(np.mean, yb) ** 2)
    assert score(Colourfulness(), images).tolist() == pytest.approx(((spread + 0.3 * mean) / 100).tolist(), rel=1e-4)


def test_grey_has_no_colour():
    grey = some_images(2)[:, :1].expand(-1, 3, -1, -1)
    assert score(Colourfulness(), grey).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert (score(Colourfulness(), some_images(2)) > 0.5).all()


def test_jpeg_counts_the_bits_per_pixel_of_pillows_file():
    images = some_images(2, 24, 40)
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        sizes.append(8 * len(file.getvalue()) / (24 * 40))
    assert score(Jpeg("incompressible"), images).tolist() == pytest.approx(sizes)
    assert score(Jpeg(), images).tolist() == pytest.approx([-s for s in sizes])


def test_jpeg_prefers_flat_or_busy_images():
    images = torch.cat([torch.full((1, 3, 64, 64), 0.3), some_images(1, 64, 64)])
    assert score(Jpeg("compressible"), images).argmax() == 0
    assert score(Jpeg("incompressible"), images).argmax() == 1


def test_values_a_little_outside_the_range_do_not_wrap_around_in_jpeg():
    flat = torch.full((1, 3, 32, 32), 1.0)
    assert torch.equal(score(Jpeg(), flat + 0.01), score(Jpeg(), flat))


def test_scores_come_in_order_of_members_and_images():
    found = ask(("first", Fake([1.0, 2.0, 3.0]), 1.0), ("second", Fake([6.0, 5.0, 4.0]), 0.5))
    assert found.scores.tolist() == [[1, 2, 3], [6, 5, 4]]
    assert found.scores.dtype == torch.float32
    assert found.by_reward["second"].tolist() == [6, 5, 4]
    assert list(found.errors) == []


def test_every_image_goes_with_its_own_prompt_and_metadata():
    seen = []

    def remember(given):
        seen.append((given.images.clone(), list(given.prompts), list(given.metadata)))
        return given.images.flatten(1).mean(1)

    images = some_images(3)
    found = ask(("mean", Fake(remember), 1.0), images=images)
    assert torch.equal(seen[0][0], images)
    assert seen[0][1] == ["a red circle", "two blue squares", "a red circle"]
    assert seen[0][2][1] == BLUE_SQUARES.metadata
    assert torch.equal(found.scores[0], images.flatten(1).mean(1))


@pytest.mark.parametrize(("mode", "weights"), [("each", [1.0, -0.5]), ("sum", [1.0])])
def test_rewards_are_weighted_after_or_before_normalising(mode, weights):
    members = [("a", Fake([1.0, 2.0, 3.0]), 1.0), ("b", Fake([4.0, 0.0, 2.0]), -0.5)]
    panel = Panel(members, mode)
    assert panel.weights.tolist() == weights
    scores = panel(some_images(3), prompts_for(range(3))).scores.tolist()
    assert scores == ([[1, 2, 3], [4, 0, 2]] if mode == "each" else [[-1, 2, 2]])


@pytest.mark.parametrize("mode", ["each", "sum"])
def test_the_record_shows_raw_scores_and_sub_scores(mode):
    reward = Fake([1.0, 2.0, 3.0], details={"part": torch.tensor([0.1, 0.2, 0.3])})
    found = ask(("a", reward, 10.0), mode=mode)
    assert found.by_reward["a"].tolist() == [1, 2, 3]
    assert found.by_reward["a/part"].tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("answer", [[1.0], [1.0] * 4, [[1.0, 2.0, 3.0]], 1.0])
def test_a_wrong_number_of_scores_is_a_bug_and_ends_the_run(answer):
    with pytest.raises(RuntimeError, match=r"reward odd returned shape \(.*\) for 3 images"):
        ask(("odd", Fake(answer), 1.0))


def test_an_exception_becomes_nan_with_a_reason_for_every_image():
    found = ask(("far", Fake(fails), 1.0), ("near", Fake([1.0, 2.0, 3.0]), 1.0))
    assert found.scores[0].isnan().all()
    assert found.scores[1].tolist() == [1, 2, 3]
    assert list(found.errors) == ["far: OSError: out of reach"] * 3


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_stopping_is_not_swallowed(interrupt):
    def stop(_):
        raise interrupt

    with pytest.raises(interrupt):
        ask(("slow", Fake(stop), 1.0))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_score_that_is_no_number_becomes_nan_with_a_reason(value):
    found = ask(("wild", Fake([1.0, value, 3.0]), 1.0))
    assert found.scores[0].isnan().tolist() == [False, True, False]
    assert found.scores[0, 2] == 3
    assert list(found.errors) == ["wild: the score is not a finite number"]


def test_the_rewards_own_reason_is_kept():
    found = ask(("judge", Fake([1.0, torch.nan, 3.0], errors={1: "no answer"}), 1.0))
    assert list(found.errors) == ["judge: no answer"]


def test_a_missing_score_makes_the_sum_missing_and_never_0():
    found = ask(("a", Fake([1.0, torch.nan, 3.0]), 1.0), ("b", Fake([1.0, 1.0, 1.0]), 1.0), mode="sum")
    assert found.scores.isnan().tolist() == [[False, True, False]]
    assert found.by_reward["b"].tolist() == [1, 1, 1]


def test_a_reward_cannot_touch_the_random_state_or_leave_a_graph():
    weight = torch.ones(1, requires_grad=True)

    def careless(given):
        torch.manual_seed(5)
        return torch.rand(len(given.prompts)) * weight

    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = ask(("careless", Fake(careless), 1.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.scores.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_scores_of_any_type_become_float32(dtype):
    found = ask(("a", Fake(lambda given: torch.arange(3).to(dtype)), 1.0))
    assert found.scores.dtype == torch.float32
    assert found.scores.tolist() == [[0, 1, 2]]


def test_one_image_is_enough():
    assert ask(("a", Brightness(), 1.0), images=some_images(1)).scores.shape == (1, 1)


def test_chunks_are_put_together_in_order():
    images, members = some_images(5), [("bright", Brightness(), 1.0), ("far", Fake(fails), 1.0)]
    panel, prompts = Panel(members), prompts_for(some_images(5))
    with panel.scoring() as scoring:
        for i in (0, 2, 4):
            scoring.add(images[i : i + 2], prompts[i : i + 2])
        joined = scoring.collect()
    whole = panel(images, prompts)
    assert torch.equal(joined.scores[0], whole.scores[0])
    assert joined.scores[1].isnan().all()
    assert torch.equal(joined.by_reward["bright"], whole.by_reward["bright"])
    assert list(joined.errors) == list(whole.errors)


def test_a_panel_needs_a_reward():
    with pytest.raises(ValueError, match="the list of rewards is empty; name at least one"):
        Panel([])


def test_problems_with_prompts_are_named_with_their_reward():
    panel = Panel([("a", Fake(0), 1.0), ("b", Fake(0, complaints=("p1 is bad", "p2 is bad")), 1.0)])
    with pytest.raises(ValueError, match=r"^reward b: p1 is bad; reward b: p2 is bad$"):
        panel.validate([RED_CIRCLE])
    many = Panel([("b", Fake(0, complaints=tuple("abcde")), 1.0)])
    with pytest.raises(ValueError, match=r"reward b: a; reward b: b; reward b: c \(and 2 more\)$"):
        many.validate([RED_CIRCLE])


def test_shapes_wants_metadata():
    with pytest.raises(ValueError, match=r"reward shapes: prompt 'a cat': it has no 'include' clauses; use a \.jsonl"):
        Panel([("shapes", make_reward("shapes"), 1.0)]).validate([RED_CIRCLE, Prompt("a cat", {})])
