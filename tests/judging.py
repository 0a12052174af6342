"""A judge that asks a stub server, and grey images for it."""

import torch
from densegrpo.engine.knobs import check, options_of
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.remote.judge import VlmJudge


def judge(stub_or_url, **options):
    url = stub_or_url if isinstance(stub_or_url, str) else stub_or_url.url
    options = {"base_url": f"{url}/v1", "model": "judge-1", "timeout": 2.0, "patience": 0.5, **options}
    check("vlm_judge", options_of(VlmJudge), options)
    return VlmJudge(**options)


def batch(num=5, metadata=None, prompts=None):
    levels = torch.linspace(0, 1, num) if num > 1 else torch.full((num,), 0.5)
    images = levels.view(-1, 1, 1, 1).expand(num, 3, 8, 12).clone()
    return RewardBatch(images, prompts or [f"prompt {i}" for i in range(num)], metadata or [{}] * num)
