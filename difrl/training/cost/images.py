"""Cost of an image generator, from its pipeline without weights, and a dry run on latents of one number."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from difrl.config import RunConfig
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.load import build_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.diffusion.prompt_encoder import encode
from difrl.policies.importance_sampling import get_correction
from difrl.policies.model_paths import resolve
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.dry_run import DryPolicy, Tally, dry_config
from difrl.training.cost.flops import Cost, count_call_cost
from difrl.training.cost.model_cost import ModelCost
from difrl.training.inputs import Inputs


def count_image_cost(config: RunConfig, policy: DiffusionPolicy, inputs: Inputs) -> ModelCost:
    """Return the cost of a policy on the meta device, and a dry policy for it."""
    model, family, shape = config.model, policy.family, policy.sampling.shape
    condition = encode(family, inputs.train[0].text, inputs.train[0].image, model.max_sequence_length)
    others = [name for name in family.adapted_parts() if name not in family.denoiser_names]
    notes = [f"the adapter's part for {name} is active and stays as it is" for name in others]
    try:
        cost = count_denoiser_cost(family, condition, shape, DTYPES[model.dtype])
    except (RuntimeError, NotImplementedError) as error:
        if "meta tensor" not in str(error):
            raise
        cost = Cost(forward=0, training=0, activations=0)
        notes.append("no estimate of activations and time: the network reads values, which it has not without weights")
    return ModelCost(
        name=f"{type(family.pipeline).__name__} at {resolve(model.path)}",
        modules=family.modules,
        dry=_build_dry_policy(config, family, shape),
        forward=cost.forward,
        training=cost.training,
        working_memory=lambda tally: (
            {"activations, rough bound": cost.activations * tally.together} if cost.forward else {}
        ),
        efficiency=(0.25, 0.75),
        notes=notes,
    )


def count_denoiser_cost(
    family: Family, condition: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Cost:
    """Return the cost of one evaluation of a denoiser under a condition, with all weights in `dtype`, as autocast casts them.

    Activations are those of a forward pass wholly in `dtype`, with attention that keeps no matrix of tokens by
    tokens (sdpa, flash, xformers). Autocast keeps norms in float32, so half precision takes somewhat more.
    """
    family = type(family)(copy.deepcopy(family.pipeline)).with_inputs(family.inputs)
    denoiser = nn.Module.to(family.denoiser, dtype)  # diffusers' own method warns
    x_t = torch.zeros(1, *shape, dtype=dtype)
    return count_call_cost(denoiser, lambda: family.call(x_t, torch.zeros(1), condition))


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
        "size": (1, 1),
        "sequence_length": lambda self, latent_shape: length,
        "build_grid": lambda self, steps: family.build_grid(steps),
        "with_inputs": lambda self, inputs: self,
        "decode": lambda self, latents: latents.expand(-1, 3, -1, -1),
        "encode_images": lambda self, images: images[:, :1, :1, :1],
    }
    one_number: type[Family] = type("OneNumber", (type(family),), members)
    policy = build_diffusion_policy(dry_config(config), one_number(family.pipeline), "cpu", keep_base=True)
    policy.sampling = replace(policy.sampling, correction=get_correction(config))
    # The number of evaluations depends on the size of a step's window, and on its start if samples share the steps before.
    windows = [policy.sampling.window(NoiseKey(config.seed, step)) for step in range(config.train.steps)]
    kinds = [(w.size, w.start if policy.sampling.branching.size > 1 else 0) for w in windows]
    return DryPolicy(policy, tally, {kinds.index(kind): count for kind, count in Counter(kinds).items()})
