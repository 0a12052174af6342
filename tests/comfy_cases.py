"""What is measured inside a real ComfyUI: ``python comfy_cases.py COMFYUI PACKAGE ANSWER [case ...]``.

Each case returns numbers and texts that test_comfy_backend.py judges. All run under ``torch.inference_mode``,
as ComfyUI runs nodes.
"""

import json
import traceback
from pathlib import Path

import comfy_inside  # first: it loads the host
import comfy_memory_cases
import comfy_model_cases
import comfy_placement_cases
import comfy_reward_cases
import comfy_training_cases
import torch

CASES = {
    name.removeprefix("case_"): case
    for module in (
        comfy_model_cases,
        comfy_training_cases,
        comfy_memory_cases,
        comfy_placement_cases,
        comfy_reward_cases,
    )
    for name, case in vars(module).items()
    if name.startswith("case_")
}


def measured(case):
    try:
        with torch.inference_mode():
            return case()
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    answer = {name: measured(CASES[name]) for name in comfy_inside.WANTED or CASES}
    Path(comfy_inside.ANSWER).write_text(json.dumps(answer, indent=1), encoding="utf-8")
