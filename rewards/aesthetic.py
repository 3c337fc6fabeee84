"""How much people like a picture, whatever its prompt: LAION's aesthetic predictor, version 2 (LAION-5B, 2210.08402).

Five linear layers, 768 → 1024 → 128 → 64 → 16 → 1 with nothing between them, on the normalised embedding of OpenAI's
CLIP ViT-L/14, fitted to ratings from 1 to 10. This is the aesthetic reward of DDPO (2305.13301) and after it. The
layers are published as `sac+logos+ava1-l14-linearMSE.pth` in christophschuhmann/improved-aesthetic-predictor on GitHub,
a pickle, which is read as tensors alone; the hub id is a mirror of that file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from rewards.clip import ClipReward, TransformersClip, check_dtype
from rewards.weights import fill, find_file, read_tensors

MODEL = "openai/clip-vit-large-patch14"
HEAD = "camenduru/improved-aesthetic-predictor"
FILE = "sac+logos+ava1-l14-linearMSE.pth"


class AestheticHead(nn.Module):
    """Rating [B] of embeddings [B,width] of length one. The dropouts only keep the published names of the layers."""

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

    model: CLIP by hub id or folder. head: a file, a folder with `filename`, or a hub id.
    """

    name = "aesthetic"
    needs: tuple[str, ...] = ("images",)

    def __init__(
        self,
        model: str = MODEL,
        head: str = HEAD,
        filename: str = FILE,
        *,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(partial(TransformersClip, model, dtype=check_dtype(dtype, self.name)), batch_size)
        self._source, self._filename = head, filename
        self._head: AestheticHead | None = None

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [B] of one batch; the prompts are not read."""
        embeddings = self.encoder.images(images)
        if self._head is None:
            self._head = self._read_head(embeddings.shape[1])
        return self._head.to(embeddings.device)(embeddings)

    def _read_head(self, width: int) -> AestheticHead:
        """The layers on embeddings of this width, always in float32."""
        path = find_file(self._source, self._filename)
        head = AestheticHead(width).eval()
        fill(head, read_tensors(path), path)
        return head
