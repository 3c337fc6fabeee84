"""Terms of a policy's likelihoods beside ℓ: the exact KL from old, scales and weights of steps, mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.config import ForwardLikelihood, ReverseLikelihood
from difrl.core import Likelihoods, RatioNormalised
from difrl.data.prompts import Prompt
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.likelihoods import Forward, Reverse
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.diffusion.step_weights import slope, time_step
from samplers import FlowMatching, Grid, VariancePreserving, make_kernel
from tests.recipes import FLOW_GRPO, recipe

KEY = NoiseKey(seed=3, step=5)
PROMPTS = [Prompt(f"a {colour} square", {}) for colour in ("red", "green", "blue")]
GUARD = {
    **FLOW_GRPO,
    "objective": {"kind": "ratio_normalised", "clip_low": 0.1, "clip_high": 0.1},
    "anchors": [{"to": "old", "coefficient": 0.5}],
    "snapshots": {"old": {"decay": 0.0}},
}
GRID = Grid(torch.linspace(1, 0, 6, dtype=torch.float64))
FLOW = FlowMatching()


def drawn_then_moved(path: Path, /, **sections: Any) -> tuple[DiffusionPolicy, Any, Any]:
    """A policy whose weights have moved since it drew a rollout, with the rollout and its decisions."""
    policy = load_diffusion_policy(recipe(path, **sections))
    rollout = policy.rollout(PROMPTS, torch.arange(3), torch.arange(3), KEY)
    generator = torch.Generator().manual_seed(0)
    for p in policy.parameters.values():
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
    return policy, rollout, policy.decisions(rollout, KEY)


@pytest.mark.parametrize("old", ["recorded", "recompute"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_bias_is_the_kl_between_old_and_new_transitions(sd3: Path, old: str, reduce: str) -> None:
    """The bias is ‖mean_θ − mean_old‖² / (2 std²) of means computed here, with gradient, also beside an anchor to old."""
    likelihood = {"kind": "reverse", "old": old, "reduce": reduce}
    policy, rollout, decisions = drawn_then_moved(sd3, **{**GUARD, "likelihood": likelihood})
    flat = decisions.flat()
    condition = policy.prompts(PROMPTS, False).repeat_interleave(decisions.mask.shape[1])

    def transition(snapshot: str) -> Any:
        output = policy.denoiser(snapshot)(flat["x_t"], flat["t"], condition)
        return policy.sampling.kernel(FLOW, output, flat["x_t"], flat["t"], flat["s"])

    before = transition("old")  # first: an exchange of weights would invalidate the graphs of θ
    lik, new = policy.likelihoods(rollout, decisions), transition("current")
    terms = ((new.mean - before.mean) / new.std).square().flatten(1) / 2
    expected = (terms.mean(1) if reduce == "mean" else terms.sum(1)).unflatten(0, decisions.mask.shape)
    # float32 means of size 1, whose differences are about 0.05
    torch.testing.assert_close(lik["bias"], expected, rtol=1e-3, atol=1e-5)
    parameter = policy.parameters["proj_out.weight"]
    found, wanted = (torch.autograd.grad(x.sum(), parameter, retain_graph=True)[0] for x in (lik["bias"], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))
    assert float(lik["bias"].detach().min()) > 0
    assert not torch.allclose(lik["bias"], lik["divergence/old"])  # of outputs, not of transitions
    torch.testing.assert_close(lik["scale"], new.std.flatten().unflatten(0, decisions.mask.shape))
    assert "weight" not in lik.terms


def test_detached_old_has_no_kl(sd3: Path) -> None:
    likelihood = {"kind": "reverse", "old": "detach"}
    policy, rollout, decisions = drawn_then_moved(sd3, **{**GUARD, "likelihood": likelihood})
    assert torch.equal(policy.likelihoods(rollout, decisions)["bias"], torch.zeros(decisions.mask.shape))


def test_means_are_recorded_only_where_something_reads_them(sd3: Path) -> None:
    def recorded_tensors(**sections: Any) -> set[str]:
        policy = load_diffusion_policy(recipe(sd3, **sections))
        return set(policy.rollout(PROMPTS, torch.arange(3), torch.arange(3), KEY).replay_data)

    assert "mean" in recorded_tensors(**GUARD)
    assert "mean" not in recorded_tensors(**FLOW_GRPO)
    assert "mean" not in recorded_tensors(**{**GUARD, "likelihood": {"kind": "reverse", "old": "recompute"}})


def test_a_policy_evaluates_what_is_needed_and_no_more(sd3: Path) -> None:
    policy, rollout, decisions = drawn_then_moved(
        sd3, anchors=[{"to": "base"}, {"to": "old"}], snapshots={"old": {"decay": 0.0}}
    )
    policy.evaluations = 0
    assert set(policy.likelihoods(rollout, decisions, frozenset()).terms) == set()
    assert policy.evaluations == 9
    lik = policy.likelihoods(rollout, decisions, frozenset({"references/base"}))
    assert set(lik.terms) == {"references/base"}
    assert policy.evaluations == 9 + 18
    full = {f"{kind}/{name}" for kind in ("references", "divergence") for name in ("base", "old")}
    assert set(policy.likelihoods(rollout, decisions).terms) == full


@pytest.mark.parametrize("weighting", ["uniform", "adaptive"])
@pytest.mark.parametrize("error", ["output", "clean"])
def test_mixtures_are_of_outputs(sd3: Path, weighting: str, error: str) -> None:
    """ℓ⁺ and ℓ⁻ agree with mixtures of the raw outputs of both models that are computed here."""
    likelihood = {"kind": "forward", "decisions": 2, "old": "recompute", "mix": 0.7}
    policy, rollout, decisions = drawn_then_moved(
        sd3,
        likelihood={**likelihood, "weighting": weighting, "error": error},
        objective={"kind": "negative_aware"},
        snapshots={"old": {"decay": 0.0}},
    )
    lik = policy.likelihoods(rollout, decisions)
    flat = decisions.flat()
    condition = policy.prompts(PROMPTS, False).repeat_interleave(2)
    new, old = (policy.denoiser(name)(flat["x_t"], flat["t"], condition) for name in ("current", "old"))

    def logp(output: Tensor) -> Tensor:
        t = flat["t"].float()[:, None, None, None]
        velocity, clean = output - (flat["noise"] - flat["x0"]), (flat["x_t"] - t * output) - flat["x0"]
        difference = {"output": velocity, "clean": clean}[error].flatten(1)
        size = {"uniform": 1.0, "adaptive": difference.detach().abs().mean(1)}[weighting]
        return (-difference.square().mean(1) / size).unflatten(0, (3, 2))

    torch.testing.assert_close(lik["mixed/plus"], logp(0.7 * new + 0.3 * old), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lik["mixed/minus"], logp(1.7 * old - 0.7 * new), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lik.logp, logp(new), rtol=1e-4, atol=1e-5)


def test_error_of_the_clean_sample_is_t_squared_times_that_of_a_velocity() -> None:
    g = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(5, 4, 3, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * noise
    flat = {"x0": x0, "noise": noise, "t": t, "x_t": x_t}
    clean, by_t2 = (
        Forward(ForwardLikelihood(kind="forward", **{key: value}), FLOW, GRID).logp(output, flat)
        for key, value in (("error", "clean"), ("weighting", "t2"))
    )
    torch.testing.assert_close(clean, by_t2, rtol=1e-12, atol=1e-12)


KERNELS = [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.5), ("precise", 0.7), ("ddim", 0.5)]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k[0])
def test_slope_is_the_derivative_of_the_mean(kernel: tuple[str, float]) -> None:
    """The slope agrees with autograd at every step of a grid, and is equal for all numbers of a state."""
    step, (t, s) = make_kernel(*kernel, GRID), (GRID.times[:-1], GRID.times[1:])
    output = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    transition = step(FLOW, output, torch.ones(5, 3, dtype=torch.float64), t, s)
    (derivative,) = torch.autograd.grad(transition.mean.sum(), output)
    torch.testing.assert_close(slope(step, FLOW, t, s)[:, None].expand(5, 3), derivative.abs(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(time_step(step, FLOW, t, s), torch.full((5,), 0.2, dtype=torch.float64))


def test_slope_of_flow_sde_is_the_time_step_times_a_constant() -> None:
    """Both step weights are equal up to a factor: |dt| (1 + η²/2) after the first step, and |dt| at t = 1."""
    step, (t, s) = make_kernel("flow_sde", 0.7, GRID), (GRID.times[:-1], GRID.times[1:])
    expected = 0.2 * torch.tensor([1.0, *[1 + 0.7**2 / 2] * 4], dtype=torch.float64)
    torch.testing.assert_close(slope(step, FLOW, t, s), expected, rtol=1e-9, atol=0)


def test_slope_of_a_variance_preserving_step() -> None:
    """DDIM at η = 0 with ε: α_s (−σ_t / α_t) + σ_s."""
    process = VariancePreserving(torch.linspace(0.99, 0.01, 100), "epsilon")
    t, s = GRID.times[:-2], GRID.times[1:-1]
    alpha, sigma = process.alpha, process.sigma
    expected = (sigma(s) - alpha(s) * sigma(t) / alpha(t)).abs()
    torch.testing.assert_close(slope(make_kernel("ddim", 0.0, GRID), process, t, s), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("choice", "constant"), [("none", None), ("time_step", 0.2), ("slope", 0.2 * 1.245)])
def test_step_weights(choice: Any, constant: float | None) -> None:
    config = ReverseLikelihood(kind="reverse", step_weight=choice)
    kind = Reverse(config, FLOW, make_kernel("flow_sde", 0.7, GRID))
    state = torch.zeros(2, 3, dtype=torch.float64)
    flat = {"x_t": state, "x_next": state, "t": GRID.times[1:3], "s": GRID.times[2:4]}
    weight = kind.evaluate(state, flat).weight
    assert (weight is None) == (constant is None)
    if weight is not None and constant is not None:
        assert weight.tolist() == pytest.approx([1 / constant] * 2)


def test_ratios_of_flow_sde_are_centred_by_normalisation_alone() -> None:
    """20,000 draws from old outputs under the sampler's own kernel, at each step (GRPO-Guard, arXiv:2510.22319)."""
    rows, dims = 20_000, 8
    g = torch.Generator().manual_seed(0)
    old, moved, x_t = (torch.randn(1, 1, dims, generator=g, dtype=torch.float64) for _ in range(3))
    t, s = GRID.times[1:4].expand(rows, 3), GRID.times[2:5].expand(rows, 3)
    kind = Reverse(ReverseLikelihood(kind="reverse"), FLOW, make_kernel("flow_sde", 0.7, GRID))
    shape = (rows * 3, dims)
    flat = {"x_t": x_t.expand(rows, 3, dims).reshape(shape), "t": t.flatten(), "s": s.flatten()}
    z = torch.randn(shape, generator=g, dtype=torch.float64)
    transition = kind.kernel(FLOW, old.expand(rows, 3, dims).reshape(shape), flat["x_t"], flat["t"], flat["s"])
    flat["x_next"] = transition.sample(z)
    theta, before = (
        kind.evaluate((old + size * moved).expand(rows, 3, dims).reshape(shape), flat) for size in (0.5, 0.0)
    )

    def shaped(x: Tensor) -> Tensor:
        return x.reshape(rows, 3)

    lik = Likelihoods(
        shaped(theta.logp),
        torch.ones(rows, 3, dtype=torch.bool),
        {
            "references/old": shaped(before.logp),
            "bias": shaped(theta.kl_from(before)),
            "scale": shaped(theta.scale),
        },
    )
    _, metrics = RatioNormalised()(lik, torch.ones(rows), torch.zeros(rows, dtype=torch.int64))
    raw, normalised = metrics["ratio"].log(), metrics["ratio/normalised"].log()
    shift = shaped((theta.transition.mean - before.transition.mean).norm(dim=1))[0] / dims
    error = rows**-0.5
    assert (raw.mean(0) < -4 * error * raw.std(0)).all()
    assert (normalised.mean(0).abs() < 4 * error * normalised.std(0)).all()
    # The relative error of a spread over n samples is 1 / sqrt(2n) = 0.005.
    torch.testing.assert_close(normalised.std(0), shift, rtol=0.025, atol=0)
    torch.testing.assert_close(raw.std(0), shift / lik["scale"][0], rtol=0.025, atol=0)
