"""Trying a connection: what a person wants to read before a long run."""

import time
from collections.abc import Callable

from ...protocols import RewardBatch, RewardResult
from .parallel import interruptibly
from .patience import RemoteError
from .picture import trial_batch

HEALTH_SECONDS = 10.0
"""A server that is there says so within that time."""


def tried(
    name: str,
    health: Callable[[], None],
    score: Callable[[RewardBatch], RewardResult],
    batch: RewardBatch | None = None,
) -> str:
    """One paragraph: the score of a plain grey image and the time it took, or why there is none and what to do.

    Raises only what the host raises to stop.
    """
    try:
        interruptibly(health)
        start = time.monotonic()
        result = interruptibly(lambda: score(batch or trial_batch()))
    except (ValueError, RemoteError) as problem:
        return f"NOT CONNECTED. {problem}"
    if result.errors:
        return f"NO SCORE. {name} is reachable, but has no score for a plain grey test image: {result.errors[0]}"
    seconds = time.monotonic() - start
    parts = ", ".join(f"{key} {value[0]:.2f}" for key, value in result.details.items())
    more = f" ({parts})" if parts else ""
    return f"OK. {name} answers {result.scores[0]:.2f}{more} for a plain grey test image, in {seconds:.1f} s."
