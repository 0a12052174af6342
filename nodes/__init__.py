"""ComfyUI nodes: translate widgets to engine calls, nothing more."""

from comfy_api.latest import ComfyExtension, io

from . import calibrate, demo, inspect_rollout, lora, method, progress, prompts, rewards, train

NODES: list[type[io.ComfyNode]] = [
    demo.LoadDemoModel,
    prompts.TrainingPrompts,
    rewards.RewardModel,
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
        progress.add_routes()
        return NODES
