"""Reference samples: what a model that stays as it is draws for a prompt, with which rewards of the trained one are compared.

Their noise is keyed by the run's seed and the prompt's number, and each prompt's are drawn and scored by themselves, so
that their bits depend neither on the step nor on the process that asks first, and a resumed run finds the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from difrl.config import ReferencesConfig
from difrl.data import Prompt
from difrl.memory import enough_for
from difrl.policies.base import Key, Policy
from difrl.scoring import score
from rewards import Reward, Scores


class References:
    """What rewards say of the reference samples of prompts; kept by prompt."""

    def __init__(
        self,
        config: ReferencesConfig,
        seed: int,
        policy: Policy,
        rewards: Mapping[str, Reward],
        prompts: Sequence[Prompt],
        device: torch.device,
    ) -> None:
        self.config, self.policy, self.rewards, self.prompts = config, policy, rewards, prompts
        self.key, self.device = Key(seed, 0, "references"), device
        self._known: dict[int, Mapping[str, Scores]] = {}

    def __call__(self, asked: Sequence[int]) -> dict[str, Scores]:
        """Reward -> its scores [B, M] of the reference samples of B prompts, by their numbers.

        The model evaluations are no part of the policy's count: how many there are depends on which process meets a prompt
        first, and on resuming.
        """
        spent = self.policy.evaluations
        for number in dict.fromkeys(asked):
            if number not in self._known:
                self._known[number] = self._scored(number)
        self.policy.evaluations = spent
        rows = [self._known[number] for number in asked]
        return {
            name: Scores(torch.stack([r[name].values for r in rows]), torch.stack([r[name].valid for r in rows]))
            for name in self.rewards
        }

    def _scored(self, number: int) -> Mapping[str, Scores]:
        count = self.config.count
        prompts, samples = [self.prompts[number]] * count, number * count + torch.arange(count)
        with enough_for("reference samples", f"lower references.count (now {count}) or rollout.batch"):
            drawn = self.policy.reference(prompts, samples, self.key, self.config.snapshot).to(self.device)
        return {name: score(reward, drawn) for name, reward in self.rewards.items()}
