"""ComfyUI nodes: translate widgets to engine calls, nothing more."""

from comfy_api.latest import ComfyExtension, io

from ..engine.models import comfy_rewards
from . import calibrate, demo, inspect_rollout, lora, method, progress, prompts, reward_sources, rewards, train, votes

NODES: list[type[io.ComfyNode]] = [
    demo.LoadDemoModel,
    prompts.TrainingPrompts,
    rewards.RewardModel,
    reward_sources.RemoteReward,
    reward_sources.Judge,
    reward_sources.HumanVote,
    reward_sources.RewardOptions,
    rewards.CombineRewards,
    rewards.RewardScore,
    method.DenseSampler,
    method.BranchSampler,
    calibrate.CalibrateExploration,
    method.RewardProbe,
    method.TurningPointAssigner,
    method.PolicyUpdate,
    train.TrainLoop,
    inspect_rollout.InspectRollout,
    lora.SaveLora,
]


class DenseGRPOExtension(ComfyExtension):
    """All nodes of this package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Called by ComfyUI at start-up."""
        comfy_rewards.register()
        for part in (progress, rewards, votes):
            part.add_routes()
        return NODES
