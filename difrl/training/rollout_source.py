"""Sources of a step's scored samples: the policy, whose samples are scored, or a file of samples with their rewards.

The trainer draws groups from a source by their numbers, and does not depend on the kind of source.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from difrl.config import CollectConfig, DataConfig, RehearsalConfig, RunConfig
from difrl.core import Collect, DynamicSampling, draw_once
from difrl.data.modality import Item, Modality, find_modality
from difrl.data.prompt_order import PromptOrder
from difrl.data.prompts import Prompt
from difrl.data.recorded_samples import RecordedGroup, load_recorded_samples
from difrl.data.rollout import Content, Rollout, ScoredRollout
from difrl.policies.base import NoiseKey, Policy
from difrl.runtime.memory import enough_for
from difrl.runtime.progress import phase
from difrl.scoring import Scorer
from difrl.scoring.reference_samples import ReferenceScores
from rewards import Scores
from samplers import keyed_uniform

SectionTimer = Callable[[str], None]
"""Called with the name of a section of the step when the section ends."""


class RolloutSource(Protocol):
    """Groups of scored samples for each step."""

    def draw(
        self,
        step: int,
        attempt: int,
        groups: Sequence[int],
        time_section: SectionTimer,
        weights: Mapping[str, float] | None = None,
    ) -> ScoredRollout:
        """Return whole groups of a step.

        Args:
          step: number of the step.
          attempt: 0, or how often the groups were drawn before. Each attempt draws other samples.
          groups: numbers of the groups.
          time_section: called at the end of each section.
          weights: reward -> its weight in this step, where it differs from the weight in evaluations.
        """

    def prompts_of(self, steps: Iterable[int]) -> Iterator[Prompt]:
        """Yield the prompts that may be drawn in these steps, with repetitions."""

    def commit_step(self) -> None:
        """Keep what the draws of a step measured. Draws of a step that fails are forgotten."""

    def state(self) -> dict[str, Tensor]:
        """Return measurements of the committed steps that might differ if they were repeated: name -> [measurements, ...].

        The names, and all of a shape but its first number, do not depend on the measurements. {} for a source without any.
        """

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Add the state of a process of this run, or of the run before it was resumed."""


class PolicyRollouts:
    """Samples of the policy. A prompt has one group for each branch; the samples of a group are neighbours."""

    def __init__(
        self, config: RunConfig, policy: Policy, scorer: Scorer, prompts: Sequence[Prompt], device: torch.device
    ) -> None:
        self.config, self.policy, self.scorer, self.prompts, self.device = config, policy, scorer, prompts, device
        self.order = PromptOrder(prompts, config.data.prompts_per_step, config.seed)
        self.reference_scores: ReferenceScores | None = None
        if config.references is not None:
            self.reference_scores = ReferenceScores(
                config.references, config.seed, policy, scorer.reference_rewards, prompts, device
            )

    def draw(
        self,
        step: int,
        attempt: int,
        groups: Sequence[int],
        time_section: SectionTimer,
        weights: Mapping[str, float] | None = None,
    ) -> ScoredRollout:
        parts = self._split(groups)
        prompts = [self._prompt_numbers(step, attempt, part) for part in parts]
        reference_scores: list[Mapping[str, Scores] | None] = [None] * len(parts)
        if self.reference_scores is not None:
            reference_scores = [self.reference_scores(numbers) for numbers in prompts]
            time_section("references")
        rollouts = (self._rollout(step, attempt, *part) for part in zip(parts, prompts, strict=True))
        score = partial(self.scorer.score_for_training, weights=weights or {})
        if not self.config.rollout.overlap:
            (rollout,) = rollouts
            time_section("rollout")
            scored = score(rollout, reference_scores=reference_scores[0])
            time_section("score")
            return scored
        # In one thread, no reward is called twice at a time, and calls keep their order.
        with ThreadPoolExecutor(1, "scoring") as thread:
            pending = [
                thread.submit(score, rollout, reference_scores=part)
                for rollout, part in zip(rollouts, reference_scores, strict=True)
            ]
            time_section("rollout")
            scored = ScoredRollout.cat([part.result() for part in pending])
        time_section("score")
        return scored

    def prompts_of(self, steps: Iterable[int]) -> Iterator[Prompt]:
        for step in steps:
            draws = (self.order.redraw(step, attempt) for attempt in range(1, self.config.collect.max_draws))
            for numbers in (self.order.step(step), *draws):
                yield from (self.prompts[number] for number in numbers)

    def commit_step(self) -> None:
        if self.reference_scores is not None:
            self.reference_scores.commit_step()

    def state(self) -> dict[str, Tensor]:
        return {} if self.reference_scores is None else self.reference_scores.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        if self.reference_scores is not None:
            self.reference_scores.load(state)

    def _split(self, groups: Sequence[int]) -> list[Sequence[int]]:
        """Return parts that are drawn at once: all groups, or with overlap a batch of whole prompts (at least one)."""
        config = self.config
        if not config.rollout.overlap:
            return [groups]
        size = config.branches * max(1, config.rollout.batch // (config.branches * config.samples_per_group))
        return [groups[i : i + size] for i in range(0, len(groups), size)]

    def _prompt_numbers(self, step: int, attempt: int, groups: Sequence[int]) -> list[int]:
        """Return the number of each sample's prompt."""
        config = self.config
        numbers = self.order.redraw(step, attempt) if attempt else self.order.step(step)
        return [numbers[g // config.branches] for g in groups for _ in range(config.samples_per_group)]

    def _rollout(self, step: int, attempt: int, groups: Sequence[int], numbers: Sequence[int]) -> Rollout:
        config = self.config
        prompts = [self.prompts[number] for number in numbers]
        ids, samples = number_samples(groups, config.samples_per_group, attempt * config.groups)
        advice = f"lower rollout.batch (now {config.rollout.batch} samples)"
        with phase("rollout", total=len(prompts)), enough_for("rollout", advice):
            return self.policy.rollout(prompts, ids, samples, NoiseKey(config.seed, step)).to(self.device)


class DatasetRollouts:
    """Samples of a file with their rewards. The policy computes the data that it needs to evaluate them."""

    def __init__(
        self,
        data: DataConfig | RehearsalConfig,
        seed: int,
        policy: Policy,
        recorded: Sequence[RecordedGroup],
        modality: Modality,
        device: torch.device,
    ) -> None:
        self.data, self.seed, self.policy, self.recorded = data, seed, policy, recorded
        self.modality, self.device = modality, device
        self.order = PromptOrder([group.prompt for group in recorded], data.prompts_per_step, seed)
        self._cache: OrderedDict[Item, Mapping[str, Tensor]] = OrderedDict()
        # Samples that do not fit are refused before training, as far as it shows without encoding more than the first.
        policy.validate_items(
            [i for group in recorded for i in group.items], [p for group in recorded for p in group.places]
        )
        first = recorded[0]
        self._replay_data([first.prompt], first.items[:1], modality.read(first.items[:1]))

    def draw(
        self,
        step: int,
        attempt: int,
        groups: Sequence[int],
        time_section: SectionTimer,
        weights: Mapping[str, float] | None = None,
    ) -> ScoredRollout:
        size, numbers = self.data.group_size, self.order.step(step)
        drawn = [(self.recorded[numbers[group]], group) for group in groups]
        picked = [(recorded, i) for recorded, group in drawn for i in self._pick(recorded, step, group)]
        items = [recorded.items[i] for recorded, i in picked]
        rewards = torch.tensor([recorded.rewards[i] for recorded, i in picked])
        prompts = [recorded.prompt for recorded, _ in picked]
        ids, samples = number_samples(groups, size, 0)
        content = self.modality.read(items)
        rollout = Rollout(tuple(prompts), ids, samples, self._replay_data(prompts, items, content))
        rollout = rollout.with_content(content).to(self.device)
        time_section("rollout")
        rewards = rewards.to(self.device)
        return ScoredRollout(rollout, rewards, torch.ones_like(rewards, dtype=torch.bool))

    def prompts_of(self, steps: Iterable[int]) -> Iterator[Prompt]:
        return (self.recorded[number].prompt for step in steps for number in self.order.step(step))

    def commit_step(self) -> None:
        """Do nothing: a file has no measurements to keep."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: there is no state."""

    def _pick(self, recorded: RecordedGroup, step: int, group: int) -> list[int]:
        """Return the numbers of the samples that a step takes: all, or `group_size` of them without replacement."""
        keys = keyed_uniform((len(recorded.items),), seed=self.seed, step=step, samples=[group], use="examples")[0]
        return sorted(keys.argsort(stable=True)[: self.data.group_size].tolist())

    def _replay_data(self, prompts: Sequence[Prompt], items: Sequence[Item], content: Content) -> dict[str, Tensor]:
        """Return the data that the policy needs to evaluate samples. The `cache` most recently used samples keep theirs."""
        rows = [self._replay_row(prompt, items[i], content[i : i + 1]) for i, prompt in enumerate(prompts)]
        while len(self._cache) > self.data.cache:
            self._cache.popitem(last=False)
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _replay_row(self, prompt: Prompt, item: Item, content: Content) -> Mapping[str, Tensor]:
        """Return the data of one sample. Encoded alone, its bits depend neither on other samples nor on the cache."""
        if item not in self._cache:
            self._cache[item] = {name: x.cpu() for name, x in self.policy.replay_data([prompt], content).items()}
        self._cache.move_to_end(item)
        return self._cache[item]


def number_samples(groups: Sequence[int], size: int, first: int) -> tuple[Tensor, Tensor]:
    """Return group ids and sample numbers, [len(groups) · size] each.

    The sample numbers of group g are `size` successive ones from (first + g) · size.
    """
    ids = torch.tensor(list(groups)).repeat_interleave(size)
    return ids, (first + ids) * size + torch.arange(size).repeat(len(groups))


def build_rollout_source(
    config: RunConfig, policy: Policy, scorer: Scorer, prompts: Sequence[Prompt], device: torch.device
) -> RolloutSource:
    """Build the source of `data.rows`."""
    if config.data.rows == "prompts":
        return PolicyRollouts(config, policy, scorer, prompts, device)
    return build_dataset_rollouts(config.data, config, policy, device)


def build_dataset_rollouts(
    data: DataConfig | RehearsalConfig, config: RunConfig, policy: Policy, device: torch.device
) -> DatasetRollouts:
    """Build the source of the samples of a file, for a run's data or its rehearsal."""
    modality = find_modality(config)
    return DatasetRollouts(data, config.seed, policy, load_recorded_samples(data, modality), modality, device)


def build_dynamic_sampling(config: CollectConfig) -> Collect[ScoredRollout]:
    """Build the stage that draws groups again until they are informative, or the empty stage."""
    if config.max_draws == 1:
        return draw_once
    if config.by is None:
        return DynamicSampling[ScoredRollout](config.max_draws)
    return DynamicSampling[ScoredRollout](config.max_draws, partial(_informative_by, f"reward/{config.by}"))


def _informative_by(column: str, scored: ScoredRollout) -> tuple[Tensor, Tensor]:
    """Return a reward's column, and which rows have it: a reward of weight 0 in the step need not score a valid row."""
    values = scored.parts[column]
    return values, scored.valid & ~values.isnan()
