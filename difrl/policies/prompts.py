"""From prompts to what a denoiser is conditioned on: each text is encoded once in a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difrl.data import Prompt
from difrl.policies.base import batches
from difrl.policies.families import Family
from samplers import Condition


@dataclass(eq=False)
class PromptEncoder:
    """The family's text encoders, with the embeddings of every text seen so far on the CPU."""

    family: Family
    negative: str
    """Negative prompt of guidance, where a prompt has none of its own."""
    max_sequence_length: int | None
    batch: int
    """Texts encoded at once."""
    dtype: torch.dtype
    """Of the embeddings given to the denoiser."""
    _embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __call__(self, prompts: Sequence[Prompt], guided: bool) -> Condition:
        """Embeddings of prompts, and of their negative prompts where guidance wants them."""
        positive = [p.text for p in prompts]
        negative = [self.negative if p.negative is None else p.negative for p in prompts]
        self._embed([*positive, *negative] if guided else positive)
        return Condition(self._gathered(positive), self._gathered(negative) if guided else None)

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        for chunk in batches(len(new), self.batch):
            encoded = self.family.encode_prompts(new[chunk], self.max_sequence_length)
            for row, text in enumerate(new[chunk]):
                self._embeddings[text] = {name: value[row].cpu() for name, value in encoded.items()}

    def _gathered(self, texts: Sequence[str]) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(texts))
        device = next(self.family.denoiser.parameters()).device
        rows = torch.tensor([distinct.index(text) for text in texts], device=device)
        names = self._embeddings[distinct[0]]
        return {
            name: torch.stack([self._embeddings[text][name] for text in distinct]).to(device, self.dtype)[rows]
            for name in names
        }
