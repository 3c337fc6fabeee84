"""The log-likelihoods of a minibatch under the policy and its references: the only input of an objective from the model.

Rows are samples, columns are decisions: a denoising step of a recorded trajectory, a fresh (t, noise) for a clean sample,
or one element of a generated sequence. Neither this record nor an objective depends on which of the three it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

DecisionReduction = Literal["each", "mean", "sum"]

FACTORS = ("scale", "weight")
TERMS = ("references/NAME", "divergence/NAME", "bias", "mixed/plus", "mixed/minus", *FACTORS)
_DETACHED = ("references/", *FACTORS)


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """Log-likelihood terms of B samples with J decisions each. Every tensor has shape [B, J].

    Attributes:
      logp: l_ij(theta), with gradient. The policy decides how it is reduced over a sample's own dimensions (averaged for
        Gaussians, a plain log-probability for a discrete choice); the terms are reduced in the same way.
      mask: bool, True where the decision counts. A sample that could not be scored is False throughout.
      terms: further tensors by name, those that the run needs (`Objective.needs` uses the same names):
        "references/NAME": l_ij under a snapshot ("old", "base", ...), detached.
        "divergence/NAME": divergence of theta from an anchor, with gradient, of the anchor's own kind.
        "bias": KL(old || theta) = E_old[-log ratio], with gradient, where it has a closed form. Ratio normalisation adds
          it to the log ratio, and a trust region bounds it.
        "scale": factor by which ratio normalisation multiplies log ratio + bias, detached.
        "weight": factor of the decision's loss, detached.
        "mixed/plus", "mixed/minus": l+ and l-, the likelihoods of b out + (1 - b) out_old and of (1 + b) out_old - b out,
          with gradient.
    """

    logp: Tensor
    mask: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.logp.ndim != 2:
            raise ValueError(
                f"Likelihoods.logp has shape {list(self.logp.shape)}, expected [samples, decisions]; "
                "a policy with one decision a sample gives [samples, 1]"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"Likelihoods.mask is {self.mask.dtype}, expected torch.bool; compare it with 0 first")
        for name in self.terms:
            group, _, own_name = name.partition("/")
            if name not in TERMS and not (own_name and f"{group}/NAME" in TERMS):
                raise ValueError(f"Likelihoods: found a term {name!r}, expected {', '.join(TERMS)}")
        for name, tensor in {"mask": self.mask, **self.terms}.items():
            self._validate(name, tensor)

    def _validate(self, name: str, tensor: Tensor) -> None:
        if tensor.shape != self.logp.shape:
            raise ValueError(
                f"Likelihoods: {name} has shape {list(tensor.shape)}, expected {list(self.logp.shape)} as logp has; "
                "give one value a sample and decision"
            )
        if name.startswith(_DETACHED) and tensor.requires_grad:
            raise ValueError(
                f"Likelihoods: {name} carries a gradient, expected none; evaluate it under torch.no_grad() or "
                "detach it, or the loss would also train what it is measured against"
            )

    def __len__(self) -> int:
        return self.logp.shape[0]

    def __getitem__(self, name: str) -> Tensor:
        """Return a term. Raise ValueError if it is absent."""
        self.require([name])
        return self.terms[name]

    def require(self, names: Iterable[str]) -> None:
        """Raise ValueError unless every one of these terms is present."""
        missing = sorted(set(names) - self.terms.keys())
        if missing:
            raise ValueError(
                f"the objective needs {missing} of the likelihoods, which hold only {['logp', 'mask', *sorted(self.terms)]}; "
                "choose a likelihood that provides them, or another objective"
            )

    def log_ratio(self, reference: str = "old") -> Tensor:
        """Return l_ij(theta) - l_ij(reference), [B, J], with gradient; 0 where masked, even if NaN or infinite there."""
        return torch.where(self.mask, self.logp - self[f"references/{reference}"], 0.0)

    def select(self, index: Tensor | slice) -> Likelihoods:
        """Return the rows of an index (int64 or bool tensor, or a slice)."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Likelihoods:
        """Apply a function that keeps dtypes to logp, the mask and every term."""
        terms = {name: function(term) for name, term in self.terms.items()}
        return Likelihoods(function(self.logp), function(self.mask), terms)

    @classmethod
    def cat(cls, parts: Sequence[Likelihoods], dim: int = 0) -> Likelihoods:
        """Concatenate minibatches along samples (0) or decisions (1). All must hold the same terms and fit in the other."""
        found = {(part.logp.shape[1 - dim], tuple(sorted(part.terms))) for part in parts}
        if len(found) != 1:
            raise ValueError(
                f"cannot concatenate likelihoods with ({'JB'[dim]}, terms) = {sorted(found)}; expected at least one part, "
                "all with the same terms and size: evaluate them in one way and pad to one length"
            )
        return cls(
            torch.cat([part.logp for part in parts], dim),
            torch.cat([part.mask for part in parts], dim),
            {name: torch.cat([part.terms[name] for part in parts], dim) for name in parts[0].terms},
        )


def reduce_over_decisions(lik: Likelihoods, decisions: DecisionReduction) -> Likelihoods:
    """Reduce each sample to one decision, [B, 1], for an objective that is nonlinear in a sample's mean or sum.

      "sum":  l_i = sum_j m_ij l_ij            "mean":  l_i = sum_j m_ij l_ij / max(1, sum_j m_ij)

    for logp and every term; "each" returns the argument. A row stays unmasked if any of its decisions was. "scale" and
    "weight" are factors and are averaged either way. The average is exact where they are constant along a row; where they
    are not, there is no exact counterpart.
    """
    if decisions == "each":
        return lik
    if decisions not in ("mean", "sum"):
        raise ValueError(f"decisions is {decisions!r}, expected 'each', 'mean' or 'sum'")
    count = lik.mask.sum(dim=1, keepdim=True).clamp(min=1)

    def reduced(tensor: Tensor, mean: bool) -> Tensor:
        total = torch.where(lik.mask, tensor, 0.0).sum(dim=1, keepdim=True)
        return total / count if mean else total

    mean = decisions == "mean"
    return Likelihoods(
        reduced(lik.logp, mean),
        lik.mask.any(dim=1, keepdim=True),
        {name: reduced(term, mean or name in FACTORS) for name, term in lik.terms.items()},
    )
