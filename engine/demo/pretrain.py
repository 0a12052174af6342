"""Make the shipped demo model: ``python -m densegrpo.engine.demo.pretrain OUT --minutes 60``.

Rectified flow from scratch on pictures painted on the fly; one thread, exponential moving average of the
weights, cosine learning rate over the given time.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..models.mmdit import MMDiT
from . import codec, text
from .scenes import SceneSampler, all_prompts, cell_table, is_held_out, prompt_lists

TAG_WEIGHTS = {
    "single_object": 0.04,
    "counting": 0.22,
    "colors": 0.08,
    "two_object": 0.03,
    "color_attr": 0.23,
    "position": 0.40,
}
DROP_TEXT, BATCH, PEAK_LR = 0.1, 256, 1.5e-3
log = logging.getLogger("densegrpo.pretrain")


def pretrain(out: Path, minutes: float, depth: int = 2, seed: int = 0) -> None:
    """Train for ``minutes`` of wall time and write transformer, codec and text tables to ``out``."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    entries = [entry for entry in all_prompts() if not is_held_out(entry)]
    tables, pixels = text.make_tables(), cell_table()
    tag_weight = torch.tensor([TAG_WEIGHTS[e["tag"]] / sum(o["tag"] == e["tag"] for o in entries) for e in entries])
    examples = torch.multinomial(tag_weight, 4000, True, generator=generator)
    book = codec.fit(SceneSampler(entries, pixels)(examples, generator))
    latents = codec.encode(pixels.flatten(0, 2), book).unflatten(0, pixels.shape[:3])
    sampler = SceneSampler(entries, latents)
    context, pooled = text.encode([e["prompt"] for e in entries] + [""], tables)
    model = MMDiT(depth, text.WIDTH, text.POOLED)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9995))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    velocity = torch.compile(model)
    start, step, running = time.monotonic(), 0, 0.0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        warm = min(1.0, (step + 1) / 500)
        optimizer.param_groups[0]["lr"] = PEAK_LR * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        index = torch.multinomial(tag_weight, BATCH, True, generator=generator)
        x0 = sampler(index, generator)
        noise = torch.randn(x0.shape, generator=generator)
        u = torch.rand(BATCH, generator=generator)
        sigma = 2 * u / (1 + u)
        dropped = torch.rand(BATCH, generator=generator) < DROP_TEXT
        index = index.where(~dropped, len(entries))
        x = x0.lerp(noise, sigma.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            prediction = velocity(x, sigma, context[index], pooled[index])
        loss = (prediction.float() - (noise - x0)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        step, running = step + 1, 0.99 * running + 0.01 * loss.item()
        if step % 500 == 0:
            log.info("step %d, %.0f %% of the time, loss %.4f", step, 100 * progress, running)
        if step % 2500 == 0:
            save(out, ema.module, book, tables)
    save(out, ema.module, book, tables)
    save_prompts(out)
    (out / "pretrain.json").write_text(json.dumps({"minutes": minutes, "steps": step, "batch": BATCH, "loss": running}))


def save_prompts(out: Path) -> None:
    """Write the prompt lists of reinforcement learning."""
    out.mkdir(parents=True, exist_ok=True)
    for name, entries in zip(("train", "held_out"), prompt_lists(), strict=True):
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")


def save(out: Path, model: torch.nn.Module, book: dict, tables: dict) -> None:
    """Write the three files."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "transformer.safetensors")
    save_file({k: v.contiguous() for k, v in book.items()}, out / "codec.safetensors")
    save_file(tables, out / "text.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--depth", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    pretrain(args.out, args.minutes, args.depth)
