"""What a run of an image generator would cost: its parts of an estimate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from difrl.config import RunConfig
from difrl.config.run import samples_base_at_end
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.flops import count_cost
from difrl.policies.diffusion.load import family_class, make_denoiser_trainable, needs_base
from difrl.policies.errors import ModelError
from difrl.policies.model_paths import resolve
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.parts import Inputs, Parts, Words, kept
from difrl.training.cost.plan_images import plan_of

WORDS = Words(
    heading="Model evaluations",
    rollout="rollout",
    unit="an evaluation",
    left_out="Not in it: encoding prompts, decoding samples (whose memory grows with rollout.batch), rewards and files. "
    "A model so small that it leaves the device idle takes longer.",
)
EFFICIENCY = (0.25, 0.75)


def image_parts(config: RunConfig, inputs: Inputs, processes: int) -> Parts:
    """On the meta device."""
    path = resolve(config.model.path)
    family = _skeleton(path, config)
    trained = _make_trainable(family, config)
    plan = plan_of(config, family, processes)
    # Anchors ask for the base, and so do the sweep and the pictures at the end (difrl/training/run.py).
    memory = kept(config, _modules(family), trained, samples_base_at_end(config) or needs_base(config))
    model, dtype = config.model, DTYPES[config.model.dtype]
    # From here on the skeleton is in one dtype.
    cost = count_cost(family, plan.training.shape, model.max_sequence_length, dtype, model.gradient_checkpointing)
    memory["activations, rough bound"] = cost.activations * plan.differentiated
    return Parts(
        model=f"{type(family.pipeline).__name__} at {path}",
        frozen=sum(p.numel() for p in _parameters(family) if not p.requires_grad),
        trained=sum(p.numel() for p in trained),
        memory=memory,
        evaluations=plan.evaluations(len(inputs.evaluation), len(inputs.train)),
        forward=cost.forward,
        training=cost.training,
        words=WORDS,
        efficiency=EFFICIENCY,
    )


def _skeleton(path: str, config: RunConfig) -> Family:
    """The pipeline as load_family would leave it, on the meta device."""
    cls = family_class(path, config.model.revision)
    try:
        family = cls.build_skeleton(path, config.model.revision)
    except OSError as error:
        raise ModelError(f"model.path: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"model.path: the parts of {path} cannot be built from their config.json ({type(error).__name__}: "
            f"{error}); download the model again, or use the version of diffusers and transformers it was made with"
        ) from error
    for part in _modules(family):
        # Not the method of diffusers and transformers, which warns: with weights, from_pretrained casts.
        nn.Module.to(part, DTYPES[config.model.dtype])
        part.requires_grad_(False).eval()
    nn.Module.to(family.pipeline.vae, torch.float32)
    return family


def _modules(family: Family) -> list[nn.Module]:
    return [part for part in family.pipeline.components.values() if isinstance(part, nn.Module)]


def _parameters(family: Family) -> Iterator[nn.Parameter]:
    return (p for part in _modules(family) for p in part.parameters())


def _make_trainable(family: Family, config: RunConfig) -> list[nn.Parameter]:
    """What make_denoiser_trainable trains; an adapter to continue from is taken to have the rank that the recipe says."""
    lora = config.model.lora
    start = lora.warm_start
    if start is not None and not Path(start).exists() and (start.startswith((".", "/", "~")) or start.count("/") != 1):
        raise ModelError(f"model.lora.warm_start: no folder {start!r}; expected a folder or a hub id of a LoRA")
    model = config.model.model_copy(update={"lora": lora.model_copy(update={"warm_start": None})})
    with torch.device("meta"):
        return list(make_denoiser_trainable(family, model).values())
