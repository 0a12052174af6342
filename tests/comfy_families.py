"""Tiny random models of the host's families; imported inside the host's Python only."""

import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch

CPU = torch.device("cpu")
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 64,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
CHROMA = FLUX | {"image_model": "chroma", "in_channels": 64, "out_channels": 64, "depth": 1, "depth_single_blocks": 1}
CHROMA |= {"in_dim": 64, "out_dim": 128, "hidden_dim": 128, "n_layers": 1}
for _absent in ("vec_in_dim", "guidance_embed"):
    CHROMA.pop(_absent)
SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
    "qk_norm": "rms",
    "num_patches": 64,
    "pos_embed_scaling_factor": None,
    "pos_embed_max_size": 8,
    "x_block_self_attn_layers": [0],
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 128,
    "num_layers": 2,
    "ffn_dim": 128,
    "num_heads": 1,
    "in_dim": 16,
    "out_dim": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
QWEN = {
    "image_model": "qwen_image",
    "num_layers": 2,
    "in_channels": 64,
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "joint_attention_dim": 64,
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 144,
    "cap_feat_dim": 64,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": [24, 24, 24],
    "axes_lens": [300, 512, 512],
}
AURA = {
    "max_seq": 64,
    "cond_seq_dim": 64,
    "n_double_layers": 1,
    "n_layers": 2,
    "n_heads": 1,
    "global_conddim": 128,
    "dim": 128,
    "in_channels": 4,
    "out_channels": 4,
}
HIDREAM = {
    "image_model": "hidream",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "caption_channels": [64, 64],
    "text_emb_dim": 32,
    "num_routed_experts": 2,
    "num_activated_experts": 2,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (128, 128),
    "llama_layers": [0, 1],
}
FAMILIES = {
    "sd3": ("SD3", SD3, 32),
    "wan": ("WAN21_T2V", WAN, 0),
    "flux": ("Flux", FLUX, 32),
    "chroma": ("Chroma", CHROMA, 0),
    "qwen": ("QwenImage", QWEN, 0),
    "lumina": ("Lumina2", LUMINA, 0),
    "aura": ("AuraFlow", AURA, 0),
    "hidream": ("HiDream", HIDREAM, 32),
}
"""Name -> (class of the host, its sizes, width of the pooled text)."""


def build(family, dtype=torch.float32, compute=None, stock_loader=False):
    """A MODEL with random weights in ``dtype`` that computes in ``compute``."""
    kind, sizes, _ = FAMILIES[family]
    config = getattr(comfy.supported_models, kind)(dict(sizes))
    config.set_inference_dtype(dtype, compute)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for name, value in [*model.diffusion_model.named_parameters(), *model.diffusion_model.named_buffers()]:
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.1
        is_gain = value.ndim == 1 and name.endswith(("weight", "scale"))
        value.data = (torch.randn(value.shape, generator=generator) * scale + is_gain).to(value.dtype)
    model.diffusion_model.eval()
    if stock_loader:
        return comfy.sd.load_diffusion_model_state_dict(model.diffusion_model.state_dict())
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def conditioning(family, tokens, seed):
    """A random CONDITIONING as the family's text encoders shape it."""
    generator = torch.Generator().manual_seed(seed)
    width, pooled = 4096 if family == "wan" else 64, FAMILIES[family][2]
    extras = {"pooled_output": torch.randn(1, pooled, generator=generator) if pooled else None}
    if family == "hidream":
        extras["conditioning_llama3"] = torch.randn(1, 2, tokens, 64, generator=generator)
    if family == "lumina":
        extras["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    return [[torch.randn(1, tokens, width, generator=generator), extras]]


class FakeVAE:
    """Shows three latent channels as an image; video latents as a clip of four frames."""

    def __init__(self, model):
        self.latent_channels = model.model.latent_format.latent_channels

    def spacial_compression_decode(self):
        return 8

    def decode(self, latents):
        if latents.ndim == 5:
            return latents[:, :3].repeat(1, 1, 4, 1, 1).movedim(1, -1)
        return latents[:, :3].movedim(1, -1)
