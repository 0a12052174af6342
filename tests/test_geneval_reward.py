"""GenEval: the detector's network and boxes, what counts as found, the colour of a cut-out, the score."""

import json
from pathlib import Path

import pytest
import torch
from densegrpo.engine.prompts import load_prompts
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import geneval_colour
from densegrpo.engine.rewards import geneval_reward as module
from densegrpo.engine.rewards.clip import crop, load_clip
from densegrpo.engine.rewards.files import ROOTS_VARIABLE
from densegrpo.engine.rewards.geneval import RELATIONS
from densegrpo.engine.rewards.geneval_colour import colours_of, middle, on_grey
from densegrpo.engine.rewards.geneval_detector import Found
from densegrpo.engine.rewards.geneval_reward import TAGS, GenEval, problem_of, wanted
from densegrpo.engine.rewards.geneval_words import COLOURS
from tiny_clip import write_clip
from tiny_reward_models import some_images, write_mask2former
from torch.nn.functional import normalize

DETECTOR, CLIP = "mask2former-swin-small-coco-instance", "clip-vit-large-patch14"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOTS_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def written(root):
    write_clip(root / CLIP, 2)
    return write_mask2former(root / DETECTOR)


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def meta(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def thing(name, score=0.8, box=(0, 0, 10, 10)):
    return Found(name, score, box, torch.ones(box[3] - box[1], box[2] - box[0], dtype=torch.bool))


class Planted:
    """A detector that looks its answer up: the red of an image's first pixel says which."""

    def __init__(self, answers):
        self.model, self.placement, self.answers, self.calls = torch.nn.Identity(), "swap", answers, []

    def find(self, images, size):
        self.calls.append(len(images))
        return [self.answers[round(image[0, 0, 0].item() * 255)] for image in images]


@pytest.fixture
def plant(root, written, monkeypatch):
    def put(*answers):
        detector = Planted(answers)
        monkeypatch.setattr(module, "load_detector", lambda *_: detector)
        images = some_images(len(answers), 40, 60)
        images[:, 0, 0, 0] = torch.arange(len(answers)) / 255
        return detector, images

    return put


def ask(images, metadata, **options):
    return GenEval(**options)(RewardBatch(images, ["a"] * len(metadata), metadata))


TWO_CATS = meta("counting", clause("cat", 2), exclude=[clause("cat", 3)])
A_CAT = meta("single_object", clause("cat"))
LEFT = meta("position", clause("cat", position=["left of", 1]), clause("dog"))


@pytest.mark.parametrize(
    ("metadata", "found", "strict", "partial"),
    [
        (A_CAT, [thing("cat")], 1, 1),
        (A_CAT, [thing("cat", 0.3)], 0, 0),
        (A_CAT, [thing("cat", 0.31)], 1, 1),
        (A_CAT, [thing("dog")], 0, 0),
        (A_CAT, [thing("cat")] * 5, 0, 0),
        (TWO_CATS, [thing("cat", 0.95)] * 2, 1, 1),
        (TWO_CATS, [thing("cat", 0.95), thing("cat", 0.9)], 0, 0.5),
        (TWO_CATS, [thing("cat", 0.95)] * 3, 0, 0.5),
        (meta("two_object", clause("cat"), clause("tv remote")), [thing("cat"), thing("tv remote")], 1, 1),
        (meta("two_object", clause("cat"), clause("dog")), [thing("cat")], 0, 0.5),
        (LEFT, [thing("cat"), thing("dog", box=(40, 0, 50, 10))], 1, 1),
        (LEFT, [thing("dog"), thing("cat", box=(40, 0, 50, 10))], 0, 2 / 3),
    ],
)
def test_detections_are_judged_by_the_rules_and_both_scores_are_in_the_details(plant, metadata, found, strict, partial):
    _, images = plant(found)
    result = ask(images, [metadata])
    assert result.details["strict"].item() == strict
    assert result.details["partial"].item() == pytest.approx(partial)
    assert torch.equal(result.scores, result.details["partial"])
    assert torch.equal(ask(images, [metadata], score="strict").scores, result.details["strict"])


CAT, DOG, FAR_DOG = thing("cat", 0.95), thing("dog", 0.95), thing("dog", 0.95, box=(40, 0, 50, 10))
TWO = meta("two_object", clause("cat"), clause("dog"))
RED_CAT = meta("colors", clause("cat", color="red"))
RED_AND_BLUE = meta("color_attr", clause("cat", color="red"), clause("dog", color="blue"))
EVERY_TAG = [
    ("single_object hit", A_CAT, [CAT], {}, 1, 1),
    ("single_object miss", A_CAT, [DOG], {}, 0, 0),
    ("two_object hit", TWO, [CAT, DOG], {}, 1, 1),
    ("two_object partial", TWO, [DOG], {}, 0, 1 / 2),
    ("two_object miss", TWO, [], {}, 0, 0),
    ("counting hit", TWO_CATS, [CAT] * 2, {}, 1, 1),
    ("counting partial", TWO_CATS, [CAT], {}, 0, 1 / 2),
    ("counting miss", TWO_CATS, [CAT] * 4, {}, 0, 0),
    ("colors hit", RED_CAT, [CAT], {"cat": "red"}, 1, 1),
    ("colors partial", RED_CAT, [CAT], {"cat": "blue"}, 0, 1 / 2),
    ("colors miss", RED_CAT, [DOG], {}, 0, 0),
    ("position hit", LEFT, [CAT, FAR_DOG], {}, 1, 1),
    ("position partial", LEFT, [CAT, DOG], {}, 0, 2 / 3),
    ("position miss", LEFT, [], {}, 0, 0),
    ("color_attr hit", RED_AND_BLUE, [CAT, DOG], {"cat": "red", "dog": "blue"}, 1, 1),
    ("color_attr partial", RED_AND_BLUE, [CAT, DOG], {"cat": "red", "dog": "red"}, 0, 3 / 4),
    ("color_attr miss", RED_AND_BLUE, [], {}, 0, 0),
]
"""What it is, metadata, detections, the colour CLIP sees of each class, strict, partial."""


def test_every_tag_can_be_hit_missed_and_half_right(plant, monkeypatch):
    colour_of = {}
    monkeypatch.setattr(module, "colours_of", lambda clip, pieces, names, size: [colour_of[name] for name in names])
    seen = {}
    for title, metadata, found, colours, strict, partial in EVERY_TAG:
        colour_of = colours
        _, images = plant(found)
        details = ask(images, [metadata]).details
        seen[title] = (details["strict"].item(), round(details["partial"].item(), 4))
        assert seen[title] == (strict, round(partial, 4)), title
    assert {title.split()[0] for title in seen} == set(TAGS)


def test_every_image_is_judged_by_its_own_prompt_whatever_the_batch_size(plant):
    answers = [[thing("cat")] * n for n in range(5)]
    metadata = [A_CAT, A_CAT, meta("single_object", clause("cat", 4)), A_CAT, meta("single_object", clause("cat", 4))]
    for batch_size, calls in [(2, [2, 2, 1]), (8, [5])]:
        detector, images = plant(*answers)
        assert ask(images, metadata, batch_size=batch_size).scores.tolist() == [0, 1, 0.5, 0, 1]
        assert detector.calls == calls
    order = [3, 1, 4, 0, 2]
    shuffled = ask(images[order], [metadata[i] for i in order]).scores
    assert shuffled.tolist() == [0, 1, 1, 0, 0.5]


def test_an_image_without_good_metadata_or_pixels_gets_nan_and_the_others_their_score(plant):
    _, images = plant([thing("cat")], [thing("cat")], [thing("cat")], [thing("cat")])
    images[2, 1, 3, 3] = torch.nan
    result = ask(images, [A_CAT, {}, A_CAT, meta("single_object", clause("unicorn"))])
    assert result.scores.isnan().tolist() == [False, True, True, True]
    assert result.details["strict"].isnan().tolist() == [False, True, True, True]
    assert "no GenEval metadata" in result.errors[1]
    assert result.errors[2] == "the image has pixels that are not numbers"
    assert "class 'unicorn' is not one of" in result.errors[3]


def test_only_classes_of_the_prompt_are_kept_and_of_each_the_16_best():
    cats = [thing("cat", 0.5 + i / 100) for i in range(20)]
    metadata = meta("colors", clause("cat"), exclude=[clause("dog")])
    kept = wanted([thing("bus", 0.99), *cats, thing("dog", 0.4)], metadata)
    assert [one.name for one in kept] == ["cat"] * 16 + ["dog"]
    assert [one.score for one in kept[:16]] == [cat.score for cat in reversed(cats[4:])]


def test_colours_are_asked_of_classes_that_are_wanted_in_one_only(plant, monkeypatch):
    asked = []

    def answer(clip, pieces, names, batch_size):
        asked.extend((name, tuple(piece.shape)) for name, piece in zip(names, pieces, strict=True))
        return ["red" if name == "cat" else "blue" for name in names]

    monkeypatch.setattr(module, "colours_of", answer)
    found = [thing("cat", box=(0, 0, 10, 7)), thing("dog", box=(40, 0, 50, 10))]
    _, images = plant(found, found, found)
    both = meta("color_attr", clause("cat", color="red"), clause("dog", color="red"))
    scores = ask(images, [meta("colors", clause("cat", color="red")), both, A_CAT]).scores
    assert scores.tolist() == [1, 0.75, 1]
    assert asked == [("cat", (3, 7, 10)), ("cat", (3, 7, 10)), ("dog", (3, 10, 10))]


def test_clip_rests_when_no_colour_is_asked_for(plant, monkeypatch):
    monkeypatch.setattr(module, "load_clip", lambda *_: 1 / 0)
    _, images = plant([thing("cat")], [])
    nothing_there = meta("colors", clause("cat", color="red"))
    assert ask(images, [A_CAT, nothing_there]).scores.tolist() == [1, 0]


def test_clip_is_the_one_of_the_other_rewards(root, plant):
    load_clip.cache_clear()
    expected = load_clip(root / CLIP, "float32", "swap")
    _, images = plant([thing("cat")])
    ask(images, [meta("colors", clause("cat", color="red"))])
    assert load_clip.cache_info().misses == 1
    assert len(expected.kept) == 30


def test_the_colour_is_the_nearest_mean_of_three_templates(root, written):
    clip = load_clip(root / CLIP, "float32", "swap")
    pieces = [image[:, : 20 + i, i:] for i, image in enumerate(some_images(12, 40, 60))]
    names = ["cat", "computer mouse", "dog"] * 4
    expected = []
    for piece, name in zip(pieces, names, strict=True):
        image = clip.image_features(piece[None], crop)[0]
        forms = ("a photo of a {} " + name, "a photo of a {}-colored " + name, "a photo of a {} object")
        texts = [[form.format(colour) for form in forms] for colour in COLOURS]
        means = torch.stack([normalize(clip.text_features(three).mean(0), dim=0) for three in texts])
        expected.append(COLOURS[int((means @ image).argmax())])
    assert len(set(expected)) > 2
    for batch_size in (1, 5, 32):
        assert colours_of(clip, pieces, names, batch_size) == expected


def test_around_an_object_everything_is_grey():
    image, mask = some_images(1, 20, 30)[0], torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    piece = on_grey(image, (10, 5, 16, 9), mask)
    assert torch.equal(piece[:, 1:3, 2:5], image[:, 6:8, 12:15])
    outside = piece[:, ~mask]
    assert outside.eq(0x99 / 255).all()
    assert outside.shape == (3, 18)


def test_very_long_cut_outs_do_not_fill_the_memory(root, written, monkeypatch):
    clip, line = load_clip(root / CLIP, "float32", "swap"), some_images(1, 1, 3000)[0]
    assert middle(line).shape == (3, 1, 16)
    assert torch.equal(middle(line), line[:, :, 1492:1508])
    assert middle(line.mT).shape == (3, 16, 1)
    assert middle(some_images(1, 30, 40)[0]).shape == (3, 30, 40)
    seen = []
    monkeypatch.setattr(geneval_colour, "crop", lambda images, size: [seen.append(images.shape), crop(images, size)][1])
    assert colours_of(clip, [line], ["cat"], 8)[0] in COLOURS
    assert seen == [(1, 3, 1, 16)]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, 'it has no GenEval metadata; use a .jsonl file of prompts with lines such as {"prompt": "a photo of two'),
        ({"include": [clause("cat")]}, "tag None is not one of single_object, two_object, counting, colors, position"),
        (meta("colours", clause("cat")), "tag 'colours' is not one of"),
        ({"include": [clause("cat")], "tag": ["colors"]}, "tag ['colors'] is not one of"),
        (meta("single_object", clause("mouse")), "class 'mouse' is not one of person, bicycle"),
        (meta("colors", clause("cat", color="grey")), "color 'grey' is not one of red, orange"),
        (meta("single_object"), "no 'include' clauses"),
    ],
)
def test_prompts_without_good_metadata_are_refused(root, written, metadata, message):
    (problem,) = GenEval().validate(["a cat", "a photo"], [A_CAT, metadata])
    assert problem.startswith("prompt 'a photo': ")
    assert message in problem


def test_the_example_in_the_message_is_good_metadata():
    start = problem_of({}).index("{")
    example = json.loads(problem_of({})[start:])
    assert problem_of(example) is None


def test_lines_of_the_official_file_are_good_as_they_are(root, written):
    prompts = load_prompts("geneval.jsonl", Path(__file__).parent / "golden")
    metadata = [prompt.metadata for prompt in prompts]
    assert {data["tag"] for data in metadata} == set(TAGS)
    assert {clause["position"][0] for data in metadata for clause in data["include"] if "position" in clause} == {
        *RELATIONS
    }
    assert GenEval().validate([prompt.text for prompt in prompts], metadata) == []
