"""Searches for samples with a high reward: the best of N, or the best candidate of every step (SVDD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from difrl.data.modality import find_modality
from difrl.data.prompts import Prompt, load_prompts
from difrl.data.rollout import Rollout
from difrl.inference.loaded_run import LoadedRun
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.diffusion.svdd import SVDDSettings, draw_with_svdd
from difrl.policies.errors import ModelError
from difrl.reporting.number_format import number
from difrl.reporting.sample_sheets import Sheet, build_sheet
from difrl.runtime.progress import phase
from difrl.scoring import Scorer
from difrl.scoring.parse_reward import parse_reward
from rewards import RewardError
from samplers import best_of


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Samples of a search, prompt by prompt."""

    rollout: Rollout
    values: Tensor | None
    """Reward of each sample, [B], NaN where it has none; None if no sample has one."""
    note: str
    """A sentence on the search, or ""."""


class Search(Protocol):
    """A way to draw `count` samples of each prompt from a run at an RLG weight."""

    @property
    def uses_reward(self) -> bool:
        """True if a reward scores samples, which may need the metadata of prompts."""

    def __call__(self, run: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        """Draw the samples."""


@dataclass(frozen=True)
class PlainSearch:
    """Samples as they are drawn."""

    uses_reward: ClassVar[bool] = False

    def __call__(self, run: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        rollout = run.sample(prompts, per_prompt=count, rlg=rlg, seed=seed)
        return SearchResult(rollout, None, _saved_note(run, rollout))


@dataclass(frozen=True)
class ScoredSearch:
    """Samples as they are drawn, with a reward for those of the run's own prompts, whose metadata is known."""

    scorer: Scorer
    uses_reward: ClassVar[bool] = True

    def __call__(self, run: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        rollout = run.sample(prompts, per_prompt=count, rlg=rlg, seed=seed)
        own = torch.tensor([bool(p.place) for p in rollout.prompts])
        if not own.any():
            return SearchResult(rollout, None, "")
        scored = self.scorer(rollout.select(own))
        values = torch.full((len(rollout),), torch.nan)
        values[own] = torch.where(scored.valid, scored.rewards, torch.nan).cpu()
        return SearchResult(rollout, values, "")


@dataclass(frozen=True)
class BestOf:
    """The best of `draws` samples by a reward, for each sample that is shown."""

    draws: int
    scorer: Scorer
    uses_reward: ClassVar[bool] = True

    def __call__(self, run: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        rollout = run.sample(prompts, per_prompt=count * self.draws, rlg=rlg, seed=seed)
        values = _score(self.scorer, rollout)
        groups = torch.arange(len(rollout) // self.draws, device=values.device).repeat_interleave(self.draws)
        best = best_of(values, values.isfinite(), groups)
        notes = [
            f"best of {self.draws} by {_name(self.scorer)}: {_mean(values)} over all draws, "
            f"{_mean(values[best])} over the chosen",
            _saved_note(run, rollout),
        ]
        return SearchResult(rollout.select(best), values[best], "; ".join(filter(None, notes)))


@dataclass(frozen=True)
class SVDD:
    """Samples that are chosen at every step: the best candidate, or one in proportion to exp(reward / temperature)."""

    settings: SVDDSettings
    scorer: Scorer
    uses_reward: ClassVar[bool] = True

    def __call__(self, run: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        policy, guidance = run.policy, run.guidance_at(rlg)
        if not isinstance(policy, DiffusionPolicy):  # only a diffusion policy has denoising steps
            raise ModelError(
                "--svdd chooses among candidates of a denoising step, and this model has none; see --best-of"
            )
        if guidance.adaptive is not None:
            raise ModelError(
                "SVDD and adaptive guidance do not go together: a sample's candidates agree at different steps; "
                "leave out one of --svdd and --adaptive-guidance, or take `adaptive` out of the run's inference.json"
            )
        repeated = [p for p in prompts for _ in range(count)]
        key, numbers = NoiseKey(seed, 0, "sample"), torch.arange(len(repeated))
        score = partial(_score, self.scorer)
        with phase("SVDD", total=len(repeated)):
            rollout = draw_with_svdd(policy, repeated, numbers, key, guidance, self.settings, score)
        values = _score(self.scorer, rollout)
        cost = rollout.measures["cost/evaluations"].mean().item()
        note = (
            f"SVDD with {self.settings.candidates} candidates by {_name(self.scorer)}: {_mean(values)}, "
            f"{cost:.1f} evaluations a sample"
        )
        return SearchResult(rollout, values, note)


def build_search(
    run: LoadedRun, best_of: int | None, svdd: int | None, temperature: float, reward: str | None
) -> Search:
    """Build the search for the options of a command.

    reward: an entry of the run's recipe, or else a registered name. Without one nothing is searched; the texts of a run are
    scored by the rewards it was trained on.
    """
    config = run.config
    if reward is None:
        if not (run.is_run and run.makes_texts):
            return PlainSearch()
        return ScoredSearch(Scorer.build(config.rewards, [], run.policy.device))
    recipe = [*config.rewards, *config.watch] if run.is_run else []
    chosen = parse_reward(reward, recipe).model_copy(update={"weight": 1.0})
    scorer = Scorer.build([chosen], [], run.policy.device, find_modality(config))
    scorer.preload()
    return BestOf(best_of, scorer) if best_of is not None else SVDD(SVDDSettings(svdd or 1, temperature), scorer)


def draw_sheet(
    run: LoadedRun, search: Search, prompts: Sequence[Prompt], count: int, weights: Sequence[float], seed: int
) -> tuple[Sheet, list[str]]:
    """Draw a sheet of `count` samples of each prompt at every RLG weight. Return it with the notes on the search.

    A prompt with the text and the input image of one of the run's own prompts is replaced by it, because a reward such as
    geneval needs the metadata.
    """
    data = run.config.data
    files = [data.train, data.evaluation] if search.uses_reward and run.is_run else []
    images = find_modality(run.config).takes_images
    own = {(p.text, p.image): p for file in files if file is not None for p in load_prompts(file, images=images)}
    prompts = [own.get((prompt.text, prompt.image), prompt) for prompt in prompts]
    rollouts, scores, notes = {}, {}, []
    for weight in weights:
        label = f"w = {weight:g}" if len(weights) > 1 else ""
        with phase(f"w = {weight:g}"):
            result = search(run, prompts, count, weight, seed)
        rollouts[label] = result.rollout
        if result.values is not None:
            values = [value if isfinite(value) else None for value in result.values.tolist()]
            scores[label] = [values[i : i + count] for i in range(0, len(values), count)]
        if result.note:
            notes.append(f"{label}: {result.note}" if label else result.note)
    return build_sheet([prompt.text for prompt in prompts], rollouts, scores), notes


def _score(scorer: Scorer, rollout: Rollout) -> Tensor:
    """Return the reward of each sample, [B], NaN where it is not valid."""
    scored = scorer(rollout)
    if not scored.valid.any():
        raise RewardError(
            _name(scorer),
            f"it could score none of {len(rollout)} samples; it may need metadata that these prompts do not have: take "
            "prompts of the run's own files, or another --reward",
        )
    return torch.where(scored.valid, scored.rewards, torch.nan)


def _name(scorer: Scorer) -> str:
    return next(iter(scorer.optimised))


def _mean(values: Tensor) -> str:
    return number(values[values.isfinite()].mean().item())


def _saved_note(run: LoadedRun, rollout: Rollout) -> str:
    """Return a sentence on the evaluations that adaptive guidance saved, or "" where it is off."""
    if run.guidance.adaptive is None:
        return ""
    saved, made = (rollout.measures[f"cost/{name}"].mean().item() for name in ("saved", "evaluations"))
    return f"adaptive guidance saved {saved:.1f} of {saved + made:.1f} evaluations a sample"
