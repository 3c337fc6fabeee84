"""Conditions of a denoiser for prompts. Embeddings are cached, so each text is encoded once as long as memory allows."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from difrl.data.prompts import Prompt
from difrl.policies.diffusion.families import Family
from difrl.policies.errors import ModelError
from difrl.runtime.progress import count_done, phase
from difrl.runtime.quiet_libraries import silenced_libraries
from rewards.image_files import read_image_file
from samplers import Condition

log = logging.getLogger(__name__)

Key = tuple[str, Path | None]
"""A text and the file of its input image."""


@dataclass(eq=False)
class PromptEncoder:
    """The text encoders of a family, with a cache of the latest embeddings on the CPU."""

    family: Family
    negative: str
    """Negative prompt for prompts that have none of their own."""
    max_sequence_length: int | None
    dtype: torch.dtype
    """Precision of the embeddings given to the denoiser."""
    room: int = 2**30
    """Size of the cache in bytes. With T5 at 256 tokens a text takes 2 to 4 MB."""
    _embeddings: dict[Key, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    """Text and image -> name -> embedding, the least recently used first."""
    _size: int = 0
    _measured: set[str] = field(default_factory=set, repr=False)
    """Texts whose length in tokens was compared with the encoders' limits."""

    def __call__(self, prompts: Sequence[Prompt], guided: bool) -> Condition:
        """Return the condition of prompts, with that of their negative prompts if guided."""
        positive = [(p.text, p.image) for p in prompts]
        negative = [(self.negative if p.negative is None else p.negative, p.image) for p in prompts]
        found = self._embedded([*positive, *negative] if guided else positive)
        return Condition(self._gathered(positive, found), self._gathered(negative, found) if guided else None)

    def warn_of_cut(self, prompts: Sequence[Prompt]) -> None:
        """Log how many prompts are longer than an encoder reads, for each length. Prompts met before are left out."""
        texts = list(dict.fromkeys(p.text for p in prompts if p.text not in self._measured))
        self._measured.update(texts)
        lengths: dict[int, dict[str, list[int]]] = defaultdict(dict)
        with silenced_libraries(), phase("measuring prompts"):
            for name, (tokenizer, limit) in self.family.tokenizers(self.max_sequence_length).items():
                lengths[limit][name] = [len(ids) for ids in tokenizer(texts).input_ids] if texts else []
        for limit, found in lengths.items():
            longest = [max(of_text) for of_text in zip(*found.values(), strict=True)]
            if cut := sum(length > limit for length in longest):
                noun = "prompt was" if cut == 1 else "prompts were"
                log.warning(
                    "%d %s cut at %d tokens (%s); the longest has %d", cut, noun, limit, ", ".join(found), max(longest)
                )

    @torch.no_grad()
    def _embedded(self, keys: Sequence[Key]) -> dict[Key, dict[str, Tensor]]:
        """Return the embeddings of these texts with their images from the cache, or encode and cache them.

        Each is encoded alone, so that its bits do not depend on the state of the cache: a resumed run starts with an empty one.
        """
        new = [key for key in dict.fromkeys(keys) if key not in self._embeddings]
        found = {key: self._embeddings.pop(key) for key in dict.fromkeys(keys) if key in self._embeddings}
        with silenced_libraries(), phase("encoding prompts", total=len(new)):  # `warn_of_cut` counts what was cut
            for key in new:
                encoded = encode(self.family, *key, self.max_sequence_length)
                # A copy: a view may keep alive more than the row.
                found[key] = {name: value[0].cpu().clone() for name, value in encoded.items()}
                count_done()
        self._embeddings |= found
        self._size += sum(_bytes(found[key]) for key in new)
        while self._size > self.room:
            self._size -= _bytes(self._embeddings.pop(next(iter(self._embeddings))))
        return found

    def _gathered(self, keys: Sequence[Key], found: Mapping[Key, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(keys))
        device = self.family.device
        rows = torch.tensor([distinct.index(key) for key in keys], device=device)
        stacked = dict[str, Tensor]()
        for name in found[distinct[0]]:
            # Padded to the longest of all texts, so that the conditions of a prompt and its negative have one shape.
            longest = [max(sizes) for sizes in zip(*(row[name].shape for row in found.values()), strict=True)]
            values = torch.stack([_pad(found[key][name], longest) for key in distinct])
            stacked[name] = values.to(device, self.dtype if values.is_floating_point() else None)[rows]
        return stacked


def validate_images(family: Family, prompts: Sequence[Prompt]) -> None:
    """Raise ModelError for prompts with an input image that the model does not take, or without one that it needs."""
    name = type(family.pipeline).__name__
    surplus = [p for p in prompts if p.image is not None and not family.takes_image]
    missing = [p for p in prompts if p.image is None and family.needs_image]
    for wrong, problem in (
        (surplus, "takes no input image; remove it"),
        (missing, 'changes an image; add "image" to the row'),
    ):
        if wrong:
            place = wrong[0].place or repr(wrong[0].text)
            raise ModelError(f"{place}: {name} {problem} ({len(wrong)} of {len(prompts)} prompts)")


@torch.no_grad()
def encode(family: Family, text: str, image: Path | None, max_sequence_length: int | None) -> dict[str, Tensor]:
    """Return the conditions of a text and the input image in a file, by name, [1, ...]."""
    picture = None if image is None else read_image_file(image)
    return family.encode_prompt(text, picture, max_sequence_length)


def _pad(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Append zeros to every dimension up to `shape`."""
    missing = [room for size, full in zip(value.shape, shape, strict=True) for room in (full - size, 0)]
    return F.pad(value, missing[::-1])


def _bytes(embedding: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in embedding.values())
