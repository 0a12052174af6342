"""Rows of several prompts in one call of a host's MODEL.

The host averages a list of conditionings over every image, so rows with their own prompts need one conditioning
with batched tensors. It is put together here from what the host made of each prompt, by the host's own rules.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PARTIAL = {"area", "mask", "control", "gligen", "hooks", "start_percent", "end_percent", "timestep_start", "default"}
"""Entries that limit a conditioning to part of the image or of the noise levels, or bring another model."""


def check_conditioning(conditioning: Any, what: str) -> None:
    """Raise ValueError when training cannot use ``conditioning``; ``what`` names it."""
    if len(conditioning) != 1:
        raise ValueError(
            f"{what} has a conditioning of {len(conditioning)} parts; training needs exactly one per prompt: use a "
            "plain CLIP text encoding, without Conditioning (Combine) or scheduled hooks"
        )
    partial = sorted(PARTIAL & conditioning[0][1].keys())
    if partial:
        raise ValueError(f"{what} has a conditioning with {', '.join(partial)}; training needs plain text encodings")


def groups(entries: Sequence[dict[str, Any]], place: Tensor) -> list[Tensor]:
    """Split rows into calls: in each, all prompts have conditioning of the same shapes, e.g. equal token counts.

    ``entries`` are the prompts as the host prepared them, ``place`` [R] says which of them each row belongs to.
    """
    kinds: list[dict[str, Any]] = []
    kind_of = []
    for entry in entries:
        conds = entry["model_conds"]
        found = next((i for i, other in enumerate(kinds) if can_share_a_call(conds, other)), len(kinds))
        kinds += [conds] * (found == len(kinds))
        kind_of.append(found)
    kind = torch.tensor(kind_of)[place]
    return [(kind == i).nonzero().flatten() for i in range(len(kinds))]


def can_share_a_call(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the host would concatenate them, and without repeating tokens to make lengths equal."""
    if a.keys() != b.keys():
        return False
    return all(type(a[k]) is type(b[k]) and a[k].can_concat(b[k]) and a[k].size() == b[k].size() for k in a)


def merged(entries: Sequence[dict[str, Any]], place: Tensor) -> dict[str, Any]:
    """One conditioning for rows of the prompts ``place`` [R], row by row; a single prompt is expanded by the host."""
    numbers = place.tolist()
    first = entries[numbers[0]]
    if len(set(numbers)) == 1:
        return first
    conds = {}
    for name, kind in first["model_conds"].items():
        parts = [entries[i]["model_conds"][name].process_cond(batch_size=1, area=None) for i in numbers]
        conds[name] = kind._copy_with(parts[0].concat(parts[1:]))
    return {**first, "model_conds": conds}
