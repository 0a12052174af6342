"""Credit assignment: rewards of states [V, B, T+1] -> credit of steps [V, B, T]. All are pure."""

from torch import Tensor

from .data import StepRewards


def broadcast_terminal(rewards: StepRewards) -> Tensor:
    """Every step gets the final reward (Flow-GRPO, arXiv 2505.05470)."""
    return rewards.values[..., -1:].expand_as(rewards.values[..., 1:])


def gain(rewards: StepRewards) -> Tensor:
    """Each step gets the reward it added (DenseGRPO, arXiv 2601.20218, eq. 7); they sum to R_T - R_0."""
    return rewards.values.diff(dim=-1)
