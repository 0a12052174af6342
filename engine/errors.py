"""Errors that a user reads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def errors_named(title: str) -> Iterator[None]:
    """Put ``title`` before what went wrong; the kind of error stays."""
    try:
        yield
    except (ValueError, RuntimeError) as problem:
        kind = next(k for k in (torch.OutOfMemoryError, ValueError, RuntimeError) if isinstance(problem, k))
        raise kind(f"{title}: {problem}") from problem
