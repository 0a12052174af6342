"""What changes while training: adapter, optimizer, averaged weights, iteration."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from .knobs import Knob
from .lora import Lora


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW and exponential moving average, defaults of Flow-GRPO's SD3.5 runs."""

    lr: Annotated[float, Knob(1e-8, 1.0, "learning rate")] = 3e-4
    beta1: Annotated[float, Knob(0.0, 0.9999, "AdamW's first momentum")] = 0.9
    beta2: Annotated[float, Knob(0.0, 0.99999, "AdamW's second momentum")] = 0.999
    weight_decay: Annotated[float, Knob(0.0, 1.0, "AdamW's weight decay")] = 1e-4
    grad_clip: Annotated[float, Knob(1e-6, 1e6, "largest norm of the whole gradient")] = 1.0
    ema_decay: Annotated[float, Knob(0.0, 0.99999, "decay of the averaged weights; 0 = no averaging")] = 0.9
    ema_every: Annotated[int, Knob(1, 1000, "optimizer steps between two averages")] = 8


class Learner:
    """Holds the training state; evaluation and exported files use the averaged weights."""

    def __init__(self, lora: Lora, settings: OptimizerSettings):
        self.lora, self.settings = lora, settings
        self.optimizer = torch.optim.AdamW(
            lora.parameters(),
            settings.lr,
            (settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.ema = AveragedModel(lora, avg_fn=self.average) if settings.ema_decay > 0 else None
        self.iteration = 0
        self.num_steps = 0

    def average(self, averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        """Decay min((1 + n) / (10 + n), ema_decay), as in Flow-GRPO's code."""
        n = int(num_averaged)
        return current.lerp(averaged, min((1 + n) / (10 + n), self.settings.ema_decay))

    def step(self) -> float:
        """Clip the gradient, step, average; returns the gradient norm. A non-finite gradient is skipped."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.lora.parameters(), self.settings.grad_clip))
        if norm == norm and norm != float("inf"):
            self.optimizer.step()
            self.num_steps += 1
            if self.ema is not None and self.num_steps % self.settings.ema_every == 0:
                self.ema.update_parameters(self.lora)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[Lora]:
        """Within it the model runs with the averaged weights."""
        if self.ema is None or int(self.ema.n_averaged) == 0:
            yield self.lora
            return
        kept = [p.detach().clone() for p in self.lora.parameters()]
        copy_into(self.lora, self.ema.module.parameters())
        try:
            yield self.lora
        finally:
            copy_into(self.lora, kept)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes, as copies on the CPU."""
        tensors = {f"lora.{k}": v for k, v in self.lora.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in values.items()}
        tensors |= {"iteration": torch.tensor(self.iteration), "num_steps": torch.tensor(self.num_steps)}
        return {name: value.detach().cpu().clone() for name, value in tensors.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from ``state()``. Raises ValueError when it belongs to another LoRA."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.lora.load_state_dict(part("lora."))
            if self.ema is not None:
                self.ema.load_state_dict(part("ema."))
        except RuntimeError as problem:
            first = str(problem).splitlines()[1].strip()
            raise ValueError(f"the checkpoint belongs to another LoRA ({first}); use the run's own config") from None
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.iteration, self.num_steps = int(tensors["iteration"]), int(tensors["num_steps"])

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo every change made within it when it ends by an exception, Ctrl-C included."""
        before = self.state()
        try:
            yield
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            self.load_state(before)
            raise


def copy_into(lora: Lora, values: "Iterator[Tensor] | list[Tensor]") -> None:
    """Overwrite the parameters."""
    with torch.no_grad():
        for parameter, value in zip(lora.parameters(), values, strict=True):
            parameter.copy_(value)
