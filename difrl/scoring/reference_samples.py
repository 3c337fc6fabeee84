"""Reference samples: what a model that stays as it is draws for a prompt, with which rewards of the trained one are compared.

Their noise is keyed by the run's seed and the prompt's number, and each prompt's are drawn and scored by themselves, so
that their bits depend neither on the step nor on the process that asks first. What rewards say of them may be dear, and
need not be the same when they are asked again (a judge over HTTP, one that failed), so it is part of a checkpoint: what was
known after the last whole step. A step that fails leaves no trace, since it is done again from its beginning.

What a reward could not score may be what it can never score, or a failure that was dropped and has passed. It cannot be told
apart here, so it is tried again, ever more rarely: when the prompt is met for the 2nd, 4th, 8th … time. A prompt is so never
lost to a failure that passes, and what can never be scored costs little.

Every process knows the prompts that it met itself, and counts its own meetings. It finds both again where a run is resumed;
where there were more or fewer processes, each begins with what any of them knew, and the most that one of them counted.
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
from difrl.runtime.memory import enough_for
from difrl.scoring.scorer import score
from rewards import Reward, Scores
from samplers import stable_seed


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a prompt's M reference samples."""

    met: int
    """How often the prompt was met."""
    scores: Mapping[str, Scores]
    """Reward -> its scores [M]; what it has not scored, or could not, is not valid."""


class ReferenceScores:
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
        self.key, self.device = NoiseKey(seed, 0, "references"), device
        self._known: ChainMap[int, Known] = ChainMap({}, {})
        """By the prompt's number: what was found in a step that is not over, before what was known when it began."""
        blank = torch.zeros(config.count, device=device)
        self._nothing = Known(0, dict.fromkeys(rewards, Scores(blank, blank.bool())))

    def __call__(self, asked: Sequence[int]) -> dict[str, Scores]:
        """Reward -> its scores [B, M] of the reference samples of B prompts, by their numbers.

        The model evaluations are no part of the policy's count: how many there are depends on which process meets a prompt
        first.
        """
        spent = self.policy.evaluations
        for number in dict.fromkeys(asked):
            self._known[number] = self._met(number)
        self.policy.evaluations = spent
        return self._stacked([self._known[number] for number in asked])

    def commit_step(self) -> None:
        """The step is over: what was found in it is known from now on."""
        found, known = self._known.maps
        known.update(found)
        found.clear()

    def state(self) -> dict[str, Tensor]:
        """What is kept, a row for each of K prompts, for a checkpoint.

        number, prompt, met [K] int64: the prompt's number, a hash of what it says, how often it was met. scores/REWARD [K, M]
        float32: NaN where not valid.
        """
        _, known = self._known.maps
        columns = {
            "number": list(known),
            "prompt": [_mark(self.prompts[number]) for number in known],
            "met": [one.met for one in known.values()],
        }
        scores = {f"scores/{name}": _shown(found) for name, found in self._stacked(list(known.values())).items()}
        return {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()} | scores

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Adds what a process knew, as its `state` says it. A prompt that now says something else was never met."""
        _, known = self._known.maps
        scores = {name: state[f"scores/{name}"].to(self.device) for name in self.rewards}
        numbers, marks, counts = (state[name].tolist() for name in ("number", "prompt", "met"))
        for row, (number, mark, met) in enumerate(zip(numbers, marks, counts, strict=True)):
            if number < len(self.prompts) and _mark(self.prompts[number]) == mark:
                old = known.get(number, self._nothing)
                joined = {name: _joined(old.scores[name], _read(column[row])) for name, column in scores.items()}
                known[number] = Known(max(old.met, met), joined)

    def _met(self, number: int) -> Known:
        """What is known of a prompt once it has been met again."""
        known = self._known.get(number, self._nothing)
        met, missing = known.met + 1, [name for name, scores in known.scores.items() if not scores.valid.all()]
        if not missing or met.bit_count() > 1:  # all but 1, 2, 4, 8 …
            return Known(met, known.scores)
        found = self._scored(number, missing)
        joined = {name: _joined(known.scores[name], scores) for name, scores in found.items()}
        return Known(met, {**known.scores, **joined})

    def _scored(self, number: int, names: Sequence[str]) -> dict[str, Scores]:
        """What these rewards say of a prompt's samples, [M]."""
        count = self.config.count
        prompts, samples = [self.prompts[number]] * count, number * count + torch.arange(count)
        with enough_for("reference samples", f"lower references.count (now {count}) or rollout.batch"):
            drawn = self.policy.reference(prompts, samples, self.key, self.config.snapshot).to(self.device)
        return {name: score(self.rewards[name], drawn) for name in names}

    def _stacked(self, known: Sequence[Known]) -> dict[str, Scores]:
        """Reward -> [K, M], a row for each; K may be 0."""
        rows = {name: [one.scores[name] for one in (self._nothing, *known)] for name in self.rewards}
        return {
            name: Scores(torch.stack([s.values for s in each])[1:], torch.stack([s.valid for s in each])[1:])
            for name, each in rows.items()
        }


def _joined(known: Scores, new: Scores) -> Scores:
    """The newer of two scores where both are valid."""
    return Scores(torch.where(new.valid, new.values, known.values), known.valid | new.valid)


def _shown(scores: Scores) -> Tensor:
    return torch.where(scores.valid, scores.values, torch.nan)


def _read(shown: Tensor) -> Scores:
    """The inverse of `_shown`: valid scores are finite."""
    return Scores(shown.nan_to_num(0.0), ~shown.isnan())


def _mark(prompt: Prompt) -> int:
    """A hash of all that drawing and scoring its samples depends on."""
    return stable_seed(repr((prompt.text, prompt.negative, dict(prompt.metadata))))
