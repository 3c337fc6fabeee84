"""CLIP directional similarity: whether the picture changed in the direction in which its caption did.

    score = cos(E(output) − E(input), T(target) − T(source))

E and T are CLIP's unit embeddings of pictures and texts. The direction is that of StyleGAN-NADA (2108.00946, whose loss is
1 − score), and InstructPix2Pix (2211.09800) measures edits by it. The metadata have `source`, a caption of the input image,
and `target`, a caption of the output that is wanted. An output equal to its input has no direction and scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import Metadata, MetadataError, Scores, all_valid, check_images
from rewards.clip import ClipReward, choose_backend
from rewards.input_images import read_inputs


class ClipDirection(ClipReward):
    """CLIP directional similarity of an edit: the change of the picture against the change of its caption.

    The metadata have the captions `source` and `target`. model, backend, pretrained: as for clip_score.
    """

    name = "clip_direction"
    needs: tuple[str, ...] = ("images", "metadata")

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        backend: str = "transformers",
        pretrained: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(choose_backend(self.name, model, backend, pretrained, dtype), batch_size)

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]."""
        images = check_images(samples, self.name)
        inputs = read_inputs(self.name, prompts, metadata)
        sources, targets = (self._captions(key, prompts, metadata) for key in ("source", "target"))
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if source == target:
                problem = f"`source` and `target` in the metadata are both {source!r}, so there is no direction"
                raise MetadataError(self.name, problem, row, prompts[row])
        if not prompts:
            return all_valid(samples.new_zeros(0))
        after = torch.cat([self.encoder.images(part) for part in images.split(self.batch_size)])
        # A file that occurs several times, as in a group, is one tensor; inputs may differ in size.
        encoded = {id(image): self.encoder.images(image[None])[0] for image in {id(i): i for i in inputs}.values()}
        before = torch.stack([encoded[id(image)] for image in inputs])
        return all_valid(
            directional_similarity(before, after, *map(self._texts, (sources, targets))).to(samples.device)
        )

    def _captions(self, key: str, prompts: Sequence[str], metadata: Metadata) -> list[str]:
        for row, facts in enumerate(metadata):
            if not isinstance(facts.get(key), str) or not facts[key].strip():
                problem = f"`{key}` in the metadata is {facts.get(key)!r}, expected a caption of the "
                problem += "input image" if key == "source" else "output that is wanted"
                raise MetadataError(self.name, problem, row, prompts[row])
        return [facts[key] for facts in metadata]

    def _texts(self, captions: Sequence[str]) -> Tensor:
        rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        return self.encoder.texts(list(rows))[[rows[caption] for caption in captions]]


def directional_similarity(before: Tensor, after: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return cos(after − before, target − source) [B] of unit embeddings [B,D]; 0 where one of the differences is 0."""
    return F.cosine_similarity(after - before, target - source, dim=1)
