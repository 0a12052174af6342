"""A real browser votes on the page of a headless run: two people, three tabs, keys, clicks, and Stop.

Needs node with npm and Chromium, as test_browser.py does. Screenshots go to the folder ``DENSEGRPO_ARTEFACTS``, or to
pytest's temporary folder.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.brightness import luma
from densegrpo.engine.rewards.human_vote import HumanVote
from test_browser import browser  # noqa: F401

SCRIPT = Path(__file__).parent / "votes_browser.mjs"
HOSTILE = "a red <b>circle</b> <img src=x onerror='window.hacked = true'>"


def pictures(num_groups, per_group, size=64):
    """A batch of soft blobs, each image of another brightness."""
    num = num_groups * per_group
    generator = torch.Generator().manual_seed(num)
    noise = torch.rand((num, 3, 4, 4), generator=generator)
    images = torch.nn.functional.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)
    images = images * torch.linspace(0.2, 1, num)[torch.randperm(num, generator=generator)].view(-1, 1, 1, 1)
    groups = torch.arange(num_groups).repeat_interleave(per_group)
    prompts = [HOSTILE if group == 0 else f"prompt {group}" for group in groups.tolist()]
    return RewardBatch(images, prompts, [{}] * num, groups)


def ranks(values):
    """Place of each value, 0 for the smallest."""
    return values.argsort().argsort()


def test_people_vote_in_a_browser(browser, tmp_path, caplog):  # noqa: F811
    shots = Path(os.environ.get("DENSEGRPO_ARTEFACTS") or tmp_path)
    like, rank = HumanVote(port=0, timeout=15), HumanVote(mode="rank", port=0, timeout=15)
    with like.session(tmp_path / "my_run"), rank.session(tmp_path / "my_run"):
        address = caplog.text.split("open ")[1].split()[0]
        command = [browser.node, str(SCRIPT), address, browser.chromium, str(browser.modules), str(shots)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        first, second = pictures(2, 5), pictures(2, 4)
        liked, ranked = like(first), rank(second)
        with pytest.raises(KeyboardInterrupt):
            like(pictures(1, 2, size=512))
    out, problems = process.communicate(timeout=30)
    assert process.returncode == 0, out + problems
    seen = json.loads(out.splitlines()[-1])
    dark = ranks(luma(first.images[:5]).flatten(1).mean(1))
    assert liked.scores[:5].tolist() == [[1, 1, 0.5, 0.5, 0][place] for place in dark]
    assert liked.skipped == {5, 6, 7, 8, 9}
    assert liked.errors == {}
    dark = [ranks(luma(images).flatten(1).mean(1)) for images in second.images.split(4)]
    assert ranked.scores[:4].tolist() == pytest.approx([1 - place / 3 for place in dark[0].tolist()])
    assert ranked.scores[4:].tolist() == pytest.approx([[1, 2 / 3, 1 / 6, 1 / 6][place] for place in dark[1]])
    assert seen["prompt"] == HOSTILE
    assert not seen["hacked"], "a prompt was run as markup"
    assert not seen["submittable"], "nothing is marked"
    assert "group 2 of 2" in seen["other"], "two people should not work on the same group"
    assert seen["errors"] == []


def test_the_scripts_of_the_page_work():
    node = shutil.which("node")
    if node is None:
        pytest.skip("the tests of web/votes/*.js need node")
    command = [node, "--test", str(Path(__file__).parent / "web" / "drafts.test.js")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
