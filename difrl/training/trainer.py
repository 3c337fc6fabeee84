"""The one loop, for every algorithm.

    prompts → rollout → rewards [B] → advantages [B] ┐
                  └──→ decisions → likelihoods [B, J] ┴→ objective → loss [B, J] → one reduction → update

A step is one rollout and `updates_per_step` optimizer updates on it. Every sum runs over the samples of all processes and
every random number is keyed by sample, so what a step computes depends neither on the number of processes nor on the size
of the micro-batches. Left out: drawing, scoring and storing, which belong to the policy, the scorer and difrl/training/run.py.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from difrl.config import CollectConfig, RunConfig
from difrl.config.schema.schedules import build_coefficient
from difrl.core import (
    Coefficient,
    Collect,
    DynamicSampling,
    Likelihoods,
    aggregation_weights,
    anchor_penalty,
    draw_once,
    informative,
    reduce_over_decisions,
    weighted_mean,
)
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.policies.base import Decisions, NoiseKey, Policy
from difrl.policies.logprob_check import SAMPLES, Close, Names, check_first_update
from difrl.policies.snapshots import CURRENT
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.dtypes import DTYPES
from difrl.runtime.errors import UserError
from difrl.runtime.memory import enough_for
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from difrl.training.microbatches import Extent, chunks, extent, self_contained
from difrl.training.rehearsal import Rehearsal, rehearsal_of
from difrl.training.reward_kl import RewardKL, penalties, subtract_kl
from difrl.training.rollout_source import build_rollout_source

Metrics = dict[str, float]


class TrainingError(UserError):
    """Training cannot go on."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What this process learns from in a step."""

    scored: ScoredRollout
    advantages: Tensor
    """[B], 0 where the sample is not valid."""
    charges: Tensor | None = None
    """[B, J]: what anchors take off the advantage of each decision; None if nothing."""

    @property
    def rollout(self) -> Rollout:
        return self.scored.rollout

    def select(self, index: Tensor | slice) -> Batch:
        charges = None if self.charges is None else self.charges[index]
        return Batch(self.scored.select(index), self.advantages[index], charges)

    def of(self, columns: slice) -> Tensor:
        """The advantages of these decisions, [B], or [B, J] where they differ."""
        if self.charges is None:
            return self.advantages
        return self.advantages[:, None] - self.charges[:, columns].to(self.advantages.dtype)


@dataclass(frozen=True, eq=False)
class Sums:
    """Over the decisions of a step's updates: name -> total. Names that are new begin at 0."""

    own: dict[str, Tensor] = field(default_factory=lambda: defaultdict(_zero))
    rehearsed: dict[str, Tensor] = field(default_factory=lambda: defaultdict(_zero))


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


class Trainer:
    """Trains a policy; its only state is the policy's, the optimizer's, the source's, what coefficients and weights have
    learnt, and the number of evaluations."""

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        processes: DistributedContext,
    ) -> None:
        _check_shares(config, processes)
        self.config, self.policy, self.scorer, self.prompts, self.processes = config, policy, scorer, prompts, processes
        self.objective = config.objective.build(config.likelihood)
        self.source = build_rollout_source(config, policy, scorer, prompts, processes.device)
        self.rehearsal = rehearsal_of(config, policy, processes.device, processes)
        self.collect = _collect(config.collect)
        steps = config.train.steps
        self.learning_rate: Coefficient = build_coefficient(config.train.lr, steps)
        self.coefficients = {a.label: build_coefficient(a.coefficient, steps) for a in config.anchors}
        self.charges = RewardKL.of(config.anchors)
        own = [anchor.label for anchor in config.anchors if anchor.place == "loss" and anchor.samples == "own"]
        self.held_on_own = tuple(own)
        """Anchors whose divergence is part of the loss of the step's samples."""
        self.weights = {r.label: build_coefficient(r.weight, steps) for r in config.rewards}
        """Reward -> the coefficient that is its weight."""
        self.estimate = config.advantage.build(config.rewards)
        self.diversity = Diversity.build(config.eval.diversity)
        self.parameters = list(policy.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1.0, betas=config.train.betas, weight_decay=config.train.weight_decay
        )
        self.evaluations = 0
        self.intact = True
        """Whether weights, optimizer, snapshots and source are those after a whole number of steps."""

    def step(self, number: int) -> Metrics:
        """Rollout `number` and its updates; the metrics are those of all processes."""
        before = self.policy.evaluations
        clock = Clock()
        drawn: list[ScoredRollout] = []

        def draw(attempt: int, groups: Sequence[int] | None) -> ScoredRollout:
            drawn.append(self._draw(number, attempt, groups, clock))
            return drawn[-1]

        # A reward that fails on one process stops all, before anything was learnt from the step.
        scored = self.processes.run_synchronised(lambda: self.collect(draw))
        metrics = self._observe(drawn)
        drawn.clear()
        # The updates have no use for images.
        scored, charges, observed_in_reward = self._charged(number, scored.without_images())
        weights = self._reward_weights(number)
        batch = Batch(scored, self._advantages(scored, weights), charges)
        rate = self.learning_rate.value(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rehearsed = None if self.rehearsal is None else self.rehearsal.draw(number)
        sums = Sums()
        norms = self._updates(number, batch, rehearsed, sums)
        if not norms:
            raise TrainingError(
                f"step {number}: no sample could be scored{_blamed(metrics, self.weights)}, so there is nothing to learn "
                "from. A reward may want something of the prompts: a quoted text, or metadata, of which a .txt file has none; "
                "`difrl rewards NAME` says what it reads"
            )
        self.policy.snapshots.update(number)
        self.source.commit_step()
        self._restart_if_due(number)
        clock.time_section("update")
        spent = self.processes.all_reduce_sums({"n": torch.tensor(float(self.policy.evaluations - before))})["n"]
        self.evaluations += int(spent)
        metrics |= self._summary(sums.own, len(norms)) | observed_in_reward
        if self.rehearsal is not None:
            held = self._summary(sums.rehearsed, len(norms))
            metrics |= held | {"loss": metrics["loss"] + held["loss"]}
        self._adapt(metrics)
        metrics |= {f"weight/{r.label}": weights[r.label] for r in self.config.rewards if r.varies}
        metrics |= {"grad_norm": sum(norms) / len(norms), "lr": rate, "nfe": self.evaluations}
        metrics |= {"updates/skipped": self.config.train.updates_per_step - len(norms)}
        self.intact = True
        return metrics | clock.times

    def _updates(self, step: int, batch: Batch, rehearsed: Rollout | None, sums: Sums) -> list[float]:
        """The updates of a step; the norm of each one's gradient. An update none of whose samples was scored is left out."""
        train, norms = self.config.train, list[float]()
        advice = (
            f"lower train.micro_batch (now {train.micro_batch} decisions), set model.gradient_checkpointing: true, or train "
            "with model.train: lora and model.dtype: bfloat16"
        )
        with enough_for("update", advice):
            for update in range(train.updates_per_step):
                norm = self._update(step, update, batch, rehearsed, sums, first=not norms)
                norms += [] if norm is None else [norm]
        return norms

    def _draw(self, step: int, draw: int, wanted: Sequence[int] | None, clock: Clock) -> ScoredRollout:
        """Groups of a step, or this process's share of all, sampled and scored. Prompts and noise differ between draws."""
        mine = range(self.processes.rank, self.config.groups, self.processes.count) if wanted is None else wanted
        return self.source.draw(step, draw, mine, clock.time_section, self._reward_weights(step))

    def _reward_weights(self, step: int) -> dict[str, float]:
        return {name: weight.value(step) for name, weight in self.weights.items()}

    def _charged(self, step: int, scored: ScoredRollout) -> tuple[ScoredRollout, Tensor | None, Metrics]:
        """With anchors in the reward taken off it, what others take off each decision [B, J], and what all of them were."""
        if not self.charges.all:
            return scored, None, {}
        decisions = self.policy.decisions(scored.rollout, NoiseKey(self.config.seed, step, "reward"))
        found = penalties(self.policy, scored.rollout, decisions, self._chunks(decisions))
        levels = {name: self.coefficients[name].value(step) for name in self.charges.all}
        sums = {name: p.divergence.sum(dim=1) for name, p in found.items()}
        columns = {f"kl/{name}": torch.where(scored.valid, value, math.nan) for name, value in sums.items()}
        metrics = self.processes.masked_means(columns) | {
            f"coefficient/{name}": level for name, level in levels.items()
        }
        scored = subtract_kl(scored, {name: found[name].amount.sum(dim=1) for name in self.charges.rewards}, levels)
        each = [levels[name] * found[name].amount for name in self.charges.decisions]
        return scored, sum(each[1:], each[0]) if each else None, metrics

    def _advantages(self, scored: ScoredRollout, weights: Mapping[str, float]) -> Tensor:
        gather = self.processes.gather
        columns = {name: gather(scored.parts[name]) for name in self.estimate.reads}
        rewards, groups, valid = (gather(x) for x in (scored.rewards, scored.groups, scored.valid))
        return self.processes.local_rows(self.estimate(rewards, columns, weights, groups, valid))

    def _adapt(self, metrics: Metrics) -> None:
        """Shows every coefficient the step's divergence, and every weight its mean reward: the same on all processes."""
        self.coefficients = {name: c.updated(metrics[f"kl/{name}"]) for name, c in self.coefficients.items()}
        for reward in self.config.rewards:
            mean = metrics.get(reward.column, math.nan)
            if math.isfinite(mean):  # where it could score no sample of the step there is nothing to react to
                self.weights[reward.label] = self.weights[reward.label].updated(mean)

    def _restart_if_due(self, step: int) -> None:
        every = self.config.train.restart_every
        if every is not None and (step + 1) % every == 0:
            self.optimizer.state.clear()

    def _update(
        self, step: int, update: int, batch: Batch, rehearsed: Rollout | None, sums: Sums, *, first: bool
    ) -> float | None:
        """One optimizer update; the norm of the gradient, None where nothing could be scored."""
        if not self._learn(step, update, batch, sums.own, first=first):
            return None
        if self.rehearsal is not None and rehearsed is not None:
            self._rehearse(step, update, self.rehearsal, rehearsed, sums.rehearsed)
        return self._descend(step, update)

    def _learn(self, step: int, update: int, batch: Batch, sums: dict[str, Tensor], *, first: bool) -> bool:
        """The gradient of one update, from its share of the groups; False, and none, where nothing could be scored."""
        if self.config.train.updates_per_step > 1:
            batch = batch.select(self._share(batch.scored.groups, update, self.config.groups))
        # Fresh (t, ε) for each update, and the same ones for θ and every reference.
        key = NoiseKey(self.config.seed, step, f"train/{update}")
        decisions = self.policy.decisions(batch.rollout, key)
        decisions = replace(decisions, mask=decisions.mask & batch.scored.valid[:, None])
        count = self._count(decisions)
        if count == 0:
            return False
        statistics = self._statistics(batch, decisions)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (rows, columns) in enumerate(self._chunks(decisions)):
            part, chosen = batch.select(rows), decisions.select(rows, columns)
            check = self._check(part.rollout, chosen) if first and number == 0 else None
            lik = self.policy.likelihoods(part.rollout, chosen)
            if check is not None:
                check(lik)
            lik = reduce_over_decisions(lik, self.objective.decisions)
            mine = statistics and {name: value[rows, columns] for name, value in statistics.items()}
            loss, details = self.objective(lik, part.of(columns), part.scored.groups, mine)
            coefficients = {
                name: self.coefficients[name].per_sample(step, part.advantages) for name in self.held_on_own
            }
            total = weighted_mean(loss + anchor_penalty(lik, coefficients), self._weights(lik.mask), count)
            total.backward()
            levels = {f"coefficient/{name}": c[:, None].expand_as(lik.logp) for name, c in coefficients.items()}
            _add(sums, lik, details | levels | {"loss": loss.detach()}, total)
        return True

    def _rehearse(self, step: int, update: int, rehearsal: Rehearsal, drawn: Rollout, sums: dict[str, Tensor]) -> None:
        """Adds the gradient of the anchors that are measured on rehearsed samples."""
        assert self.config.rehearsal is not None
        drawn = drawn.select(self._share(drawn.groups, update, self.config.rehearsal.prompts_per_step))
        decisions = self.policy.decisions(drawn, NoiseKey(self.config.seed, step, f"rehearsal/{update}"))
        count = self._count(decisions)
        levels = {name: self.coefficients[name].value(step) for name in rehearsal.labels}
        for rows, columns in self._chunks(decisions):
            lik = self.policy.likelihoods(drawn.select(rows), decisions.select(rows, columns), rehearsal.needs)
            lik = reduce_over_decisions(lik, self.objective.decisions)
            total = weighted_mean(anchor_penalty(lik, levels), self._weights(lik.mask), count)
            total.backward()
            told = {f"coefficient/{name}": torch.full_like(total.detach(), level) for name, level in levels.items()}
            _add(sums, lik, {name: value.expand_as(lik.logp) for name, value in told.items()}, total)

    def _descend(self, step: int, update: int) -> float:
        """One optimizer update along the gradient of all processes; the norm of the gradient."""
        self.processes.sum_gradients(self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {step}, update {update}: the gradient is {norm}, so the weights were left as they are. Lower train.lr, "
                "or raise an anchor's coefficient"
            )
        self.intact = False
        self.optimizer.step()
        return norm

    def _weights(self, mask: Tensor) -> Tensor:
        """What each decision counts in the mean of losses, [B, J]."""
        return aggregation_weights(mask, self.config.train.aggregation)[0]

    def _count(self, decisions: Decisions) -> float:
        """What the sum of losses is divided by, over all processes; 0 where nothing could be scored."""
        mask = decisions.mask if self.objective.decisions == "each" else decisions.mask.any(dim=1, keepdim=True)
        return self.processes.all_reduce_sums({"n": aggregation_weights(mask, self.config.train.aggregation)[1]})["n"]

    def _share(self, groups: Tensor, update: int, count: int) -> Tensor:
        """The rows of the `count` groups that belong to an update: by group number, so that processes do not matter."""
        return groups * self.config.train.updates_per_step // count == update

    def _chunks(self, decisions: Decisions) -> Iterator[tuple[slice, slice]]:
        return chunks(decisions.mask, self._extent(decisions))

    def _extent(self, decisions: Decisions) -> Extent:
        columns = decisions.mask.shape[1]
        micro_batch, compared = self.config.train.micro_batch, self.config.compared
        return extent(self.objective, columns, micro_batch, compared, decisions.whole)

    @torch.no_grad()
    def _statistics(self, batch: Batch, decisions: Decisions) -> Mapping[str, Tensor] | None:
        """What the objective needs to know of rows in other micro-batches, from a pass without gradient; None if nothing."""
        objective, groups = self.objective, batch.scored.groups
        if self_contained(objective, groups, self._extent(decisions)):
            return None
        parts: dict[int, list[Likelihoods]] = defaultdict(list)
        for rows, columns in self._chunks(decisions):
            lik = self.policy.likelihoods(batch.rollout.select(rows), decisions.select(rows, columns), objective.needs)
            parts[rows.start].append(lik)
        whole = Likelihoods.cat([Likelihoods.cat(row, dim=1) for row in parts.values()])
        lik = reduce_over_decisions(whole, objective.decisions)
        a = batch.of(slice(None)).reshape(len(lik), -1).expand_as(lik.logp).to(lik.logp.dtype)
        if objective.scope == "group":  # which no two processes share
            return objective.statistics(objective.summarise(lik), lik.mask, a, groups)
        gather = self.processes.gather
        summary = {name: gather(value) for name, value in objective.summarise(lik).items()}
        statistics = objective.statistics(summary, gather(lik.mask), gather(a), gather(groups))
        return {name: self.processes.local_rows(value) for name, value in statistics.items()}

    def _check(self, rollout: Rollout, decisions: Decisions) -> Callable[[Likelihoods], None]:
        """Evaluates what must agree, before the differentiable pass (it may exchange weights); returns the comparison."""
        spent = self.policy.evaluations
        counts = decisions.mask.any(dim=1)
        rows = counts.int().argsort(descending=True, stable=True)[:SAMPLES]
        few, drawn = decisions.select(rows, slice(None)), rollout.select(rows)
        recorded = self.policy.rollout_logprobs(drawn, few)
        # Where θ did not draw the samples, the weights that did must still give what was recorded.
        on_policy = self.config.rollout.snapshot == CURRENT
        replayed = None if on_policy else self.policy.recomputed_logprobs(drawn, few)
        twins = self.policy.references_equal_to_policy()
        # Every process checks a sample of every step: counted, the evaluations would depend on how many there are.
        self.policy.evaluations = spent
        dtype = DTYPES[self.config.model.dtype]

        def diagnose(expected: Tensor, close: Close) -> str:
            return self.policy.diagnose(drawn, few, expected, close)

        def compare(lik: Likelihoods) -> None:
            found = lik.logp[rows] if replayed is None else replayed
            check_first_update(found, recorded, few.mask, dtype, diagnose)
            for name in twins:
                names = Names(other=f"that of {name!r}, whose weights are the same,")
                check_first_update(lik.logp[rows], lik[f"references/{name}"][rows], few.mask, dtype, diagnose, names)

        return compare

    def _observe(self, drawn: Sequence[ScoredRollout]) -> Metrics:
        """Means of rewards, groups without spread, diversity: of every sample that was drawn, before any update."""
        columns = [observed(scored, self.diversity) for scored in drawn]
        return self.processes.masked_means({name: torch.cat([c[name] for c in columns]) for name in columns[0]})

    def _summary(self, sums: Mapping[str, Tensor], updates: int) -> Metrics:
        """Means over the step's decisions of everything the objective and the anchors reported."""
        totals = self.processes.all_reduce_sums(sums)
        count = totals.pop("count")
        objective = totals.pop("total") / updates
        squares = totals.pop("ratio_spread", None)
        metrics = {METRIC_NAMES.get(name, name): value / count for name, value in totals.items()}
        if squares is not None:
            metrics["ratio/std"] = math.sqrt(max(0.0, squares / count - (metrics["ratio/mean"] - 1) ** 2))
        return metrics | {"loss": objective}


def _collect(config: CollectConfig) -> Collect[ScoredRollout]:
    """The stage that a recipe names."""
    if config.max_draws == 1:
        return draw_once
    if config.by is None:
        return DynamicSampling[ScoredRollout](config.max_draws)
    return DynamicSampling[ScoredRollout](config.max_draws, partial(_known, f"reward/{config.by}"))


def _known(name: str, scored: ScoredRollout) -> tuple[Tensor, Tensor]:
    """A column, and which rows have it: where its weight is 0 in the step, a reward need not have scored a valid row."""
    column = scored.parts[name]
    return column, scored.valid & ~column.isnan()


def _blamed(metrics: Mapping[str, float], rewards: Collection[str]) -> str:
    """Which of these rewards left samples, or all references of samples, without a score, in brackets."""
    missing = {key: key.partition("invalid/")[2].split("/")[0] for key in metrics if key.startswith(MISSING)}
    found = [f"{key} {metrics[key]:.2f}" for key, name in missing.items() if name in rewards and metrics[key] > 0]
    return f" ({', '.join(found)})" if found else ""


MISSING = ("invalid/", "references/invalid/")
METRIC_NAMES = {"ratio": "ratio/mean", "clip_high": "clip/high", "clip_low": "clip/low", "loss": "loss/objective"}
"""An objective's own word for a metric -> the name in metrics.jsonl."""


def observed(scored: ScoredRollout, diversity: Diversity) -> dict[str, Tensor]:
    """What a draw says of itself: name -> one value a sample or a group, NaN where there is none."""
    groups, valid = scored.groups, scored.valid
    columns = {
        "reward/mean": torch.where(valid, scored.rewards, math.nan),
        "groups/zero_std": 1.0 - informative(scored.rewards, groups, valid).float(),
        "samples/invalid": 1.0 - valid.float(),
        **scored.parts,
        **scored.rollout.measures,
    }
    return columns | diversity(scored.rollout)


def _add(sums: dict[str, Tensor], lik: Likelihoods, details: Mapping[str, Tensor], total: Tensor) -> None:
    """Adds a micro-batch to the sums of the step."""
    columns = dict(details)
    for name, term in lik.terms.items():
        kind, _, anchor = name.partition("/")
        if kind == "divergence":
            columns[f"kl/{anchor}"] = term.detach()
    if "ratio" in details:
        # From 1, not from 0: ratios of 1 ± 1e-4 are usual, and float32 squares around 1 are that coarse.
        columns["ratio_spread"] = (details["ratio"].double() - 1) ** 2
    for name, value in columns.items():
        sums[name] = sums[name] + torch.where(lik.mask, value.double(), 0.0).sum()
    sums["count"] = sums["count"] + lik.mask.sum()
    sums["total"] = sums["total"] + total.detach().double()


def _check_shares(config: RunConfig, processes: DistributedContext) -> None:
    groups, updates = config.groups, config.train.updates_per_step
    if config.rehearsal is not None and config.rehearsal.prompts_per_step % (processes.count * updates):
        raise TrainingError(
            f"rehearsal.prompts_per_step ({config.rehearsal.prompts_per_step}) must be a multiple of the number of processes "
            f"({processes.count}) times train.updates_per_step ({updates}); change one of them"
        )
    if groups % (processes.count * updates):
        found = f"{groups}" if config.branches == 1 else f"{groups} with the branches"
        raise TrainingError(
            f"data.prompts_per_step ({found}) must be a multiple of the number of processes ({processes.count}) times "
            f"train.updates_per_step ({updates}), since every process has whole groups in every update; change one of them"
        )


class Clock:
    """Seconds spent in each part of a step, as time/… metrics."""

    def __init__(self) -> None:
        self.times: Metrics = {}
        self._last = time.perf_counter()

    def time_section(self, name: str) -> None:
        """Charges the time since the last lap to `name`; work still queued on an accelerator is waited for."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + now - self._last
        self._last = now
