"""From the model section of a recipe to a policy: find the family, load, make trainable, take snapshots."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig as PeftLoraConfig
from torch import nn

from difrl.config import (
    ForwardLikelihood,
    LoraConfig,
    ModelConfig,
    ReverseLikelihood,
    RolloutConfig,
    RunConfig,
)
from difrl.policies.diffusion.branching import branching_of
from difrl.policies.diffusion.families import FAMILIES, Family
from difrl.policies.diffusion.likelihoods import Forward, Kind, Reverse
from difrl.policies.diffusion.policy import DiffusionPolicy, Sampling
from difrl.policies.diffusion.prompt_encoder import PromptEncoder
from difrl.policies.diffusion.sde_window import windows_of
from difrl.policies.errors import ModelError
from difrl.policies.model_paths import resolve
from difrl.policies.references import Comparison, compared_with, in_reward, needs_of, references_of
from difrl.policies.snapshots import BASE, CURRENT, Snapshots
from difrl.policies.trainable import ADAPTER, base_weights, copies_of, trained_weights
from difrl.runtime.dtypes import DTYPES
from difrl.runtime.quiet_libraries import quiet
from samplers import Grid, Kernel, Process, Scheduler, Window, make_kernel, ode, stable_seed

STOCHASTIC_SOLVERS = frozenset(
    {
        "DDPMScheduler",
        "DPMSolverSDEScheduler",
        "EulerAncestralDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "LCMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "CosineDPMSolverMultistepScheduler",
    }
)


def family_class(path: str, revision: str | None = None) -> type[Family]:
    """The family of the pipeline at a folder or hub id, from its model_index.json."""
    try:
        found = DiffusionPipeline.load_config(path, revision=revision)["_class_name"]
    except (OSError, KeyError) as error:
        raise ModelError(
            f"model.path: {path!r} has no readable model_index.json ({type(error).__name__}); expected a diffusers "
            "pipeline folder or hub id. For a hub model check the name, the network and `hf auth login`"
        ) from error
    if found not in FAMILIES:
        raise ModelError(
            f"model.path: {path!r} is a {found}, which no family of difrl handles; expected one of "
            f"{', '.join(FAMILIES)} (docs/extending.md shows how to add a family)"
        )
    return FAMILIES[found]


def load_family(model: ModelConfig, device: torch.device | str = "cpu") -> Family:
    """The pipeline, frozen, on the device, its autoencoder in float32."""
    path = resolve(model.path)
    cls = family_class(path, model.revision)
    try:
        with quiet():
            family = cls(cls.load(path, DTYPES[model.dtype], model.revision))
    except OSError as error:  # of the hub too: its errors are OSErrors
        raise ModelError(
            f"model.path: {path!r} cannot be loaded: {error} Expected every part that its model_index.json names; copy or "
            "download the folder again"
        ) from error
    family.pipeline.to(device)
    if model.dtype != "float32":
        # Half-precision decoding shifts colours; the autoencoder is small beside the denoiser.
        family.pipeline.vae.to(torch.float32)
    for part in family.pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    family.pipeline.set_progress_bar_config(disable=True)
    set_attention(family.denoiser, model.attention)
    if model.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    return family


def set_attention(denoiser: nn.Module, backend: str) -> None:
    """Chooses diffusers' attention implementation, or says why it cannot run here."""
    if backend == "sdpa":
        return
    problem = f"model.attention: {backend} cannot run here"
    try:
        if backend == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
            return
        denoiser.set_attention_backend(backend)  # type: ignore[operator]
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise ModelError(f"{problem}: {error}. Use model.attention: sdpa, torch's own") from error
    processors = [getattr(m, "processor", None) for m in denoiser.modules()]
    if not any(getattr(p, "_attention_backend", None) is not None for p in processors):
        raise ModelError(
            f"{problem}: {type(denoiser).__name__} has attention processors that take no backend; "
            "use model.attention: sdpa or xformers"
        )


def make_trainable(family: Family, model: ModelConfig, seed: int = 0) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in float32: the adapter's for LoRA, the denoiser's for full training."""
    if model.train == "lora":
        with torch.random.fork_rng():  # every process and every resumed run must begin with the same adapter
            torch.manual_seed(stable_seed(seed, "lora"))
            _add_lora(family, model.lora)
    else:
        family.denoiser.requires_grad_(True)
    return trained_weights(family.denoiser)


def _add_lora(family: Family, lora: LoraConfig) -> None:
    denoiser = family.denoiser
    if lora.warm_start is not None:
        family.pipeline.load_lora_weights(lora.warm_start, adapter_name=ADAPTER)
        trained = [p for name, p in denoiser.named_parameters() if ".lora_" in name]
        if not trained:
            raise ModelError(f"model.lora.warm_start: {lora.warm_start!r} holds no LoRA weights for the denoiser")
        for p in trained:
            p.requires_grad_(True)
        return
    targets = list(lora.targets or family.lora_targets)
    absent = [t for t in targets if not any(name.endswith(t) for name, _ in denoiser.named_modules())]
    if lora.targets is not None and absent:
        raise ModelError(f"model.lora.targets: no module of {type(denoiser).__name__} ends in {absent}")
    config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=targets, init_lora_weights=True
    )
    denoiser.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]


def kind_of(config: ReverseLikelihood | ForwardLikelihood, process: Process, grid: Grid, kernel: Kernel) -> Kind:
    """The likelihood a recipe names."""
    if config.kind == "reverse":
        return Reverse(config, process, kernel)
    return Forward(config, process, grid)


def _scheduler(config: RolloutConfig, family: Family) -> Scheduler | None:
    if config.solver is None:
        return None
    cls = getattr(diffusers, config.solver, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise ModelError(
            f"rollout.solver: diffusers has no scheduler {config.solver!r}, e.g. DPMSolverMultistepScheduler"
        )
    if config.solver in STOCHASTIC_SOLVERS:
        raise ModelError(
            f"rollout.solver: {config.solver} draws noise of its own, which is not keyed by sample, so runs could not be "
            "repeated; choose a deterministic one such as DPMSolverMultistepScheduler or UniPCMultistepScheduler"
        )
    return cls.from_config(family.scheduler.config, **family.process.scheduler_settings)


def samplings(config: RunConfig, family: Family) -> tuple[Sampling, Sampling]:
    """How rollouts and how evaluations are drawn: the latter by the ODE (or the solver) from the current weights."""
    rollout, process = config.rollout, family.process
    shape = family.latent_shape(rollout.height, rollout.width)
    length = family.sequence_length(shape)

    def grid_of(steps: int) -> Grid:
        return Grid.from_scheduler(copy.deepcopy(family.scheduler), process, steps, sequence_length=length)

    grid = grid_of(rollout.steps)
    kernel = make_kernel(rollout.kernel, rollout.noise_level, grid)
    scheduler = _scheduler(rollout, family)
    reduce = config.likelihood.reduce if config.likelihood.kind == "reverse" else "mean"
    window = windows_of(config, grid, kernel, process)
    means = "bias" in needs_of(config) and config.likelihood.old == "recorded"
    training = Sampling(
        grid,
        kernel,
        window,
        rollout.guidance,
        rollout.snapshot,
        rollout.batch,
        shape,
        reduce,
        means,
        scheduler,
        branching_of(config, kernel),
    )
    evaluation = Sampling(
        grid_of(config.eval.steps or rollout.steps),
        ode,
        lambda key: Window(0, 0),
        rollout.guidance,
        CURRENT,
        rollout.batch,
        shape,
        scheduler=scheduler,
    )
    return training, evaluation


def needs_base(config: RunConfig) -> bool:
    """Whether training evaluates the pretrained weights, or draws from them."""
    return BASE in (*config.drawn_by, *inverted_by(config), *compared_with(config))


def inverted_by(config: RunConfig) -> list[str]:
    """The snapshots whose sampler is run backwards for the noise of a forward likelihood: one, or none."""
    likelihood = config.likelihood
    return [likelihood.noise.snapshot] if likelihood.kind == "forward" and likelihood.noise.kind == "inversion" else []


def load_policy(config: RunConfig, device: torch.device | str = "cpu", *, keep_base: bool = False) -> DiffusionPolicy:
    """Load the policy of a run before its first step.

    keep_base: keep the pretrained weights also where no anchor needs them.
    """
    return build_policy(config, load_family(config.model, device), keep_base=keep_base)


def build_policy(config: RunConfig, family: Family, *, keep_base: bool = False) -> DiffusionPolicy:
    """Build the policy of a run over a frozen pipeline."""
    likelihood = config.likelihood
    assert likelihood.kind != "tokens"
    trained = make_trainable(family, config.model, config.seed)
    keep = keep_base or needs_base(config)
    decays = {name: s.build(config.train) for name, s in config.snapshots.items()}
    try:
        training, evaluation = samplings(config, family)
    except ValueError as error:  # of samplers and families, which know nothing of recipes
        raise ModelError(f"rollout: {error}") from error
    return DiffusionPolicy(
        family,
        kind_of(likelihood, family.process, training.grid, training.kernel),
        training,
        evaluation,
        Snapshots(trained, decays, base_weights(family.denoiser, config.model, trained, keep), copies_of(config.model)),
        Comparison(references_of(config), config.likelihood.old, needs_of(config), in_reward(config)),
        PromptEncoder(
            family,
            config.data.negative,
            config.model.max_sequence_length,
            DTYPES[config.model.dtype],
            config.model.embeddings_mb * 2**20,
        ),
        _saver(family, config.model),
    )


def _saver(family: Family, model: ModelConfig) -> Callable[[Path], None]:
    """LoRA: the adapter, as load_lora_weights reads it. Full: the whole pipeline, as from_pretrained reads it."""

    def save(folder: Path) -> None:
        with quiet():
            if model.train == "lora":
                family.save_lora(folder)
            else:
                family.pipeline.save_pretrained(folder, safe_serialization=True)

    return save
