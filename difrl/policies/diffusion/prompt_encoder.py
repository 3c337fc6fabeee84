"""Conditions of a denoiser for prompts.

Embeddings are cached on the disk (embedding_files.py), in memory, and, for the prompts in use, on the device.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
Embeddings = dict[Key, dict[str, Tensor]]
"""Text and image -> name -> embedding."""
DEVICE_ROOM = 256 * 2**20
"""Bytes of embeddings kept on the device: the prompts of a step, as a rule."""


class Recent:
    """The embeddings that were used most recently, as many as fit into `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.size = room, 0
        self._embeddings = Embeddings()

    def __contains__(self, key: Key) -> bool:
        return key in self._embeddings

    def take(self, keys: Iterable[Key]) -> Embeddings:
        """Remove and return those of these keys that are there."""
        found = {key: self._embeddings.pop(key) for key in dict.fromkeys(keys) if key in self._embeddings}
        self.size -= sum(map(_bytes, found.values()))
        return found

    def add(self, embeddings: Embeddings) -> None:
        """Add embeddings that are not there, and remove the least recently used until all fit."""
        self._embeddings |= embeddings
        self.size += sum(map(_bytes, embeddings.values()))
        while self.size > self.room:
            self.take([next(iter(self._embeddings))])


@dataclass(eq=False)
class PromptEncoder:
    """The encoders of a family, with caches of their results."""

    family: Family
    negative: str
    """Negative prompt for prompts that have none of their own."""
    max_sequence_length: int | None
    dtype: torch.dtype
    """Precision of the embeddings given to the denoiser."""
    room: int = 2**30
    """Size of the cache in memory in bytes. With T5 at 256 tokens a text takes 2 to 4 MB."""
    _measured: set[str] = field(default_factory=set, repr=False)
    """Texts whose length in tokens was compared with the encoders' limits."""

    def __post_init__(self) -> None:
        self._in_memory, self._on_device = Recent(self.room), Recent(DEVICE_ROOM)

    def __call__(self, prompts: Sequence[Prompt], guided: bool) -> Condition:
        """Return the condition of prompts, with that of their negative prompts if guided."""
        positive, negative = self._keys(prompts)
        found = self._moved(self._embedded([*positive, *negative] if guided else positive))
        return Condition(_gathered(positive, found), _gathered(negative, found) if guided else None)

    def encode_ahead(self, prompts: Sequence[Prompt], guided: bool, start: float = 0.0) -> None:
        """Encode prompts, with their negative prompts if guided, and drop the encoders.

        start: share of the prompts that come last. Processes that start at different places divide the work, through the
        files on the disk, and none waits for another. A prompt that is later neither in memory nor on the disk is encoded again.
        """
        positive, negative = self._keys(prompts)
        keys = list(dict.fromkeys([*positive, *negative] if guided else positive))
        first = int(start * len(keys))
        for key, embedding in self._encoded([k for k in (*keys[first:], *keys[:first]) if k not in self._in_memory]):
            self._in_memory.add({key: embedding})
        self.family.encoders.drop()

    def _keys(self, prompts: Sequence[Prompt]) -> tuple[list[Key], list[Key]]:
        positive = [(p.text, p.image) for p in prompts]
        return positive, [(self.negative if p.negative is None else p.negative, p.image) for p in prompts]

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

    def _embedded(self, keys: Sequence[Key]) -> Embeddings:
        """Return the embeddings of these texts with their images from memory, or encode and keep them."""
        found = self._in_memory.take(keys)
        found |= self._encoded([key for key in dict.fromkeys(keys) if key not in found])
        self._in_memory.add(found)
        return found

    def _encoded(self, keys: Sequence[Key]) -> Iterator[tuple[Key, dict[str, Tensor]]]:
        """Yield these texts with their images and their embeddings.

        Each is encoded alone, so that its bits do not depend on the state of the cache: a resumed run starts with an empty one.
        """
        with silenced_libraries(), phase("encoding prompts", total=len(keys)):  # `warn_of_cut` counts what was cut
            for key in keys:
                encoded = encode(self.family, *key, self.max_sequence_length)
                yield key, {name: value[0] for name, value in encoded.items()}
                count_done()

    def _moved(self, found: Embeddings) -> Embeddings:
        """Return embeddings on the device. Micro-batches of a step have the same prompts, whose embeddings are moved once."""
        kept = self._on_device.take(found)
        for key, embedding in found.items():
            if key not in kept or _is_of_other(self.dtype, kept[key]):
                kept[key] = {name: self._move(value) for name, value in embedding.items()}
        self._on_device.add(kept)
        return {key: kept[key] for key in found}

    def _move(self, value: Tensor) -> Tensor:
        device = self.family.device
        value = value.to(self.dtype) if value.is_floating_point() else value
        return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _gathered(keys: Sequence[Key], found: Embeddings) -> dict[str, Tensor]:
    """Return the embeddings of keys, name -> [B, ...], padded with zeros to the longest of all that were found.

    So the conditions of a prompt and of its negative have one shape.
    """
    distinct = list(dict.fromkeys(keys))
    stacked = dict[str, Tensor]()
    for name, first in found[distinct[0]].items():
        longest = [max(sizes) for sizes in zip(*(row[name].shape for row in found.values()), strict=True)]
        rows = torch.tensor([distinct.index(key) for key in keys], device=first.device)
        stacked[name] = torch.stack([_pad(found[key][name], longest) for key in distinct])[rows]
    return stacked


def _is_of_other(dtype: torch.dtype, embedding: Mapping[str, Tensor]) -> bool:
    return any(value.is_floating_point() and value.dtype != dtype for value in embedding.values())


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
    return family.encode(text, picture, max_sequence_length)


def _pad(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Append zeros to every dimension up to `shape`."""
    missing = [room for size, full in zip(value.shape, shape, strict=True) for room in (full - size, 0)]
    return F.pad(value, missing[::-1])


def _bytes(embedding: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in embedding.values())
