"""The training loop, the same for every algorithm.

    prompts → rollout → rewards [B] → advantages [B] ┐
                  └──→ decisions → likelihoods [B, J] ┴→ objective → loss [B, J] → one reduction → update

A step is one rollout and `updates_per_step` optimizer updates on it. Every sum runs over the samples of all processes and
all randomness is keyed by sample, so the result of a step depends neither on the number of processes nor on the size of the
micro-batches. Sampling belongs to the policy, scoring to the scorer, and files to difrl/training/run.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from difrl.config import RunConfig
from difrl.config.schema.schedules import build_coefficient
from difrl.core import (
    Coefficient,
    Likelihoods,
    aggregation_weights,
    anchor_penalty,
    reduce_over_decisions,
    weighted_mean,
)
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.policies.base import Decisions, NoiseKey, Part, Policy
from difrl.policies.evaluation import StoredEvaluation
from difrl.runtime.distributed import DistributedContext, ProcessError
from difrl.runtime.errors import UserError
from difrl.runtime.memory import enough_for
from difrl.runtime.progress import count_done, phase
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from difrl.training.batch import Batch, update_rows
from difrl.training.first_update import FirstUpdateCheck
from difrl.training.microbatches import Extent, chunks, extent, self_contained
from difrl.training.optimizers import build_optimizer, set_learning_rate
from difrl.training.rehearsal import build_rehearsal
from difrl.training.reward_kl import RewardKL, evaluate_penalties, subtract_kl
from difrl.training.rollout_source import build_dynamic_sampling, build_rollout_source
from difrl.training.step_metrics import Clock, LossSums, Metrics, failed_rewards, rollout_columns


class TrainingError(UserError):
    """Training cannot go on."""


class Trainer:
    """Train a policy on the samples of a rollout source.

    Its state is that of the policy, the optimizer and the source, the levels of adaptive coefficients and weights, and the
    number of evaluations.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        processes: DistributedContext,
    ) -> None:
        if problems := find_indivisible(config, processes.count):
            raise TrainingError("\n".join(problems))
        self.config, self.policy, self.scorer, self.prompts, self.processes = config, policy, scorer, prompts, processes
        self.source = build_rollout_source(config, policy, scorer, prompts, processes.device)
        self.collect = build_dynamic_sampling(config.collect)
        self.rehearsal = build_rehearsal(config, policy, processes)
        self.diversity = Diversity.build(config.eval.diversity)
        self.advantage_estimator = config.advantage.build(config.rewards)
        self.objective = config.objective.build(config.likelihood)
        steps = config.train.steps
        self.weights = {r.label: build_coefficient(r.weight, steps) for r in config.rewards}
        """Reward -> its weight."""
        self.coefficients = {a.label: build_coefficient(a.coefficient, steps) for a in config.anchors}
        """Anchor -> its coefficient."""
        self.loss_anchors = [a.label for a in config.anchors if a.place == "loss" and a.samples == "own"]
        """Anchors in the loss of the step's own samples."""
        self.measured = {a.label for a in config.anchors if a.measure}
        """Anchors that are evaluated where their coefficient is 0 too."""
        self.reward_kl = RewardKL.build(config.anchors)
        self.learning_rate: Coefficient = build_coefficient(config.train.lr, steps)
        self.parameters = list(policy.parameters.values())
        self.optimizer = build_optimizer(self.parameters, config.train)
        self.evaluations = 0
        self.check_evaluations = 0
        """Evaluations of the last step's first-update check in this process. `evaluations` leaves them out."""
        self.intact = True
        """True if weights, optimizer, snapshots and source are in the state after a whole number of steps."""

    def step(self, number: int) -> Metrics:
        """Run step `number`: a rollout and its updates. Return metrics over all processes."""
        config, clock = self.config, Clock()
        evaluations = self.policy.evaluations
        weights = {name: weight.value(number) for name, weight in self.weights.items()}
        learning_rate = self.learning_rate.value(number)
        set_learning_rate(self.optimizer, learning_rate)

        scored, metrics = self._rollout_and_score(number, weights, clock)
        scored, decision_penalties, kl_metrics = self._apply_reward_kl(number, scored)
        batch = Batch(scored, self._estimate_advantages(scored, weights), decision_penalties)
        rehearses = self.rehearsal is not None and self._evaluated(number, self.rehearsal.anchors)
        rehearsed = self.rehearsal.draw(number) if self.rehearsal is not None and rehearses else None
        norms, loss_metrics, rehearsal_metrics = self._updates(number, batch, rehearsed)
        if not norms:
            failed = ", ".join(failed_rewards(metrics, self.weights))
            raise TrainingError(
                f"step {number}: no sample could be scored{failed and f' ({failed})'}, so there is nothing to "
                "learn from. A reward may need something in the prompts: a quoted text, or metadata, which a .txt file does not "
                "have; `difrl rewards NAME` lists what it reads"
            )
        self.policy.snapshots.update(number)
        self.source.commit_step()
        if config.train.restart_every is not None and (number + 1) % config.train.restart_every == 0:
            self.optimizer.state.clear()
        clock.time_section("update")

        counts = {"all": self.policy.evaluations - evaluations, "check": self.check_evaluations}
        spent = self.processes.all_reduce_sums({name: torch.tensor(float(count)) for name, count in counts.items()})
        self.evaluations += int(spent["all"])
        metrics |= loss_metrics | kl_metrics | rehearsal_metrics
        self._adapt(metrics)
        metrics |= {f"weight/{r.label}": weights[r.label] for r in config.rewards if r.varies}
        metrics |= {"grad_norm": sum(norms) / len(norms), "lr": learning_rate, "nfe": self.evaluations}
        metrics |= {"updates/skipped": config.train.updates_per_step - len(norms)}
        metrics |= {"nfe/check": spent["check"] / self.processes.count}
        self.intact = True
        return metrics | clock.times

    def _rollout_and_score(
        self, step: int, weights: Mapping[str, float], clock: Clock
    ) -> tuple[ScoredRollout, Metrics]:
        """Return this process's samples of a step, without images, and metrics of every sample that was drawn for it."""
        local_groups = range(self.processes.rank, self.config.groups, self.processes.count)
        drawn: list[ScoredRollout] = []

        def draw(attempt: int, groups: Sequence[int] | None) -> ScoredRollout:
            groups = local_groups if groups is None else groups
            drawn.append(self.source.draw(step, attempt, groups, clock.time_section, weights))
            return drawn[-1]

        references = self.config.references
        snapshots = [self.config.rollout.snapshot, *([] if references is None else [references.snapshot])]
        alike = self.config.collect.max_draws == 1 and references is None
        with self.policy.drawing(*snapshots, alike=alike), self.processes.fail_together():
            scored = self.collect(draw)
        columns = [rollout_columns(one, self.diversity) for one in drawn]
        metrics = self.processes.masked_means({name: torch.cat([c[name] for c in columns]) for name in columns[0]})
        return scored.without_images(), metrics

    def _apply_reward_kl(self, step: int, scored: ScoredRollout) -> tuple[ScoredRollout, Tensor | None, Metrics]:
        """Subtract anchors in the reward from it.

        Return the samples, the sum of the penalties of anchors on decisions [B, J] (None without them), and metrics.
        """
        if not self.reward_kl.all:
            return scored, None, {}
        decisions = self.policy.decisions(scored.rollout, NoiseKey(self.config.seed, step, "reward"))
        anchors = self._evaluated(step, self.reward_kl.all)
        found = evaluate_penalties(self.policy, scored.rollout, decisions, list(self._microbatches(decisions)), anchors)
        coefficients = {name: self.coefficients[name].value(step) for name in self.reward_kl.all}
        sums = {name: p.divergence.sum(dim=1) for name, p in found.items()}
        columns = {f"kl/{name}": torch.where(scored.valid, value, math.nan) for name, value in sums.items()}
        metrics = self.processes.masked_means(columns) | {f"coefficient/{name}": c for name, c in coefficients.items()}
        amounts = {name: found[name].amount.sum(dim=1) for name in self.reward_kl.rewards if name in found}
        each = [coefficients[name] * found[name].amount for name in self.reward_kl.decisions if name in found]
        return subtract_kl(scored, amounts, coefficients), sum(each[1:], each[0]) if each else None, metrics

    def _estimate_advantages(self, scored: ScoredRollout, weights: Mapping[str, float]) -> Tensor:
        """Return the advantages of this process's samples, [B], estimated from the rewards of all processes."""
        gather = self.processes.gather
        columns = {name: gather(scored.parts[name]) for name in self.advantage_estimator.reads}
        rewards, groups, valid = (gather(x) for x in (scored.rewards, scored.groups, scored.valid))
        return self.processes.local_rows(self.advantage_estimator(rewards, columns, weights, groups, valid))

    def _updates(self, step: int, batch: Batch, rehearsed: Rollout | None) -> tuple[list[float], Metrics, Metrics]:
        """Run the updates of a step. An update is left out if none of its samples was scored.

        Return the norm of each update's gradient, and metrics of the losses of the step's own and of rehearsed samples.
        """
        train, norms = self.config.train, list[float]()
        sums, rehearsal_sums = LossSums(), LossSums()
        advice = (
            f"lower train.micro_batch (now {train.micro_batch} decisions), set model.gradient_checkpointing: true, or train "
            "with model.train: lora and model.dtype: bfloat16"
        )
        with phase("update", total=train.updates_per_step), enough_for("update", advice):
            for update in range(train.updates_per_step):
                if self._accumulate_gradient(step, update, batch, sums, first=not norms):
                    if rehearsed is not None:
                        self._accumulate_rehearsal_gradient(step, update, rehearsed, rehearsal_sums)
                    norms.append(self._optimizer_step(step, update))
                count_done()
        if not norms:
            return [], {}, {}
        metrics, rehearsal = sums.means(self.processes, len(norms)), Metrics()
        if rehearsed is not None:
            rehearsal = rehearsal_sums.means(self.processes, len(norms))
            rehearsal["loss"] += metrics["loss"]
        return norms, metrics, rehearsal

    def _accumulate_gradient(self, step: int, update: int, batch: Batch, sums: LossSums, *, first: bool) -> bool:
        """Compute the gradient of an update, micro-batch by micro-batch. Return False if no sample of it was scored.

        first: whether it is the first update of the step, which must start from ratio 1.
        """
        updates = self.config.train.updates_per_step
        if updates > 1:
            batch = batch.select(update_rows(batch.groups, update, updates, self.config.groups))
        # Fresh (t, ε) for each update, and the same ones for θ and every reference.
        decisions = self.policy.decisions(batch.rollout, NoiseKey(self.config.seed, step, f"train/{update}"))
        decisions = replace(decisions, mask=decisions.mask & batch.scored.valid[:, None])
        weights, count = self._loss_weights(decisions)
        if count == 0:
            return False
        anchors = self._evaluated(step, self.loss_anchors)
        needs = self.objective.needs | {f"divergence/{name}" for name in anchors}
        parts = list(self._microbatches(decisions))
        references = self.policy.evaluate_references(batch.rollout, decisions, parts, needs)
        statistics = self._statistics(batch, decisions, parts, references)
        self.optimizer.zero_grad(set_to_none=True)
        with phase("micro-batches", total=len(parts)):
            for number, ((rows, columns), evaluated) in enumerate(zip(parts, references, strict=True)):
                part, part_decisions = batch.select(rows), decisions.select(rows, columns)
                check = None
                if first and number == 0:
                    check = FirstUpdateCheck.prepare(
                        self.config, self.policy, self.objective, part.rollout, part_decisions
                    )
                    self.check_evaluations = check.evaluations
                lik = self.policy.likelihoods(part.rollout, part_decisions, needs, evaluated)
                if check is not None:
                    self._check_first_update(check, lik)
                lik = reduce_over_decisions(lik, self.objective.decisions)
                part_statistics = statistics and {name: value[rows, columns] for name, value in statistics.items()}
                loss, metrics = self.objective(lik, part.decision_advantages(columns), part.groups, part_statistics)
                coefficients = {
                    name: self.coefficients[name].per_sample(step, part.advantages) for name in self.loss_anchors
                }
                metrics |= {f"coefficient/{name}": c[:, None].expand_as(lik.logp) for name, c in coefficients.items()}
                metrics |= {"loss": loss.detach()}
                penalty = anchor_penalty(lik, {name: coefficients[name] for name in anchors})
                self._backward(loss + penalty, lik, weights[rows, columns], count, metrics, sums)
                count_done()
        return True

    def _check_first_update(self, check: FirstUpdateCheck, lik: Likelihoods) -> None:
        """Raise an error on every process if the check fails on one, which searches for the cause."""
        failed, snapshots = not check.holds(lik), self.policy.snapshots
        if self.processes.any(failed):
            with snapshots.gathered(*snapshots.names):
                if failed:
                    check(lik)
            raise ProcessError(
                "the first-update check failed on another process; its message is among the output above"
            )

    def _accumulate_rehearsal_gradient(self, step: int, update: int, rehearsed: Rollout, sums: LossSums) -> None:
        """Add the gradient of the anchors that are measured on rehearsed samples."""
        assert self.rehearsal is not None
        updates = self.config.train.updates_per_step
        rehearsed = rehearsed.select(update_rows(rehearsed.groups, update, updates, self.rehearsal.groups_per_step))
        decisions = self.policy.decisions(rehearsed, NoiseKey(self.config.seed, step, f"rehearsal/{update}"))
        weights, count = self._loss_weights(decisions)
        anchors = self._evaluated(step, self.rehearsal.anchors)
        needs = frozenset(f"divergence/{name}" for name in anchors)
        coefficients = {name: self.coefficients[name].value(step) for name in anchors}
        parts = list(self._microbatches(decisions))
        references = self.policy.evaluate_references(rehearsed, decisions, parts, needs)
        for (rows, columns), evaluated in zip(parts, references, strict=True):
            part = decisions.select(rows, columns)
            lik = self.policy.likelihoods(rehearsed.select(rows), part, needs, evaluated)
            lik = reduce_over_decisions(lik, self.objective.decisions)
            metrics = {f"coefficient/{name}": torch.full_like(lik.logp, c) for name, c in coefficients.items()}
            self._backward(anchor_penalty(lik, coefficients), lik, weights[rows, columns], count, metrics, sums)

    def _backward(
        self,
        loss: Tensor,
        lik: Likelihoods,
        weights: Tensor,
        count: float,
        metrics: Mapping[str, Tensor],
        sums: LossSums,
    ) -> None:
        """Add the gradient of a micro-batch's loss [B, J], whose mean over the update divides by `count`; sum its metrics."""
        total = weighted_mean(loss, weights, count)
        total.backward()
        sums.add(lik, metrics, total)

    def _optimizer_step(self, step: int, update: int) -> float:
        """Update the weights along the gradient of all processes. Return the norm of the gradient before it is clipped."""
        layout = self.policy.snapshots.layout
        layout.sum_gradients(self.processes)
        norm = layout.number(nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {step}, update {update}: the gradient is {norm}, so the weights were left as they are. Lower train.lr, "
                "or raise an anchor's coefficient"
            )
        self.intact = False
        self.optimizer.step()
        return norm

    def _evaluated(self, step: int, anchors: Iterable[str]) -> list[str]:
        """Return which of these anchors are evaluated in a step: those that act in it, adapt to it or are to be measured."""
        return [
            name
            for name in anchors
            if name in self.measured or self.coefficients[name].value(step) != 0 or self.coefficients[name].state()
        ]

    def _adapt(self, metrics: Metrics) -> None:
        """Update coefficients by the step's divergences, and weights by its mean rewards: alike on all processes."""
        for name in [name for name in self.coefficients if f"kl/{name}" in metrics]:
            self.coefficients[name] = self.coefficients[name].updated(metrics[f"kl/{name}"])
        for reward in self.config.rewards:
            mean = metrics.get(reward.column, math.nan)
            if math.isfinite(mean):  # not if the reward could score no sample of the step
                self.weights[reward.label] = self.weights[reward.label].updated(mean)

    def _loss_weights(self, decisions: Decisions) -> tuple[Tensor, float]:
        """Return the weights of an update's losses [B, J], and the divisor of their sum over all processes: 0 if none counts."""
        mask = decisions.mask if self.objective.decisions == "each" else decisions.mask.any(dim=1, keepdim=True)
        weights, count = aggregation_weights(mask, self.config.train.aggregation)
        return weights, self.processes.all_reduce_sums({"n": count})["n"]

    def _microbatches(self, decisions: Decisions) -> Iterator[tuple[slice, slice]]:
        return chunks(decisions.mask, self._extent(decisions))

    def _extent(self, decisions: Decisions) -> Extent:
        columns = decisions.mask.shape[1]
        return extent(
            self.objective, columns, self.config.train.micro_batch, self.config.samples_per_group, decisions.whole
        )

    @torch.no_grad()
    def _statistics(
        self,
        batch: Batch,
        decisions: Decisions,
        microbatches: Sequence[Part],
        references: Iterable[Mapping[str, StoredEvaluation]],
    ) -> Mapping[str, Tensor] | None:
        """Return the objective's statistics over rows of several micro-batches, [B, J] each, from a pass of θ without gradient.

        None if every micro-batch holds all rows that its statistics depend on.
        """
        objective = self.objective
        if self_contained(objective, batch.groups, self._extent(decisions)):
            return None
        parts: dict[int, list[Likelihoods]] = defaultdict(list)
        for (rows, columns), evaluated in zip(microbatches, references, strict=True):
            rollout, part = batch.rollout.select(rows), decisions.select(rows, columns)
            parts[rows.start].append(self.policy.likelihoods(rollout, part, objective.needs, evaluated))
        whole = Likelihoods.cat([Likelihoods.cat(row, dim=1) for row in parts.values()])
        lik = reduce_over_decisions(whole, objective.decisions)
        advantages = batch.decision_advantages().reshape(len(lik), -1).expand_as(lik.logp).to(lik.logp.dtype)
        if objective.scope == "group":  # a group is never split over processes
            return objective.statistics(objective.summarise(lik), lik.mask, advantages, batch.groups)
        gather = self.processes.gather
        summary = {name: gather(value) for name, value in objective.summarise(lik).items()}
        statistics = objective.statistics(summary, gather(lik.mask), gather(advantages), gather(batch.groups))
        return {name: self.processes.local_rows(value) for name, value in statistics.items()}


def find_indivisible(config: RunConfig, processes: int) -> list[str]:
    """Return a problem for each number of groups that is not a multiple of processes times updates."""
    updates = config.train.updates_per_step
    counts = {"data.prompts_per_step": (config.groups, "" if config.branches == 1 else " with the branches")}
    if config.rehearsal is not None:
        counts["rehearsal.prompts_per_step"] = (config.rehearsal.prompts_per_step, "")
    return [
        f"{key}: found {count}{branches}, expected a multiple of the number of processes ({processes}) times "
        f"train.updates_per_step ({updates}), since every process has whole groups in every update; change one of them"
        for key, (count, branches) in counts.items()
        if count % (processes * updates)
    ]
