"""The shipped workflows by name. See build.py."""

from collections.abc import Callable
from functools import partial

from calibration import calibrate_demo
from first_steps import quickstart_demo, try_a_reward, use_the_lora
from graph import Graph
from methods import METHODS
from rewards import geneval_composition, human_votes, ocr_text_rendering, reward_mix_with_holdout
from training import on_demo, on_flux, on_sd35

REWARDS = (reward_mix_with_holdout, human_votes, ocr_text_rendering, geneval_composition)
FIRST_STEPS = {make.__name__: make for make in (quickstart_demo, try_a_reward, use_the_lora, calibrate_demo)}
ON = {"demo": on_demo, "sd35": on_sd35, "flux": on_flux}

WORKFLOWS: dict[str, Callable[[Graph], None]] = (
    FIRST_STEPS
    | {make.__name__: make for make in REWARDS}
    | {
        f"{key}_{model}": partial(make, name=f"{key}_{model}", method=method)
        for model, make in ON.items()
        for key, method in METHODS.items()
        if model != "flux" or method.flux
    }
)
