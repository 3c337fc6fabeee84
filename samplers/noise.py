"""Noise keyed by its purpose, not by the order in which it is drawn.

Each sample's noise comes from its own generator, seeded by a hash of (seed, step, sample, use, index). It
therefore does not depend on the other samples of the batch or the process, nor on the order of the draws.
Generators run on the CPU, so that every device gets the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor


def stable_seed(*key: int | str) -> int:
    """Return a 63-bit hash of a key, the same in every process, version and platform (Python's `hash` is not)."""
    # repr keeps 1 and "1" apart, and quotes keep the parts apart.
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    samples: Sequence[int] | Tensor,
    use: str,
    index: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return N(0, I) noise [B, *shape] for B = len(samples).

    Args:
      shape: of one sample's noise.
      seed: of the run.
      step: of training.
      samples: global numbers of the samples in that step.
      use: purpose of the noise ("init", "sde", ...).
      index: a further number, such as the denoising step.
      device, dtype: of the result.
    """
    return _draw(torch.randn, shape, (int(seed), int(step), use, int(index)), samples, device, dtype)


def keyed_uniform(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    samples: Sequence[int] | Tensor,
    use: str,
    index: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return uniform numbers in [0, 1), [B, *shape]. The arguments are those of `keyed`."""
    return _draw(torch.rand, shape, (int(seed), int(step), use, int(index)), samples, device, dtype)


def _draw(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    key: tuple[int | str, ...],
    samples: Sequence[int] | Tensor,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """Draw in float32 always, so that a dtype changes the rounding of the noise and not the noise."""
    numbers = torch.as_tensor(samples).tolist()
    out = torch.empty(len(numbers), *shape)
    generator = Generator()
    for row, number in enumerate(numbers):
        out[row] = draw(tuple(shape), generator=generator.manual_seed(stable_seed(*key, int(number))))
    return out.to(device, dtype)
