"""The likelihood of a sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from difrl.config.schema.base import Section


class GridTimes(Section):
    """Times stratified over the grid of the sampler, without its first step."""

    kind: Literal["grid"] = "grid"
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of the grid's steps in use, counted from the noisy end, the first included",
    )


class UniformTimes(Section):
    """Times uniform in [low, high]."""

    kind: Literal["uniform"]
    low: float = Field(0.0, ge=0, lt=1)
    high: float = Field(1.0, gt=0, le=1)


class LogitNormalTimes(Section):
    """t = sigmoid(mean + std · normal), then t ← shift · t / (1 + (shift − 1) t) (arXiv:2403.03206)."""

    kind: Literal["logit_normal"]
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)


Times = Annotated[GridTimes | UniformTimes | LogitNormalTimes, Field(discriminator="kind")]


class ReverseLikelihood(Section):
    """ℓ = log N(x_next; mean_θ, std²) of the recorded stochastic denoising steps."""

    kind: Literal["reverse"]
    reduce: Literal["mean", "sum"] = Field("mean", description="reduction over the dimensions of the latent")
    old: Literal["recorded", "recompute", "detach"] = Field("recorded", description="source of ℓ_old")
    step_weight: Literal["none", "time_step", "slope"] = Field(
        "none", description="divides a step's loss by |dt|, or by |∂mean/∂output| of its kernel (arXiv:2510.22319)"
    )


class FreshNoise(Section):
    """Independent noise ε for every decision."""

    kind: Literal["fresh"] = "fresh"


class InversionNoise(Section):
    """The noise ε from which a model would generate the clean sample: DDIM inversion along rollout.steps (arXiv:2503.18454)."""

    kind: Literal["inversion"]
    snapshot: str = Field(
        "base", description="weights whose path is inverted: base, current, or the name of a snapshot"
    )


NoiseConfig = Annotated[FreshNoise | InversionNoise, Field(discriminator="kind")]


class ForwardLikelihood(Section):
    """ℓ = −w(t) · ‖out_θ − target‖² at fresh (t, ε) of the clean sample: the pretraining loss."""

    kind: Literal["forward"]
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber", "adaptive", "elbo"] = "uniform"
    error: Literal["output", "clean"] = Field(
        "output", description="compared quantity: the model's output, or the clean sample that it implies"
    )
    times: Times = GridTimes()
    noise: NoiseConfig = FreshNoise()
    decisions: int = Field(4, gt=0, description="(t, ε) pairs per sample and update")
    share: list[Literal["t", "noise"]] = Field([], description="draws that all samples of a group share")
    old: Literal["recompute", "detach"] = Field("detach", description="source of ℓ_old")
    mix: float | None = Field(None, gt=0, description="b of the mixed likelihoods ℓ⁺, ℓ⁻ (arXiv:2509.16117)")
    cutoff: float = Field(0.02, ge=0, lt=1, description="smallest t with a weight under elbo")


class TokensLikelihood(Section):
    """ℓ = log π_θ(token | previous tokens) of every generated token, at the temperature of sampling."""

    kind: Literal["tokens"]
    old: Literal["recorded", "recompute", "detach"] = Field("recorded", description="source of ℓ_old")
    chunk: int = Field(
        1024,
        gt=0,
        description="tokens whose logits are computed at once; fewer need less memory and give the same numbers",
    )


LikelihoodConfig = Annotated[ReverseLikelihood | ForwardLikelihood | TokensLikelihood, Field(discriminator="kind")]
