"""The objectives, which are the losses that training minimises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, SerializeAsAny
from pydantic_core import PydanticKnownError

from difrl.config.schema.base import KeyPath, Section
from difrl.config.schema.data import AdvantageConfig
from difrl.config.schema.likelihood import LikelihoodConfig
from difrl.runtime.registry import Registry

if TYPE_CHECKING:
    from difrl.core import Objective

DecisionReduction = Literal["each", "mean", "sum"]

_DECISIONS = "each decision separately, or the mean or sum over the decisions of a sample"


Conflicts = Iterable[tuple[KeyPath, str]]
"""Keys to change, each with a sentence."""
_OLD_DISTRIBUTION = "likelihood.old: recompute and snapshots: {old: {decay: 0.0}}"


class ObjectiveSection(Section):
    """Base of the sections that build an objective. A subclass declares `kind: Literal[NAME]`, its keys and `build`.

    A key `decisions` must be the reduction of the objective, a key `reference` the snapshot from which θ is measured.
    """

    kind: str

    compares: ClassVar[bool] = False
    """True if the loss compares the samples of a group, so that a sample alone has no loss."""
    reads_mixtures: ClassVar[bool] = False
    """True if the mixed likelihoods ℓ⁺ and ℓ⁻ of likelihood.mix are read."""

    @property
    def reduction(self) -> DecisionReduction:
        """The value of the key `decisions`; "each" for a section without that key."""
        reduction: DecisionReduction = dict(self).get("decisions", "each")
        return reduction

    @property
    def measured_from(self) -> str:
        """The value of the key `reference`; "old" for a section without that key."""
        reference: str = dict(self).get("reference", "old")
        return reference

    def conflicts(self, likelihood: LikelihoodConfig, advantage: AdvantageConfig) -> Conflicts:
        """Yield the key to change and a sentence for each setting that the objective cannot work with; none by default."""
        return ()

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        """Return the objective, for a run with that likelihood."""
        raise NotImplementedError(f"{type(self).__name__} must define build(likelihood)")

    @classmethod
    def variants(cls) -> list[type[Section]]:
        return [OBJECTIVES[name] for name in OBJECTIVES.names()]


OBJECTIVES = Registry[type[ObjectiveSection]]("objective", "difrl.objectives")


def register_objective(name: str, section: type[ObjectiveSection]) -> None:
    """Make a section available as `objective: {kind: NAME}`. Raise ValueError if another section has that name."""
    OBJECTIVES.register(name, section)


class ClippedObjective(ObjectiveSection):
    """max(−A ρ, −A clip(ρ, 1 − clip_low, 1 + clip_high)) (arXiv:1707.06347, 2503.14476)."""

    kind: Literal["clipped"]
    clip_low: float | None = Field(0.2, gt=0, description="lower bound is 1 − clip_low; null: none")
    clip_high: float | None = Field(0.2, gt=0, description="upper bound is 1 + clip_high; null: none")
    clip_dual: float | None = Field(
        None,
        gt=1,
        description="where A < 0 the loss is at most |A| times this ratio (arXiv:1912.09729); null: no bound",
    )
    decisions: DecisionReduction = Field("each", description=_DECISIONS)

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import Clipped

        return Clipped(self.clip_low, self.clip_high, self.clip_dual, decisions=self.decisions)


class RatioNormalisedObjective(ObjectiveSection):
    """The clipped objective of log ρ̃ = scale (log ρ + bias), with mean 0 and equal spread at every step (arXiv:2510.22319)."""

    kind: Literal["ratio_normalised"]
    clip_low: float | None = Field(0.2, gt=0, description="lower bound is 1 − clip_low; null: none")
    clip_high: float | None = Field(0.2, gt=0, description="upper bound is 1 + clip_high; null: none")
    bias: Literal["closed_form", "batch"] = Field(
        "closed_form", description="KL(old‖θ) of a reverse step, or the mean of −log ρ over the step's samples"
    )
    decisions: DecisionReduction = Field("each", description=_DECISIONS)

    def conflicts(self, likelihood: LikelihoodConfig, advantage: AdvantageConfig) -> Conflicts:
        if likelihood.kind == "forward" and self.bias == "closed_form":
            problem = "E[−log ρ] has no closed form for a forward likelihood; set bias: batch"
            yield ("objective", "bias"), problem
        if likelihood.kind == "tokens" and likelihood.old == "recorded" and self.bias == "closed_form":
            problem = "KL(old‖θ) of a token needs the full old distribution, and only the ℓ of the token is recorded"
            yield ("objective", "bias"), f"{problem}; set bias: batch, or {_OLD_DISTRIBUTION}"
        if likelihood.kind == "reverse" and self.decisions != "each":
            problem = f"every step has its own scale, so the {self.decisions} over the steps of a sample has none"
            yield ("objective", "decisions"), f"{problem}; set decisions: each"

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import RatioNormalised

        return RatioNormalised(self.clip_low, self.clip_high, self.bias, decisions=self.decisions)


def _check_entropy(kind: str, likelihood: LikelihoodConfig) -> Conflicts:
    if likelihood.kind != "tokens":
        problem = (
            f"{kind} restrains the decisions that reduce the entropy of θ, and under a {likelihood.kind} "
            "likelihood, whose noise is fixed, the entropy cannot fall"
        )
        yield ("objective", "kind"), f"{problem}; set clipped, or likelihood.kind: tokens"


class ClipCovObjective(ObjectiveSection):
    """The clipped objective without a share of the decisions whose covariance of ℓ and A is large: Clip-Cov
    (arXiv:2505.22617).
    """

    kind: Literal["clip_cov"]
    clip_low: float | None = Field(1.0, gt=0, description="lower bound is 1 − clip_low; null: none")
    clip_high: float | None = Field(1.0, gt=0, description="upper bound is 1 + clip_high; null: none")
    share: float = Field(
        2e-4, gt=0, le=1, description="share of an update's decisions that is left out of the gradient"
    )
    lowest: float = Field(1.0, description="covariance above which a decision may be left out")
    highest: float = Field(5.0, description="covariance below which a decision may be left out")
    decisions: DecisionReduction = Field("each", description=_DECISIONS)

    def conflicts(self, likelihood: LikelihoodConfig, advantage: AdvantageConfig) -> Conflicts:
        yield from _check_entropy(self.kind, likelihood)
        if self.lowest >= self.highest:
            problem = f"found {self.lowest:g}, and no covariance is above it and below {self.highest:g}"
            yield ("objective", "lowest"), f"{problem}; set lowest below highest"

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import ClipCov

        return ClipCov(self.clip_low, self.clip_high, self.share, self.lowest, self.highest, decisions=self.decisions)


class KLCovObjective(ObjectiveSection):
    """−A ρ, plus coefficient · |log ρ| where the covariance of ℓ and A is largest: KL-Cov (arXiv:2505.22617)."""

    kind: Literal["kl_cov"]
    share: float = Field(2e-3, gt=0, le=1, description="share of an update's decisions with the penalty")
    coefficient: float = Field(1.0, gt=0, description="factor of |log ρ|")
    decisions: DecisionReduction = Field("each", description=_DECISIONS)

    def conflicts(self, likelihood: LikelihoodConfig, advantage: AdvantageConfig) -> Conflicts:
        yield from _check_entropy(self.kind, likelihood)
        if likelihood.old != "recompute":
            reasons = {
                "detach": "detach makes log ρ zero, so the penalty would have no effect",
                "recorded": "with a recorded ℓ_old the slope of |log ρ| at 0 would be the sign of a rounding error",
            }
            problem = reasons[likelihood.old]
            yield ("likelihood", "old"), f"{problem}; set {_OLD_DISTRIBUTION}"

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import KLCov

        return KLCov(self.share, self.coefficient, decisions=self.decisions)


class DivergenceMaskedObjective(ObjectiveSection):
    """−A ρ, dropped where KL(old‖θ) ≥ delta and the gradient would increase it (arXiv:2606.11025)."""

    kind: Literal["divergence_masked"]
    delta: float = Field(1e-5, gt=0, description="KL of the trust region, in the reduction of the likelihood")
    decisions: DecisionReduction = Field("each", description=_DECISIONS)

    def conflicts(self, likelihood: LikelihoodConfig, advantage: AdvantageConfig) -> Conflicts:
        if likelihood.kind == "forward":
            problem = "the mask needs the exact KL from old, which a forward likelihood does not have"
            yield ("objective", "kind"), f"{problem}; set likelihood.kind: reverse, or objective.kind: clipped"
        elif likelihood.kind == "tokens" and likelihood.old == "recorded":
            problem = "the mask needs KL(old‖θ) of full distributions, and only the ℓ of each token is recorded"
            yield ("likelihood", "old"), f"{problem}; set {_OLD_DISTRIBUTION}"
        elif likelihood.old == "detach":
            problem = "detach makes the KL from old zero, so the mask would have no effect; set old: recorded"
            yield ("likelihood", "old"), problem

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import DivergenceMasked

        return DivergenceMasked(self.delta, decisions=self.decisions)


class CentredObjective(ObjectiveSection):
    """(a / β) (β (Δ − mean Δ) − (r − mean r))², means within a group: CRD (arXiv:2603.14128)."""

    compares: ClassVar[bool] = True
    kind: Literal["centred"]
    beta: float = Field(1.0, gt=0, description="β of the tilted distribution old · exp(r / β)")
    bound: float = Field(5.0, gt=0, description="a: unit rewards are clip(A, ±a) / 2a + ½")
    form: Literal["squared", "bce"] = Field("squared", description="squared error, or cross-entropy of sigmoids")
    reward: Literal["unit", "raw"] = Field(
        "unit", description="unit: advantages mapped to [0, 1]; raw: advantages unchanged, for advantage.std: none"
    )
    temperature: float | None = Field(
        None, gt=0, description="temperature of softmax-weighted means in both directions; null: plain means"
    )
    decisions: DecisionReduction = Field("each", description=_DECISIONS)

    def conflicts(self, likelihood: LikelihoodConfig, advantage: AdvantageConfig) -> Conflicts:
        if likelihood.kind == "tokens" and self.decisions == "each":
            problem = (
                "log-ratios are centred by decision, and token j of one text is not comparable with token j of another"
            )
            yield ("objective", "decisions"), f"{problem}; set sum, or mean to divide by the length"
        if self.reward != "raw":
            return
        required: list[tuple[str, object, tuple[object, ...]]] = [
            ("baseline", advantage.baseline, ("none", "mean")),
            ("std", advantage.std, ("none",)),
            ("clip", advantage.clip, (None,)),
            ("scale", advantage.scale, (1.0,)),
            ("positive", advantage.positive, (1.0,)),
            ("negative", advantage.negative, (1.0,)),
        ]
        for key, found, allowed in required:
            if found not in allowed:
                expected = "null" if allowed[0] is None else allowed[0]
                problem = f"objective.reward: raw uses advantages as rewards, which {key}: {found} changes"
                yield ("advantage", key), f"{problem}; set {key}: {expected}"

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import CentredRewardDistillation

        return CentredRewardDistillation(
            self.beta, self.bound, self.form, self.reward, self.temperature, decisions=self.decisions
        )


class NegativeAwareObjective(ObjectiveSection):
    """(a / b) (−r ℓ⁺ − (1 − r) ℓ⁻), b from likelihood.mix: DiffusionNFT (arXiv:2509.16117)."""

    reads_mixtures: ClassVar[bool] = True
    kind: Literal["negative_aware"]
    bound: float = Field(5.0, gt=0, description="a: r is clip(A, ±a) / 2a + ½")

    def conflicts(self, likelihood: LikelihoodConfig, advantage: AdvantageConfig) -> Conflicts:
        if likelihood.kind != "forward":
            problem = f"mixtures of outputs need a forward likelihood, found likelihood.kind: {likelihood.kind}"
            yield ("objective", "kind"), f"{problem}; set likelihood.kind: forward, or objective.kind: clipped"
        elif likelihood.mix is None:
            yield ("likelihood", "mix"), "negative_aware needs the mixtures ℓ⁺ and ℓ⁻; set e.g. mix: 1.0"

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import NegativeAware

        assert likelihood.kind == "forward"  # difrl/config/checks/ refuses the others
        assert likelihood.mix is not None
        return NegativeAware(likelihood.mix, self.bound)


class _ComparingSection(ObjectiveSection):
    """Base of the objectives that compare the log-ratios of a group's samples to a reference."""

    compares: ClassVar[bool] = True

    def conflicts(self, likelihood: LikelihoodConfig, advantage: AdvantageConfig) -> Conflicts:
        if self.measured_from == "old" and likelihood.old == "detach":
            problem = "detach makes old the policy itself, so every Δ is zero; set likelihood.old: recompute"
            yield ("objective", "reference"), f"{problem}, or reference: base"
        for key, factor in (("positive", advantage.positive), ("negative", advantage.negative)):
            if factor == 0:
                problem = "pairs are chosen by the order of advantages, which a factor of 0 removes"
                yield ("advantage", key), f"{problem}; set a number above 0"
        if likelihood.kind == "tokens" and self.reduction == "each":
            problem = "texts are compared as a whole: token j of one text is not comparable with token j of another"
            yield ("objective", "decisions"), f"{problem}; set sum, or mean to divide by the length"
        if likelihood.kind != "forward" or self.reduction != "each":
            return
        # Inversion determines the noise of each sample, so only t has to be shared.
        shared = ["t"] if likelihood.noise.kind == "inversion" else ["t", "noise"]
        if not set(shared) <= set(likelihood.share):
            problem = "samples are compared decision by decision, so a group must share its draws"
            yield ("likelihood", "share"), f"{problem}; set share: [{', '.join(shared)}], or objective.decisions: mean"


class PreferenceObjective(_ComparingSection):
    """−log σ(β (Δ_w − Δ_l)) of the best and the worst of each group: DPO (arXiv:2305.18290) and its relatives."""

    kind: Literal["preference"]
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    loss: Literal["logistic", "squared"] = Field("logistic", description="squared is IPO (arXiv:2310.12036)")
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = Field(
        "reverse_kl", description="divergence whose f′ replaces the logarithm: f-DPO (arXiv:2309.16240)"
    )
    alpha: float = Field(0.5, gt=0, le=1, description="parameter of the alpha-divergence")
    flip: float = Field(0.0, ge=0, lt=0.5, description="share of wrong labels: rDPO (arXiv:2403.00409)")
    reference: str = Field("base", description="base, or the name of a snapshot; Δ is the log-ratio to it")
    decisions: DecisionReduction = Field("each", description=_DECISIONS)

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import Preference

        return Preference(
            self.beta,
            self.loss,
            self.divergence,
            self.alpha,
            self.flip,
            reference=self.reference,
            decisions=self.decisions,
        )


class AnchoredPreferenceObjective(_ComparingSection):
    """KL(softmax(A / target_temperature) ‖ softmax(Δ / temperature)) within a group: ADPO (arXiv:2510.18913)."""

    kind: Literal["anchored_preference"]
    temperature: float = Field(1.0, gt=0, description="temperature of log-ratios, 1 / β")
    target_temperature: float = Field(
        1.0, gt=0, description="temperature of advantages; a small one is close to hard labels"
    )
    reference: str = Field("base", description="base, or the name of a snapshot; Δ is the log-ratio to it")
    decisions: DecisionReduction = Field("each", description=_DECISIONS)

    def build(self, likelihood: LikelihoodConfig) -> Objective:
        from difrl.core import AnchoredPreference

        return AnchoredPreference(
            self.temperature, self.target_temperature, reference=self.reference, decisions=self.decisions
        )


register_objective("clipped", ClippedObjective)
register_objective("ratio_normalised", RatioNormalisedObjective)
register_objective("clip_cov", ClipCovObjective)
register_objective("kl_cov", KLCovObjective)
register_objective("divergence_masked", DivergenceMaskedObjective)
register_objective("centred", CentredObjective)
register_objective("negative_aware", NegativeAwareObjective)
register_objective("preference", PreferenceObjective)
register_objective("anchored_preference", AnchoredPreferenceObjective)


def _section_of_kind(value: Any) -> ObjectiveSection:
    """Return the section of the class that `kind` chooses, as a discriminated union would."""
    if isinstance(value, ObjectiveSection):
        return value
    if not isinstance(value, Mapping):
        raise PydanticKnownError("model_attributes_type")
    if "kind" not in value:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
    kind = str(value["kind"])
    try:
        section = OBJECTIVES[kind]
    except LookupError as error:
        known = ", ".join(f"'{name}'" for name in OBJECTIVES.names())
        context = {"discriminator": "'kind'", "tag": kind, "expected_tags": known}
        raise PydanticKnownError("union_tag_invalid", context) from error
    return section.model_validate(value)


ObjectiveConfig = Annotated[SerializeAsAny[ObjectiveSection], PlainValidator(_section_of_kind)]
