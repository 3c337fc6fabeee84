"""What one evaluation of a model costs, counted on the meta device: nothing is computed and no memory is used.

Matrix products and convolutions are counted as they are called, so the count is right also where a model does
not send every token through every weight (an MMDiT has one set for image tokens and one for text tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difrl.policies.diffusion.families import Family
from difrl.policies.flops import Cost, count_call_cost


def count_cost(
    family: Family, shape: tuple[int, ...], max_sequence_length: int | None, dtype: torch.dtype, recompute: bool
) -> Cost:
    """The cost of a denoiser on the meta device, whose weights this casts to `dtype`, as autocast would.

    Activations are those of a forward pass wholly in `dtype`, with attention that keeps no matrix of tokens by
    tokens (sdpa, flash, xformers). Autocast keeps norms in float32, so half precision takes somewhat more.
    """
    denoiser = nn.Module.to(family.denoiser, dtype)  # diffusers' own method warns

    def call() -> Tensor:
        x_t = torch.empty(1, *shape, dtype=dtype, device="meta")
        shapes = family.condition_shapes(max_sequence_length)
        condition = {name: torch.empty(1, *s, dtype=dtype, device="meta") for name, s in shapes.items()}
        return family.call(x_t, torch.zeros(1, device="meta"), condition)

    return count_call_cost(denoiser, call, denoiser.enable_gradient_checkpointing if recompute else None)
