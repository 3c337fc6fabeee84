"""What a policy says of a minibatch: the only thing an objective sees.

Rows are samples, columns are decisions: a denoising step of a recorded trajectory, a fresh (t, noise) for a
clean sample, one element of a generated sequence. Nothing here, and nothing that reads it, knows which of the
three it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Decisions = Literal["each", "mean", "sum"]

_DETACHED = ("references/", "scale", "weight")
_FACTORS = ("scale", "weight")


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """Log-likelihood terms of B samples with J decisions each. Every tensor has shape [B, J].

    Attributes:
      logp: l_ij(theta), with gradient. How it is reduced over a sample's own dimensions (averaged for
        Gaussians, a plain log-probability for a discrete choice) is the policy's to say; everything below
        uses the same reduction.
      mask: bool, True where the decision counts. A sample that could not be scored is False throughout.
      references: snapshot name ("old", "base", ...) -> l_ij under that snapshot, detached.
      divergence: anchor name -> divergence of theta from that anchor, with gradient, of the anchor's own kind.
      bias: KL(old || theta) = E_old[-log ratio], with gradient, where it has a closed form: what ratio
        normalisation adds to log ratio, and what a trust region measures.
      scale: what ratio normalisation multiplies log ratio + bias by, detached.
      weight: factor of the decision's loss, detached.
      mixed: (l+, l-), the likelihoods of b out + (1 - b) out_old and of (1 + b) out_old - b out, with
        gradient.
    """

    logp: Tensor
    mask: Tensor
    references: Mapping[str, Tensor] = field(default_factory=dict)
    divergence: Mapping[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    mixed: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.logp.ndim != 2:
            raise ValueError(
                f"Likelihoods.logp has shape {list(self.logp.shape)}, expected [samples, decisions]; "
                "a policy with one decision a sample gives [samples, 1]"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"Likelihoods.mask is {self.mask.dtype}, expected torch.bool; compare it with 0 first")
        for name, tensor in self.tensors().items():
            _check_field(name, tensor, self.logp)

    def __len__(self) -> int:
        return self.logp.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor present under one flat name: "logp", "mask", "references/old", "mixed/plus", ..."""
        single = {
            "logp": self.logp,
            "mask": self.mask,
            "bias": self.bias,
            "scale": self.scale,
            "weight": self.weight,
        }
        plus, minus = self.mixed or (None, None)
        return {
            **{name: tensor for name, tensor in single.items() if tensor is not None},
            **{f"references/{name}": tensor for name, tensor in self.references.items()},
            **{f"divergence/{name}": tensor for name, tensor in self.divergence.items()},
            **({"mixed/plus": plus, "mixed/minus": minus} if plus is not None and minus is not None else {}),
        }

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Tensor]) -> Likelihoods:
        """The inverse of `tensors`."""
        return cls(
            logp=flat["logp"],
            mask=flat["mask"],
            references=_below(flat, "references/"),
            divergence=_below(flat, "divergence/"),
            bias=flat.get("bias"),
            scale=flat.get("scale"),
            weight=flat.get("weight"),
            mixed=(flat["mixed/plus"], flat["mixed/minus"]) if "mixed/plus" in flat else None,
        )

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a flat name, which must be present: lik["scale"], lik["mixed/plus"]."""
        self.require([name])
        return self.tensors()[name]

    def require(self, names: Iterable[str]) -> None:
        """Raise ValueError unless every name (in the words of `tensors`) is present."""
        present = self.tensors()
        missing = sorted(set(names) - present.keys())
        if missing:
            raise ValueError(
                f"the objective needs {missing} of the likelihoods, which hold only {sorted(present)}; "
                "choose a likelihood that provides them, or another objective"
            )

    def log_ratio(self, reference: str = "old") -> Tensor:
        """l_ij(theta) - l_ij(reference), [B, J], with gradient; 0 where masked, whatever stands there."""
        return torch.where(self.mask, self.logp - self[f"references/{reference}"], 0.0)

    def select(self, index: Tensor | slice) -> Likelihoods:
        """The rows of an index (int64 or bool tensor, or a slice)."""
        return Likelihoods.from_tensors({name: tensor[index] for name, tensor in self.tensors().items()})

    @classmethod
    def cat(cls, parts: Sequence[Likelihoods]) -> Likelihoods:
        """The rows of several minibatches in order; they must hold the same fields and the same J."""
        flat = [part.tensors() for part in parts]
        names = [sorted(part) for part in flat]
        if not parts or any(other != names[0] for other in names) or len({p.logp.shape[1] for p in parts}) > 1:
            found = [(part.logp.shape[1], fields) for part, fields in zip(parts, names, strict=True)]
            raise ValueError(
                f"cannot concatenate likelihoods with (J, fields) = {found}; expected at least one part, "
                "all with the same fields and J: evaluate them in one way and pad to one length"
            )
        return cls.from_tensors({name: torch.cat([part[name] for part in flat]) for name in names[0]})


def collapse(lik: Likelihoods, decisions: Decisions) -> Likelihoods:
    """One decision a sample, [B, 1], for an objective that is nonlinear in a sample's mean or sum.

      "sum":  l_i = sum_j m_ij l_ij            "mean":  l_i = sum_j m_ij l_ij / max(1, sum_j m_ij)

    alike for logp, references, divergence, bias and mixed; "each" returns the argument. A row stays unmasked
    if any of its decisions was. `scale` and `weight` are factors, not terms, and are averaged either way:
    exact where they are constant along a row, and with no exact counterpart where they are not.
    """
    if decisions == "each":
        return lik
    if decisions not in ("mean", "sum"):
        raise ValueError(f"decisions is {decisions!r}, expected 'each', 'mean' or 'sum'")
    count = lik.mask.sum(dim=1, keepdim=True).clamp(min=1)

    def reduced(name: str, tensor: Tensor) -> Tensor:
        if name == "mask":
            return tensor.any(dim=1, keepdim=True)
        total = torch.where(lik.mask, tensor, 0.0).sum(dim=1, keepdim=True)
        return total if decisions == "sum" and name not in _FACTORS else total / count

    return Likelihoods.from_tensors({name: reduced(name, tensor) for name, tensor in lik.tensors().items()})


def _check_field(name: str, tensor: Tensor, logp: Tensor) -> None:
    if tensor.shape != logp.shape:
        raise ValueError(
            f"Likelihoods: {name} has shape {list(tensor.shape)}, expected {list(logp.shape)} as logp has; "
            "give one value a sample and decision"
        )
    if name.startswith(_DETACHED) and tensor.requires_grad:
        raise ValueError(
            f"Likelihoods: {name} carries a gradient, expected none; evaluate it under torch.no_grad() or "
            "detach it, or the loss would also train what it is measured against"
        )


def _below(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}
