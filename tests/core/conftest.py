"""A policy small enough to write down, which fills every field of the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from difrl.core import Likelihoods, gaussian_kl, velocity


@dataclass
class FakePolicy:
    """x_ij = W c_ij + std_j z_ij in D dimensions; samples come from W_old. log N is averaged over D."""

    weight: Tensor
    old: Tensor
    base: Tensor
    contexts: Tensor
    noise: Tensor
    std: Tensor
    mask: Tensor
    mix: float = 0.7

    @classmethod
    def make(cls, rows: int, columns: int, *, dims: int = 3, shift: float = 0.3, seed: int = 0) -> FakePolicy:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        old = normal(dims, dims)
        lengths = torch.randint(1, columns + 1, (rows, 1), generator=g)
        return cls(
            weight=(old + shift * normal(dims, dims)).requires_grad_(),
            old=old,
            base=old + 0.2 * normal(dims, dims),
            contexts=normal(rows, columns, dims),
            noise=normal(rows, columns, dims),
            std=torch.linspace(0.5, 1.5, columns, dtype=torch.float64),
            mask=torch.arange(columns) < lengths,
        )

    def likelihoods(self, rows: slice | Tensor = slice(None)) -> Likelihoods:
        c, std = self.contexts[rows], self.std[:, None]
        out, out_old, out_base = c @ self.weight.T, c @ self.old.T, c @ self.base.T
        x = out_old + std * self.noise[rows]
        scale = self.std.expand(c.shape[:2])
        return Likelihoods(
            logp=log_normal(x, out, std),
            mask=self.mask[rows],
            references={"old": log_normal(x, out_old, std), "base": log_normal(x, out_base, std)},
            divergence={"base": columns(velocity, out, out_base), "old": kl(out_old, out, std)},
            bias=kl(out_old, out, std),
            scale=scale,
            weight=1.0 / scale,
            mixed=(
                log_normal(x, self.mix * out + (1 - self.mix) * out_old, std),
                log_normal(x, (1 + self.mix) * out_old - self.mix * out, std),
            ),
        )

    def grad(self, scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, self.weight, retain_graph=True)[0]


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).mean(dim=-1)


def columns(divergence: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A [B, D] -> [B] divergence of every decision: [B, J, D] -> [B, J]."""
    rows, number = tensors[0].shape[:2]
    return divergence(*(x.flatten(0, 1) for x in tensors)).reshape(rows, number)


def kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    return columns(gaussian_kl, mean, other, std.expand_as(mean))


@pytest.fixture
def fake_policy() -> type[FakePolicy]:
    return FakePolicy
