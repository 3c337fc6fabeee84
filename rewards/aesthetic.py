"""LAION's aesthetic predictor, version 2 (LAION-5B, 2210.08402): how much people like a picture, whatever its prompt.

Five linear layers, 768 → 1024 → 128 → 64 → 16 → 1 without activations between them, on the normalised embedding of
OpenAI's CLIP ViT-L/14, fitted to ratings from 1 to 10. It is the aesthetic reward of DDPO (2305.13301) and of the work
that followed. The layers are published as `sac+logos+ava1-l14-linearMSE.pth` in
christophschuhmann/improved-aesthetic-predictor on GitHub. This file is a pickle; only its tensors are read. The default
hub id is a mirror of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rewards.clip import DTYPES, ClipReward, TransformersClip
from rewards.options import check_choice
from rewards.random_state import preserved_random_state
from rewards.sources import check_sources
from rewards.weights import find_file, load_weights, read_tensors

CLIP_MODEL = "openai/clip-vit-large-patch14"
HEAD = "camenduru/improved-aesthetic-predictor"
FILE = "sac+logos+ava1-l14-linearMSE.pth"


class AestheticHead(nn.Module):
    """Rating [B] of unit embeddings [B,width]. The dropouts are there so that the layers have their published names."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        ratings: Tensor = self.layers(embeddings)[:, 0]
        return ratings


class Aesthetic(ClipReward):
    """Rating of the picture from 1 to 10 by LAION's aesthetic predictor (version 2).

    model: hub id or folder of CLIP. head: a file, a folder that contains `filename`, or a hub id.
    """

    name = "aesthetic"
    needs: tuple[str, ...] = ("images",)

    def __init__(
        self,
        model: str = CLIP_MODEL,
        head: str = HEAD,
        filename: str = FILE,
        *,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        check_sources(self.name, model=model, head=head)
        super().__init__(
            partial(TransformersClip, model, dtype=check_choice(self.name, "dtype", dtype, DTYPES)), batch_size
        )
        self._source, self._filename = head, filename
        self._head: AestheticHead | None = None

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the ratings [B] of one batch. The prompts are not used."""
        embeddings = self.encoder.images(images)
        scores: Tensor = self._get_head(embeddings.shape[1]).to(embeddings.device)(embeddings)
        return scores

    def preload(self) -> None:
        """Load the encoder and the layers now."""
        with torch.no_grad():
            self._get_head(self.encoder.texts([""]).shape[1])

    def _get_head(self, width: int) -> AestheticHead:
        if self._head is None:
            self._head = self._load_head(width)
        return self._head

    @preserved_random_state()
    def _load_head(self, width: int) -> AestheticHead:
        """Load the layers, always in float32, for embeddings of this width."""
        path = find_file(self._source, self._filename)
        head = AestheticHead(width).eval()
        load_weights(head, read_tensors(path), path)
        return head
