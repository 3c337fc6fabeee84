"""Ways to draw a sheet's samples: as they come, the best of N, or chosen at every step (SVDD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from difrl.data.modality import MODALITIES
from difrl.data.prompts import Prompt, load_prompts
from difrl.data.rollout import Rollout
from difrl.inference.loaded_run import LoadedRun
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.diffusion.svdd import SVDDSettings, draw_with_svdd
from difrl.policies.errors import ModelError
from difrl.reporting.number_format import number
from difrl.reporting.sample_sheets import Sheet, build_sheet
from difrl.scoring import Scorer
from difrl.scoring.parse_reward import parse_reward
from rewards import RewardError
from samplers import best_of


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Samples prompt by prompt, what each was worth (None where nothing scored them), and a sentence on the search."""

    rollout: Rollout
    values: Tensor | None
    told: str


class Search(Protocol):
    """A way to draw `count` samples of each prompt from an opened run at an RLG weight."""

    @property
    def scored(self) -> bool:
        """Whether a reward is asked, which may want the prompts' metadata."""

    def __call__(
        self, opened: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int
    ) -> SearchResult: ...


@dataclass(frozen=True)
class Plain:
    """Samples as they come."""

    scored: ClassVar[bool] = False

    def __call__(self, opened: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        rollout = opened.sample(prompts, per_prompt=count, rlg=rlg, seed=seed)
        return SearchResult(rollout, None, saved(opened, rollout))


@dataclass(frozen=True)
class ScoredSearch:
    """Samples as they come, with the run's own reward for those of its own prompts, whose metadata is known."""

    scorer: Scorer
    scored: ClassVar[bool] = True

    def __call__(self, opened: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        rollout = opened.sample(prompts, per_prompt=count, rlg=rlg, seed=seed)
        known = torch.tensor([bool(p.place) for p in rollout.prompts])
        if not known.any():
            return SearchResult(rollout, None, "")
        scored = self.scorer(rollout.select(known))
        values = torch.full((len(rollout),), torch.nan)
        values[known] = torch.where(scored.valid, scored.rewards, torch.nan).cpu()
        return SearchResult(rollout, values, "")


@dataclass(frozen=True)
class BestOf:
    """Each sample is the best of `draws`, as a reward judges them."""

    draws: int
    scorer: Scorer
    scored: ClassVar[bool] = True

    def __call__(self, opened: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        rollout = opened.sample(prompts, per_prompt=count * self.draws, rlg=rlg, seed=seed)
        values = _values(self.scorer, rollout)
        groups = torch.arange(len(rollout) // self.draws, device=values.device).repeat_interleave(self.draws)
        chosen = best_of(values, values.isfinite(), groups)
        told = (
            f"best of {self.draws} by {_name(self.scorer)}: {_mean(values)} over all draws, "
            f"{_mean(values[chosen])} over the chosen"
        )
        return SearchResult(
            rollout.select(chosen), values[chosen], "; ".join(filter(None, (told, saved(opened, rollout))))
        )


@dataclass(frozen=True)
class Svdd:
    """At every step the best of some candidates, or one in proportion to exp(reward / temperature)."""

    decoding: SVDDSettings
    scorer: Scorer
    scored: ClassVar[bool] = True

    def __call__(self, opened: LoadedRun, prompts: Sequence[Prompt], count: int, rlg: float, seed: int) -> SearchResult:
        policy, steering = opened.policy, opened.guidance_at(rlg)
        if not isinstance(policy, DiffusionPolicy):  # SVDD looks into the denoising, which no other model has
            raise ModelError(
                "--svdd chooses among candidates of a denoising step, and this model has none; see --best-of"
            )
        if steering.adaptive is not None:
            raise ModelError(
                "SVDD and adaptive guidance do not go together: a sample's candidates agree at different steps; "
                "leave out one of --svdd and --adaptive-guidance, or take `adaptive` out of the run's inference.json"
            )
        repeated = [p for p in prompts for _ in range(count)]
        key, numbers = NoiseKey(seed, 0, "sample"), torch.arange(len(repeated))
        score = partial(_values, self.scorer)
        rollout = draw_with_svdd(policy, repeated, numbers, key, steering, self.decoding, score)
        values = _values(self.scorer, rollout)
        cost = rollout.measures["cost/evaluations"].mean().item()
        told = (
            f"SVDD with {self.decoding.candidates} candidates by {_name(self.scorer)}: {_mean(values)}, "
            f"{cost:.1f} evaluations a sample"
        )
        return SearchResult(rollout, values, told)


def search_of(
    opened: LoadedRun, best_of: int | None, svdd: int | None, temperature: float, reward: str | None
) -> Search:
    """The search that a command's options describe."""
    if reward is None:
        return ScoredSearch(own_scorer(opened)) if opened.is_run and opened.of_texts else Plain()
    scorer = scorer_of(opened, reward)
    return BestOf(best_of, scorer) if best_of is not None else Svdd(SVDDSettings(svdd or 1, temperature), scorer)


def draw_sheet(
    opened: LoadedRun, search: Search, texts: Sequence[str], count: int, weights: Sequence[float], seed: int
) -> tuple[Sheet, list[str]]:
    """One sheet of `count` samples of each text at every weight, and what there is to say of them."""
    prompts = with_metadata(opened, texts) if search.scored else [Prompt(text, {}) for text in texts]
    rollouts, scores, notes = {}, {}, []
    for weight in weights:
        found = search(opened, prompts, count, weight, seed)
        label = f"w = {weight:g}" if len(weights) > 1 else ""
        rollouts[label] = found.rollout
        if found.values is not None:
            values = [value if isfinite(value) else None for value in found.values.tolist()]
            scores[label] = [values[i : i + count] for i in range(0, len(values), count)]
        if found.told:
            notes.append(f"{label}: {found.told}" if label else found.told)
    return build_sheet(texts, rollouts, scores), notes


def own_scorer(opened: LoadedRun) -> Scorer:
    """What the run was trained on."""
    return Scorer.build(opened.config.rewards, [], opened.policy.device)


def scorer_of(opened: LoadedRun, name: str) -> Scorer:
    """The reward to search with: as the run's recipe has it, else the registered one of that name."""
    known = [*opened.config.rewards, *opened.config.watch] if opened.is_run else []
    config = parse_reward(name, known).model_copy(update={"weight": 1.0})
    scorer = Scorer.build([config], [], opened.policy.device)
    scorer.check_modality(MODALITIES[opened.config.likelihood.kind])
    return scorer


def _values(scorer: Scorer, rollout: Rollout) -> Tensor:
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


def saved(opened: LoadedRun, rollout: Rollout) -> str:
    """What adaptive guidance saved, where it is on."""
    if opened.steering.adaptive is None:
        return ""
    left_out, made = (rollout.measures[f"cost/{name}"].mean().item() for name in ("saved", "evaluations"))
    return f"adaptive guidance saved {left_out:.1f} of {left_out + made:.1f} evaluations a sample"


def with_metadata(opened: LoadedRun, texts: Sequence[str]) -> list[Prompt]:
    """Texts as prompts: one of the run's own brings the metadata along that a reward such as geneval needs."""
    sources = [opened.config.data.train, opened.config.data.evaluation] if opened.is_run else []
    known = {p.text: p for source in sources if source is not None for p in load_prompts(source)}
    return [known.get(text, Prompt(text, {})) for text in texts]
