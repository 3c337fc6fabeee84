"""Where a step's scored samples come from: drawn from the policy and scored, or read from a file with their rewards.

The trainer asks a source for groups by number and learns from what it gets; it knows of no other difference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from difrl.config import CollectConfig, DataConfig, RehearsalConfig, RunConfig
from difrl.core import Collect, DynamicSampling, draw_once
from difrl.data.modality import MODALITIES, Item, Modality
from difrl.data.prompt_order import PromptOrder
from difrl.data.prompts import Prompt
from difrl.data.recorded_samples import RecordedGroup, load_recorded_samples
from difrl.data.rollout import Content, Rollout, ScoredRollout
from difrl.policies.base import NoiseKey, Policy
from difrl.runtime.memory import enough_for
from difrl.scoring import Scorer
from difrl.scoring.reference_samples import ReferenceScores
from rewards import Scores
from samplers import keyed_uniform

SectionTimer = Callable[[str], None]
"""Charges the time since the last time_section to a part of the step."""


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
        """These groups of a step, whole. Another attempt draws others of the same numbers.

        weights: of the rewards in this step, by name, where they are not those that evaluations take.
        """

    def commit_step(self) -> None:
        """The step is over: what its draws found out is known from now on."""

    def state(self) -> dict[str, Tensor]:
        """What is known after the last step that is over and might be found otherwise: name -> a row for each thing known.

        {} where nothing ever is; names and what follows the rows in a shape do not depend on what is known.
        """

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Adds what a process of this run, or of the run before it was resumed, knew."""


class PolicyRollouts:
    """Samples of the policy. A prompt has as many groups as branches; a branch is a group, and its samples neighbours."""

    def __init__(
        self, config: RunConfig, policy: Policy, scorer: Scorer, prompts: Sequence[Prompt], device: torch.device
    ) -> None:
        self.config, self.policy, self.scorer, self.prompts, self.device = config, policy, scorer, prompts, device
        self.order = PromptOrder(prompts, config.data.prompts_per_step, config.seed)
        self.references: ReferenceScores | None = None
        if config.references is not None:
            self.references = ReferenceScores(
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
        parts = self._parts(groups)
        asked = [self._asked(step, attempt, part) for part in parts]
        references: list[Mapping[str, Scores] | None] = [None] * len(parts)
        if self.references is not None:
            references = [self.references(numbers) for numbers in asked]
            time_section("references")
        rollouts = (self._rollout(step, attempt, *one) for one in zip(parts, asked, strict=True))
        score = partial(self.scorer.score_for_training, weights=weights or {})
        if not self.config.rollout.overlap:
            (rollout,) = rollouts
            time_section("rollout")
            scored = score(rollout, references=references[0])
            time_section("score")
            return scored
        # One thread: no reward is called twice at a time, and its calls keep their order.
        with ThreadPoolExecutor(1, "scoring") as thread:
            pending = [
                thread.submit(score, rollout, references=known)
                for rollout, known in zip(rollouts, references, strict=True)
            ]
            time_section("rollout")
            scored = ScoredRollout.cat([part.result() for part in pending])
        time_section("score")
        return scored

    def commit_step(self) -> None:
        if self.references is not None:
            self.references.commit_step()

    def state(self) -> dict[str, Tensor]:
        return {} if self.references is None else self.references.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        if self.references is not None:
            self.references.load(state)

    def _parts(self, groups: Sequence[int]) -> list[Sequence[int]]:
        """What is drawn at once: all, or whole prompts, as many as a batch of the rollout holds, one at least."""
        config = self.config
        if not config.rollout.overlap:
            return [groups]
        size = config.branches * max(1, config.rollout.batch // (config.branches * config.samples_per_group))
        return [groups[i : i + size] for i in range(0, len(groups), size)]

    def _asked(self, step: int, attempt: int, groups: Sequence[int]) -> list[int]:
        """The number of each sample's prompt."""
        config = self.config
        chosen = self.order.step(step * config.collect.max_draws + attempt)
        return [chosen[g // config.branches] for g in groups for _ in range(config.samples_per_group)]

    def _rollout(self, step: int, attempt: int, groups: Sequence[int], asked: Sequence[int]) -> Rollout:
        config = self.config
        prompts = [self.prompts[number] for number in asked]
        ids, samples = numbered(groups, config.samples_per_group, attempt * config.groups)
        with enough_for("rollout", f"lower rollout.batch (now {config.rollout.batch} samples)"):
            return self.policy.rollout(prompts, ids, samples, NoiseKey(config.seed, step)).to(self.device)


class DatasetRollouts:
    """Samples of a file, with the rewards it gives them. The policy makes of them what it needs to evaluate them."""

    def __init__(
        self,
        data: DataConfig | RehearsalConfig,
        seed: int,
        policy: Policy,
        examples: Sequence[RecordedGroup],
        medium: Modality,
        device: torch.device,
    ) -> None:
        self.data, self.seed, self.policy, self.examples = data, seed, policy, examples
        self.medium, self.device = medium, device
        self.order = PromptOrder([e.prompt for e in examples], data.prompts_per_step, seed)
        self._known: OrderedDict[Item, Mapping[str, Tensor]] = OrderedDict()
        # What does not fit is told now: all that shows without encoding, and the first sample encoded.
        policy.validate_items([i for e in examples for i in e.items], [p for e in examples for p in e.places])
        first = examples[0]
        self._tape([first.prompt], first.items[:1], medium.read(first.items[:1]))

    def draw(
        self,
        step: int,
        attempt: int,
        groups: Sequence[int],
        time_section: SectionTimer,
        weights: Mapping[str, float] | None = None,
    ) -> ScoredRollout:
        chosen = self.order.step(step)
        size = self.data.group_size
        examples = [self.examples[chosen[g]] for g in groups]
        picked = [self._picked(example, step, g) for example, g in zip(examples, groups, strict=True)]
        items = [e.items[i] for e, rows in zip(examples, picked, strict=True) for i in rows]
        rewards = torch.tensor([e.rewards[i] for e, rows in zip(examples, picked, strict=True) for i in rows])
        prompts = [example.prompt for example in examples for _ in range(size)]
        ids, samples = numbered(groups, size, 0)
        content = self.medium.read(items)
        rollout = Rollout(tuple(prompts), ids, samples, self._tape(prompts, items, content))
        rollout = rollout.with_content(content).to(self.device)
        time_section("rollout")
        return ScoredRollout(
            rollout, rewards.to(self.device), torch.ones_like(rewards, dtype=torch.bool).to(self.device)
        )

    def commit_step(self) -> None:
        """Nothing: what is known of a file's samples is found again by reading it."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing, as it has no state."""

    def _picked(self, example: RecordedGroup, step: int, group: int) -> list[int]:
        """Which of an example's samples a step takes: all, or group_size of them without replacement."""
        shape = (len(example.items),)
        drawn = keyed_uniform(shape, seed=self.seed, step=step, samples=[group], use="examples")[0]
        return sorted(drawn.argsort(stable=True)[: self.data.group_size].tolist())

    def _tape(self, prompts: Sequence[Prompt], items: Sequence[Item], content: Content) -> dict[str, Tensor]:
        """The policy's tape; as many samples as `cache` keep theirs, the ones that were not used for longest go first."""
        rows = [self._row(prompt, items[i], content[i : i + 1]) for i, prompt in enumerate(prompts)]
        while len(self._known) > self.data.cache:
            self._known.popitem(last=False)
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _row(self, prompt: Prompt, item: Item, content: Content) -> Mapping[str, Tensor]:
        """The tape of one sample. Encoded alone, so that its bits depend on no neighbour, nor on what was known before."""
        if item not in self._known:
            tape = self.policy.replay_data([prompt], content)
            self._known[item] = {name: value.cpu() for name, value in tape.items()}
        self._known.move_to_end(item)
        return self._known[item]


def numbered(groups: Sequence[int], size: int, first: int) -> tuple[Tensor, Tensor]:
    """Group ids and sample numbers [len(groups) · size]; a sample's number divided by `size` is its group's, from `first`."""
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
    modality = MODALITIES[config.likelihood.kind]
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
