"""Gumbel noise keyed by (sample, position, token): the argmax of logits + noise is a sample of their softmax.

The noise is a hash of its key in integer arithmetic, so it is the same in every batch, in any order and in every
process. A whole vocabulary of it costs a few elementwise passes on the device of the keys. It is for text what `keyed`
is for images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.noise import stable_seed


def _signed(word: int) -> int:
    """Return the int64 of the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


# SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): its increment, and the multipliers of its finaliser.
_STRIDE = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def sample_keys(*, seed: int, step: int, samples: Sequence[int] | Tensor, use: str) -> Tensor:
    """Return one key a sample, [B] int64 on the CPU. The arguments are those of `keyed`."""
    numbers = torch.as_tensor(samples).tolist()
    return torch.tensor([stable_seed(int(seed), int(step), use, int(number)) for number in numbers], dtype=torch.int64)


def gumbel(keys: Tensor, position: int, vocabulary: int) -> Tensor:
    """Return standard Gumbel noise [B, V] float32 for `keys` [B] int64, on their device; finite everywhere.

    -log(E) with E = -log1p(-v) ~ Exp(1), v uniform: the large values, which win an argmax, come from the v near 0, where
    floats are dense. Each sample and position has a SplitMix64 stream of its own, and token i takes its i-th number.
    """
    streams = _mix(keys + _STRIDE * torch.tensor(position + 1, dtype=torch.int64, device=keys.device))
    tokens = torch.arange(1, vocabulary + 1, dtype=torch.int64, device=keys.device) * _STRIDE
    words = _mix(streams[:, None] + tokens)
    # 63 bits: converted whole, a small v keeps its 24 significant bits. The bounds keep v off 0 and 1.
    uniform = _shifted(words, 1).to(torch.float32).mul_(2.0**-63).clamp_(2.0**-64, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(words: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser, a bijection of 64 bits, in place. Integer products wrap around."""
    words ^= _shifted(words, 30)
    words *= _FIRST
    words ^= _shifted(words, 27)
    words *= _SECOND
    words ^= _shifted(words, 31)
    return words


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Return the logical right shift of 64-bit words; torch's own copies the sign bit."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
