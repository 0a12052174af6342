"""Prompts made by rule and the shipped lists: grammar, metadata, mix, and that no two are equal."""

import json
import re
from collections import Counter

import pytest
from densegrpo.engine.prompt_sets import geneval as made
from densegrpo.engine.prompt_sets import make_file, normal, quoted_text
from densegrpo.engine.prompts import BUILT_IN, dump, load_prompts
from densegrpo.engine.rewards.geneval import RELATIONS, Detection, judge, problems, relations
from densegrpo.engine.rewards.geneval_words import CLASSES, COCO_CLASSES, COLOURS, RENAMED
from densegrpo.engine.rewards.ocr import QUOTED, target

SETS = [name for name in BUILT_IN if name.startswith("set:")]
TAGS = {"set:colours": {"colors", "color_attr"}} | {f"set:{tag}": {tag} for tag in ("counting", "position", "text")}
EVERY_KIND = {**made.KINDS, **quoted_text.KINDS}
COUNTS = {1: ("a", "an", "one"), 2: ("two",), 3: ("three",), 4: ("four",)}
OFFICIAL = (
    *("a photo of a bench", "a photo of an elephant", "a photo of an orange", "a photo of a scissors"),
    *("a photo of a broccoli and a vase", "a photo of a computer keyboard and a cell phone"),
    *("a photo of two clocks", "a photo of three buses", "a photo of four benchs", "a photo of four knifes"),
    *(
        "a photo of three persons",
        "a photo of two toothbrushs",
        "a photo of two sheeps",
        "a photo of three wine glasses",
    ),
    *("a photo of a red apple", "a photo of an orange orange", "a photo of a brown skis"),
    *("a photo of a bench left of a bear", "a photo of a carrot left of an orange", "a photo of a book above a laptop"),
)
"""Prompts of GenEval's own test set."""


def records(name, count, seed=0, **options):
    return [json.loads(line) for line in make_file(name, count, seed, **options).text.splitlines()]


def everything(tag):
    kind = EVERY_KIND[tag]
    step = 1 if kind.size < 30_000 else 97
    return [kind.make(number) for number in range(0, kind.size, step)]


def test_the_words_are_those_of_coco_and_geneval():
    assert len(set(CLASSES)) == len(CLASSES) == len(COCO_CLASSES) == 80
    assert [i for i, (a, b) in enumerate(zip(COCO_CLASSES, CLASSES, strict=True)) if a != b] == [64, 65, 66]
    assert (CLASSES[0], CLASSES[16], CLASSES[66], CLASSES[79]) == ("person", "dog", "computer keyboard", "toothbrush")
    assert set(RENAMED) < set(COCO_CLASSES)
    assert len(set(COLOURS)) == 10


def test_official_prompts_can_be_made():
    short = {tag: kind for tag, kind in made.KINDS.items() if tag != "color_attr"}
    assert set(OFFICIAL) <= {kind.make(number)["prompt"] for kind in short.values() for number in range(kind.size)}


@pytest.mark.parametrize(
    ("words", "colours", "prompt"),
    [
        (("car", "potted plant"), ("red", "orange"), "a photo of a red car and an orange potted plant"),
        (("orange", "broccoli"), ("red", "purple"), "a photo of a red orange and a purple broccoli"),
        (("toothbrush", "bicycle"), ("white", "red"), "a photo of a white toothbrush and a red bicycle"),
    ],
)
def test_official_prompts_of_two_colours_can_be_made(words, colours, prompt):
    def number(items, pair):
        return [(items[i], items[j]) for i, j in (made.pair(n, len(items)) for n in range(many(items)))].index(pair)

    def many(items):
        return len(items) * (len(items) - 1)

    which = number(made.COLOURED, words) * many(COLOURS) + number(COLOURS, colours)
    assert made.color_attr(which)["prompt"] == prompt
    assert which < made.KINDS["color_attr"].size == many(made.COLOURED) * many(COLOURS)


@pytest.mark.parametrize("tag", made.KINDS)
def test_every_geneval_prompt_has_metadata_that_its_rules_accept(tag):
    for record in everything(tag):
        assert record["tag"] == tag
        assert problems(record, CLASSES, COLOURS) is None
        assert ("exclude" in record) == (tag == "counting")


@pytest.mark.parametrize("tag", sorted(set(EVERY_KIND) - {"color_attr"}))
def test_no_two_prompts_of_a_tag_are_equal(tag):
    kind = EVERY_KIND[tag]
    assert len({normal(kind.make(number)["prompt"]) for number in range(kind.size)}) == kind.size


@pytest.mark.parametrize(
    ("tag", "size"),
    [("single_object", 80), ("two_object", 6320), ("counting", 240), ("colors", 790), ("position", 25_280)],
)
def test_the_number_of_prompts_is_that_of_the_words(tag, size):
    assert made.KINDS[tag].size == size


def test_each_kind_says_the_same_in_words_and_in_metadata():
    assert made.counting(0) == {
        "tag": "counting",
        "prompt": "a photo of two persons",
        "include": [{"class": "person", "count": 2}],
        "exclude": [{"class": "person", "count": 3}],
    }
    assert made.position(1) == {
        "tag": "position",
        "prompt": "a photo of a person right of a bicycle",
        "include": [{"class": "bicycle", "count": 1}, {"class": "person", "count": 1, "position": ["right of", 0]}],
    }
    assert made.color_attr(0) == {
        "tag": "color_attr",
        "prompt": "a photo of a red bicycle and an orange car",
        "include": [
            {"class": "bicycle", "count": 1, "color": "red"},
            {"class": "car", "count": 1, "color": "orange"},
        ],
    }


@pytest.mark.parametrize("number", range(4))
def test_a_picture_drawn_as_a_position_prompt_says_passes_the_rules(number):
    record = made.position(number)
    b, a = (clause["class"] for clause in record["include"])
    x, y = {"left of": (-9, 0), "right of": (9, 0), "above": (0, -9), "below": (0, 9)}[RELATIONS[number]]
    found = [Detection(a, "", (x, y, x + 1, y + 1)), Detection(b, "", (0, 0, 1, 1))]
    assert RELATIONS[number] in relations(*found)
    assert judge(found, record).strict == 1
    assert f"{a} {RELATIONS[number]} " in record["prompt"]


def test_people_are_not_painted():
    assert not any("person" in r["prompt"] for tag in ("colors", "color_attr") for r in everything(tag))


@pytest.mark.parametrize("tag", quoted_text.KINDS)
def test_every_text_prompt_has_exactly_one_quoted_text_which_is_its_target(tag):
    for record in everything(tag):
        assert record["prompt"].count('"') == 2
        assert QUOTED.search(record["prompt"])[1] == record["text"] == target(record["prompt"], record)


def test_the_usual_mix_is_that_of_the_public_training_set():
    assert make_file("geneval", 170, 0).counts == {
        "position": 70,
        "counting": 50,
        "color_attr": 30,
        "colors": 10,
        "two_object": 10,
    }
    assert set(make_file("text", 40, 0).counts.values()) == {10}


def test_a_short_list_is_the_beginning_of_a_long_one_with_the_same_seed():
    long = records("geneval", 200, seed=3)
    assert records("geneval", 40, seed=3) == long[:40]
    assert Counter(r["tag"] for r in long[:17]) == {
        "position": 7,
        "counting": 5,
        "color_attr": 3,
        "colors": 1,
        "two_object": 1,
    }
    assert [r["tag"] for r in long[:5]] == ["position", "counting", "position", "color_attr", "counting"]
    assert records("geneval", 40, seed=4) != long[:40]


@pytest.mark.parametrize(("name", "count"), [("geneval", 2000), ("text", 2000)])
def test_a_list_has_no_duplicates_and_other_tags_go_on_where_one_has_no_more(name, count):
    found = [normal(r["prompt"]) for r in records(name, count)]
    assert len(set(found)) == len(found) == count


def test_tags_can_be_chosen_with_their_shares():
    assert make_file("geneval", 30, 0, tags="counting=2, single_object").counts == {
        "counting": 20,
        "single_object": 10,
    }
    assert make_file("geneval", 320, 0, tags="counting,single_object").counts == {
        "counting": 240,
        "single_object": 80,
    }


@pytest.mark.parametrize("name", ["geneval", "text"])
def test_a_held_out_list_shares_nothing_with_the_other(tmp_path, name):
    held_out = make_file(name, 150, 0)
    file = tmp_path / "held_out.jsonl"
    file.write_text(held_out.text.replace("a photo of", "A photo  of"), encoding="utf-8")
    same_seed = records(name, 150, without=str(file))
    kept_out = {normal(json.loads(line)["prompt"]) for line in held_out.text.splitlines()}
    assert len(same_seed) == 150
    assert not kept_out & {normal(r["prompt"]) for r in same_seed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("genevall", 3, 0), r"unknown prompt generator 'genevall' \(did you mean 'geneval'\?\); known: geneval, text"),
        (("geneval", 0, 0), "--count must be above 0, got 0"),
        (("geneval", 81, 0, "single_object"), r"only 80 different prompts with the tags single_object, not 81"),
        (("geneval", 3, 0, "count"), r"unknown tag 'count' \(did you mean 'counting'\?\); known: position, counting"),
        (("geneval", 3, 0, "counting=x"), "'counting=x' must be TAG or TAG=SHARE"),
        (("geneval", 3, 0, "counting=0"), "share above 0"),
        (("geneval", 3, 0, "counting=nan"), "share above 0"),
        (("geneval", 3, 0, "", "nowhere.jsonl"), r"nowhere\.jsonl does not exist"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_file(*arguments)


def test_when_the_other_file_took_the_prompts_the_message_says_so(tmp_path):
    file = tmp_path / "all.jsonl"
    file.write_text(make_file("geneval", 75, 1, tags="single_object").text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"only 5 different prompts .* that are not in the other file, not 6"):
        make_file("geneval", 6, 0, tags="single_object", without=str(file))


@pytest.mark.parametrize("name", ["geneval", "text"])
def test_a_made_file_is_a_prompt_file(tmp_path, name):
    made_file = make_file(name, 20, 0)
    (tmp_path / "made.jsonl").write_text(made_file.text, encoding="utf-8")
    prompts = load_prompts("made.jsonl", tmp_path)
    assert len(prompts) == sum(made_file.counts.values()) == 20
    assert dump(prompts) == made_file.text


@pytest.mark.parametrize("name", SETS)
def test_a_shipped_list_is_valid_and_says_the_same_in_words_and_in_metadata(name, tmp_path):
    prompts = load_prompts(name, tmp_path)
    assert len({normal(p.text) for p in prompts}) == len(prompts) == 32
    assert {p.metadata["tag"] for p in prompts} <= TAGS[name]
    for prompt in prompts:
        if name == "set:text":
            assert target(prompt.text, {}) == prompt.metadata["text"]
            assert prompt.text.count('"') == 2
            continue
        assert problems(prompt.metadata, CLASSES, COLOURS) is None
        for clause in prompt.metadata["include"]:
            words = [f"{n} {clause['color']}" if "color" in clause else n for n in COUNTS[clause["count"]]]
            assert re.search(rf"\b({'|'.join(words)}) {clause['class']}", prompt.text), prompt.text
            if "position" in clause:
                assert f"{clause['class']} to the {clause['position'][0]} a" in prompt.text.replace(
                    " above ", " to the above "
                ).replace(" below ", " to the below ")


@pytest.mark.parametrize("name", SETS)
def test_every_thing_a_shipped_list_names_is_in_its_metadata(name, tmp_path):
    for prompt in load_prompts(name, tmp_path) if name != "set:text" else ():
        text = prompt.text
        for clause in sorted(prompt.metadata["include"], key=lambda c: len(c["class"]), reverse=True):
            text = re.sub(
                rf"({clause['color']} )?{clause['class']}" if "color" in clause else clause["class"], "", text
            )
        assert not [name for name in CLASSES if re.search(rf"\b{name}(s|es)?\b", text)], prompt.text


def test_the_lists_are_part_of_the_package():
    assert SETS == ["set:colours", "set:counting", "set:position", "set:text"]
    assert all(path.is_file() for path in BUILT_IN.values())
