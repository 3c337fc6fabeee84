"""Cost of an image generator, from the skeleton of its pipeline, and a dry run on latents of one number."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difrl.config import ModelConfig, RunConfig
from difrl.config.run import samples_base_at_end
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import read_images
from difrl.data.prompts import Prompt
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.load import build_diffusion_policy, get_family_class, make_denoiser_trainable, with_inputs
from difrl.policies.diffusion.policy import DiffusionPolicy, encode_recorded
from difrl.policies.diffusion.prompt_encoder import encode, validate_images
from difrl.policies.errors import ModelError
from difrl.policies.model_paths import resolve
from difrl.policies.trainable import build_snapshots, check_adapter
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.dry_run import DryPolicy, Tally, dry_config
from difrl.training.cost.flops import Cost, count_call_cost
from difrl.training.cost.model_cost import ModelCost, Wording
from difrl.training.inputs import Inputs

WORDING = Wording(
    heading="Model evaluations",
    rollout="rollout",
    unit="an evaluation",
    left_out="Not in it: encoding prompts, decoding samples (whose memory grows with rollout.batch), rewards and files. "
    "A model so small that it leaves the device idle takes longer.",
)
EFFICIENCY = (0.25, 0.75)


def build_image_cost(config: RunConfig, inputs: Inputs) -> ModelCost:
    """Build the pipeline of a recipe on the meta device, and a dry policy over it. Raise ConfigError or ModelError."""
    model, path = config.model, resolve(config.model.path)
    try:
        family = with_inputs(_build_skeleton(path, model), config)
        shape = family.latent_shape()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    validate_images(family, [*inputs.train, *inputs.evaluation])
    for group in inputs.recorded[:1]:
        encode_recorded(family, read_images(group.items[:1]), shape)
    dry = _build_dry_policy(config, family, shape)
    with torch.device("meta"):
        trained = make_denoiser_trainable(family, model)
    check_adapter(family.denoiser, model.lora)
    cost = count_denoiser_cost(
        family,
        encode(family, inputs.train[0].text, inputs.train[0].image, model.max_sequence_length),
        shape,
        DTYPES[model.dtype],
        model.gradient_checkpointing,
    )
    return ModelCost(
        name=f"{type(family.pipeline).__name__} at {path}",
        snapshots=build_snapshots(family.denoiser, trained, config, samples_base_at_end(config)),
        modules=family.modules,
        dry=dry,
        forward=cost.forward,
        training=cost.training,
        working_memory=lambda tally: {"activations, rough bound": cost.activations * tally.together},
        efficiency=EFFICIENCY,
        wording=WORDING,
        notes=[
            f"the adapter's part for {name} is active and stays as it is"
            for name in family.adapted_parts()
            if name not in family.denoiser_names
        ],
    )


def count_denoiser_cost(
    family: Family,
    condition: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    recompute: bool,
) -> Cost:
    """Return the cost of one evaluation of a denoiser under a condition, with all weights in `dtype`, as autocast casts them.

    Activations are those of a forward pass wholly in `dtype`, with attention that keeps no matrix of tokens by
    tokens (sdpa, flash, xformers). Autocast keeps norms in float32, so half precision takes somewhat more.
    """
    family = type(family)(copy.deepcopy(family.pipeline)).with_inputs(family.inputs)
    denoiser = nn.Module.to(family.denoiser, dtype)  # diffusers' own method warns
    x_t = torch.empty(1, *shape, dtype=dtype, device="meta")
    return count_call_cost(
        denoiser,
        lambda: family.call(x_t, torch.zeros(1, device="meta"), condition),
        denoiser.enable_gradient_checkpointing if recompute else None,
    )


class _Zero(nn.Module):
    """A denoiser whose output is 0."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally, self.factor = tally, nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor) -> Tensor:
        self.tally.add(len(x_t))
        return self.factor * x_t


def _build_dry_policy(config: RunConfig, family: Family, shape: tuple[int, ...]) -> DryPolicy:
    """Build the policy over latents of one number; process, scheduler and sequence length are those of the model."""
    tally, length = Tally(), family.sequence_length(shape)
    denoiser = _Zero(tally)
    members: dict[str, Any] = {
        "denoiser": denoiser,
        "scheduler": family.scheduler,
        "process": family.process,
        "encode_prompt": lambda self, text, image, max_sequence_length: {"prompt": torch.zeros(1, 1)},
        "call": lambda self, x_t, timestep, condition: denoiser(x_t),
        "latent_shape": lambda self: (1, 1, 1),
        "sequence_length": lambda self, latent_shape: length,
        "build_grid": lambda self, steps: family.build_grid(steps),
        "with_inputs": lambda self, inputs: self,
        "decode": lambda self, latents: latents.expand(-1, 3, -1, -1),
        "encode_images": lambda self, images: images[:, :1, :1, :1],
    }
    one_number: type[Family] = type("OneNumber", (type(family),), members)
    policy = build_diffusion_policy(dry_config(config), one_number(family.pipeline), keep_base=True)
    _check_solver(policy, config.rollout.solver)
    # The number of evaluations depends on the size of a step's window, and on its start if samples share the steps before.
    windows = [policy.sampling.window(NoiseKey(config.seed, step)) for step in range(config.train.steps)]
    kinds = [(w.size, w.start if policy.sampling.branching.size > 1 else 0) for w in windows]
    return DryPolicy(policy, tally, {kinds.index(kind): count for kind, count in Counter(kinds).items()})


def _build_skeleton(path: str, model: ModelConfig) -> Family:
    """Build the pipeline as load_family leaves it, on the meta device."""
    cls = get_family_class(path, model.revision)
    try:
        family = cls.build_skeleton(path, model.revision)
    except OSError as error:
        raise ModelError(f"model.path: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"model.path: the parts of {path} cannot be built from their config.json ({type(error).__name__}: "
            f"{error}); download the model again, or use the version of diffusers and transformers it was made with"
        ) from error
    for part in family.modules:  # not by the methods of diffusers and transformers, which warn
        nn.Module.to(part, DTYPES[model.dtype]).requires_grad_(False).eval()
    if model.dtype != "float32":
        nn.Module.to(family.pipeline.vae, torch.float32)
    return family


def _check_solver(policy: DiffusionPolicy, solver: str | None) -> None:
    if solver is None:
        return
    prompts, one, key = [Prompt("", {})], torch.zeros(1, dtype=torch.int64), NoiseKey(0, 0)
    try:
        policy.rollout(prompts, one, one, key)
        policy.evaluation(prompts, one, key)
    except Exception as error:  # each scheduler of diffusers refuses in its own way
        raise ConfigError(
            f"rollout.solver: {solver} cannot drive this model: {error}; choose another one, or set rollout.solver: null"
        ) from error
