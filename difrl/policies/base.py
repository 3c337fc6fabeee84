"""The interface of a policy, whatever it generates, and the records that it exchanges with the trainer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from difrl.core import Likelihoods
from difrl.data.modality import Item
from difrl.data.prompts import Prompt
from difrl.data.rollout import Content, Rollout
from difrl.policies.evaluation import StoredEvaluation
from difrl.policies.logprob_check import Close
from difrl.policies.snapshots import Snapshots
from samplers import keyed, keyed_uniform


@dataclass(frozen=True)
class NoiseKey:
    """Key of all random numbers of a step, together with the number of a sample and a purpose."""

    seed: int
    step: int
    purpose: str = "train"

    def normal(
        self, shape: Sequence[int], samples: Tensor, purpose: str, index: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return standard normal noise [B, *shape] of samples [B], float32."""
        use = f"{self.purpose}/{purpose}"
        return keyed(shape, seed=self.seed, step=self.step, samples=samples, use=use, index=index, device=device)

    def uniform(self, shape: Sequence[int], samples: Tensor, purpose: str, index: int = 0) -> Tensor:
        """Return uniform numbers in [0, 1), [B, *shape], of samples [B], float32 on the CPU."""
        use = f"{self.purpose}/{purpose}"
        return keyed_uniform(shape, seed=self.seed, step=self.step, samples=samples, use=use, index=index)


@dataclass(frozen=True)
class GuidanceSettings:
    """Guidance of a trained model when it is used."""

    rlg: float = 1.0
    """Weight w of RLG: 0 is the base model, 1 the trained one."""
    first_steps: int = 0
    """Steps at w = 1 before RLG begins."""
    adaptive: float | None = None
    """Cosine for adaptive guidance: a sample whose two outputs agree so far needs no second evaluation of CFG or RLG."""
    measure: bool = False
    """True to measure each sample's distance to the base model. At w = 1 this costs one more evaluation a step."""

    @property
    def evaluates_base(self) -> bool:
        """True if the base model is evaluated."""
        return self.rlg != 1 or self.measure


TRAINED = GuidanceSettings()


Part = tuple[slice, slice]
"""The rows and columns of a micro-batch."""

ALL: Part = slice(None), slice(None)


@dataclass(frozen=True, eq=False)
class Decisions:
    """The decisions at which B samples are evaluated, J of each: name -> [B, J, ...]."""

    tensors: Mapping[str, Tensor]
    mask: Tensor
    """True where a decision counts, [B, J] bool."""
    whole: bool = False
    """True if all decisions of a sample are evaluated in one pass and must stay together."""

    def select(self, rows: Tensor | slice, columns: slice) -> Decisions:
        """Select rows by an integer index or a slice, and decisions by a slice. Two slices copy nothing."""
        return Decisions({k: v[rows, columns] for k, v in self.tensors.items()}, self.mask[rows, columns], self.whole)

    @property
    def passes(self) -> int:
        """Number of rows of the batch in which a model evaluates them: samples, or the single decisions that count."""
        return len(self.mask) if self.whole else int(self.mask.sum())

    def flat(self) -> dict[str, Tensor]:
        """Return the N decisions that count, a sample's one after the other: name -> [N, ...]."""
        return {name: value[self.mask] for name, value in self.tensors.items()}

    def unflat(self, values: Tensor) -> Tensor:
        """Return [N] values of these decisions as [B, J], 0 elsewhere."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


@dataclass(frozen=True, eq=False)
class Penalty:
    """Effect of an anchor outside of the loss on each decision, [B, J], without gradient."""

    amount: Tensor
    """The amount that is subtracted from the reward or from the decision's advantage: k1, or k1 less its expectation."""
    divergence: Tensor
    """An estimate of KL(sampler ‖ anchor): k1, or its expectation."""


class Policy(Protocol):
    """A generator under training. All random numbers come from keys, so a policy has no random state to save."""

    snapshots: Snapshots
    evaluations: int
    """Number of model evaluations of single samples since the start; for text, of generated tokens."""

    def validate_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ModelError for prompts that it cannot take, with the place of each. Call it before the first rollout."""

    def encode_prompts(self, prompts: Sequence[Prompt], start: float = 0.0) -> None:
        """Compute everything that depends on these prompts alone, and free the memory of the parts that do it.

        start: share of the prompts that come last, by which processes divide the work.
        """

    def validate_items(self, items: Sequence[Item], places: Sequence[str]) -> None:
        """Raise ModelError for samples of a file that `replay_data` cannot take, as far as it shows without encoding them."""

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        """Draw one sample for each prompt, with the replay data that `decisions` and `likelihoods` need."""

    def drawing(self, *snapshots: str, alike: bool = True) -> AbstractContextManager[None]:
        """Return a context in which samples are drawn by these snapshots. All processes must enter it.

        alike: whether every process draws as many samples, as often. If not, or if samples differ in length, whole weights
        must be on every process.
        """

    def reference(self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, snapshot: str) -> Rollout:
        """Draw one sample for each prompt as `rollout` does, by the weights of a snapshot, without branches or replay data."""

    def replay_data(self, prompts: Sequence[Prompt], content: Content) -> Mapping[str, Tensor]:
        """Return the replay data of samples from other sources: images [B, 3, H, W], videos or texts."""

    def evaluation(
        self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, guidance: GuidanceSettings = TRAINED
    ) -> Rollout:
        """Draw one sample for each prompt as a user would. Its measures are its cost and, if enabled, its distance to base."""

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        """Return the decisions of these samples: recorded ones, or fresh ones drawn by the key."""

    def evaluate_references(
        self, rollout: Rollout, decisions: Decisions, parts: Sequence[Part], needs: frozenset[str] | None = None
    ) -> Iterable[Mapping[str, StoredEvaluation]]:
        """Evaluate the references and anchors of an update, without gradient: for each micro-batch, name -> its evaluation.

        Weights are exchanged once for each of them. Outputs are held for the update if θ's are compared with them, one
        latent (or hidden state) a decision and reference; the result may be iterated several times.

        Args:
          parts: the micro-batches, in whose shapes the decisions are evaluated.
          needs: as for `likelihoods`.
        """

    def likelihoods(
        self,
        rollout: Rollout,
        decisions: Decisions,
        needs: frozenset[str] | None = None,
        references: Mapping[str, StoredEvaluation] | None = None,
    ) -> Likelihoods:
        """Evaluate the decisions under θ, and compare them with the references.

        Args:
          needs: names of the terms (`Likelihoods.terms`) beside logp and mask; default: all that the run uses.
          references: evaluations of these decisions by `evaluate_references`, for these terms or more; default: they are
            made first.
        """

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions, unlike: int = 0) -> Tensor:
        """Return ℓ [B, J] under the weights that drew the samples: as recorded, or evaluated again without gradient.

        unlike: rows of the batch (`Decisions.passes`) that ℓ is compared with. It is evaluated in one of half or twice as many.
        """

    def recompute_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        """Return ℓ [B, J] evaluated again in one batch, without gradient, under the weights that drew the samples."""

    def references_equal_to_policy(self) -> Sequence[str]:
        """Return the names of references that at this moment have θ's own weights and guidance."""

    def diagnose(self, rollout: Rollout, decisions: Decisions, recorded: Tensor, close: Close) -> str:
        """Return why these decisions do not evaluate to the recorded ℓ, and what to do; "" if the cause is not found.

        This costs evaluations. Call it only when the first-update check has failed.
        """

    def penalties(
        self, rollout: Rollout, decisions: Decisions, parts: Sequence[Part], names: Collection[str] | None = None
    ) -> Iterable[Mapping[str, Penalty]]:
        """Return the penalties of anchors outside of the loss on decisions of the weights that drew them.

        Args:
          parts: the micro-batches in which they are evaluated. Each gives a mapping from an anchor to its penalty.
          names: the anchors; default: all.
        """

    @property
    def device(self) -> torch.device:
        """The device of the model."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters by name."""

    def save(self, folder: Path) -> None:
        """Write what was trained: an adapter, or the trained parts with a reference to the model that has the others."""

    def merge(self, folder: Path) -> None:
        """Write the whole model in the format of its library. The policy must not be used afterwards."""


def batches(total: int, size: int) -> Iterable[slice]:
    """Return slices of at most `size` that cover range(total)."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
