"""The state of every optimizer goes into a checkpoint and comes back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from difrl.policies.layout import Layout
from difrl.policies.snapshots import Snapshots
from difrl.runtime.distributed import DistributedContext
from difrl.training import checkpoint
from difrl.training.checkpoint import CheckpointError, optimizer
from difrl.training.checkpoint.tensors import TensorFile
from tests.training.test_checkpoint import Noted

SHAPES = {"large": (64, 80), "odd": (67, 70), "small": (5,)}


def torchao(name: str) -> Callable[..., Any]:
    def build(parameters: Any) -> Any:
        pytest.importorskip("torchao")
        from torchao import optim

        built = getattr(optim, name)(parameters, lr=0.01)
        built.step = torch.compiler.set_stance("force_eager")(built.step)
        return built

    return build


def bitsandbytes(name: str) -> Callable[..., Any]:
    def build(parameters: Any) -> Any:
        bnb = pytest.importorskip("bitsandbytes")
        return getattr(bnb.optim, name)(parameters, lr=0.01)

    return build


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    **{f"torchao {name}": torchao(name) for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
    **{
        f"bitsandbytes {name}": bitsandbytes(name)
        for name in ("PagedAdamW", "PagedAdamW8bit", "Lion", "Lion8bit", "PagedLion8bit", "AdEMAMix")
    },
}


def build(name: str, seed: int = 0) -> Any:
    """Return the parts of a trainer with an optimizer of this name."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {n: nn.Parameter(torch.randn(shape, generator=generator)) for n, shape in SHAPES.items()}
    snapshots = Snapshots(Layout(parameters), {}, nullcontext)
    policy = SimpleNamespace(parameters=parameters, snapshots=snapshots)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = OPTIMIZERS[name](list(parameters.values()))
    return SimpleNamespace(policy=policy, source=Noted(), optimizer=built, evaluations=0, coefficients={}, weights={})


def advance(trained: Any, start: int, stop: int) -> None:
    for step in range(start, stop):
        for p in trained.policy.parameters.values():
            p.grad = p.detach() ** 2 - 0.1 * step
        with warnings.catch_warnings():  # paged optimizers are not paged on a CPU
            warnings.simplefilter("ignore")
            trained.optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killed_and_resumed_is_the_same_run(tmp_path: Path, name: str) -> None:
    """Weights after three more steps, and the next checkpoint, have the same bytes."""
    processes = DistributedContext()
    whole, resumed = build(name), build(name, seed=1)
    advance(whole, 0, 3)
    checkpoint.save(whole, tmp_path / "whole", 3, 9, processes)
    place = checkpoint.checkpoint_folder(tmp_path / "whole", 3)
    assert checkpoint.load(resumed, place, processes) == 3
    for trained, run in ((whole, "whole"), (resumed, "resumed")):
        advance(trained, 3, 6)
        checkpoint.save(trained, tmp_path / run, 6, 9, processes)
    for file in ("trained", "optimizer"):
        one, other = (
            (checkpoint.checkpoint_folder(tmp_path / run, 6) / f"{file}.safetensors").read_bytes()
            for run in ("whole", "resumed")
        )
        assert one == other


def test_moments_in_few_bits_are_not_widened_on_the_disk(tmp_path: Path) -> None:
    trained = build("torchao AdamW8bit")
    advance(trained, 0, 1)
    checkpoint.save(trained, tmp_path, 1, 1, DistributedContext())
    saved = load_file(checkpoint.checkpoint_folder(tmp_path, 1) / "optimizer.safetensors")
    assert sorted(name for name in saved if name.startswith("large/exp_avg/")) == [
        "large/exp_avg/codes",
        "large/exp_avg/qmap",
        "large/exp_avg/scale",
    ]
    assert saved["large/exp_avg/codes"].dtype == torch.uint8
    assert saved["small/exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("bits", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_moments_are_widened_as_torchao_does(tmp_path: Path, bits: str) -> None:
    """Where blocks do not fit another layout. AdamW has moments without blocks, and loads those of any."""
    processes = DistributedContext()
    trained, plain = build(f"torchao {bits}"), build("AdamW")
    advance(trained, 0, 2)
    checkpoint.save(trained, tmp_path, 2, 1, processes)
    file = TensorFile(checkpoint.checkpoint_folder(tmp_path, 2), "optimizer", processes)
    optimizer.load(plain.optimizer, plain.policy.snapshots.layout, file, 2, processes)
    for name, p in trained.policy.parameters.items():
        state, found = trained.optimizer.state[p], plain.optimizer.state[plain.policy.parameters[name]]
        for key in ("exp_avg", "exp_avg_sq"):
            value = state[key].dequantize() if hasattr(state[key], "dequantize") and name != "small" else state[key]
            assert torch.equal(found[key], value), (name, key)
    assert {int(state["step"]) for state in plain.optimizer.state.values()} == {2}


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    processes = DistributedContext()
    trained = build("SGD")
    advance(trained, 0, 2)
    checkpoint.save(trained, tmp_path, 2, 1, processes)
    with pytest.raises(
        CheckpointError, match=r"lacks large/exp_avg, which the optimizer of this run keeps; resume with"
    ):
        checkpoint.load(build("AdamW"), checkpoint.checkpoint_folder(tmp_path, 2), processes)
