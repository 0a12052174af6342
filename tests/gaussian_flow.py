"""A flow whose velocity is known in closed form, as a ``FlowModel``: the engine's test bench."""

import torch
from densegrpo.engine.data import expand
from densegrpo.engine.lora import LoraSettings, add_lora
from densegrpo.engine.schedule import shifted_linear
from torch import nn


class MeanOf(nn.Module):
    """mean = W 1, so that a LoRA can move it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, like):
        return self.layer(like.new_ones(1))


class GaussianFlow:
    """Data is N(mean + offset of the prompt, spread^2) per element, so the velocity is exact.

    It is conditional on purpose: code that hands a chain another chain's conditioning fails here.
    """

    device = torch.device("cpu")
    lora_prefix = "diffusion_model"

    def __init__(self, spread=0.5, latent_shape=(3, 4, 4), dtype=torch.float32):
        self.spread, self.latent_shape, self.dtype = spread, latent_shape, dtype
        self.network = MeanOf()
        self.lora = add_lora(self.network, LoraSettings(rank=1, alpha=1.0), "layer")
        self.evaluations = self.calls = 0

    @property
    def mean(self):
        return float(self.network(torch.zeros(1)).detach())

    def encode(self, prompts):
        """Longer prompts are brighter."""
        return torch.tensor([0.01 * len(prompt) for prompt in prompts])

    def velocity(self, x, sigma, cond, rows):
        """(x - E[x_0 | x]) / sigma."""
        self.evaluations += len(x)
        self.calls += 1
        x = x.to(self.dtype)
        s, mean = expand(sigma, x), self.network(torch.zeros(1)).to(self.dtype) + expand(cond[rows], x)
        variance = ((1 - s) * self.spread) ** 2 + s**2
        x0 = mean + (1 - s) * self.spread**2 / variance * (x - (1 - s) * mean)
        return ((x - x0) / s).float()

    def decode(self, latents):
        """Latents are images around grey."""
        return (latents + 0.5).float()

    def schedule(self, num_steps):
        return shifted_linear(num_steps)
