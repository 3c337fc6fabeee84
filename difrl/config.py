"""The schema of a run: what a recipe may say, with a sentence and a default for every key.

A recipe is one YAML file. `algorithm: awm` fills likelihood, objective, anchors, advantage and what belongs
to them from a preset (difrl/presets.py); whatever the recipe says itself wins. Reading a file is in
difrl/reading.py, what must hold between parts in difrl/misfits.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from difrl.levels import levels_of
from difrl.misfits import MisfitError, misfits


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are never coerced across types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class ConstantSchedule(Section):
    kind: Literal["constant"] = "constant"
    value: float
    warmup: int = Field(0, ge=0, description="steps over which the value rises linearly from 0")

    @property
    def levels(self) -> tuple[float, ...]:
        return (self.value,)


class LinearSchedule(Section):
    kind: Literal["linear"]
    start: float
    end: float
    steps: float | None = Field(None, gt=0, description="from start to end; default: the whole run")
    warmup: int = Field(0, ge=0, description="steps over which the start is reached linearly from 0")
    hold: int = Field(0, ge=0, description="steps at the start, after the warm-up")

    @property
    def levels(self) -> tuple[float, ...]:
        return (self.start, self.end)


class CosineSchedule(Section):
    kind: Literal["cosine"]
    start: float
    end: float
    steps: float | None = Field(None, gt=0, description="from start to end; default: the whole run")
    warmup: int = Field(0, ge=0, description="steps over which the start is reached linearly from 0")
    hold: int = Field(0, ge=0, description="steps at the start, after the warm-up")

    @property
    def levels(self) -> tuple[float, ...]:
        return (self.start, self.end)


def _schedule_kind(value: Any) -> str:
    """Which of Schedule's forms a value has, so that an error speaks of that form alone."""
    if isinstance(
        value, ConstantSchedule | LinearSchedule | CosineSchedule | TargetKLCoefficient | RewardAdaptiveCoefficient
    ):
        return value.kind
    return str(value.get("kind", "constant")) if isinstance(value, Mapping) else "number"


Schedule = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")],
    Discriminator(_schedule_kind),
]


class TargetKLCoefficient(Section):
    """Follows the step's mean divergence D: e = clip(D/target − 1, ±bound), value ← value · (1 + gain · e) (arXiv:1909.08593)."""

    kind: Literal["target_kl"]
    start: float = Field(gt=0, description="value of the first step")
    target: float = Field(gt=0, description="divergence to hold, in the units of kl/ANCHOR")
    gain: float = Field(0.1, gt=0, le=1, description="how fast the value follows")
    bound: float = Field(0.2, gt=0, lt=1, description="largest relative error that counts")

    @property
    def levels(self) -> tuple[float, ...]:
        return (self.start,)


class RewardAdaptiveCoefficient(Section):
    """Of each sample: floor + (value − floor) · r̃, r̃ = clip(A, ±limit) / (2 limit) + ½ (arXiv:2603.14128)."""

    kind: Literal["reward_adaptive"]
    value: Schedule = Field(description="of the best samples")
    floor: float = Field(1e-4, ge=0, description="of the worst samples")
    limit: float = Field(5.0, gt=0, description="advantage at which a sample counts as best")

    @property
    def levels(self) -> tuple[float, ...]:
        return (self.floor, *levels_of(self.value))

    @model_validator(mode="after")
    def _best_are_held_most(self) -> RewardAdaptiveCoefficient:
        if self.floor > min(levels_of(self.value)):
            raise ValueError(f"floor is {self.floor:g}, expected at most the value, {min(levels_of(self.value)):g}")
        return self


AnchorCoefficient = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")]
    | Annotated[TargetKLCoefficient, Tag("target_kl")]
    | Annotated[RewardAdaptiveCoefficient, Tag("reward_adaptive")],
    Discriminator(_schedule_kind),
]


class LoraConfig(Section):
    """Low-rank adapters (PEFT)."""

    rank: int = Field(16, gt=0)
    alpha: float | None = Field(None, gt=0, description="scale numerator; default: the rank")
    targets: list[str] | None = Field(None, description="module names; default: the family's attention layers")
    warm_start: str | None = Field(None, description="folder or hub id of a LoRA to continue from")


class ModelConfig(Section):
    """Which model is trained, and how it sits in memory."""

    path: str = Field(description="hub id, local folder, or the name of a shipped model (tiny-sd3, tiny-sd)")
    revision: str | None = Field(None, description="revision of a hub model")
    train: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of frozen weights and the forward pass; trained weights and transitions: float32",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    copies: Literal["device", "cpu"] = Field(
        "device", description="where snapshots, and full training's pretrained weights, stay while not in use"
    )
    attention: str = Field("sdpa", description="sdpa, or a backend of diffusers such as xformers, flash, sage")
    embeddings_mb: int = Field(
        1024, ge=0, description="MiB of prompt embeddings kept in CPU memory; texts beyond are encoded again"
    )
    max_sequence_length: int | None = Field(
        None, ge=0, description="T5 tokens; default: 256 with a T5 encoder, 0 without one"
    )


class WindowConfig(Section):
    """Which denoising steps are stochastic, and so decisions of a reverse likelihood (arXiv:2507.21802)."""

    kind: Literal["all", "fixed", "random"] = "all"
    start: int = Field(
        0, ge=0, description="first step of a fixed window, lowest of a random one; 0: the first with noise"
    )
    size: int | None = Field(None, gt=0, description="number of steps in a fixed or random window; default: 1")


class ProgressiveWindow(Section):
    """The last steps first, then more and more of those before them (B²-DiffuRL, arXiv:2503.11240)."""

    kind: Literal["progressive"]
    first: int = Field(1, gt=0, description="stochastic steps at the beginning of the run, the last ones")
    last: int | None = Field(None, gt=0, description="stochastic steps at its end; default: all that have noise")
    over: int | None = Field(None, gt=0, description="training steps in which the window grows; default: train.steps")


AnyWindow = Annotated[WindowConfig | ProgressiveWindow, Field(discriminator="kind")]


class BranchConfig(Section):
    """Samples that share their initial noise and the denoising steps before the window, and are compared (2503.11240)."""

    count: int = Field(1, gt=0, description="branches of a prompt, each of data.group_size / count samples")
    prefix: Literal["ode", "kernel"] = Field("ode", description="how the shared steps are taken: the ODE or the kernel")


class RolloutConfig(Section):
    """How samples are drawn."""

    steps: int = Field(10, gt=1, description="denoising steps")
    kernel: Literal["ode", "ddim", "cps", "precise", "flow_sde", "dance_sde"] = "ode"
    noise_level: float = Field(0.0, ge=0, description="η of the kernel")
    window: AnyWindow = WindowConfig()
    branch: BranchConfig | None = Field(
        None, description="what the samples of a group share; default: the prompt alone"
    )
    solver: str | None = Field(
        None, description="a diffusers scheduler class in place of the kernel; forward likelihoods only"
    )
    guidance: float = Field(1.0, ge=1, description="classifier-free guidance scale; 1 switches it off")
    snapshot: str = Field("current", description="whose samples: current, or the name of a snapshot")
    width: int | None = Field(None, gt=0, description="pixels; default: the model's own")
    height: int | None = Field(None, gt=0, description="pixels; default: the model's own")
    batch: int = Field(64, gt=0, description="samples drawn at once")

    @property
    def silent(self) -> bool:
        """Whether samples are drawn without noise after the first."""
        return self.solver is not None or self.kernel == "ode" or self.noise_level == 0


class GridTimes(Section):
    """Times stratified over the sampler's own grid, without its first step."""

    kind: Literal["grid"] = "grid"
    fraction: float = Field(1.0, gt=0, le=1, description="use this fraction of the grid, from the noisy end")


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
    reduce: Literal["mean", "sum"] = Field("mean", description="over the dimensions of the latent")
    old: Literal["recorded", "recompute", "detach"] = Field("recorded", description="where ℓ_old comes from")
    step_weight: Literal["none", "time_step", "slope"] = Field(
        "none", description="divides a step's loss by |dt|, or by |∂mean/∂output| of its kernel (arXiv:2510.22319)"
    )


class FreshNoise(Section):
    """ε drawn anew for every decision."""

    kind: Literal["fresh"] = "fresh"


class InversionNoise(Section):
    """ε that a model would have made the clean sample of: DDIM inversion along rollout.steps (arXiv:2503.18454)."""

    kind: Literal["inversion"]
    snapshot: str = Field("base", description="whose path is inverted: base, current, or the name of a snapshot")


NoiseConfig = Annotated[FreshNoise | InversionNoise, Field(discriminator="kind")]


class ForwardLikelihood(Section):
    """ℓ = −w(t) · ‖out_θ − target‖² at fresh (t, ε) of the clean sample: the pretraining loss."""

    kind: Literal["forward"]
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber", "adaptive", "elbo"] = "uniform"
    error: Literal["output", "clean"] = Field(
        "output", description="what is compared: the model's output, or the clean sample it implies"
    )
    times: Times = GridTimes()
    noise: NoiseConfig = FreshNoise()
    decisions: int = Field(4, gt=0, description="(t, ε) pairs per sample and update")
    share: list[Literal["t", "noise"]] = Field([], description="what all samples of a group have in common")
    old: Literal["recompute", "detach"] = Field("detach", description="where ℓ_old comes from")
    mix: float | None = Field(None, gt=0, description="b of the mixed likelihoods ℓ⁺, ℓ⁻ (arXiv:2509.16117)")
    cutoff: float = Field(0.02, ge=0, lt=1, description="smallest t that elbo weighs")


LikelihoodConfig = Annotated[ReverseLikelihood | ForwardLikelihood, Field(discriminator="kind")]


OfDecisions = Literal["each", "mean", "sum"]
_OF_DECISIONS = "each decision by itself, or the mean or sum of a sample's"


class ClippedObjective(Section):
    """max(−A ρ, −A clip(ρ, 1 − clip_low, 1 + clip_high)) (arXiv:1707.06347, 2503.14476)."""

    kind: Literal["clipped"]
    clip_low: float | None = Field(0.2, gt=0, description="lower bound is 1 − clip_low; null: none")
    clip_high: float | None = Field(0.2, gt=0, description="upper bound is 1 + clip_high; null: none")
    decisions: OfDecisions = Field("each", description=_OF_DECISIONS)


class RatioNormalisedObjective(Section):
    """clipped on log ρ̃ = scale (log ρ + bias), of mean 0 and one spread at every step (arXiv:2510.22319)."""

    kind: Literal["ratio_normalised"]
    clip_low: float | None = Field(0.2, gt=0, description="lower bound is 1 − clip_low; null: none")
    clip_high: float | None = Field(0.2, gt=0, description="upper bound is 1 + clip_high; null: none")
    bias: Literal["closed_form", "batch"] = Field(
        "closed_form", description="KL(old‖θ) of a reverse step, or the mean of −log ρ over the step's samples"
    )
    decisions: OfDecisions = Field("each", description=_OF_DECISIONS)


class DivergenceMaskedObjective(Section):
    """−A ρ, dropped where KL(old‖θ) ≥ delta and the step would lead further away (arXiv:2606.11025)."""

    kind: Literal["divergence_masked"]
    delta: float = Field(1e-5, gt=0, description="the KL of the trust region, reduced as the likelihood is")
    decisions: OfDecisions = Field("each", description=_OF_DECISIONS)


class CentredObjective(Section):
    """(a / β) (β (Δ − mean Δ) − (r − mean r))², means within a group: CRD (arXiv:2603.14128)."""

    kind: Literal["centred"]
    beta: float = Field(1.0, gt=0, description="β of the tilted distribution old · exp(r / β)")
    bound: float = Field(5.0, gt=0, description="a: unit rewards are clip(A, ±a) / 2a + ½")
    form: Literal["squared", "bce"] = Field("squared", description="squared error, or cross-entropy of sigmoids")
    reward: Literal["unit", "raw"] = Field(
        "unit", description="unit: advantages as rewards in [0, 1]; raw: as they are, for advantage.std: none"
    )
    temperature: float | None = Field(
        None, gt=0, description="of softmax-weighted means in both directions; null: plain means"
    )
    decisions: OfDecisions = Field("each", description=_OF_DECISIONS)


class NegativeAwareObjective(Section):
    """(a / b) (−r ℓ⁺ − (1 − r) ℓ⁻), b from likelihood.mix: DiffusionNFT (arXiv:2509.16117)."""

    kind: Literal["negative_aware"]
    bound: float = Field(5.0, gt=0, description="a: r is clip(A, ±a) / 2a + ½")


class PreferenceObjective(Section):
    """−log σ(β (Δ_w − Δ_l)) of the best and the worst of each group: DPO (arXiv:2305.18290) and its relatives."""

    kind: Literal["preference"]
    beta: float = Field(0.1, gt=0, description="how strongly θ is held to the reference")
    loss: Literal["logistic", "squared"] = Field("logistic", description="squared is IPO (arXiv:2310.12036)")
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = Field(
        "reverse_kl", description="f′ of which divergence takes the place of log: f-DPO (arXiv:2309.16240)"
    )
    alpha: float = Field(0.5, gt=0, le=1, description="of the alpha-divergence")
    flip: float = Field(0.0, ge=0, lt=0.5, description="share of labels that are wrong: rDPO (arXiv:2403.00409)")
    reference: str = Field("base", description="base, or the name of a snapshot: what Δ is measured from")
    decisions: OfDecisions = Field("each", description=_OF_DECISIONS)


class AnchoredPreferenceObjective(Section):
    """KL(softmax(A / target_temperature) ‖ softmax(Δ / temperature)) within a group: ADPO (arXiv:2510.18913)."""

    kind: Literal["anchored_preference"]
    temperature: float = Field(1.0, gt=0, description="of log-ratios: 1 / β")
    target_temperature: float = Field(1.0, gt=0, description="of advantages; small is close to hard labels")
    reference: str = Field("base", description="base, or the name of a snapshot: what Δ is measured from")
    decisions: OfDecisions = Field("each", description=_OF_DECISIONS)


ObjectiveConfig = Annotated[
    ClippedObjective
    | RatioNormalisedObjective
    | DivergenceMaskedObjective
    | CentredObjective
    | NegativeAwareObjective
    | PreferenceObjective
    | AnchoredPreferenceObjective,
    Field(discriminator="kind"),
]


class AnchorConfig(Section):
    """A KL-like pull towards other weights."""

    to: str = Field("base", description="base, or the name of a snapshot")
    divergence: Literal["velocity", "weighted", "gaussian", "k1", "k2", "k3"] = Field(
        "velocity",
        description="weighted: the distance of outputs in the weighting and reduction of a forward likelihood",
    )
    place: Literal["loss", "reward"] = Field(
        "loss", description="reward: k1 of the recorded decisions, summed over a sample, is taken off its reward"
    )
    coefficient: AnchorCoefficient = 1.0
    guidance: float | None = Field(
        None, ge=1, description="guidance scale of the anchor's prediction; default: as the likelihood is evaluated"
    )

    @model_validator(mode="after")
    def _known_before_advantages(self) -> AnchorConfig:
        if self.place == "reward" and isinstance(self.coefficient, RewardAdaptiveCoefficient):
            raise ValueError(
                "a reward_adaptive coefficient asks for advantages, which are made of the rewards that this anchor is taken "
                "off; set a number, a schedule or target_kl, or place: loss"
            )
        return self

    @property
    def label(self) -> str:
        """The name used in metrics: the snapshot, and the guidance scale where the anchor has its own."""
        return self.to if self.guidance is None else f"{self.to}-cfg{self.guidance:g}"


class AdvantageConfig(Section):
    """How rewards of a group become advantages."""

    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    std: Literal["group", "global", "beta", "none"] = Field(
        "group", description="what they are divided by; beta: for rewards in [0, 1] (arXiv:2506.02864)"
    )
    clip: float | None = Field(None, gt=0, description="advantages are clipped to ± this")
    scale: float = Field(1.0, gt=0, description="advantages are multiplied by this after clipping")
    normalise: Literal["total", "each"] = Field(
        "total", description="each: every reward by itself, before they are summed by weight (arXiv:2601.05242)"
    )
    positive: float = Field(1.0, ge=0, description="factor of positive advantages (arXiv:2506.01347)")
    negative: float = Field(1.0, ge=0, description="factor of negative advantages; positive: 0 learns from these alone")


class CollectConfig(Section):
    """Draw again until groups differ in reward (dynamic sampling, arXiv:2503.14476)."""

    max_draws: int = Field(1, gt=0, description="draws at most; 1 keeps whatever the first draw gave")


class DecaySnapshot(Section):
    """snapshot ← decay · snapshot + (1 − decay) · θ, once a step."""

    kind: Literal["decay"] = "decay"
    decay: Schedule = Field(
        0.0, description="0 copies the weights, 0.99 follows them slowly; schedules count optimizer updates"
    )

    @property
    def levels(self) -> tuple[float, ...]:
        return levels_of(self.decay)


class SoupSnapshot(Section):
    """The average of the initial weights and those after every so many steps (arXiv:2411.01798)."""

    kind: Literal["soup"]
    every: int = Field(gt=0, description="steps between the weights that are averaged")
    levels: ClassVar[tuple[float, ...]] = ()


class ResetSnapshot(Section):
    """The weights as they were after the latest multiple of so many steps (arXiv:2505.24864)."""

    kind: Literal["reset"]
    every: int = Field(gt=0, description="steps between resets")
    levels: ClassVar[tuple[float, ...]] = ()


def _snapshot_kind(value: Any) -> str:
    if isinstance(value, DecaySnapshot | SoupSnapshot | ResetSnapshot):
        return value.kind
    return str(value.get("kind", "decay")) if isinstance(value, Mapping) else "decay"


SnapshotConfig = Annotated[
    Annotated[DecaySnapshot, Tag("decay")]
    | Annotated[SoupSnapshot, Tag("soup")]
    | Annotated[ResetSnapshot, Tag("reset")],
    Discriminator(_snapshot_kind),
]


class RewardConfig(Section):
    """A reward by name, or by import path."""

    name: str | None = Field(None, description="a name that `difrl rewards` lists")
    import_: str | None = Field(None, alias="import", description="module:callable instead of a name")
    weight: float = Field(1.0, description="in the weighted sum")
    options: dict[str, Any] = Field({}, description="keyword arguments of the reward")

    @model_validator(mode="after")
    def _one_source(self) -> RewardConfig:
        if (self.name is None) == (self.import_ is None):
            raise ValueError("give a reward either a name or an import, e.g. `- name: geneval`")
        return self

    @property
    def label(self) -> str:
        """The name used in metrics."""
        return self.name or str(self.import_).replace(":", ".").rpartition(".")[2]


class DataConfig(Section):
    """Prompts, and how many samples are drawn for each."""

    train: str = Field(description="a .txt or .jsonl file, or a built-in set such as shapes:train")
    rows: Literal["prompts", "pairs", "samples"] = Field(
        "prompts",
        description="of train: prompts to draw samples for, or images that exist: preference pairs, samples with rewards",
    )
    cache: int = Field(1024, ge=0, description="images of pairs or samples whose latents are kept in memory")
    evaluation: str | None = Field(None, description="prompts that are never trained on; default: none")
    prompts_per_step: int = Field(12, gt=0, description="groups of a step, over all processes")
    group_size: int = Field(12, gt=1, description="samples for each prompt")
    negative: str = Field("", description="negative prompt of guidance, where the prompt's row has none")


class TrainConfig(Section):
    """The optimisation."""

    steps: int = Field(100, gt=0, description="a step is one rollout with its updates")
    updates_per_step: int = Field(1, gt=0, description="optimizer updates a rollout is divided into")
    micro_batch: int = Field(
        64, gt=0, description="decisions evaluated with gradient at once; guidance doubles the model's batch"
    )
    lr: Schedule = Field(1e-4, description="a number, or a schedule over train.steps")
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="of AdamW")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    restart_every: int | None = Field(
        None, gt=0, description="steps after which AdamW forgets its moments, as where ProRL resets its reference"
    )
    threads: int | None = Field(None, gt=0, description="CPU threads a process; default: torch's own choice")


class EvaluationConfig(Section):
    """What is measured on prompts that are never trained on."""

    every: int = Field(20, ge=0, description="steps between evaluations; 0: never, not even before and after")
    images: int = Field(256, gt=0, description="samples of an evaluation during the run")
    final_images: int | None = Field(None, gt=0, description="samples before and after a run; default: images")
    steps: int | None = Field(None, gt=1, description="denoising steps; default: rollout.steps")
    diversity: list[str] = Field(
        ["pixels"], description="features whose distance within a prompt is measured: pixels, judge, or module:function"
    )
    show: int = Field(6, ge=0, description="prompts of the sample grid")
    columns: int = Field(8, gt=0, description="samples for each prompt of the grid")
    rlg: list[float] = Field(
        [0.0, 0.5, 1.0, 1.5, 2.0], description="RLG weights of the sweep at the end of the run; []: no sweep"
    )


class GuardConfig(Section):
    """What to do when a watched reward or the diversity falls while the trained reward rises (difrl/guard.py)."""

    action: Literal["warn", "stop", "rollback"] = Field(
        "rollback", description="end the run as it is (stop), or with the weights of its best evaluation (rollback)"
    )
    margin: float = Field(2.0, ge=0, description="standard errors beyond which a change counts as a fall or a rise")
    diversity: float | None = Field(
        0.25, ge=0, lt=1, description="share of its highest value that diversity may lose; null: it is not guarded"
    )
    rewards: list[str] | None = Field(None, description="watched rewards that are guarded; default: all")
    patience: int = Field(2, gt=0, description="evaluations in a row with a fall before anything is done")


class CheckpointConfig(Section):
    every: int = Field(
        50, ge=0, description="steps between checkpoints; 0: at the end, on Ctrl-C or failure, and for a guard"
    )
    keep: int = Field(2, gt=0, description="how many are kept, beside the best where there is a guard")


class RunConfig(Section):
    """One run."""

    algorithm: str | None = Field(None, description="a preset; `difrl recipes` lists them")
    seed: int = 0
    output_dir: Path = Field(Path("runs/default"), strict=False, description="the run folder")
    model: ModelConfig = Field(description="which model is trained, e.g. model: {path: tiny-sd3}")
    data: DataConfig = Field(description="prompts, e.g. data: {train: prompts.txt}")
    rewards: list[RewardConfig] = Field(min_length=1, description="what is optimised, e.g. [{name: geneval}]")
    watch: list[RewardConfig] = Field([], description="rewards that are scored and never optimised")
    rollout: RolloutConfig = RolloutConfig()
    likelihood: LikelihoodConfig = Field(description="of samples; a preset such as algorithm: awm sets it")
    objective: ObjectiveConfig = Field(description="the loss; a preset such as algorithm: awm sets it")
    anchors: list[AnchorConfig] = []
    advantage: AdvantageConfig = AdvantageConfig()
    collect: CollectConfig = CollectConfig()
    snapshots: dict[str, SnapshotConfig] = Field({}, description="name → how it follows; old, ema, sampler, …")
    train: TrainConfig = TrainConfig()
    eval: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig | None = Field(None, description="ends a run whose watched measures fall; {} takes the defaults")
    tensorboard: bool = False

    @property
    def branches(self) -> int:
        """Groups of a prompt: its branches, or one."""
        return 1 if self.rollout.branch is None else self.rollout.branch.count

    @property
    def groups(self) -> int:
        """Groups of a step, over all processes; a group's samples are compared with each other."""
        return self.data.prompts_per_step * self.branches

    @property
    def compared(self) -> int:
        """Samples of a group: all of a prompt, or of one of its branches."""
        return self.data.group_size // self.branches

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        if found := misfits(self):
            raise MisfitError(found)
        return self
