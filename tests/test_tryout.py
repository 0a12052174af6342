"""Trying a reward on images, as the node Reward Score does."""

import pytest
import torch
from densegrpo.engine.rewards.brightness import Brightness
from densegrpo.engine.tryout import score_images


def grey(*levels):
    """Images [N, H, W, C] of these brightnesses."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 16, 16, 3)


def test_the_report_has_the_mean_first_and_then_each_image():
    _, scores, report = score_images(grey(0.2, 0.6), "", [{"name": "brightness"}], "each")
    assert scores == pytest.approx([0.2, 0.6])
    assert report.splitlines() == ["mean of 2: brightness 0.400", "1: brightness 0.200", "2: brightness 0.600"]


def test_one_image_is_its_own_mean():
    assert score_images(grey(0.2), "", [{"name": "brightness"}], "each")[2] == "1: brightness 0.200"


def test_several_rewards_have_a_mean_each():
    report = score_images(grey(0.2, 0.6), "", [{"name": "brightness"}, {"name": "jpeg"}], "sum")[2]
    assert report.startswith("mean of 2: brightness 0.400, jpeg ")


def test_an_image_without_a_score_is_left_out_of_the_mean_and_one_reason_is_said_once(monkeypatch):
    whole = Brightness.__call__

    def broken(self, batch):
        result = whole(self, batch)
        result.scores[1:] = torch.nan
        return result

    monkeypatch.setattr(Brightness, "__call__", broken)
    report = score_images(grey(0.2, 0.6, 0.8), "", [{"name": "brightness"}], "each")[2].splitlines()
    assert report[0] == "mean of 3: brightness 0.200"
    assert report[4:] == ["brightness: the score is not a finite number"]


def test_images_and_lines_of_prompts_must_fit():
    with pytest.raises(ValueError, match="3 images need one prompt or 3 lines, got 2 lines"):
        score_images(grey(0.1, 0.2, 0.3), "a\nb", [{"name": "brightness"}], "each")
