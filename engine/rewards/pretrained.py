"""Models in folders as transformers writes them: loaded whole, or refused.

Transformers renames tensors between its versions and translates the names in files, so here only shapes are compared
before a model is loaded, and names by what transformers says it did not find.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clip import model_type
from .files import some

COMPUTED = ("position_ids", "relative_position_index")
"""Ends of names of tensors that hold no weights: a model computes them when it is made."""


def check_type(folder: Path, allowed: Sequence[str]) -> None:
    """Raise ValueError unless config.json describes a model of one of these types."""
    kind = model_type(folder)
    if kind not in allowed:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of type {kind!r}, this reward needs "
            f"{' or '.join(map(repr, allowed))}"
        )


def check_shapes(path: Path, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``given`` has, under whatever names, as many tensors of each expected shape."""
    shapes = [tuple(value.shape) for name, value in expected.items() if not name.endswith(COMPUTED)]
    lacking = Counter(shapes) - Counter(tuple(value.shape) for value in given.values())
    if lacking:
        raise ValueError(
            f"{path} lacks tensors of the model that config.json describes: "
            f"{some([f'{count} of the shape {shape}' for shape, count in lacking.items()])}; it is another model, or "
            "cut off"
        )


def pretrained(
    kind: Any, config: Any, weights: dict[str, Tensor], path: Path, unused: Sequence[str] = (), **options: Any
) -> Any:
    """A transformers model of class ``kind`` with these weights.

    Raises ValueError naming weights that are missing: transformers would make them up. ``unused``: names of weights
    that the model never computes with. ``options``: more arguments of the class.
    """
    try:
        with quiet():
            found = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **options)
    except RuntimeError as problem:
        raise ValueError(f"{path} cannot be loaded as the model that config.json describes ({problem})") from None
    model, report = found
    lacking = [name for name in report["missing_keys"] if not name.endswith(COMPUTED) and name not in unused]
    if lacking:
        raise ValueError(f"{path} lacks {some(sorted(lacking))}; it is another model, or cut off")
    return model.eval().requires_grad_(False)


@contextmanager
def quiet():
    """Without transformers' advice to train what is missing: it is refused here, or never used."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.set_verbosity(before)
