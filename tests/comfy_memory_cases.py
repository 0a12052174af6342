"""What of a run in the host is still there when it has ended, one way or another: memory, hooks, loaded models.

There need be no GPU: what no object refers to is freed, so it is enough to look for what is referred to.
"""

import gc
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management as host
import torch
from comfy_families import FakeVAE, build, conditioning
from comfy_inside import SMALL, TEXTS, encoded, fingerprint, same
from densegrpo.engine.data import Prompt
from densegrpo.engine.models.comfy_demo import load_demo
from densegrpo.engine.models.comfy_run import Encoded, calibrate_model, inspect_model, train_model

METHOD = {"name": "dense_grpo", "group_size": 3}
REWARDS = [{"name": "brightness"}]
CONFIG = {
    "name": "run",
    "method": METHOD,
    "rewards": REWARDS,
    "held_out_rewards": [],
    "lora": {"rank": 4},
    "optimizer": {"lr": 1e-3, "ema_every": 1},
    "training": {"iterations": 2, "groups": 2, "num_steps": 4, "sample_batch": 8, "train_batch": 8},
    "evaluation": {"every": 1, "images_per_prompt": 1, "num_steps": 4},
}
LIMITS = {"rounds": 1, "trajectories": 6, "measured": 6}


@dataclass
class Watch:
    """What there was, by name, and which of it there still was when the memory was given back."""

    parts: dict[str, Any] = field(default_factory=dict)
    when_given_back: list[str] | None = None
    then: dict[int, int] = field(default_factory=dict)
    """The storages of that moment."""

    def alive(self):
        return sorted(name for name, part in self.parts.items() if part() is not None)

    def see(self, session, progress):
        learner, flow = session.learner, session.model
        parts = {"session": session, "learner": learner, "optimizer": learner.optimizer, "average": learner.ema}
        parts |= {"model": flow, "clone": flow.patcher, "lora": flow.lora}
        if progress.evaluation:
            parts["pictures"] = progress.evaluation.images
        self.parts = {name: weakref.ref(part) for name, part in parts.items()}


def goes_well(session):
    """Nothing happens."""


def is_cancelled(session):
    host.interrupt_current_processing()


def fails(session):
    raise KeyError("in the middle")


def finds_no_room(session):
    session.model.velocity = no_room


def no_room(*_):
    raise torch.OutOfMemoryError("full")


def trained(model, vae, prompts, folder, watch, happens):
    def follow(session, progress):
        watch.see(session, progress)
        if progress.number == 1:
            happens(session)

    return train_model(model, vae, prompts, prompts, SMALL, CONFIG, folder, False, follow)


def inspected(model, vae, prompts, folder, watch):
    return inspect_model(model, vae, prompts, SMALL, REWARDS, "each", METHOD, 4, 0, 8)


def calibrated(model, vae, prompts, folder, watch):
    size = (4, 0, 8, LIMITS)
    return calibrate_model(model, vae, prompts, SMALL, REWARDS, "each", METHOD, *size, folder, "a", lambda _: None)


def case_memory():
    """The demo model, and one in float16, whose LoRA has hooks of its own."""
    demo, half = load_demo(), build("sd3", torch.float16)
    own = encoded(demo.clip)
    random = {text: conditioning("sd3", 6 + i, i) for i, text in enumerate([*TEXTS, ""])}
    found = {}
    for kind, model, vae, conds in (("demo", demo.model, demo.vae, own), ("half", half, FakeVAE(half), random)):
        prompts = Encoded([Prompt(text, {}) for text in TEXTS], [conds[text] for text in TEXTS], conds[""])
        for happens in (goes_well, is_cancelled, fails, finds_no_room):
            found[f"training {kind} {happens.__name__}"] = left(model, trained, vae, prompts, happens)
        for run in (inspected, calibrated):
            found[f"{run.__name__} {kind}"] = left(model, run, vae, prompts)
    return found


def left(model, run, vae, prompts, *happens):
    """What is left after ``run``, without the help of Python's collector of what refers to each other."""
    plain, watch, usual = fingerprint(model), Watch(), host.soft_empty_cache

    def give_back():
        watch.when_given_back, watch.then = watch.alive(), storages()
        usual()

    gc.collect()
    gc.disable()
    host.soft_empty_cache, before = give_back, storages()
    try:
        with tempfile.TemporaryDirectory() as folder:
            returned, problem = run(model, vae, prompts, Path(folder), watch, *happens), None
    except BaseException as raised:
        returned, problem = None, type(raised).__name__
    finally:
        host.soft_empty_cache = usual
        after = storages()
        gc.enable()
    handed_out = set(tensors_in(returned))

    def more(now):
        return sum(size for place, size in now.items() if place not in handed_out) - sum(before.values())

    return {
        "problem": problem,
        "parts": sorted(watch.parts),
        "when given back": watch.when_given_back,
        "alive": watch.alive(),
        "bytes": more(after),
        "bytes when given back": more(watch.then),
        "handed out": len(handed_out),
        "graphs": sum(isinstance(x, torch.Tensor) and x.grad_fn is not None for x in gc.get_objects()),
        "clones": sum(loaded.model is not model and loaded.model.is_clone(model) for loaded in loaded_models()),
        "untouched": same(plain, fingerprint(model)),
    }


def storages():
    """Where the memory of each tensor is -> its bytes."""
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def tensors_in(value):
    """The places of what a node hands on, the LoRA on its MODEL included."""
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage().data_ptr()
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def loaded_models():
    """Of the host, without those that have gone."""
    return [loaded for loaded in host.current_loaded_models if loaded.model is not None]
