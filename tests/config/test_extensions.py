"""Objectives and kernels of other packages: the examples of docs/extending.md, installed as pip would, train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.config import ClippedObjective, ObjectiveSection, RunConfig, register_kernel, register_objective
from difrl.config.load import read_config, to_yaml
from difrl.config.schema.kernels import KERNEL_ENTRIES
from difrl.config.schema.objective import OBJECTIVES
from difrl.config.yaml_source import ConfigError
from difrl.core import Likelihoods
from difrl.policies.load import load_policy
from samplers import FlowMatching, Gaussian, Grid, transition_std
from tests.documented_packages import install
from tests.fakes import linear_trainer
from tests.recipes import FLOW_GRPO, recipe

RECIPE = """\
algorithm: flow_grpo
model: {path: tiny-sd3}
data: {train: "shapes:train"}
rewards: [{name: geneval}]
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("my_objectives", OBJECTIVES, tmp_path / "site", monkeypatch)
    install("my_kernels", KERNEL_ENTRIES, tmp_path / "site", monkeypatch)


def read(folder: Path, *overrides: str) -> RunConfig:
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return read_config(folder / "recipe.yaml", overrides)


PENALISED: dict[str, Any] = {"kind": "penalised", "beta": 0.5}


def test_an_objective_of_another_package_is_the_formula(tmp_path: Path) -> None:
    config = read(tmp_path, "objective={kind: penalised, beta: 0.5}")
    objective = config.objective.build(config.likelihood)
    terms = {"references/old": torch.zeros(1, 1)}
    lik = Likelihoods(torch.tensor([[math.log(2.0)]]), torch.ones(1, 1, dtype=torch.bool), terms)
    loss, metrics = objective(lik, torch.tensor([3.0]), torch.zeros(1, dtype=torch.int64))
    assert loss.item() == pytest.approx(0.5 * math.log(2.0) ** 2 - 6.0)
    assert metrics["ratio"].item() == pytest.approx(2.0)


def test_an_objective_of_another_package_trains() -> None:
    trainer = linear_trainer(objective=PENALISED)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    metrics = trainer.step(0)
    assert metrics["ratio/mean"] == pytest.approx(1.0)
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))


def test_a_written_config_keeps_the_keys_of_such_an_objective(tmp_path: Path) -> None:
    config = read(tmp_path, "objective={kind: penalised, beta: 0.5}")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert config.model_dump()["objective"] == PENALISED
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "objective={kind: penalized}",
            "objective.kind: expected clipped, .* or penalised, .*; did you mean penalised?",
        ),
        ("objective={kind: penalised, bta: 1}", r"objective.bta: unknown key; did you mean objective.beta\?"),
        ("objective={kind: penalised, beta: 0}", "objective.beta: expected more than 0, found 0"),
        ("objective={kind: penalised, clip_low: 1}", "objective.clip_low: not a key of kind: penalised; it belongs to"),
        (
            "rollout.kernel=proportionl",
            r"rollout.kernel: expected 'ode', .* or 'proportional', .*did you mean proportional\?",
        ),
        ("rollout={kernel: proportional, noise_level: 1.5}", "the kernel proportional takes at most 1"),
    ],
)
def test_errors_are_those_of_sections_of_difrl(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path, override)


def test_an_objective_declares_its_conflicts(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"likelihood\.old: detach makes log rho zero, so the penalty would do nothing"
    ):
        read(tmp_path, "objective={kind: penalised}", "likelihood.old=detach")


def test_a_kernel_of_another_package_is_sampled_and_evaluated() -> None:
    config = recipe("nowhere", **{**FLOW_GRPO, "rollout": {"kernel": "proportional", "noise_level": 0.5}})
    grid, process = Grid(torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64)), FlowMatching()
    kernel = config.rollout.build_kernel(grid)
    # σ_s = s of flow matching.
    torch.testing.assert_close(transition_std(kernel, process, grid), 0.5 * grid.times[1:])
    x, output = torch.randn(2, 3), torch.randn(2, 3)
    t, s = torch.full((2,), 0.6), torch.full((2,), 0.2)
    found = kernel(process, output, x, t, s)
    assert isinstance(found, Gaussian)
    x0, noise = process.split(output, x, t)
    torch.testing.assert_close(found.mean, 0.8 * x0 + 0.2 * math.sqrt(0.75) * noise)


def test_a_kernel_of_another_package_trains(sd3: Path) -> None:
    rollout = {"kernel": "proportional", "noise_level": 0.5, "steps": 3}
    config = recipe(sd3, **{**FLOW_GRPO, "rollout": rollout})
    trainer = linear_trainer(policy=load_policy(config), anchors=[], rollout=rollout)
    metrics = trainer.step(0)
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["grad_norm"] > 0


def test_a_name_is_taken_once() -> None:
    class Other(ObjectiveSection):
        """Another section."""

    register_objective("clipped", ClippedObjective)
    with pytest.raises(ValueError, match="two objective extensions are called 'clipped'"):
        register_objective("clipped", Other)
    with pytest.raises(ValueError, match="two kernel extensions are called 'ode'"):
        register_kernel("ode", lambda noise_level, grid: KERNEL_ENTRIES["cps"].build(noise_level, grid))
