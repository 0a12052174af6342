import torch
from densegrpo.engine import bench
from densegrpo.engine.random_weights import Shape
from densegrpo.engine.train import TrainSettings

TINY_VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
}
SD3 = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}
FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}


def test_the_gpu_benchmark_runs_on_tiny_shapes(capsys, monkeypatch):
    """The same code that measures SD3.5-medium and FLUX.1 shapes on a GPU."""
    monkeypatch.setattr(bench, "TIMED", ("flow_grpo", "g2rpo"))
    settings = TrainSettings(iterations=2, groups=1, num_steps=5, sample_batch=8, train_batch=8)
    for family, config in (("SD3Transformer2DModel", SD3), ("FluxTransformer2DModel", FLUX)):
        shape = Shape(family, config, TINY_VAE, text_tokens=5, latent_size=8)
        bench.bench_shape(family, shape, torch.device("cpu"), torch.bfloat16, settings)
    printed = capsys.readouterr().out
    assert printed.count("of the forward rate") == 2 * 2
    assert "dense_grpo        360 evaluations     5 calls    120 images     96 transitions     96 states" in printed
    assert "tempflow_grpo     256 evaluations     5 calls     96 images     96 transitions     16 states" in printed
