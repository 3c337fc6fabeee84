"""Engines that draw completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from difrl.policies.base import NoiseKey
from difrl.policies.language.lm_head import CausalLM
from difrl.policies.rollout_precision import quantized
from difrl.runtime.progress import count_done
from samplers import Completions, Decoding, Processing, generate, sample_keys


class Engine(Protocol):
    """A function that draws one completion for each prompt, by the current weights of the model."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        samples: Tensor,
        key: NoiseKey,
        temperature: float,
        processors: Sequence[Processing] = (),
    ) -> Completions:
        """Draw completions. prompts: token ids; samples [B]: numbers that the noise is keyed by."""


@dataclass(frozen=True)
class Engines:
    """The engines of training and of evaluations. Evaluations may be guided."""

    rollout: Engine
    evaluation: Engine
    correction: float | None = None
    """Upper bound of a token's importance weight. None if the model itself draws the samples of training, in its precision."""


@dataclass(frozen=True)
class Transformers:
    """Generation by transformers, with keyed noise."""

    network: CausalLM
    decoding: Decoding
    batch: int
    """Completions drawn at once."""
    precision: str = "same"
    """`rollout.precision`."""

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
        model, dtype = self.network.model, self.network.dtype
        with quantized(model, self.precision, dtype), self.network.autocast(cached=True):
            return generate(
                model,
                prompts,
                decoding,
                keys,
                processors=processors,
                batch=self.batch,
                on_drawn=count_done,
            )
