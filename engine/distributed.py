"""The processes that share a run: whole groups each, gradients added, statistics gathered."""

import os
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class World(Protocol):
    """What the training loop needs of the other processes."""

    rank: int
    size: int

    def sum(self, values: Tensor) -> Tensor:
        """Add ``values`` of all processes."""
        ...

    def gather(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Concatenate ``rows`` of all processes in rank order; sizes may differ along ``dim``. On the CPU."""
        ...

    def wait(self) -> None:
        """Until all processes are here."""
        ...


class Solo:
    """One process."""

    rank, size = 0, 1

    def sum(self, values: Tensor) -> Tensor:
        """Nothing to add."""
        return values

    def gather(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Nothing to gather."""
        return rows.cpu()

    def wait(self) -> None:
        """Nobody to wait for."""


class Accelerated:
    """Processes started by ``accelerate launch``."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce, on the device that the processes share; NCCL knows no other."""
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").to(values.device)

    def gather(self, rows: Tensor, dim: int = 0) -> Tensor:
        """All-gather of unequal parts: pad to the longest, gather, cut."""
        rows = rows.to(self.accelerator.device).movedim(dim, 0)
        counts = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.accelerator.gather(padded[None].contiguous()).cpu()
        joined = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return joined.movedim(0, dim)

    def wait(self) -> None:
        """Barrier."""
        self.accelerator.wait_for_everyone()


def gather_texts(world: World, texts: Iterable[str]) -> list[str]:
    """The texts of all processes in rank order, each one once; empty ones are left out."""
    # A text may have several lines, and names of files that are no Unicode.
    letters = "".join(f"{text}\0" for text in ("", *texts)).encode(errors="backslashreplace")
    gathered = world.gather(torch.tensor(list(letters), dtype=torch.uint8))
    return [text for text in dict.fromkeys(bytes(gathered.tolist()).decode().split("\0")) if text]


def join_world() -> World:
    """The processes around this one; one process without a launcher.

    Raises ValueError when ``accelerate launch`` was asked for several CPU processes but started only one.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
            raise ValueError(
                "accelerate launch --cpu started one process only (several need MPI); use `accelerate launch "
                "--multi_gpu --num_processes 2 -m densegrpo.engine.cli ...`, which works on CPUs too"
            )
        return Solo()
    from accelerate import Accelerator

    return Accelerated(Accelerator(cpu=not torch.cuda.is_available()))
