"""Images on their way to a server."""

import base64
import io
import threading

import numpy as np
import pytest
import torch
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.remote import http_reward, picture
from densegrpo.engine.rewards.remote import judge as judge_module
from densegrpo.engine.rewards.remote.http_reward import RemoteHttp
from densegrpo.engine.rewards.remote.judge import Answers
from densegrpo.engine.rewards.remote.picture import Picture, png_file, text_of
from judging import batch, judge
from PIL import Image
from stub_servers import Stub, chat, grey_rewards, judge_of

CLAUSES = {"include": [{"class": "cow", "count": 2, "color": "red"}, {"class": "dog", "count": 1}]}
"""Three questions."""


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(judge_module, "KEPT", Answers())


@pytest.fixture
def encoded(monkeypatch):
    """What was encoded, in order."""
    made = []

    def counted(image):
        made.append(image)
        return png_file(image)

    for module in (picture, http_reward):
        monkeypatch.setattr(module, "png_file", counted)
    return made


def pixels(file):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).movedim(-1, 0)


@pytest.mark.parametrize("kind", ["noise", "flat", "levels"])
def test_a_file_holds_the_image_without_loss(kind):
    numbers = {
        "noise": torch.randint(0, 256, (3, 37, 21), generator=torch.Generator().manual_seed(0)),
        "flat": torch.full((3, 64, 64), 7),
        "levels": torch.arange(256).expand(3, 5, 256),
    }[kind]
    file = png_file(numbers / 255)
    assert torch.equal(pixels(file), numbers)
    assert Image.open(io.BytesIO(file)).mode == "RGB"


def test_numbers_between_levels_are_rounded_and_those_outside_are_cut():
    image = torch.tensor([-1.0, 0.6 / 255, 1.4 / 255, 254.6 / 255, 2.0]).expand(3, 1, 5)
    assert pixels(png_file(image))[0, 0].tolist() == [0, 1, 1, 255, 255]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_image_with_a_pixel_that_is_no_number_has_no_file(value):
    image = torch.zeros(3, 4, 4)
    image[2, 3, 3] = value
    assert png_file(image) is None


def test_the_first_request_is_sent_before_the_second_image_is_encoded(encoded):
    with Stub(lambda request: order.append(len(encoded)) or grey_rewards(request)) as stub:
        order = []
        RemoteHttp(url=stub.url, batch_size=1, workers=1)(batch(4))
        assert order == [1, 2, 3, 4]
        order, encoded[:] = [], []
        RemoteHttp(url=stub.url, batch_size=2, workers=1)(batch(4))
        assert order == [2, 4]
    with Stub(judge_of(lambda request: order.append(len(encoded)) or chat("Yes"))) as stub:
        order, encoded[:] = [], []
        judge(stub, workers=1)(batch(3))
    assert order == [1, 2, 3]


@pytest.mark.parametrize("ask", [lambda url: RemoteHttp(url=url, batch_size=1, workers=2), lambda url: judge(url)])
def test_several_images_are_encoded_at_once(ask, monkeypatch):
    """Each waits until another one is under way."""
    meeting = threading.Barrier(2)

    def meet(image):
        meeting.wait(5)
        return png_file(image)

    for module in (picture, http_reward):
        monkeypatch.setattr(module, "png_file", meet)
    with Stub(lambda r: chat("Yes") if "chat" in r.path else grey_rewards(r)) as stub:
        assert not ask(stub.url)(batch(4)).errors


def test_of_a_request_only_images_that_are_numbers_are_sent(encoded):
    images = batch(5)
    images.images[[0, 1, 3], 0, 0, 0] = torch.nan
    with Stub(grey_rewards) as stub:
        result = RemoteHttp(url=stub.url, batch_size=2, workers=1)(images)
    assert [request.data["prompt"] for request in stub.requests] == [["prompt 2"], ["prompt 4"]]
    assert set(result.errors) == {0, 1, 3}
    torch.testing.assert_close(result.scores[[2, 4]], torch.tensor([0.5, 1.0]), atol=0.003, rtol=0)


def test_an_image_is_encoded_once_however_many_questions_are_asked_about_it(encoded):
    with Stub(judge_of(chat("Yes"))) as stub:
        result = judge(stub, preset="geneval_atoms")(batch(4, [CLAUSES] * 4))
    assert not result.errors
    assert len(stub.requests) == 12
    assert len(encoded) == 4


def test_each_question_shows_its_own_image():
    with Stub(judge_of(chat("Yes"))) as stub:
        judge(stub, preset="geneval_atoms")(batch(4, [CLAUSES] * 4))
    shown = [r.data["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2] for r in stub.requests]
    assert sorted(shown) == sorted(3 * [text_of(png_file(image)) for image in batch(4).images])


def test_a_broken_image_has_no_score_whatever_is_asked(encoded):
    images = batch(2, [CLAUSES] * 2)
    images.images[0, 0, 0, 0] = torch.nan
    with Stub(judge_of(chat("Yes"))) as stub:
        result = judge(stub, preset="geneval_atoms")(images)
    assert result.errors == {0: "the image has pixels that are not numbers"}
    assert result.scores.isnan().tolist() == [True, False]
    assert len(stub.requests) == 3


def test_a_file_is_kept_for_its_last_reader_only(encoded):
    one = Picture(torch.rand(3, 8, 8), 3)
    first = one.read()
    assert one.file == first
    assert one.read() == first
    assert one.file == first
    assert one.read() == first
    assert one.file is None
    assert len(encoded) == 1


def test_a_picture_is_encoded_once_by_several_threads(encoded):
    one, files = Picture(torch.rand(3, 300, 300), 8), []
    threads = [threading.Thread(target=lambda: files.append(one.read())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(encoded) == 1
    assert files == [png_file(one.image)] * 8


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8)])
def test_a_judge_refuses_images_that_are_not_rgb(shape):
    images = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"\(RGB\), got torch.float32 \[{shape[0]}, {shape[1]}, "):
        judge("http://127.0.0.1:1")(RewardBatch(images, ["a"] * len(images), [{}] * len(images)))


def test_text_of_a_file_is_plain_base64():
    assert base64.b64decode(text_of(b"\x00\xff+/")) == b"\x00\xff+/"
