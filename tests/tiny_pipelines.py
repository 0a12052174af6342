"""SD3.5 and FLUX.1 in miniature: diffusers pipelines with random weights, made from config without a download."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from densegrpo.engine.lora import LoraSettings
from densegrpo.engine.models.diffusers import DiffusersSettings
from tokenizers import Tokenizer, models, pre_tokenizers, processors

PROMPTS = ["a red cat", "two dogs", "a red cat"]
LORA = LoraSettings(rank=2, alpha=4.0)


def tokenizers(folder):
    """A CLIP and a T5 tokenizer that know single letters, from files as a download would have them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    files = {
        "clip/vocab.json": {token: i for i, token in enumerate(vocabulary)},
        "clip/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
        "t5/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "clip/merges.txt").write_text("#version: 0.2\n")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    t5 = Tokenizer(models.Unigram(pieces, 2))
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    t5.save(str(folder / "t5/tokenizer.json"))
    return (
        transformers.CLIPTokenizer.from_pretrained(folder / "clip"),
        transformers.T5TokenizerFast.from_pretrained(folder / "t5"),
    )


def clip(kind):
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config).eval()


def t5():
    config = transformers.T5Config(
        vocab_size=30, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5EncoderModel(config).eval()


def vae():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def sd3(folder):
    """SD3.5-medium in miniature: RMS norm of queries and keys, dual attention in the first block."""
    clip_tokenizer, t5_tokenizer = tokenizers(folder)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer,
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer,
    )


def flux(folder):
    """FLUX.1-dev in miniature."""
    clip_tokenizer, t5_tokenizer = tokenizers(folder)
    network = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip(transformers.CLIPTextModel),
        tokenizer=clip_tokenizer,
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer,
    )


@functools.cache
def folder_of(family):
    """The folder that ``save_pretrained`` wrote; not to be changed."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        {"sd3": sd3, "flux": flux}[family](root).save_pretrained(root / "pipeline")
    return root / "pipeline"


def changed(family, root, file, **entries):
    """A copy of the folder below ``root`` with some entries of one of its JSON files changed."""
    folder = root / family
    shutil.copytree(folder_of(family), folder, dirs_exist_ok=True)
    content = json.loads((folder / file).read_text()) | entries
    (folder / file).write_text(json.dumps(content))
    return folder


def load(folder, lora=LORA, **options):
    return DiffusersSettings(**{"path": str(folder), "dtype": "float32", "resolution": 64} | options).load(lora, 0)


def noise(model, size):
    return torch.randn(size, *model.latent_shape, generator=torch.Generator().manual_seed(1))


def pipeline_of(folder, family, **given):
    kind = {"sd3": diffusers.StableDiffusion3Pipeline, "flux": diffusers.FluxPipeline}[family]
    pipeline = kind.from_pretrained(folder, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def packed(latents):
    """FLUX.1's tokens, by diffusers' own function."""
    return diffusers.FluxPipeline._pack_latents(latents, *latents.shape)
