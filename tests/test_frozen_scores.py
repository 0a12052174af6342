"""The model rewards' scores are what they were: against frozen numbers, not formulas that run beside them."""

import json
from pathlib import Path

import pytest
import torch
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import MODEL_REWARDS, make_reward
from densegrpo.engine.rewards.files import ROOTS_VARIABLE
from test_model_rewards import WANTED
from tiny_reward_models import DETECTOR_SIZE, some_images, write_every_model

FROZEN = json.loads((Path(__file__).parent / "golden" / "rewards.json").read_text(encoding="utf-8"))
PROMPTS = ["a red cat", "a dog", "Photo of a DOG &amp; a cat", "a red dog of a cat " * 30]
CASES = {
    "aesthetic": {"name": "aesthetic"},
    "aesthetic v1": {"name": "aesthetic", "version": "v1"},
    "aesthetic_siglip": {"name": "aesthetic_siglip"},
    "clipscore": {"name": "clipscore"},
    "geneval": {"name": "geneval", "size": DETECTOR_SIZE},
    "hpsv2": {"name": "hpsv2"},
    "imagereward": {"name": "imagereward"},
    "pickscore": {"name": "pickscore"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_models")
    write_every_model(folder)
    return folder


def score(case):
    """Two square images and two that are not, each with its prompt."""
    reward = make_reward(**CASES[case])
    parts = [
        reward(RewardBatch(some_images(2, *size, seed=seed), PROMPTS[2 * seed : 2 * seed + 2], [WANTED] * 2)).scores
        for seed, size in enumerate([(48, 48), (40, 72)])
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("case", CASES)
def test_a_score_is_what_it_was(root, monkeypatch, case):
    monkeypatch.setenv(ROOTS_VARIABLE, str(root))
    torch.testing.assert_close(score(case), torch.tensor(FROZEN[case]), atol=2e-5, rtol=2e-5)


def test_every_model_reward_is_frozen():
    assert {case["name"] for case in CASES.values()} == set(MODEL_REWARDS)
    assert set(FROZEN) == set(CASES)
