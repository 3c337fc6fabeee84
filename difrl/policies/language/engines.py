"""What draws completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from difrl.policies.base import NoiseKey
from difrl.policies.language.lm_head import CausalLM
from samplers import Completions, Decoding, Processing, generate, sample_keys


class Engine(Protocol):
    """Draws one completion for each prompt, by the weights that the model has at the moment."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        samples: Tensor,
        key: NoiseKey,
        temperature: float,
        processors: Sequence[Processing] = (),
    ) -> Completions:
        """prompts: token ids. samples [B]: the numbers by which noise is keyed."""


@dataclass(frozen=True)
class Engines:
    """What draws the samples of training, and those of evaluations, which may be steered."""

    rollout: Engine
    evaluation: Engine
    correction: float | None = None
    """Most that the importance weight of a token may be; None where the network itself draws the samples of training."""


@dataclass(frozen=True)
class Transformers:
    """transformers' own generation, with keyed noise."""

    network: CausalLM
    decoding: Decoding
    batch: int
    """Completions drawn at once."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        samples: Tensor,
        key: NoiseKey,
        temperature: float,
        processors: Sequence[Processing] = (),
    ) -> Completions:
        keys = sample_keys(seed=key.seed, step=key.step, samples=samples, use=f"{key.purpose}/tokens")
        decoding = replace(self.decoding, temperature=temperature)
        with self.network.autocast():
            return generate(self.network.model, prompts, decoding, keys, processors=processors, batch=self.batch)
