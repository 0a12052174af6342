"""GRPO reinforcement learning of flow-matching image models. Importing this package imports nothing heavy."""
