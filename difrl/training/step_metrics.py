"""Metrics of a training step: of its rollout, of its losses, and its times."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from difrl.core import Likelihoods, informative
from difrl.data.rollout import ScoredRollout
from difrl.runtime.distributed import DistributedContext
from difrl.scoring.diversity import Diversity

Metrics = dict[str, float]

METRIC_NAMES = {
    "ratio": "ratio/mean",
    "clip_high": "clip/high",
    "clip_low": "clip/low",
    "clip_dual": "clip/dual",
    "loss": "loss/objective",
}
"""Name of a metric in an objective -> its name in metrics.jsonl."""


def rollout_columns(scored: ScoredRollout, diversity: Diversity) -> dict[str, Tensor]:
    """Return rewards, groups without spread and diversity: name -> one value a sample or a group, NaN where it has none."""
    groups, valid = scored.groups, scored.valid
    columns = {
        "reward/mean": torch.where(valid, scored.rewards, math.nan),
        "groups/zero_std": 1.0 - informative(scored.rewards, groups, valid).float(),
        "samples/invalid": 1.0 - valid.float(),
        **scored.parts,
        **scored.rollout.measures,
    }
    return columns | diversity(scored.rollout)


def failed_rewards(metrics: Mapping[str, float], rewards: Collection[str]) -> list[str]:
    """Return the shares of samples, and of reference samples, that these rewards could not score: "invalid/ocr 0.25"."""
    prefixes = ("invalid/", "references/invalid/")
    names = {key: key.partition("invalid/")[2].split("/")[0] for key in metrics if key.startswith(prefixes)}
    return [f"{key} {metrics[key]:.2f}" for key, name in names.items() if name in rewards and metrics[key] > 0]


class LossSums:
    """Accumulators over the decisions of a step's updates. Their means are the metrics of the objective and of the anchors."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def add(self, lik: Likelihoods, metrics: Mapping[str, Tensor], loss: Tensor) -> None:
        """Add a micro-batch: metrics [B, J], the divergences of the likelihoods, and its part of the update's loss."""
        divergences = {name: term for name, term in lik.terms.items() if name.startswith("divergence/")}
        columns = {**metrics, **{name.replace("divergence/", "kl/", 1): d.detach() for name, d in divergences.items()}}
        if "ratio" in metrics:
            # From 1, not from 0: ratios of 1 ± 1e-4 are usual, and float32 squares around 1 are that coarse.
            columns["ratio_spread"] = (metrics["ratio"].double() - 1) ** 2
        for name, value in columns.items():
            self.sums[name] = self.sums[name] + torch.where(lik.mask, value.double(), 0.0).sum()
        self.sums["count"] = self.sums["count"] + lik.mask.sum()
        self.sums["total"] = self.sums["total"] + loss.detach().double()

    def means(self, processes: DistributedContext, updates: int) -> Metrics:
        """Return means over the decisions of all processes, and the mean loss of the step's updates."""
        totals = processes.all_reduce_sums(self.sums)
        count, loss = totals.pop("count"), totals.pop("total") / updates
        squares = totals.pop("ratio_spread", None)
        metrics = {METRIC_NAMES.get(name, name): value / count for name, value in totals.items()}
        if squares is not None:
            metrics["ratio/std"] = math.sqrt(max(0.0, squares / count - (metrics["ratio/mean"] - 1) ** 2))
        return metrics | {"loss": loss}


class Clock:
    """Seconds spent in each section of a step, as time/… metrics."""

    def __init__(self) -> None:
        self.times: Metrics = {}
        self._last = time.perf_counter()

    def time_section(self, name: str) -> None:
        """Add the time since the previous call to section `name`, after work that is queued on an accelerator is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + now - self._last
        self._last = now
