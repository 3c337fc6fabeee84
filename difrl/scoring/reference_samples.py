"""Scores of reference samples: samples of a fixed model, with which shapes compare the rewards of the policy's samples.

Their noise is keyed by the run's seed and the prompt's number, and the samples of each prompt are drawn and scored
separately. So their bits depend neither on the step nor on the process that meets the prompt first. Their scores may be
expensive, and may differ when they are computed again (a judge over HTTP, a failed call). Therefore they are part of a
checkpoint, as they were after the last complete step. A step that fails leaves no entries, because it is repeated from its
beginning.

A missing score may be one that the reward can never give, or a failure that was dropped and is over. The two cases cannot
be distinguished here. The reward is tried again when the prompt is drawn for the 2nd, 4th, 8th … time. So a temporary
failure never excludes a prompt for good, and samples that can never be scored cost little.

Every process has entries of the prompts that it has met, with its own counts, and finds both again when a run is resumed.
After a change of the number of processes, each starts with the entries of all, and with the largest count of any.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.config import ReferencesConfig
from difrl.data.prompts import Prompt
from difrl.policies.base import NoiseKey, Policy
from difrl.runtime.files import digest_file
from difrl.runtime.memory import enough_for
from difrl.runtime.progress import phase
from difrl.scoring.scorer import score_rollout, values_or_nan
from rewards import Reward, Scores
from rewards.combination import stack
from samplers import stable_seed


@dataclass(frozen=True, eq=False)
class PromptReferences:
    """Scores of a prompt's M reference samples."""

    met: int
    """Number of draws of the prompt in this process."""
    scores: Mapping[str, Scores]
    """Scores [M], by reward. Samples that are not scored yet, or could not be scored, are invalid."""


class ReferenceScores:
    """Scores of the reference samples of prompts, cached by prompt."""

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
        self.key, self.device = NoiseKey(seed, 0, "references"), device
        self._cache: ChainMap[int, PromptReferences] = ChainMap({}, {})
        """By the prompt's number. The first map has the entries of the step in progress, the second those before it."""
        blank = torch.zeros(config.count, device=device)
        self._blank = PromptReferences(0, dict.fromkeys(rewards, Scores(blank, blank.bool())))

    def __call__(self, numbers: Sequence[int]) -> dict[str, Scores]:
        """Return the scores [B, M], by reward, of the reference samples of B prompts, given by their numbers.

        The model evaluations are not counted in `policy.evaluations`: their number depends on which process meets a prompt
        first.
        """
        evaluations = self.policy.evaluations
        with phase("reference samples", total=len(set(numbers)) * self.config.count):
            for number in dict.fromkeys(numbers):
                self._cache[number] = self._add_draw(number)
        self.policy.evaluations = evaluations
        return self._stack([self._cache[number] for number in numbers])

    def commit_step(self) -> None:
        """Keep the entries of the step in progress."""
        step, committed = self._cache.maps
        committed.update(step)
        step.clear()

    def state(self) -> dict[str, Tensor]:
        """Return the committed entries for a checkpoint, a row for each of K prompts.

        number, prompt, met [K] int64: the prompt's number, a hash of its content, and its number of draws. scores/REWARD
        [K, M] float32: NaN where invalid.
        """
        _, committed = self._cache.maps
        columns = {
            "number": list(committed),
            "prompt": [hash_prompt(self.prompts[number]) for number in committed],
            "met": [entry.met for entry in committed.values()],
        }
        scores = self._stack(list(committed.values()))
        return {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()} | {
            f"scores/{name}": values_or_nan(found) for name, found in scores.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Add the entries of a process's `state`. Entries of prompts whose content has changed are ignored."""
        _, committed = self._cache.maps
        scores = {name: state[f"scores/{name}"].to(self.device) for name in self.rewards}
        numbers, hashes, counts = (state[name].tolist() for name in ("number", "prompt", "met"))
        for row, (number, content, met) in enumerate(zip(numbers, hashes, counts, strict=True)):
            if number < len(self.prompts) and hash_prompt(self.prompts[number]) == content:
                old = committed.get(number, self._blank)
                merged = {name: _merge(old.scores[name], _from_nan(column[row])) for name, column in scores.items()}
                committed[number] = PromptReferences(max(old.met, met), merged)

    def _add_draw(self, number: int) -> PromptReferences:
        """Count one more draw of a prompt, and return its entry. Missing scores are filled in if they are due."""
        entry = self._cache.get(number, self._blank)
        met, missing = entry.met + 1, [name for name, scores in entry.scores.items() if not scores.valid.all()]
        if not missing or met.bit_count() > 1:  # tried at draws 1, 2, 4, 8 …
            return PromptReferences(met, entry.scores)
        fresh = {name: _merge(entry.scores[name], scores) for name, scores in self._score(number, missing).items()}
        return PromptReferences(met, {**entry.scores, **fresh})

    def _score(self, number: int, names: Sequence[str]) -> dict[str, Scores]:
        """Draw a prompt's reference samples, and return their scores [M] by these rewards."""
        count = self.config.count
        prompts, samples = [self.prompts[number]] * count, number * count + torch.arange(count)
        with enough_for("reference samples", f"lower references.count (now {count}) or rollout.batch"):
            drawn = self.policy.reference(prompts, samples, self.key, self.config.snapshot).to(self.device)
        return score_rollout({name: self.rewards[name] for name in names}, drawn)

    def _stack(self, entries: Sequence[PromptReferences]) -> dict[str, Scores]:
        """Return the scores [K, M] of K entries, by reward. K may be 0."""
        stacked = {name: stack([entry.scores[name] for entry in (self._blank, *entries)]) for name in self.rewards}
        return {name: Scores(scores.values[1:], scores.valid[1:]) for name, scores in stacked.items()}


def _merge(old: Scores, new: Scores) -> Scores:
    """Return the new scores where they are valid, else the old ones."""
    return Scores(torch.where(new.valid, new.values, old.values), old.valid | new.valid)


def _from_nan(values: Tensor) -> Scores:
    """Return the scores of `values_or_nan`. Valid scores are finite."""
    return Scores(values.nan_to_num(0.0), ~values.isnan())


def hash_prompt(prompt: Prompt) -> int:
    """Return a hash of everything that a prompt's samples and scores depend on."""
    files = map(digest_file, prompt.files.values())
    return stable_seed(repr((prompt.text, prompt.negative, dict(prompt.metadata), *files)))
