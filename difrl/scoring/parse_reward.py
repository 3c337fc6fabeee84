"""Rewards on the command line: a name, an import path, or a reward of a recipe in braces."""

from __future__ import annotations

from collections.abc import Sequence

from difrl.config import RewardConfig
from difrl.config.load import read_argument


def parse_reward(text: str, known: Sequence[RewardConfig] = ()) -> RewardConfig:
    """Return the reward of `ocr`, `my_module.my_reward`, `{name: ocr, options: {threads: 1}}`, or the label of one in `known`."""
    labels = {reward.label: reward for reward in known}
    if text in labels:
        return labels[text]
    if text.lstrip().startswith("{"):
        return read_argument(RewardConfig, text, "reward")
    return RewardConfig.model_validate({"import" if "." in text or ":" in text else "name": text})
