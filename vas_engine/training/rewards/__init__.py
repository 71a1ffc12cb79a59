"""Rewards: what a finished response is worth.

A reward is any object with a ``name`` that maps prompts and responses to one number each. `load_rewards` makes
them from short descriptions, `RewardProcess` does so in a process of its own, and `score` is the only way the
rest of the package calls one: it cuts what there is into batches and checks what comes back.
"""

from __future__ import annotations

from vas_engine.training.rewards.load import load_reward, load_rewards
from vas_engine.training.rewards.process import RewardProcess
from vas_engine.training.rewards.reward import ChatPrompt, FunctionReward, Reward, RewardError
from vas_engine.training.rewards.score import score, score_all

__all__ = [
    "ChatPrompt",
    "FunctionReward",
    "Reward",
    "RewardError",
    "RewardProcess",
    "load_reward",
    "load_rewards",
    "score",
    "score_all",
]
