"""Reference samples: what a model that stays as it is draws for a prompt, with which rewards of the trained one are compared.

Their noise is keyed by the run's seed and the prompt's number, and each prompt's are drawn and scored by themselves, so
that their bits depend neither on the step nor on the process that asks first, and a resumed run finds the same.

What a reward could not score may be what it can never score, or a failure that was dropped and has passed. It cannot be told
apart here, so it is tried again, ever more rarely: when the prompt is met for the 2nd, 4th, 8th … time. A prompt is so never
lost to a failure that passes, and what can never be scored costs little. Meetings are counted from the start of the process:
a resumed run may try earlier than one that went on, and so find scores sooner; where nothing failed both are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from difrl.config import ReferencesConfig
from difrl.data import Prompt
from difrl.memory import enough_for
from difrl.policies.base import Key, Policy
from difrl.scoring.scorer import score
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
        self._met: Counter[int] = Counter()

    def __call__(self, asked: Sequence[int]) -> dict[str, Scores]:
        """Reward -> its scores [B, M] of the reference samples of B prompts, by their numbers.

        The model evaluations are no part of the policy's count: how many there are depends on which process meets a prompt
        first, and on resuming.
        """
        spent = self.policy.evaluations
        for number in dict.fromkeys(asked):
            self._met[number] += 1
            missing = self._missing(number)
            if missing and self._met[number].bit_count() == 1:  # 1, 2, 4, 8 …
                self._known[number] = {**self._known.get(number, {}), **self._scored(number, missing)}
        self.policy.evaluations = spent
        rows = [self._known[number] for number in asked]
        return {
            name: Scores(torch.stack([r[name].values for r in rows]), torch.stack([r[name].valid for r in rows]))
            for name in self.rewards
        }

    def _missing(self, number: int) -> list[str]:
        """The rewards that have not scored all samples of a prompt."""
        known = self._known.get(number, {})
        return [name for name in self.rewards if name not in known or not known[name].valid.all()]

    def _scored(self, number: int, names: Sequence[str]) -> dict[str, Scores]:
        """What these rewards say of a prompt's samples, or said before of those that they cannot score now."""
        count = self.config.count
        prompts, samples = [self.prompts[number]] * count, number * count + torch.arange(count)
        with enough_for("reference samples", f"lower references.count (now {count}) or rollout.batch"):
            drawn = self.policy.reference(prompts, samples, self.key, self.config.snapshot).to(self.device)
        known = self._known.get(number, {})
        found = {name: score(self.rewards[name], drawn) for name in names}
        return {name: _joined(known[name], new) if name in known else new for name, new in found.items()}


def _joined(known: Scores, new: Scores) -> Scores:
    return Scores(torch.where(new.valid, new.values, known.values), known.valid | new.valid)
