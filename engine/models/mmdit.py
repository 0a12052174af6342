"""The SD3 transformer (MMDiT, arXiv 2403.03206, figure 2) under its native parameter names, small sizes.

ComfyUI reads the sizes from the weights, so a file saved from here loads in its stock UNETLoader:
hidden = 64 x depth, heads = depth, blocks = depth, 16 latent channels, patch 2, RMS norm of queries and keys.
Axes: B images, N image tokens, L text tokens, D hidden.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Attention(nn.Module):
    """Projections of one stream; the attention itself is joint, see ``JointBlock``."""

    def __init__(self, dim: int, heads: int, pre_only: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        if not pre_only:
            self.proj = nn.Linear(dim, dim)
        self.ln_q, self.ln_k = RMSNorm(dim // heads), RMSNorm(dim // heads)

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> queries, keys, values, each [B, heads, N, D / heads]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.ln_q(q), self.ln_k(k), v


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Stream(nn.Module):
    """One modality's half of a joint block; ``pre_only`` ends after its keys and values are given."""

    def __init__(self, dim: int, heads: int, pre_only: bool = False):
        super().__init__()
        self.pre_only = pre_only
        self.attn = Attention(dim, heads, pre_only)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (2 if pre_only else 6) * dim))
        if not pre_only:
            self.mlp = Mlp(dim, 4 * dim)

    def before(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """(queries, keys, values) and the modulation the second half needs."""
        shift, scale, *rest = self.adaLN_modulation(c)[:, None].chunk(2 if self.pre_only else 6, -1)
        return self.attn.qkv_heads(modulate(x, shift, scale)), tuple(rest)

    def after(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """Residual attention and MLP."""
        gate_msa, shift, scale, gate_mlp = rest
        x = x + gate_msa * self.attn.proj(attended)
        return x + gate_mlp * self.mlp(modulate(x, shift, scale))


class JointBlock(nn.Module):
    """Text and image attend to each other; in the last block the text stream ends."""

    def __init__(self, dim: int, heads: int, last: bool):
        super().__init__()
        self.context_block = Stream(dim, heads, pre_only=last)
        self.x_block = Stream(dim, heads)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(context [B, L, D], x [B, N, D], c [B, D]) -> (context, x)."""
        of_context, context_rest = self.context_block.before(context, c)
        of_x, x_rest = self.x_block.before(x, c)
        q, k, v = (torch.cat(pair, 2) for pair in zip(of_context, of_x, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        length = context.shape[1]
        if not self.context_block.pre_only:
            context = self.context_block.after(context, attended[:, :length], context_rest)
        return context, self.x_block.after(x, attended[:, length:], x_rest)


class PatchEmbed(nn.Module):
    """Latent patches to tokens."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Embedder(nn.Module):
    """Two linear layers around a SiLU, for time and for the pooled text."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] -> [B, D], in the weights' dtype; noise levels stay float32 until here."""
        return self.mlp(x.to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    """Tokens to velocities of their patch."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.linear = nn.Linear(dim, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, patch * patch * C]."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(modulate(x, shift, scale))


class MMDiT(nn.Module):
    """Velocity of a latent, given its noise level and a text."""

    pos_embed: Tensor

    def __init__(self, depth: int, context_dim: int, pooled_dim: int, channels: int = 16, max_tokens: int = 16):
        super().__init__()
        dim = 64 * depth
        self.patch, self.channels = 2, channels
        self.x_embedder = PatchEmbed(channels, dim, self.patch)
        self.t_embedder, self.y_embedder = Embedder(256, dim), Embedder(pooled_dim, dim)
        self.context_embedder = nn.Linear(context_dim, dim)
        self.joint_blocks = nn.ModuleList(JointBlock(dim, depth, i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(dim, self.patch**2 * channels)
        self.register_buffer("pos_embed", position_table(max_tokens, dim))

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """X [B, C, H, W], sigma [B] in 0..1, context [B, L, .], pooled [B, .] -> dx/dsigma [B, C, H, W]."""
        rows, columns = (size // self.patch for size in x.shape[-2:])
        c = self.t_embedder(sinusoid(sigma * 1000)) + self.y_embedder(pooled)
        tokens = self.x_embedder(x) + self.cropped_positions(rows, columns)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, tokens = block(context, tokens, c)
        out = self.final_layer(tokens, c).view(-1, rows, columns, self.patch, self.patch, self.channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def cropped_positions(self, rows: int, columns: int) -> Tensor:
        """The middle ``rows`` x ``columns`` of the position table, [1, N, D]."""
        side = math.isqrt(self.pos_embed.shape[1])
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.pos_embed.view(1, side, side, -1)
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm, then scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def sinusoid(t: Tensor, width: int = 256) -> Tensor:
    """[B] -> [B, width], cosines first."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1).to(t.dtype)


def position_table(side: int, dim: int) -> Tensor:
    """Fixed sine and cosine of column and row, [1, side * side, D]."""
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    columns = axis[None, :].expand(side, side, -1)
    return torch.cat([columns, columns.transpose(0, 1)], -1).reshape(1, side * side, dim).float()
