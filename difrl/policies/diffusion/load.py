"""Loading of a diffusion policy: the family, the pipeline, its adapter, its snapshots."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import nn

from difrl.config import (
    ForwardLikelihood,
    ModelConfig,
    ReverseLikelihood,
    RunConfig,
)
from difrl.policies.base_reference import find_pipeline, write_reference
from difrl.policies.compilation import compile_blocks
from difrl.policies.diagnosis import widened
from difrl.policies.diffusion.branching import build_branching
from difrl.policies.diffusion.distilled import warn_of_distillation
from difrl.policies.diffusion.families import FAMILIES, Family, find_family
from difrl.policies.diffusion.families.base import read_index
from difrl.policies.diffusion.families.meta_parts import check_parts
from difrl.policies.diffusion.likelihoods import Forward, LikelihoodKind, Reverse
from difrl.policies.diffusion.offload import offload_weights
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.diffusion.prompt_encoder import PromptEncoder
from difrl.policies.diffusion.sampling import Sampling
from difrl.policies.diffusion.sde_window import build_windows
from difrl.policies.errors import LOADING_ERRORS, ModelError
from difrl.policies.importance_sampling import get_correction
from difrl.policies.layout import is_sharded
from difrl.policies.merge_adapters import merge_adapters
from difrl.policies.quantization import is_quantized, plan_pipeline
from difrl.policies.references import build_reference_set, get_needs
from difrl.policies.rollout_precision import check_precision
from difrl.policies.snapshots import CURRENT
from difrl.policies.tokenizer_state import remember_padding
from difrl.policies.trainable import ADAPTER, build_snapshots, make_trainable
from difrl.policies.trained_policy import ModelFiles
from difrl.policies.warm_start import DIFFUSERS_LORA, load_warm_start
from difrl.runtime.dtypes import DTYPES
from difrl.runtime.quiet_libraries import silenced_libraries
from samplers import Grid, Kernel, Process, Scheduler, Window, draws_noise, ode


def get_family_class(path: str, revision: str | None = None) -> type[Family]:
    """Return the family of the pipeline at a folder or hub id, by its model_index.json."""
    try:
        index = read_index(path, revision)
        found, name = find_family(index), index["_class_name"]
    except (OSError, KeyError) as error:
        raise ModelError(
            f"model.path: {path!r} has no readable model_index.json ({type(error).__name__}); expected a diffusers "
            "pipeline folder or hub id. For a hub model check the name, the network and `hf auth login`"
        ) from error
    if found is None:
        raise ModelError(
            f"model.path: {path!r} is a {name}, which diffusers does not cut into blocks; expected a pipeline that it does "
            f"(docs/models.md), or one of {', '.join(FAMILIES.names())} (docs/extending.md shows how to add a family)"
        )
    return found


def load_family(model: ModelConfig, device: torch.device | str = "cpu") -> Family:
    """Load the frozen pipeline. Its autoencoder is in float32. On the meta device it has no weights, to count its cost."""
    path = find_pipeline(model.path)
    cls = get_family_class(path, model.revision)
    dtype, skeleton = DTYPES[model.dtype], torch.device(device).type == "meta"
    try:
        with silenced_libraries():
            if skeleton:
                family = cls.build_skeleton(path, model.revision)
            else:
                plan = plan_pipeline(read_index(path, model.revision), model)
                family = cls.load(path, dtype, model.revision, plan)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"model.path: {path!r} cannot be loaded ({type(error).__name__}: {error}); expected every part that its "
            "model_index.json names. Copy or download the folder again, or use the version of diffusers and transformers it "
            "was made with"
        ) from error
    if skeleton:
        for part in family.modules:  # not by the methods of diffusers and transformers, which warn
            nn.Module.to(part, dtype)
    else:
        # The loaders fill missing weights with random ones, without a word.
        check_parts(path, family.pipeline.components)
        _place(family, model, device)
        set_attention(family.denoiser, model.attention)
    if model.dtype != "float32":
        # Half-precision decoding shifts colours; the autoencoder is small beside the denoiser.
        nn.Module.to(family.pipeline.vae, torch.float32)
    if model.tiling:
        set_tiling(family.pipeline)
    for part in family.modules:
        part.requires_grad_(False).eval()
    family.pipeline.set_progress_bar_config(disable=True)
    if model.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    return family


def set_tiling(pipeline: Any) -> None:
    """Let the autoencoder of a pipeline work on tiles. Raise ModelError if it cannot."""
    try:
        pipeline.vae.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"model.tiling: the autoencoder of {type(pipeline).__name__} has no tiles; set model.tiling: false"
        ) from error


def _place(family: Family, model: ModelConfig, device: torch.device | str) -> None:
    """Move the parts of a pipeline to the device, and prepare the denoiser for it. Raise ModelError if that cannot be done."""
    for name, part in family.denoisers.items():
        if model.quantize != "none" and not is_quantized(part):
            raise ModelError(
                f"model.quantize: the {name} of {model.path!r} cannot be quantised; set model.quantize: none"
            )
        if model.offload == "weights":
            offload_weights(part, device)
        if model.compile:
            compile_blocks(part, device)
    family.encoders.offload = model.offload != "none"
    stays = is_sharded(model) or model.offload == "weights"  # moved a block or a layer at a time
    for part in family.resident:
        if not stays or part not in family.denoisers.values():
            nn.Module.to(part, device)


def set_attention(denoiser: Any, backend: str) -> None:
    """Set the attention implementation of diffusers. Raise ModelError if it cannot run here."""
    if backend == "sdpa":
        return
    problem = f"model.attention: {backend} cannot run here"
    try:
        if backend == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()
            return
        denoiser.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise ModelError(f"{problem}: {error}. Use model.attention: sdpa, torch's own") from error
    processors = [getattr(m, "processor", None) for m in denoiser.modules()]
    if not any(getattr(p, "_attention_backend", None) is not None for p in processors):
        raise ModelError(
            f"{problem}: {type(denoiser).__name__} has attention processors that take no backend; "
            "use model.attention: sdpa or xformers"
        )


def make_denoiser_trainable(family: Family, model: ModelConfig, seed: int = 0) -> None:
    """Make the denoiser trainable. Its trained parameters become float32, on the device on which it runs."""
    make_trainable(
        family.denoiser,
        model,
        seed,
        lora_targets=family.lora_targets,
        load_adapter=lambda path: load_warm_start(path, DIFFUSERS_LORA, partial(family.load_lora, adapter=ADAPTER)),
    )
    if model.offload == "weights":  # PEFT puts an adapter beside its layer
        for p in family.denoiser.parameters():
            p.data = p.data.to(family.device) if p.requires_grad else p.data


def build_kind(
    config: ReverseLikelihood | ForwardLikelihood, process: Process, grid: Grid, kernel: Kernel
) -> LikelihoodKind:
    """Build the likelihood of a recipe."""
    if config.kind == "reverse":
        return Reverse(config, process, kernel)
    return Forward(config, process, grid)


def with_inputs(family: Family, config: RunConfig) -> Family:
    """Return the family with the inputs of a recipe. Raise ValueError for an input that the pipeline does not have."""
    rollout = config.rollout
    sizes = {"height": rollout.height, "width": rollout.width, "num_frames": rollout.frames}
    return family.with_inputs({**sizes, **config.model.inputs})


def _build_scheduler(config: RunConfig, family: Family, sequence_length: int) -> Scheduler | None:
    """Build the solver of a recipe. Raise ModelError if it is unknown, cannot drive the model, or draws noise."""
    name, steps = config.rollout.solver, {config.rollout.steps, config.eval.steps or config.rollout.steps}
    if name is None:
        return None
    cls: Any = getattr(diffusers, name, None)
    known = isinstance(cls, type) and issubclass(cls, SchedulerMixin)
    if not known:
        raise ModelError(
            f"rollout.solver: diffusers has no scheduler {name!r}, e.g. DPMSolverMultistepScheduler, or a package "
            "that it needs is not installed"
        )
    try:
        scheduler = cls.from_config(family.scheduler.config, **family.process.scheduler_settings)
        if scheduler.config.get("clip_sample"):  # the default of some classes, for pixels; latents have no bounds
            scheduler.register_to_config(clip_sample=False)
        noisy = any(draws_noise(scheduler, family.process, n, sequence_length=sequence_length) for n in steps)
    except Exception as error:  # each scheduler of diffusers refuses in its own way
        raise ModelError(
            f"rollout.solver: {name} cannot drive this model: {error}; choose another one, or set rollout.solver: null"
        ) from error
    if noisy:
        raise ModelError(
            f"rollout.solver: {name} draws noise of its own under the model's scheduler_config.json, which is not "
            "keyed by sample, so runs could not be repeated; choose a deterministic one such as DPMSolverMultistepScheduler "
            "or UniPCMultistepScheduler"
        )
    return scheduler


def build_samplings(config: RunConfig, family: Family) -> tuple[Sampling, Sampling]:
    """Build the sampling of rollouts and that of evaluations: by the ODE (or the solver), from the current weights."""
    rollout, process = config.rollout, family.process
    shape = family.latent_shape()
    grid = family.build_grid(rollout.steps)
    kernel = rollout.build_kernel(grid)
    scheduler = _build_scheduler(config, family, family.sequence_length(shape))
    reduce = config.likelihood.reduce if config.likelihood.kind == "reverse" else "mean"
    window = build_windows(config, grid, kernel, process)
    means = "bias" in get_needs(config) and config.likelihood.old == "recorded"
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
        build_branching(config, kernel),
        rollout.precision,
        get_correction(config),
    )
    evaluation = Sampling(
        family.build_grid(config.eval.steps or rollout.steps),
        ode,
        lambda key: Window(0, 0),
        rollout.guidance,
        CURRENT,
        rollout.batch,
        shape,
        scheduler=scheduler,
    )
    return training, evaluation


def load_diffusion_policy(
    config: RunConfig, device: torch.device | str = "cpu", *, keep_base: bool = False
) -> DiffusionPolicy:
    """Load the policy of a run before its first step.

    keep_base: keep the pretrained weights also where no anchor needs them.
    """
    return build_diffusion_policy(config, load_family(config.model, device), device, keep_base=keep_base)


def build_diffusion_policy(
    config: RunConfig, family: Family, device: torch.device | str, *, keep_base: bool = False
) -> DiffusionPolicy:
    """Build the policy of a run over a frozen pipeline, whose denoiser is laid out on a device."""
    likelihood = config.likelihood
    assert likelihood.kind != "tokens"
    warn_of_distillation(config, family)
    files = _build_files(family, config.model)  # before a prompt is encoded, which may change the padding of tokenizers
    make_denoiser_trainable(family, config.model, config.seed)
    check_precision(family.denoiser, config.rollout.precision, DTYPES[config.model.dtype])
    try:
        family = with_inputs(family, config)
        training, evaluation = build_samplings(config, family)
    except ValueError as error:  # of samplers and families, which know nothing of recipes
        message = str(error)
        raise ModelError(message if message.startswith(("rollout.", "model.")) else f"rollout: {message}") from error
    snapshots = build_snapshots(family.denoiser, config, keep_base, device)
    family.equal_calls = snapshots.layout.largest
    return DiffusionPolicy(
        family,
        build_kind(likelihood, family.process, training.grid, training.kernel),
        training,
        evaluation,
        snapshots,
        build_reference_set(config),
        PromptEncoder(
            family,
            config.data.negative,
            config.model.max_sequence_length,
            DTYPES[config.model.dtype],
            config.model.embeddings_mb * 2**20,
        ),
        files,
    )


def _build_files(family: Family, model: ModelConfig) -> ModelFiles:
    """Return the functions that write the adapter (LoRA) or the denoiser (full), and the whole pipeline.

    A denoiser that was trained in full is written in float32, and so are the other parts of its whole pipeline: from_pretrained
    keeps the type of text encoders and loads a denoiser in float32, and the two must be equal.
    """
    restore_padding = remember_padding(family.pipeline.components.values())

    def save(folder: Path) -> None:
        if model.train == "lora":
            with silenced_libraries():
                family.save_lora(folder)
            return
        for name, part in family.denoisers.items():
            with silenced_libraries(), widened(part, "cpu"):  # the device may have no room
                part.save_pretrained(folder / name)
        others = set(family.pipeline.components) - set(family.denoisers)
        write_reference(folder, model.path, model.revision, list(family.denoisers), sorted(others))

    def merge(folder: Path) -> None:
        restore_padding()
        with silenced_libraries(), family.encoders.complete(), ExitStack() as stack:
            if model.train == "lora":
                for part in family.adapted_parts().values():
                    merge_adapters(part)
                nn.Module.to(family.pipeline.vae, DTYPES[model.dtype])  # as the other parts
            else:
                for part in family.modules:
                    stack.enter_context(widened(part, "cpu"))
            family.save(folder)

    return ModelFiles(save, merge)
