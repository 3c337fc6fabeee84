"""Optimizers of three libraries: their steps, their memory, and runs that go on where they were."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from difrl.config import TrainConfig
from difrl.training.optimizers import (
    OPTIMIZERS,
    OptimizerError,
    build_optimizer,
    count_state_bytes,
    set_learning_rate,
)

SHAPES = ((64, 128), (10,), (32, 128))
"""Shapes of two tensors that are large enough for a state in few bits, and of one that is not."""
BYTES = {  # of a weight, scales left out
    "adamw": 8,
    "adamw8bit": 2,
    "adamw4bit": 1,
    "adamw_fp8": 2,
    "paged_adamw": 8,
    "paged_adamw8bit": 2,
    "lion": 4,
    "lion8bit": 1,
    "paged_lion8bit": 1,
}


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]


def take_steps(optimizer: torch.optim.Optimizer, count: int = 3, lr: float = 0.1) -> None:
    for step in range(count):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape).to(p.device)
        set_learning_rate(optimizer, lr / (step + 1))
        optimizer.step()


def train(name: str, **settings: object) -> list[nn.Parameter]:
    found = parameters()
    take_steps(build_optimizer(found, TrainConfig.model_validate({"optimizer": name, **settings})))
    return found


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "adamw" in name])
def test_steps_are_those_of_adamw_to_the_precision_of_the_moments(name: str) -> None:
    settings = {"betas": (0.8, 0.9), "weight_decay": 0.5}
    for found, expected in zip(train(name, **settings), train("adamw", **settings), strict=True):
        exact = expected.numel() < 4096 or name == "paged_adamw"
        moved = (expected - expected.detach().mean()).norm()
        assert (found - expected).norm() <= (1e-6 if exact else 0.1) * moved


@pytest.mark.parametrize("name", ["lion", "lion8bit", "paged_lion8bit"])
def test_lion_steps_by_the_sign_of_its_moment(name: str) -> None:
    """Algorithm 2 of arXiv:2302.06675, whose weight decay is that of AdamW."""
    found, expected, moments = train(name, betas=(0.8, 0.9), weight_decay=0.5), parameters(), [0.0] * len(SHAPES)
    for step in range(3):
        torch.manual_seed(step)
        for i, p in enumerate(expected):
            gradient, lr = torch.randn(p.shape), 0.1 / (step + 1)
            direction = torch.sign(0.8 * torch.as_tensor(moments[i]) + 0.2 * gradient)
            moments[i] = 0.9 * torch.as_tensor(moments[i]) + 0.1 * gradient
            p.data = p.data * (1 - lr * 0.5) - lr * direction
    for one, other in zip(found, expected, strict=True):
        agrees = torch.isclose(one, other, rtol=1e-5, atol=1e-5).float().mean()
        # A moment near zero may have the other sign in eight bits.
        assert agrees > (0.98 if "8bit" in name and other.numel() >= 4096 else 0.9999)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_has_the_bytes_of_its_format_with_and_without_weights(name: str) -> None:
    sizes = []
    for device in ("cpu", "meta"):
        optimizer = build_optimizer(parameters(device), TrainConfig.model_validate({"optimizer": name}))
        take_steps(optimizer, 1)
        sizes.append(count_state_bytes(optimizer))
    large, small = (sum(n for n in numbers) for numbers in ((64 * 128, 32 * 128), (10,)))
    exact = BYTES[name] * large + (4 if "lion" in name else 8) * small
    assert sizes[0] == sizes[1]
    # A scale for 128 or 256 weights, and a table of up to 256 values for a tensor.
    assert exact <= sizes[0] <= exact + 4 * 2 * large / 128 + 4 * 256 * 2 * len(SHAPES)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(OptimizerError, match=r"train.optimizer: adamw8bit needs torchao, .*pip install torchao"):
        build_optimizer(parameters(), TrainConfig(optimizer="adamw8bit"))


def test_moments_are_reset_with_all(tmp_path: Path) -> None:
    for name in OPTIMIZERS:
        own = parameters()
        optimizer = build_optimizer(own, TrainConfig.model_validate({"optimizer": name}))
        take_steps(optimizer, 2)
        optimizer.state.clear()
        before = [p.detach().clone() for p in own]
        take_steps(optimizer, 1)
        fresh = [nn.Parameter(p) for p in before]
        take_steps(build_optimizer(fresh, TrainConfig.model_validate({"optimizer": name})), 1)
        assert all(torch.equal(one, other) for one, other in zip(own, fresh, strict=True)), name
