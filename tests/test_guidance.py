"""Classifier-free guidance, with and without gradient through its unconditional half."""

import pytest
import torch
from densegrpo.engine.data import Prompt
from densegrpo.engine.guidance import guided

PROMPTS = [Prompt("a", {}), Prompt("bbbbbbbbbb", {})]
NUM_STEPS = 5


def test_guided_velocity_is_the_usual_combination():
    weight = torch.tensor(2.0, requires_grad=True)
    x, sigma, rows = torch.randn(3, 1, 2, 2), torch.rand(3), torch.zeros(3, dtype=torch.long)

    def predict(x, sigma, rows, conditional):
        return weight * x if conditional else weight**2 * x

    def gradient(out):
        return torch.autograd.grad(out.sum(), weight)[0]

    full = guided(predict, x, sigma, rows, 4.5, "full")
    detach = guided(predict, x, sigma, rows, 4.5, "detach")
    unconditional = weight**2 * x
    torch.testing.assert_close(full, unconditional + 4.5 * (weight * x - unconditional))
    assert torch.equal(full, detach)
    torch.testing.assert_close(gradient(full), gradient(unconditional + 4.5 * (weight * x - unconditional)))
    joint = (weight**2 * x).detach()
    torch.testing.assert_close(gradient(detach), gradient(joint + 4.5 * (weight * x - joint)))


@pytest.mark.parametrize(("scale", "halves"), [(1.0, [True]), (3.0, [True, False])])
@pytest.mark.parametrize("cfg_grad", ["full", "detach"])
def test_without_guidance_there_is_one_plain_call(scale, halves, cfg_grad):
    calls = []

    def predict(x, sigma, rows, conditional):
        calls.append(conditional)
        return 1 * x

    x = torch.ones(2, 1, 1, 1, requires_grad=True)
    out = guided(predict, x, torch.ones(2), torch.zeros(2), scale, cfg_grad)
    assert torch.equal(out, x)
    assert calls == halves
    with torch.no_grad():
        assert not guided(predict, x, torch.ones(2), torch.zeros(2), scale, cfg_grad).requires_grad
