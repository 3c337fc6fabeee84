"""Cost of an image generator, from its pipeline without weights, and a dry run on latents of one number."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from difrl.config import RunConfig
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.load import build_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.diffusion.prompt_encoder import encode
from difrl.policies.diffusion.sampling import DECODED_PIXELS
from difrl.policies.importance_sampling import get_correction
from difrl.policies.model_paths import resolve
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.dry_run import DryPolicy, Tally, dry_config
from difrl.training.cost.flops import Cost, count_call_cost, count_live_bytes
from difrl.training.cost.model_cost import DECODING, ROLLOUT, UPDATE, ModelCost
from difrl.training.inputs import Inputs


def count_image_cost(config: RunConfig, policy: DiffusionPolicy, inputs: Inputs) -> ModelCost:
    """Return the cost of a policy on the meta device, and a dry policy for it."""
    model, family, shape = config.model, policy.family, policy.sampling.shape
    condition = encode(family, inputs.train[0].text, inputs.train[0].image, model.max_sequence_length)
    others = [name for name in family.adapted_parts() if name not in family.denoiser_names]
    notes = [f"the adapter's part for {name} is active and stays as it is" for name in others]
    dtype, live = DTYPES[model.dtype], 0
    try:
        cost, live = count_denoiser_cost(family, condition, shape, dtype)
    except (RuntimeError, NotImplementedError) as error:
        if "meta tensor" not in str(error):
            raise
        cost = Cost(forward=0, training=0, activations=0)
        notes.append("no estimate of activations and time: the network reads values, which it has not without weights")
    # Exact tasks have no autoencoder.
    autoencoders = [part for name, part in family.pipeline.components.items() if name == "vae"]
    place = autoencoders[0].device if autoencoders else family.device
    decoding = count_live_bytes(lambda: family.decode(torch.zeros(1, *shape, device=place)))
    guided = policy.sampling.guidance != 1

    def working_memory(config: RunConfig, together: int) -> dict[str, dict[str, int]]:
        itemsize = DTYPES[config.model.dtype].itemsize
        recomputed = config.model.gradient_checkpointing and cost.recomputed is not None
        activations = cost.recomputed if recomputed else cost.activations
        scale, batch = itemsize / dtype.itemsize, config.rollout.batch
        decoded = {"decoding": decoding * max(1, min(batch, DECODED_PIXELS // family.pixels))}
        if not cost.forward:
            return {DECODING: decoded, ROLLOUT: {}, UPDATE: {}}
        return {
            DECODING: decoded,
            ROLLOUT: {"denoising a rollout batch": int(live * batch * (1 + guided) * scale)},
            UPDATE: {"activations, rough bound": int((activations or 0) * together * scale)},
        }

    return ModelCost(
        name=f"{type(family.pipeline).__name__} at {resolve(model.path)}",
        modules=family.modules,
        dry=_build_dry_policy(config, family, shape),
        forward=cost.forward,
        training=cost.training + cost.forward * model.gradient_checkpointing,
        working_memory=working_memory,
        efficiency=(0.25, 0.75),
        notes=notes,
        encoders=[part for part in family.modules if isinstance(part, PreTrainedModel)],
        in_float32=autoencoders,
    )


def count_denoiser_cost(
    family: Family, condition: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Cost, int]:
    """Return the cost of one evaluation of a denoiser under a condition, and its bytes without gradient.

    All weights are in `dtype`, as autocast casts them.

    Activations are those of a forward pass wholly in `dtype`, with attention that keeps no matrix of tokens by
    tokens (sdpa, flash, xformers). Autocast keeps norms in float32, so half precision takes somewhat more.
    """
    family = type(family)(copy.deepcopy(family.pipeline)).with_inputs(family.inputs)
    denoiser = nn.Module.to(family.denoiser, dtype)  # diffusers' own method warns
    x_t = torch.zeros(1, *shape, dtype=dtype)
    with suppress(ValueError):  # of a denoiser that marks no blocks
        denoiser.enable_gradient_checkpointing()

    def call() -> Tensor:
        return family.call(x_t, torch.zeros(1), condition)

    return count_call_cost(denoiser, call), count_live_bytes(call)


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
