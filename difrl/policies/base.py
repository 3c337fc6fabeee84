"""What the trainer asks of a policy, whatever it generates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from difrl.core import Likelihoods
from difrl.data.modality import Item
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.logprob_check import Close
from difrl.policies.snapshots import Snapshots
from samplers import keyed


@dataclass(frozen=True)
class NoiseKey:
    """What all randomness of a step is keyed by, beside the sample's own number and the use."""

    seed: int
    step: int
    purpose: str = "train"

    def normal(
        self, shape: Sequence[int], samples: Tensor, purpose: str, index: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return standard normal noise [B, *shape] of samples [B], float32."""
        use = f"{self.purpose}/{purpose}"
        return keyed(shape, seed=self.seed, step=self.step, samples=samples, use=use, index=index, device=device)


@dataclass(frozen=True)
class GuidanceSettings:
    """How samples of a trained model are steered when it is used."""

    rlg: float = 1.0
    """w of RLG: 0 the base model, 1 the trained one."""
    first_steps: int = 0
    """Steps at w = 1 before RLG begins."""
    adaptive: float | None = None
    """Adaptive guidance: the second evaluation of CFG and of RLG ends for a sample once two outputs agree to this cosine."""
    measure: bool = False
    """Also measure each sample's distance to the base model, for one more evaluation a step at w = 1."""


TRAINED = GuidanceSettings()


@dataclass(frozen=True, eq=False)
class Decisions:
    """The decisions at which samples are evaluated: name -> [B, J, ...], and which of them count."""

    tensors: Mapping[str, Tensor]
    mask: Tensor
    """[B, J] bool."""
    whole: bool = False
    """Whether a sample's decisions are evaluated in one pass, and so must stay together."""

    def select(self, rows: Tensor | slice, columns: slice) -> Decisions:
        """Rows by an integer index or a slice, decisions by a slice; two slices copy nothing."""
        return Decisions({k: v[rows, columns] for k, v in self.tensors.items()}, self.mask[rows, columns], self.whole)

    def flat(self) -> dict[str, Tensor]:
        """Return the N decisions that count, a sample's one after the other: name -> [N, ...]."""
        return {name: value[self.mask] for name, value in self.tensors.items()}

    def unflat(self, values: Tensor) -> Tensor:
        """Return [N] values of these decisions as [B, J], 0 elsewhere."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


@dataclass(frozen=True, eq=False)
class Penalty:
    """What an anchor outside of the loss makes of each decision, [B, J], without gradient."""

    amount: Tensor
    """What is taken off the reward, or off the decision's advantage: k1, or k1 less its expectation."""
    divergence: Tensor
    """An estimate of KL(weights that drew ‖ anchor): k1, or that expectation."""


class Policy(Protocol):
    """A generator under training. All randomness comes from keys, so a policy has no random state to save."""

    snapshots: Snapshots
    evaluations: int
    """Model evaluations of single samples since the start (for text: tokens generated)."""

    def validate_prompts(self, prompts: Sequence[Prompt]) -> None:
        """ModelError names the prompts that it cannot take, each with its place; asked before anything is drawn."""

    def validate_items(self, items: Sequence[Item], places: Sequence[str]) -> None:
        """ModelError names the samples of a file that `tape` would not take, as far as that shows without encoding them."""

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        """One sample for each prompt, with the tape that `decisions` and `likelihoods` need."""

    def reference(self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, snapshot: str) -> Rollout:
        """One sample for each prompt as `rollout` draws it, by the weights of a snapshot; nothing is shared, and no tape kept."""

    def replay_data(self, prompts: Sequence[Prompt], content: Tensor | Sequence[str]) -> Mapping[str, Tensor]:
        """What `decisions` needs of samples that were made elsewhere: images [B, 3, H, W] or texts."""

    def evaluation(
        self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, steering: GuidanceSettings = TRAINED
    ) -> Rollout:
        """One sample for each prompt as a user would draw it; its measures are what it cost, and what was asked for."""

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        """The decisions of these samples: recorded ones, or fresh ones drawn by the key."""

    def likelihoods(self, rollout: Rollout, decisions: Decisions, needs: frozenset[str] | None = None) -> Likelihoods:
        """Evaluates the decisions. References and anchors are evaluated first, under their own weights.

        needs: which tensors, by the names of `Likelihoods.terms`, beside logp and mask; None: all that the run uses.
        """

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        """ℓ [B, J] under the weights that drew the samples: as recorded, or evaluated again without gradient."""

    def recomputed_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        """ℓ [B, J] evaluated again in one batch, without gradient, under the weights that drew the samples."""

    def references_equal_to_policy(self) -> Sequence[str]:
        """References of `likelihoods` that are evaluated under θ's own weights and guidance at this moment."""

    def diagnose(self, rollout: Rollout, decisions: Decisions, recorded: Tensor, close: Close) -> str:
        """Why these decisions are not evaluated as `recorded` says, and what to do; "" if nothing explains it.

        Costs evaluations; asked only when the first-update check has failed.
        """

    def penalties(self, rollout: Rollout, decisions: Decisions) -> Mapping[str, Penalty]:
        """Anchor outside of the loss → what it makes of decisions of the weights that drew the samples."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name."""

    def save(self, folder: Path) -> None:
        """Writes the trained model for others to load."""


def batches(total: int, size: int) -> Iterable[slice]:
    """Slices of at most `size` that cover range(total)."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
