"""The transformer is SD3's: the same numbers as diffusers' under converted names."""

import pytest
import torch
from densegrpo.engine.models.mmdit import MMDiT, position_table, sinusoid
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import nn

DEPTH, CONTEXT, POOLED, SIDE = 2, 24, 40, 6
DIM = 64 * DEPTH
SPLIT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
RENAMED = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}


@pytest.fixture(scope="module")
def reference():
    """Diffusers' transformer with random weights everywhere, adaptive norms included."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=2 * SIDE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=DEPTH,
        attention_head_dim=64,
        num_attention_heads=DEPTH,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=DIM,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def swapped(value):
    """Diffusers' last norms are (scale, shift), the native ones (shift, scale)."""
    return torch.cat(value.chunk(2)[::-1])


def native(state):
    """Diffusers' weights under native names."""
    out = {"pos_embed": state["pos_embed.pos_embed"]}
    for e in ("weight", "bias"):
        out[f"x_embedder.proj.{e}"] = state[f"pos_embed.proj.{e}"]
        out[f"context_embedder.{e}"] = state[f"context_embedder.{e}"]
        for ours, theirs in (("0", "1"), ("2", "2")):
            out[f"t_embedder.mlp.{ours}.{e}"] = state[f"time_text_embed.timestep_embedder.linear_{theirs}.{e}"]
            out[f"y_embedder.mlp.{ours}.{e}"] = state[f"time_text_embed.text_embedder.linear_{theirs}.{e}"]
        out[f"final_layer.linear.{e}"] = state[f"proj_out.{e}"]
        out[f"final_layer.adaLN_modulation.1.{e}"] = swapped(state[f"norm_out.linear.{e}"])
        for i in range(DEPTH):
            theirs, ours = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            for stream, names in zip(("x_block", "context_block"), SPLIT, strict=True):
                parts = [state[f"{theirs}.attn.{name}.{e}"] for name in names]
                out[f"{ours}.{stream}.attn.qkv.{e}"] = torch.cat(parts)
            for a, b in RENAMED.items():
                if f"{theirs}.{b}.{e}" in state:
                    out[f"{ours}.{a}.{e}"] = state[f"{theirs}.{b}.{e}"]
    for e in ("weight", "bias"):
        name = f"joint_blocks.{DEPTH - 1}.context_block.adaLN_modulation.1.{e}"
        out[name] = swapped(out[name])
    return out


@pytest.fixture(scope="module")
def ours(reference):
    model = MMDiT(DEPTH, CONTEXT, POOLED, max_tokens=SIDE)
    model.load_state_dict(native(reference.state_dict()))
    return model.eval()


def inputs(height, width, num_images=3):
    generator = torch.Generator().manual_seed(height * width)
    x, context, pooled = (
        torch.randn(num_images, *shape, generator=generator) for shape in ((16, height, width), (7, CONTEXT), (POOLED,))
    )
    return x, torch.linspace(1.0, 0.01, num_images), context, pooled


@pytest.mark.parametrize(("height", "width"), [(12, 12), (8, 8), (4, 12), (12, 6), (2, 10), (6, 4)])
@torch.no_grad()
def test_the_velocity_is_that_of_diffusers(reference, ours, height, width):
    """All sizes up to the table's: smaller ones use the middle of it."""
    x, sigma, context, pooled = inputs(height, width)
    expected = reference(x, context, pooled, sigma * 1000).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, sigma, context, pooled), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (4, 4), (3, 5), (1, 6), (2, 3)])
def test_the_positions_are_cropped_from_the_middle_as_in_diffusers(reference, ours, rows, columns):
    expected = reference.pos_embed.cropped_pos_embed(2 * rows, 2 * columns)
    assert torch.equal(ours.cropped_positions(rows, columns), expected)


def test_the_middle_of_the_table_row_by_row():
    model = MMDiT(1, CONTEXT, POOLED, max_tokens=5)
    model.pos_embed = torch.arange(25.0).view(1, 25, 1).expand(-1, -1, 64)
    assert model.cropped_positions(3, 1)[0, :, 0].tolist() == [7, 12, 17]
    assert model.cropped_positions(2, 4)[0, :, 0].tolist() == [5, 6, 7, 8, 10, 11, 12, 13]


@pytest.mark.parametrize("side", [4, 16])
def test_the_table_of_positions_is_that_of_diffusers(side):
    expected = get_2d_sincos_pos_embed(DIM, side, base_size=side, output_type="pt")
    torch.testing.assert_close(position_table(side, DIM)[0], expected.float(), atol=1e-6, rtol=1e-5)


def test_noise_levels_are_embedded_as_in_diffusers():
    t = torch.tensor([0.0, 1.0, 278.0, 960.129, 1000.0])
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(t), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_it_runs_in_other_precisions_with_exact_noise_levels(ours, dtype):
    """Sigma stays in float32: in bfloat16 neighbouring noise levels would become one."""
    x, sigma, context, pooled = inputs(8, 8)
    expected = ours(x, sigma, context, pooled)
    other = MMDiT(DEPTH, CONTEXT, POOLED, max_tokens=SIDE).to(dtype)
    other.load_state_dict(ours.state_dict())
    found = other(x.to(dtype), sigma, context.to(dtype), pooled.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@torch.no_grad()
def test_images_do_not_see_each_other(ours):
    x, sigma, context, pooled = inputs(8, 8)
    alone = torch.cat([ours(*(a[i : i + 1] for a in (x, sigma, context, pooled))) for i in range(3)])
    torch.testing.assert_close(ours(x, sigma, context, pooled), alone, atol=1e-5, rtol=1e-5)


def test_sizes_follow_from_the_depth_as_comfyui_expects():
    weights = MMDiT(3, CONTEXT, POOLED).state_dict()
    assert weights["x_embedder.proj.weight"].shape == (192, 16, 2, 2)
    assert weights["joint_blocks.0.x_block.attn.ln_q.weight"].shape == (64,)
    assert len({name.split(".")[1] for name in weights if name.startswith("joint_blocks")}) == 3
    assert "joint_blocks.2.context_block.attn.proj.weight" not in weights
