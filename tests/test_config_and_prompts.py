import json
import re
from pathlib import Path

import pytest
from densegrpo.engine.config import make_config, read_config
from densegrpo.engine.prompts import dump, load_prompts
from densegrpo.engine.rewards import make_panel
from densegrpo.engine.rewards.geneval import problems
from densegrpo.engine.rewards.geneval_words import CLASSES, COLOURS

ROOT = Path(__file__).resolve().parents[1]
GENEVAL_LINES = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "counting", "include": [{"class": "person", "count": 3}], "exclude": [{"class": "person", "count": 4}], \
"prompt": "a photo of three persons"}
{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, \
{"class": "dog", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a dog"}
"""
MINIMAL = {
    "name": "try",
    "model": {"name": "demo"},
    "method": {"name": "dense_grpo"},
    "rewards": [{"name": "brightness"}],
    "prompts": ["a red circle"],
}


def test_a_configuration_survives_writing_and_reading():
    config = make_config(MINIMAL | {"training": {"iterations": 7}, "lora": {"rank": 4}})
    assert make_config(json.loads(config.to_json())) == config
    assert config.training.iterations == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainin": {}}, r"no key 'trainin' \(did you mean 'training'\?\)"),
        ({"training": {"iteration": 3}}, r"training has no option 'iteration' \(did you mean 'iterations'\?\)"),
        ({"training": {"iterations": -1}}, r"training: iterations .* in 0\.\.1000000, got -1"),
        ({"training": {"iterations": 2.5}}, "iterations .* whole number"),
        ({"training": {"seed": True}}, "seed .* whole number"),
        ({"training": []}, "training must be an object"),
        ({"method": {"name": "dense_grop"}}, r"unknown recipe 'dense_grop' \(did you mean 'dense_grpo'\?\)"),
        ({"method": {"name": "dense_grpo", "noise": 9}}, r"method dense_grpo: noise .* in 0\.01\.\.2\.0, got 9"),
        ({"method": {"name": "dense_grpo", "kl": "soft"}}, "kl .* must be one of 'exact'"),
        ({"method": {"name": "flow_grpo", "probe_evaluations": 2}}, "no option 'probe_evaluations'"),
        ({"model": {"name": "sdxl"}}, "unknown model 'sdxl'.* known: comfy, demo, diffusers"),
        ({"model": "demo"}, 'model must be an object with a "name"'),
        ({"rewards": []}, "at least one reward"),
        ({"rewards": [{"name": "pikscore"}]}, "unknown reward 'pikscore'"),
        ({"rewards": [{"name": "brightness", "weight": "much"}]}, "weight .* must be a number"),
        ({"rewards": [{"name": "shapes", "score": "kind"}]}, "score .* 'dense', 'partial', 'strict'"),
        ({"reward_mode": "product"}, "reward_mode .* 'each', 'gdpo', 'sum'"),
        ({"name": "../elsewhere"}, "must be a folder name"),
        ({"name": ""}, "must be a folder name"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_config(MINIMAL | change)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="lacks method, rewards"):
        make_config({k: v for k, v in MINIMAL.items() if k not in ("method", "rewards")})


@pytest.mark.parametrize("text", ["{", "[]", '{"name": 3'])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=r"c\.json is not JSON|must be a JSON object"):
        read_config(tmp_path / "c.json")


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        read_config(tmp_path / "nowhere.json")


def test_prompt_files_are_read_with_their_metadata(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa red circle\n\n  a blue square \n", encoding="utf-8")
    assert [p.text for p in load_prompts("a.txt", tmp_path)] == ["a red circle", "a blue square"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "two cats", "include": [{"class": "cat", "count": 2}]}\n')
    (prompt,) = load_prompts("b.jsonl", tmp_path)
    assert (prompt.text, prompt.metadata["include"][0]["count"]) == ("two cats", 2)
    (tmp_path / "c.jsonl").write_text(dump([prompt]))
    assert load_prompts("c.jsonl", tmp_path) == [prompt]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", r"a\.txt has no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{oops', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "x"}', r'line 1: needs an object with a text "prompt"'),
        ("a.jsonl", '\n{"prompt": "x"}\n{"prompt": " "}', r"a\.jsonl, line 3: the prompt is empty"),
        ("a.csv", "x", r"must end in \.txt or \.jsonl"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_prompts(name, tmp_path)


def test_a_missing_prompt_file_says_what_would_do(tmp_path):
    with pytest.raises(ValueError, match=r"nope\.txt does not exist; give a \.txt or \.jsonl file"):
        load_prompts("nope.txt", tmp_path)
    with pytest.raises(ValueError, match="has no prompts"):
        load_prompts([], tmp_path)
    with pytest.raises(ValueError, match=r"the list of prompts: prompt 2 is empty"):
        load_prompts(["a cat", " "], tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read"):
        load_prompts(".", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("geneval.jsonl", GENEVAL_LINES, ["a photo of a bench", "a photo of three persons", "a photo of a dog"]),
        (
            "ocr.txt",
            'A sign that says "OPEN".\r\nA cake with "Hi".\r\n',
            ['A sign that says "OPEN".', 'A cake with "Hi".'],
        ),
        ("users.txt", "first\u2028half\x0bsecond\x85third\nnext", ["first\u2028half\x0bsecond\x85third", "next"]),
    ],
)
def test_files_of_public_sets_are_read_as_they_are(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text.encode())
    prompts = load_prompts(name, tmp_path)
    assert [p.text for p in prompts] == expected
    for prompt in prompts if name == "geneval.jsonl" else ():
        assert problems(prompt.metadata, CLASSES, COLOURS) is None


def test_what_a_reward_has_against_a_prompt_is_said_with_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a red circle"}\n\n{"prompt": "a cat"}\n{"prompt": "a cat", "include": 3}\n'
    )
    (tmp_path / "b.txt").write_text("a red circle\n\na dog\n")
    panel = make_panel([{"name": "shapes"}])
    with pytest.raises(ValueError, match=r"^reward shapes dense: .*a\.jsonl, line 3 or .*line 4: prompt 'a cat': it"):
        panel.validate(load_prompts("a.jsonl", tmp_path))
    with pytest.raises(ValueError, match=r"b\.txt, line 3: prompt 'a dog': it has no 'include'"):
        panel.validate(load_prompts("b.txt", tmp_path))
    with pytest.raises(ValueError, match=r"^reward shapes dense: prompt 'a dog': it has no"):
        panel.validate(load_prompts(["a dog"], tmp_path))
    assert "line" not in dump(load_prompts("b.txt", tmp_path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path):
    config = read_config(path)
    assert load_prompts(config.prompts, path.parent)


def test_the_configuration_in_the_readme_is_valid():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        make_config(json.loads(block))
