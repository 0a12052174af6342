"""The shape checker: finds what was drawn, at any size, and nothing else."""

import pytest
import torch
from densegrpo.engine.demo.scenes import BACKGROUND, COLOURS, SHAPES, SceneSampler, all_prompts, cell_table
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import make_reward
from densegrpo.engine.rewards.geneval import judge
from densegrpo.engine.rewards.shapes import FULL_AREA, Shapes, components, detect
from torch.nn.functional import interpolate

ENTRIES = list(all_prompts())
INDEX = torch.arange(0, len(ENTRIES), 3)
SCORES = ("dense", "partial", "strict")


@pytest.fixture(scope="module")
def pictures():
    """One painted picture of every third prompt, [390, 3, 64, 64]."""
    return SceneSampler(ENTRIES, cell_table())(INDEX, torch.Generator().manual_seed(0))


def blank(num=1, size=64):
    return torch.tensor(BACKGROUND).view(1, 3, 1, 1).div(255).repeat(num, 1, size, size)


def painted(*rectangles, size=64):
    """A background with rectangles (colour, left, top, right, bottom)."""
    image = blank(size=size)
    for colour, left, top, right, bottom in rectangles:
        image[0, :, top:bottom, left:right] = torch.tensor(COLOURS[colour]).view(3, 1, 1) / 255
    return image


def score(images, metadata, **options):
    batch = RewardBatch(images, [""] * len(images), metadata)
    return make_reward("shapes", **options)(batch).scores


def one(shape, colour=None, count=1):
    clause = {"class": shape, "count": count} | ({"color": colour} if colour else {})
    return {"include": [clause]}


def test_every_painted_picture_shows_its_prompt(pictures):
    """All but a few diagonals, on which the places happen to be too oblique for GenEval's relation."""
    entries = [ENTRIES[i] for i in INDEX]
    strict = score(pictures, entries, score="strict")
    placed = torch.tensor([e["tag"] == "position" for e in entries])
    assert strict[~placed].mean() == 1
    assert strict[placed].mean() > 0.97
    unplaced = [{"include": [{k: c[k] for k in c if k != "position"} for c in e["include"]]} for e in entries]
    assert score(pictures, unplaced, score="strict").mean() == 1


def test_the_number_of_shapes_is_exact(pictures):
    """Nothing is found twice, nothing is invented."""
    for found, i in zip(detect(pictures), INDEX.tolist(), strict=True):
        assert len(found) == sum(clause["count"] for clause in ENTRIES[i]["include"])


def test_a_picture_of_another_prompt_is_not_taken_for_it(pictures):
    """Strict can only be fooled by a prompt that says less: compare each picture with a shifted list."""
    checked = 0
    for found, i, j in zip(detect(pictures), INDEX.tolist(), INDEX.roll(37).tolist(), strict=True):
        drawn, asked = ENTRIES[i], ENTRIES[j]
        if {c["class"] for c in drawn["include"]} != {c["class"] for c in asked["include"]}:
            assert judge(found, asked).strict == 0 or len(asked["include"]) < len(drawn["include"])
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("size", [(128, 128), (512, 512), (96, 160), (200, 150)])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_the_size_of_the_image_hardly_matters(pictures, size, mode):
    few = torch.arange(0, len(INDEX), 20)
    larger = interpolate(pictures[few], size, mode=mode)
    found = score(larger, [ENTRIES[INDEX[i]] for i in few], score="strict")
    assert found.mean() >= 0.95


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_a_little_noise_hardly_matters(pictures, noise):
    few = torch.arange(0, len(INDEX), 8)
    grain = torch.randn(len(few), 3, 64, 64, generator=torch.Generator().manual_seed(0)) * noise
    noisy = (pictures[few] + grain).clamp(0, 1)
    assert score(noisy, [ENTRIES[INDEX[i]] for i in few], score="strict").mean() >= 0.95


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_every_shape_in_every_colour_is_found_where_it_is(shape, colour):
    table = cell_table()
    image = blank()
    image[0, :, 32:, :32] = table[list(COLOURS).index(colour), SHAPES.index(shape), 40]
    ((found,),) = detect(image)
    assert (found.name, found.color) == (shape, colour)
    assert found.box == pytest.approx((6, 38, 26, 58), abs=2)


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("kind", SCORES)
def test_blank_images_score_0(num, kind):
    """A whole batch without any shape, too: a policy may well paint one."""
    assert score(blank(num), [one("circle", "red")] * num, score=kind).tolist() == [0] * num
    assert detect(blank(num)) == [[]] * num


@pytest.mark.parametrize("kind", SCORES)
def test_noise_and_flat_colour_are_no_shapes(kind):
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert score(noise, [one("circle", "red")] * 2, score=kind).max() < 0.3
    whole = painted(("red", 0, 0, 64, 64))
    assert score(whole, [one("circle", "red")], score="strict").item() == 0
    assert score(whole, [one("square", "red")], score="strict").item() == 1


def test_detections_are_sorted_by_size_and_specks_are_ignored():
    image = painted(("red", 2, 2, 12, 12), ("blue", 20, 20, 60, 60), ("green", 50, 2, 56, 8))
    found = detect(image)[0]
    assert [(d.name, d.color, d.box) for d in found] == [
        ("square", "blue", (20, 20, 60, 60)),
        ("square", "red", (2, 2, 12, 12)),
    ]


def test_shapes_of_one_colour_that_touch_only_at_a_corner_are_one():
    image = painted(("red", 10, 10, 20, 20), ("red", 20, 20, 30, 30))
    assert len(detect(image)[0]) == 1
    image = painted(("red", 10, 10, 20, 20), ("red", 21, 20, 31, 30))
    assert len(detect(image)[0]) == 2


def test_more_planes_than_fit_one_pass_keep_their_images():
    """24 images of one square each, in turn in all colours and places."""
    names = list(COLOURS)
    images = torch.cat([painted((names[i % 6], 2 * i, i, 2 * i + 12, i + 12)) for i in range(24)])
    for i, found in enumerate(detect(images)):
        assert [(d.color, d.box) for d in found] == [(names[i % 6], (2 * i, i, 2 * i + 12, i + 12))]


def flood(mask):
    """Label components with a stack, slowly."""
    labels, height, width = [[0] * mask.shape[1] for _ in mask], *mask.shape
    number = 0
    for y in range(height):
        for x in range(width):
            if mask[y][x] and not labels[y][x]:
                number += 1
                stack = [(y, x)]
                while stack:
                    i, j = stack.pop()
                    if 0 <= i < height and 0 <= j < width and mask[i][j] and not labels[i][j]:
                        labels[i][j] = number
                        stack += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return labels


@pytest.mark.parametrize("density", [0.2, 0.4, 0.6])
def test_components_are_those_of_a_flood_fill(density):
    masks = torch.rand(6, 20, 20, generator=torch.Generator().manual_seed(0)) < density
    for mask, labels in zip(masks, components(masks), strict=True):
        pairs = set(zip(torch.tensor(flood(mask)).flatten().tolist(), labels.flatten().tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert torch.equal(labels > 0, mask)


def test_a_winding_path_is_one_component():
    mask = torch.zeros(1, 31, 31, dtype=torch.bool)
    mask[0, ::2] = True
    for i, row in enumerate(range(1, 31, 2)):
        mask[0, row, -1 if i % 2 else 0] = True
    assert len(components(mask).unique()) == 2


def test_dense_is_the_area_of_the_wanted_colour_capped_at_a_quarter():
    images = torch.cat([painted(("red", 0, 0, 64, rows)) for rows in (4, 8, 16, 64)])
    found = score(images, [one("circle", "red")] * 4)
    assert found.tolist() == pytest.approx([4 / 64 / FULL_AREA, 8 / 64 / FULL_AREA, 1, 1])
    assert score(images, [one("circle", "blue")] * 4).tolist() == [0] * 4


def test_dense_is_the_mean_over_the_wanted_colours():
    image = painted(("red", 0, 0, 64, 8), ("blue", 0, 8, 64, 40))
    both = {"include": [*one("circle", "red")["include"], *one("square", "blue")["include"]]}
    assert score(image, [both]).item() == pytest.approx((0.5 + 1) / 2)
    half_named = {"include": [*one("circle", "red")["include"], *one("square")["include"]]}
    assert score(image, [half_named]).item() == pytest.approx(0.5)


def test_dense_says_nothing_of_shape():
    image = painted(("red", 0, 0, 32, 32))
    assert score(image, [one("circle", "red")]).item() == score(image, [one("square", "red")]).item() == 1


def test_dense_takes_colours_near_enough():
    image = painted(("red", 0, 0, 64, 16))
    near, far = image + 0.1, image + 0.3
    assert score(near, [one("circle", "red")]).item() == 1
    assert score(far, [one("circle", "red")]).item() == 0


@pytest.mark.parametrize(
    ("metadata", "kind", "message"),
    [
        ({}, "partial", "prompt 'p': it has no 'include' clauses"),
        (one("dog"), "partial", "class 'dog' is not one of circle, square, triangle"),
        (one("circle", "pink"), "strict", "color 'pink' is not one of red, green, blue, yellow, purple, black"),
        (one("circle"), "dense", "the dense score needs a clause with a color; use score 'partial'"),
    ],
)
def test_prompts_the_checker_cannot_judge_are_named(metadata, kind, message):
    (problem,) = Shapes(kind).validate(["p"], [metadata])
    assert message in problem


@pytest.mark.parametrize("kind", SCORES)
def test_prompts_of_the_demo_world_are_fine(kind):
    fit = [e for e in ENTRIES if kind != "dense" or any("color" in c for c in e["include"])]
    assert Shapes(kind).validate([e["prompt"] for e in fit], fit) == []


def test_only_the_bad_prompts_are_named():
    problems = Shapes("partial").validate(["good", "bad", "good"], [one("circle"), one("cat"), one("square")])
    assert len(problems) == 1
    assert "'bad'" in problems[0]


@pytest.mark.parametrize("kind", SCORES)
def test_prompts_of_the_grammar_need_no_metadata_and_given_clauses_win(kind):
    image, reward = painted(("red", 10, 10, 42, 42)), make_reward("shapes", score=kind)
    prompts = ["a red square", " a blue square ", "a blue square"]
    metadata = [{}, {}, one("square", "red")]
    assert reward.validate(prompts, metadata) == []
    found = reward(RewardBatch(image.repeat(3, 1, 1, 1), prompts, metadata)).scores.tolist()
    assert found == pytest.approx([1, {"dense": 0, "partial": 0.5, "strict": 0}[kind], 1])
