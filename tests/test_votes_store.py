"""Votes on disk: crash-safe, lossless, and a data set."""

import json
import os

import pytest
import torch
from densegrpo.engine.checkpoint import SaveError
from densegrpo.engine.pictures import to_tensor
from densegrpo.engine.votes.board import Group, group_id
from densegrpo.engine.votes.store import Store, encode, read_scores, read_votes, write_scores
from PIL import Image

IMAGES = (torch.arange(3 * 3 * 8 * 6).view(3, 3, 8, 6) * 7 % 256) / 255
ENCODED = dict(encode(image) for image in IMAGES)
NAMES = list(ENCODED)


def group(mode="like", prompt="a red circle, ö\u2028"):
    return Group(group_id(mode, prompt, NAMES), mode, prompt, NAMES, 1, 2, 7, 1, 60.0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "votes")


def test_the_name_of_an_image_is_that_of_its_pixels_and_shape():
    assert len(set(NAMES)) == 3
    assert encode(IMAGES[0])[0] == NAMES[0]
    assert encode(IMAGES[0] + 0.001)[0] == NAMES[0], "less than an 8-bit level"
    black = torch.zeros(3, 4, 9)
    assert encode(black)[0] != encode(black.movedim(1, 2))[0]


def test_images_are_kept_without_loss(store):
    store.save(group(), "me", {"likes": NAMES[:1], "dislikes": []}, ENCODED)
    for name, image in zip(NAMES, IMAGES, strict=True):
        kept = to_tensor(Image.open(store.folder / "images" / f"{name}.png"))
        torch.testing.assert_close(kept, image, rtol=0, atol=1e-6)


def test_votes_are_known_to_the_next_session(store):
    store.save(group(), "me", {"likes": NAMES[:1], "dislikes": []}, ENCODED)
    store.save(group("rank"), "me", None, ENCODED)
    store.save(group(), "you", {"likes": [], "dislikes": NAMES[:1]}, ENCODED)
    store.save(group(), "me", {"likes": NAMES[1:2], "dislikes": []}, ENCODED)
    again = Store(store.folder)
    assert again.answers(group().id) == {
        "me": {"likes": NAMES[1:2], "dislikes": []},
        "you": {"likes": [], "dislikes": NAMES[:1]},
    }
    assert again.answers(group("rank").id) == {"me": None}
    assert again.answers("unknown") == {}
    vote = read_votes(store.folder)[0]
    assert (vote.prompt, vote.iteration, vote.images) == (group().prompt, 7, NAMES)


def test_skipping_keeps_no_images(store):
    store.save(group(), "me", None, ENCODED)
    assert list((store.folder / "images").iterdir()) == []


@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_a_crash_while_a_line_is_written_loses_that_line_only(store, kept):
    store.save(group(), "me", {"likes": NAMES[:1], "dislikes": []}, ENCODED)
    path = store.folder / "votes.jsonl"
    first = path.read_bytes()
    path.write_bytes(first + first[:-1][:kept])
    again = Store(store.folder)
    again.save(group(), "you", None, ENCODED)
    assert path.read_bytes().startswith(first)
    assert [vote.voter for vote in read_votes(store.folder)] == ["me", "you"]


def test_a_full_disk_is_said_and_leaves_nothing_behind(store, monkeypatch):
    store.save(group(), "me", None, ENCODED)
    before = (store.folder / "votes.jsonl").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match=r"No space left.*free some space"):
            store.save(group(), "you", None, ENCODED)
    assert (store.folder / "votes.jsonl").read_bytes() == before
    assert store.answers(group().id).keys() == {"me"}
    store.save(group(), "you", None, ENCODED)
    assert len(read_votes(store.folder)) == 2


def test_an_image_cut_off_by_a_crash_is_written_again(store):
    (store.folder / "images" / f"{NAMES[0]}.tmp").write_bytes(b"half")
    store.save(group(), "me", {"likes": NAMES[:1], "dislikes": []}, ENCODED)
    assert sorted(path.name for path in (store.folder / "images").iterdir()) == sorted(f"{n}.png" for n in NAMES)


def test_images_are_there_before_the_vote_that_names_them(store, monkeypatch):
    monkeypatch.setattr("densegrpo.engine.votes.store.append", lambda path, line: pytest.exit("power cut"))
    with pytest.raises(BaseException, match="power cut"):
        store.save(group(), "me", {"likes": NAMES[:1], "dislikes": []}, ENCODED)
    assert len(list((store.folder / "images").iterdir())) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", ["../../secret"]),
        ("images", [7]),
        ("mode", "love"),
        ("prompt", "another"),
        ("ballot", {"likes": ["z"]}),
        ("voter", None),
        ("surplus", 1),
    ],
)
def test_a_damaged_or_forged_line_is_named(store, key, value):
    store.save(group(), "me", {"likes": NAMES[:1], "dislikes": []}, ENCODED)
    path = store.folder / "votes.jsonl"
    row = json.loads(path.read_text(encoding="utf-8")) | {key: value}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"votes\.jsonl, line 1 is no vote .* remove that line"):
        Store(store.folder)


def test_a_forged_image_name_never_becomes_a_path(store):
    names = ["../../secret"]
    row = {"time": "", "group": group_id("like", "p", names), "mode": "like", "prompt": "p", "iteration": None}
    row |= {"images": names, "voter": "me", "ballot": {"likes": names}}
    (store.folder / "votes.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a name that no image has"):
        write_scores(store.folder)


def test_stored_votes_become_a_reward_data_set(store):
    store.save(group(), "me", {"likes": NAMES[:1], "dislikes": []}, ENCODED)
    store.save(group(), "you", {"likes": NAMES[:1], "dislikes": NAMES[1:2]}, ENCODED)
    store.save(group("rank"), "me", {"order": NAMES[::-1]}, ENCODED)
    store.save(group("like", "skipped by all"), "me", None, ENCODED)
    moved = store.folder.rename(store.folder.with_name("moved"))
    found = read_scores(write_scores(moved))
    liked = [score for score in found if score.group == group().id]
    assert [(score.image.stem, score.score, score.voters) for score in liked] == [
        (NAMES[0], 1.0, 2),
        (NAMES[1], 0.25, 2),
        (NAMES[2], 0.5, 2),
    ]
    assert all(score.image.is_file() and score.prompt == group().prompt for score in found)
    assert [score.score for score in found if score.group != group().id] == [0, 0.5, 1]


def test_a_change_of_mind_counts_in_the_data_set(store):
    store.save(group(), "me", {"likes": NAMES[:1], "dislikes": []}, ENCODED)
    store.save(group(), "me", {"likes": NAMES[1:2], "dislikes": []}, ENCODED)
    assert [score.score for score in read_scores(write_scores(store.folder))] == [0.5, 1, 0.5]


def test_a_folder_without_votes_is_no_data_set(store):
    with pytest.raises(ValueError, match="holds no votes"):
        write_scores(store.folder)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "../outside.png", "prompt": "", "score": 1, "voters": 1, "group": "g"}', "is no image"),
        ('{"image": "images/missing.png", "prompt": "", "score": 1, "voters": 1, "group": "g"}', "is no image"),
        ('{"image": "images/missing.png"}', "is no score"),
        ("[", "is no score"),
    ],
)
def test_a_wrong_line_of_a_data_set_is_named(tmp_path, line, reason):
    (tmp_path / "outside.png").write_bytes(b"")
    file = tmp_path / "votes" / "scores.jsonl"
    file.parent.mkdir()
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"line 1.*{reason}"):
        read_scores(file)
