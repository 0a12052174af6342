"""``densegrpo rewards`` and ``densegrpo score``."""

import json

import numpy as np
import pytest
import torch
from densegrpo.engine import score_files as module
from densegrpo.engine.cli import main
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import MODEL_REWARDS, OTHER_REWARDS, REWARDS, VARIANTS, make_reward
from densegrpo.engine.score_files import parse_reward, read_image, score_files
from PIL import Image
from tiny_clip import write_clip
from tiny_reward_models import write_every_model

BRIGHT = [{"name": "brightness"}]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    folder = tmp_path / "reward models"
    folder.mkdir()
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def picture(tmp_path):
    def save(name, grey=None, size=(40, 30), mode="RGB", **options):
        random = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
        pixels = random if grey is None else np.full_like(random, grey)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name, **options)
        return tmp_path / name

    return save


def test_scores_stand_in_a_table_with_one_line_per_file(picture, capsys):
    files = [picture("dark.png", 51), picture("light.png", 204, (20, 20))]
    status = main(["score", *map(str, files), "--reward", "brightness", "--reward", "brightness:target=0.2"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[0].split() == ["image", "brightness", "brightness", "0.2"]
    assert lines[1].split() == [str(files[0]), "0.2000", "1.0000"]
    assert lines[2].split() == [str(files[1]), "0.8000", "0.4000"]
    assert len({len(line) for line in lines}) == 1


def test_every_score_belongs_to_its_file_whatever_their_sizes(picture, monkeypatch):
    monkeypatch.setattr(module, "PART", 2)
    greys, sizes = [10, 200, 30, 90, 150, 60], [(8, 8), (8, 8), (8, 8), (9, 8), (8, 8), (8, 9)]
    files = [picture(f"{i}.png", *pair) for i, pair in enumerate(zip(greys, sizes, strict=True))]
    found = score_files(files, [""], BRIGHT)
    assert found.scores["brightness"] == pytest.approx([grey / 255 for grey in greys], abs=1e-6)
    assert found.files == [str(file) for file in files]
    assert not found.reasons


def test_details_have_their_own_column_and_each_file_is_scored_with_its_own_prompt(root, picture, tmp_path):
    write_clip(root / "PickScore_v1", 1)
    files, prompts = [picture("a.png"), picture("bb.png")], ["a red cat", "a dog"]
    found = score_files([tmp_path / "missing.png", *files], ["a cat", *prompts], [{"name": "pickscore"}, *BRIGHT])
    assert list(found.scores) == ["pickscore", "pickscore/published", "brightness"]
    images = torch.stack([read_image(file) for file in files])
    expected = make_reward("pickscore")(RewardBatch(images, prompts, [{}, {}])).scores
    assert found.scores["pickscore"][1:] == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.scores["pickscore/published"][1:] == pytest.approx((26 * expected).tolist(), rel=1e-5)


def test_files_that_cannot_be_scored_give_nan_with_a_reason(picture, tmp_path, capsys):
    good = picture("good.png", 102)
    (tmp_path / "text.png").write_text("no image")
    cut = picture("cut.png")
    cut.write_bytes(cut.read_bytes()[:200])
    files = ["text.png", str(good), "cut.png", "missing.png", "."]
    status = main(["score", *files, "--reward", "brightness", "--reward", "jpeg"])
    out, err = capsys.readouterr()
    assert status == 1
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[1] for row in rows] == ["nan", "0.4000", "nan", "nan", "nan"]
    assert [row[2] == "nan" for row in rows] == [True, False, True, True, True]
    reasons = err.splitlines()
    assert len(reasons) == 4
    assert reasons[0].startswith("densegrpo: text.png: cannot be read as an image (")
    assert reasons[1].startswith("densegrpo: cut.png: cannot be read as an image (")
    assert reasons[2] == "densegrpo: missing.png: there is no such file"
    assert reasons[3].startswith("densegrpo: .: it is a folder; name the files in it")


def test_a_reward_that_fails_gives_nan_with_its_reason(root, picture, monkeypatch):
    write_clip(root / "clip-vit-large-patch14")
    files = [picture("a.png"), picture("b.png")]
    monkeypatch.setattr("densegrpo.engine.rewards.clipscore.load_clip", lambda *_: 1 / 0)
    found = score_files(files, ["a cat"], [{"name": "clipscore"}, *BRIGHT])
    assert found.table().count("nan") == 2
    assert found.reasons == [f"{file}: clipscore: ZeroDivisionError: division by zero" for file in files]


@pytest.mark.parametrize(("mode", "name"), [("L", "grey.png"), ("P", "palette.png"), ("CMYK", "print.jpg")])
def test_other_colour_modes_are_read_as_rgb(picture, mode, name):
    assert read_image(picture(name, 100, mode=mode)).mean().item() == pytest.approx(100 / 255, abs=0.02)


def test_transparent_and_deep_images_are_refused_because_their_colours_are_unclear(tmp_path):
    alpha = np.full((8, 8, 4), 255, np.uint8)
    Image.fromarray(alpha).save(tmp_path / "opaque.png")
    assert read_image(tmp_path / "opaque.png").min() == 1
    alpha[0, 0, 3] = 254
    Image.fromarray(alpha).save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match="it is transparent in places; put it on a background first"):
        read_image(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"more than 8 bits per colour \(mode I;16\); save it with 8 bits"):
        read_image(tmp_path / "deep.png")


def test_photographs_are_turned_upright(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(picture("turned.jpg", size=(40, 30), exif=exif)).shape == (3, 40, 30)


def test_image_bombs_are_refused(picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"cannot be read as an image \(Image size \(1200 pixels\) exceeds limit"):
        read_image(picture("bomb.png"))


def test_prompts_must_fit_the_files(picture, capsys):
    files = [str(picture(f"{i}.png")) for i in range(3)]
    assert main(["score", *files, "--prompt", "a", "--prompt", "b", "--reward", "brightness"]) == 2
    assert "3 images need one --prompt, or 3 of them; got 2" in capsys.readouterr().err


def test_an_empty_prompt_is_refused_where_one_is_needed(root, picture, capsys):
    write_clip(root / "clip-vit-large-patch14")
    assert main(["score", str(picture("a.png")), "--reward", "clipscore"]) == 2
    assert "reward clipscore: prompt 1 is empty; it compares an image with a text" in capsys.readouterr().err


def test_a_missing_model_ends_in_one_sentence_with_the_command(picture, capsys):
    assert main(["score", str(picture("a.png")), "--prompt", "a", "--reward", "pickscore"]) == 2
    assert "hf download yuvalkirstain/PickScore_v1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("jpeg", {"name": "jpeg"}),
        ("jpeg:direction=incompressible", {"name": "jpeg", "direction": "incompressible"}),
        ("brightness:target=0.25", {"name": "brightness", "target": 0.25}),
        ("pickscore:batch_size=4, model=mine", {"name": "pickscore", "batch_size": 4, "model": "mine"}),
        ("shapes strict", VARIANTS["shapes strict"]),
        (
            "vlm_judge:preset=own,question=Is it red, blue, or 1, 2 = 3?, mode=score ,model=a:b",
            {
                "name": "vlm_judge",
                "preset": "own",
                "question": "Is it red, blue, or 1, 2 = 3?",
                "mode": "score",
                "model": "a:b",
            },
        ),
        ("brightness:target=0.25,", {"name": "brightness", "target": 0.25}),
        ("jpeg:,direction=incompressible", {"name": "jpeg", "direction": "incompressible"}),
        (
            '{"name": "vlm_judge", "preset": "own", "question": "Is it, mode=score, so?\\nYes"}',
            {"name": "vlm_judge", "preset": "own", "question": "Is it, mode=score, so?\nYes"},
        ),
    ],
)
def test_a_reward_is_written_with_its_options(text, entry):
    assert parse_reward(text) == entry


def test_a_reward_of_a_configuration_can_be_given_as_it_stands_there(picture, capsys):
    assert (
        main(["score", str(picture("a.png", 51)), "--reward", json.dumps({"name": "brightness", "target": 0.2})]) == 0
    )
    assert capsys.readouterr().out.split()[-1] == "1.0000"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pikscore", "unknown reward 'pikscore' (did you mean 'pickscore'?); known: brightness"),
        ("brightness:0.5", "'0.5' must be OPTION=VALUE; brightness has: target"),
        ("brightness:target=0.5,1", "must be a number in 0.0..1.0, got '0.5,1'"),
        ("{name: brightness}", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
        ("{'name': 'brightness'}", 'as Windows\' does, write "{\\"name\\": \\"brightness\\"}"'),
        ('{"reward": "brightness"}', 'must have a "name", such as {"name": "brightness"}'),
        ('{"name": "pikscore"}', "unknown reward 'pikscore' (did you mean 'pickscore'?); known: brightness"),
        ('{"name": "brightness", "target": "low"}', "must be a number in 0.0..1.0, got 'low'"),
        ("brightness:tarpet=1", "has no option 'tarpet' (did you mean 'target'?); it has: target"),
        ("brightness:target=low", "must be a number in 0.0..1.0, got 'low'"),
        ("pickscore:batch_size=1.5", "must be a whole number in 1..1024, got '1.5'"),
        ("pickscore:placement=gpu", "must be one of 'swap', 'resident', 'cpu', got 'gpu'"),
    ],
)
def test_wrong_rewards_are_named(picture, capsys, text, message):
    assert main(["score", str(picture("a.png")), "--prompt", "a", "--reward", text]) == 2
    assert message in capsys.readouterr().err


def sections(text):
    """Name of the reward -> its lines."""
    return {part.split(":")[0]: part for part in text.split("\n\n")[1:]}


def test_the_list_says_what_each_reward_needs_and_how_to_get_it(root, capsys):
    assert main(["rewards"]) == 0
    text = capsys.readouterr().out
    found = sections(text)
    assert list(found) == [*REWARDS, *MODEL_REWARDS, *OTHER_REWARDS]
    assert str(root) in text.splitlines()[0]
    for name in REWARDS:
        assert found[name].strip().endswith("installed: it needs no files")
    assert "options: target" in found["brightness"]
    assert "needs a server" in found["remote_http"]
    assert "needs a server" in found["vlm_judge"]
    assert "needs no files" in found["human_vote"]
    for name in MODEL_REWARDS:
        assert "    not installed: folder " in found[name]
        assert "licence" in found[name]
        assert "hf download" in found[name]


def test_the_list_names_models_that_are_there_but_damaged(root, capsys):
    write_clip(root / "clip-vit-large-patch14")
    (root / "clip-vit-large-patch14/model.safetensors").write_bytes(b"")
    main(["rewards"])
    found = sections(capsys.readouterr().out)["clipscore"]
    assert "needs clip-vit-large-patch14: config.json" in found
    assert "not installed: " in found
    assert "cannot be read as weights" in found


def test_the_list_says_what_is_installed(root, capsys):
    write_every_model(root)
    main(["rewards"])
    found = sections(capsys.readouterr().out)
    assert all(found[name].strip().endswith("\n    installed") for name in MODEL_REWARDS)


def test_the_models_are_among_what_a_configuration_can_hold(capsys):
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name}: " in text for name in MODEL_REWARDS)
    assert 'model = "PickScore_v1"' in text


def test_a_prompt_may_be_a_line_with_metadata(tmp_path, capsys):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    line = '{"prompt": "nothing of the demo", "include": [{"class": "circle", "count": 1, "color": "red"}]}'
    assert main(["score", str(tmp_path / "a.png"), "--prompt", line, "--reward", "shapes strict"]) == 0
    assert "0.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("brightness:cap=0.5", "cap belongs to the rewards of a run"),
        ("human_vote", "people's votes are asked for in training only"),
    ],
)
def test_what_only_training_has_is_refused(tmp_path, capsys, reward, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main(["score", str(tmp_path / "a.png"), "--reward", reward]) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_written_into_folders_that_exist(tmp_path, capsys):
    path = tmp_path / "new" / "a.jsonl"
    assert main(["prompts", "text", "--count", "3", "--out", str(path)]) == 2
    assert "there is no folder" in capsys.readouterr().err
    path.parent.mkdir()
    assert main(["prompts", "text", "--count", "3", "--out", str(path)]) == 0
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
