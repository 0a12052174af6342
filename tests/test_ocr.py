"""Reading text: the rules, and the real engine on rendered text."""

import importlib.util
import logging
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from densegrpo.engine import waiting
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import ask, ocr
from densegrpo.engine.rewards.ocr import Ocr, edit_distance, in_reading_order, similarity, target
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

installed = all(importlib.util.find_spec(name) for name in ocr.PACKAGES)
with_engine = pytest.mark.skipif(not installed, reason="rapidocr and onnxruntime are not installed")
TINY = st.text("ab c", max_size=4)


def box(left, top, width=40, height=20):
    return [[left, top], [left + width, top], [left + width, top + height], [left, top + height]]


def picture(text, size=256, font=28, turn=0, place=None):
    image = Image.new("RGB", (size, size), "white")
    where = place or (size * 0.06, size * 0.4)
    ImageDraw.Draw(image).text(where, text, fill="black", font=ImageFont.load_default(font))
    pixels = np.asarray(image.rotate(turn, fillcolor="white")).copy()
    return torch.from_numpy(pixels).movedim(-1, 0).float() / 255


def scored(images, prompts, **options):
    images = torch.stack(images)
    return Ocr(**{"threads": 1, **options})(RewardBatch(images, prompts, [{}] * len(prompts)))


def by_definition(a, b):
    if not a or not b:
        return len(a) + len(b)
    last = by_definition(a[:-1], b[:-1]) + (a[-1] != b[-1])
    return min(last, by_definition(a[:-1], b) + 1, by_definition(a, b[:-1]) + 1)


@given(TINY, TINY)
def test_the_edit_distance_is_that_of_the_definition(a, b):
    assert edit_distance(a, b) == by_definition(a, b)


@pytest.mark.parametrize(
    ("read_text", "wanted", "expected"),
    [
        ("hello world", "Hello World", 1.0),
        ("left HEL LO right", "hello", 1.0),
        ("helo", "hello", 0.8),
        ("", "hello", 0.0),
        ("quite another thing", "abc", 0.0),
        ("xhellx", "hello", 0.6),
        ("Don't - stop...", "Don\u2019t \u2014 stop\u2026", 1.0),
        ("\uff33\uff21\uff2c\uff25\uff01", "sale!", 1.0),
    ],
)
def test_a_score_is_one_minus_the_share_of_wrong_characters(read_text, wanted, expected):
    assert similarity(read_text, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "metadata", "expected"),
    [
        ('a sign that says "OPEN" and "NOW"', {}, "OPEN"),
        ("a sign that says \u201cOPEN\u201d", {}, "OPEN"),
        ('a 12\u201d ruler with "TEN" on it', {}, "TEN"),
        ('a sign that says "OPEN"', {"text": "SHUT"}, "SHUT"),
        ("a sign", {"text": "SHUT"}, "SHUT"),
    ],
)
def test_the_wanted_text_is_named_by_metadata_or_stands_in_quotation_marks(prompt, metadata, expected):
    assert target(prompt, metadata) == expected


@pytest.mark.parametrize(
    ("prompt", "metadata", "message"),
    [
        ("a cat", {}, r"^prompt 'a cat': it has no text in quotation marks; write such as"),
        ('a 12" pizza', {}, "no text in quotation marks"),
        ('a sign that says ""', {}, "no text in quotation marks"),
        ('a sign that says " "', {}, "no text in quotation marks"),
        ('a sign that says "OPEN"', {"text": 3}, "its 'text' 3 is not a text"),
        ('a sign that says "OPEN"', {"text": " "}, "its 'text' ' ' is not a text"),
    ],
)
def test_a_prompt_without_text_is_refused_before_training(monkeypatch, prompt, metadata, message):
    monkeypatch.setattr(ocr, "model_files", lambda: None)
    (found,) = Ocr().validate([prompt, 'a "good" one'], [metadata, {}])
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


def test_pieces_are_joined_line_by_line_from_the_left():
    pieces = [(box(200, 14), "Sale"), (box(100, 60), "Today"), (box(100, 6), "Opening"), (box(0, 10), "Grand")]
    assert in_reading_order(pieces) == "Grand Opening Sale Today"
    assert in_reading_order([]) == ""


def test_lines_close_to_each_other_stay_apart():
    assert in_reading_order([(box(0, 15), "second"), (box(90, 0), "first")]) == "first second"


def test_the_engine_sees_8_bits_blue_first(monkeypatch):
    seen = []
    monkeypatch.setattr(ocr, "load_engine", lambda *settings: seen.append)
    image = torch.zeros(3, 32, 40)
    image[0], image[1] = 1.2, -0.3
    image[2, 0, 0] = 0.5
    assert scored([image], ['"OPEN"']).scores.tolist() == [0]
    assert seen[0].shape == (32, 40, 3)
    assert seen[0].dtype == np.uint8
    assert seen[0][0, :2].tolist() == [[128, 0, 255], [0, 0, 255]]


@pytest.mark.parametrize("lacking", ocr.PACKAGES)
def test_a_missing_package_is_named_with_the_command_that_gets_it(monkeypatch, lacking):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None if name == lacking else object())
    (problem,) = Ocr().validate(['a "good" one'], [{}])
    command = f"{sys.executable} -m pip install rapidocr onnxruntime"
    assert problem == f"reading text needs {lacking}; get it with:  {command}"


@with_engine
def test_a_package_that_is_too_old_or_broken_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(ocr.metadata_of_packages, "version", lambda name: "3.8.4")
    with pytest.raises(ValueError, match=r"rapidocr 3\.8\.4 is too old.*pip install -U rapidocr"):
        ocr.model_files()
    monkeypatch.setattr(ocr.metadata_of_packages, "version", lambda name: "3.10.0")
    monkeypatch.setattr("rapidocr.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=r"rapidocr has no models in .*install it again"):
        ocr.model_files()


def test_a_package_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    (problem,) = Ocr().validate(['a "good" one'], [{}])
    assert "rapidocr is installed but cannot be imported" in problem
    assert "pip install --force-reinstall" in problem


@with_engine
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Hello World", {}),
        ("NASA 2049", {"turn": 20}),
        ("GRPO", {"size": 64, "font": 16}),
        ("Grand Opening", {"size": 512, "font": 40, "turn": -15}),
        ("two\nlines", {"place": (30, 30)}),
    ],
)
def test_rendered_text_is_read_in_full(text, options):
    result = scored([picture(text, **options)], [f'a sign that says "{text}"'])
    assert result.scores.tolist() == result.details["exact"].tolist() == [1.0]
    assert not result.errors


@with_engine
def test_images_without_text_score_zero_and_half_a_text_half():
    noise = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    images = [torch.full((3, 256, 256), 0.5), noise, picture("OPEN"), picture("OPEN HOUSE")]
    result = scored(images, ['"OPEN"', '"OPEN"', '"OPENHERE"', '"house"'])
    assert result.scores.tolist() == [0, 0, 0.5, 1]
    assert result.details["exact"].tolist() == [0, 0, 0, 1]


@with_engine
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 300)])
def test_images_of_any_size_have_a_score(shape):
    assert scored([torch.zeros(3, *shape)], ['"OPEN"']).scores.tolist() == [0]


@with_engine
def test_one_bad_image_or_prompt_does_not_harm_the_others():
    broken = picture("OPEN")
    broken[0, 3, 3] = torch.nan
    result = scored([picture("OPEN"), broken, picture("OPEN")], ['"OPEN"', '"OPEN"', "open"])
    assert result.scores.isnan().tolist() == result.details["exact"].isnan().tolist() == [False, True, True]
    assert result.errors[1] == "the image has pixels that are not numbers"
    assert "no text in quotation marks" in result.errors[2]


def test_a_failure_of_the_engine_is_no_score(monkeypatch):
    def engine(pixels):
        raise MemoryError("too large")

    monkeypatch.setattr(ocr, "load_engine", lambda *settings: engine)
    result = scored([picture("OPEN")], ['"OPEN"'])
    assert result.scores.isnan().all()
    assert result.errors == {0: "MemoryError: too large"}


@with_engine
def test_nothing_is_fetched_or_printed(monkeypatch, capfd):
    def refuse(*address):
        raise OSError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ocr.make_engine.cache_clear()
    logging.getLogger("RapidOCR").setLevel(logging.INFO)
    root = logging.getLogger().level
    assert scored([picture("OPEN"), torch.zeros(3, 256, 256)], ['"OPEN"'] * 2).scores.tolist() == [1, 0]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().level == root
    assert not logging.getLogger("RapidOCR").isEnabledFor(logging.ERROR)


@with_engine
def test_the_models_of_the_package_are_named_so_that_none_is_looked_for(monkeypatch):
    monkeypatch.setattr("rapidocr.RapidOCR", lambda params: params)
    settings = ocr.make_engine.__wrapped__(384, 1)
    assert [settings["Det.model_path"], settings["Rec.model_path"]] == [str(path) for path in ocr.model_files()]
    assert all(path.is_file() for path in ocr.model_files())
    assert not settings["Global.use_cls"]
    assert (settings["Det.limit_side_len"], settings["Det.limit_type"]) == (384, "max")


@with_engine
def test_equal_settings_share_one_engine_which_uses_no_more_threads_than_told():
    images, prompts = [picture("OPEN")], ['"OPEN"']
    ocr.make_engine.cache_clear()
    for _ in range(2):
        scored(images, prompts)
    assert ocr.make_engine.cache_info().misses == 1
    engine = ocr.make_engine(Ocr().detector_side, 1)
    for part in (engine.text_det, engine.text_rec):
        options = part.session.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


def test_several_threads_may_ask_but_the_engine_reads_one_image_at_a_time(monkeypatch):
    inside, most = [], []

    def engine(pixels):
        inside.append(pixels)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()

    monkeypatch.setattr(ocr, "load_engine", lambda *settings: engine)
    threads = [threading.Thread(target=scored, args=([torch.zeros(3, 8, 8)] * 3, ['"a"'] * 3)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 9


def test_a_wish_to_stop_is_heard_between_images(monkeypatch):
    seen = []

    def stop():
        if len(seen) == 2:
            raise RuntimeError("stop")

    monkeypatch.setattr(ocr, "load_engine", lambda *settings: seen.append)
    monkeypatch.setattr(waiting, "INTERRUPTS", [stop])
    with pytest.raises(waiting.Interrupted):
        scored([torch.zeros(3, 8, 8)] * 4, ['"a"'] * 4)
    assert len(seen) == 2


@with_engine
def test_it_works_where_comfyui_runs_nodes_and_leaves_images_and_random_state_alone():
    with torch.inference_mode():
        images = picture("OPEN")[None].repeat(2, 1, 1, 1)
    kept, state = images.clone(), torch.get_rng_state()
    result = ask("ocr", Ocr(threads=1), RewardBatch(images, ['"OPEN"'] * 2, [{}] * 2))
    assert result.scores.tolist() == [1, 1]
    assert result.scores.dtype == torch.float32
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)
