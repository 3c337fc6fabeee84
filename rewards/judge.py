"""A learned judge of drawings: does the drawing show its prompt? It is independent of the classical detector.

It is the watched reward of the shapes task. It is trained on true drawings and never optimised, so it reveals training
that deceives the detector instead of drawing. It can only score prompts with words that it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewards.base import Metadata, OnDevice, Scores, check_images
from rewards.options import check_choice
from rewards.random_state import preserved_random_state

PADDING = 0  # word ids start at 1
Output = Literal["probability", "logit"]


@dataclass(frozen=True)
class JudgeConfig:
    """The sizes of a `JudgeNetwork`, and its vocabulary."""

    vocabulary: tuple[str, ...]
    image_size: int = 32
    channels: int = 24  # of the first convolution, a multiple of 8; the next have twice and three times as many
    word_width: int = 32
    text_width: int = 64


class JudgeNetwork(nn.Module):
    """A network for the logit that an image shows a prompt.

    A convolutional network maps the image to an 8×8 grid of features, which the prompt modulates twice (scale and shift of
    each channel: FiLM, 1709.07871). Two coordinate channels give every cell its position, without which "left of" and
    "right of" could not be distinguished. A bidirectional GRU encodes the prompt, so the order of the words counts.
    """

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        narrow, middle, wide = config.channels, 2 * config.channels, 3 * config.channels
        self.words = nn.Embedding(len(config.vocabulary) + 1, config.word_width, padding_idx=PADDING)
        self.reader = nn.GRU(config.word_width, config.text_width // 2, batch_first=True, bidirectional=True)
        self.stem = nn.Sequential(
            _build_convolution(3 + 2, narrow, 1),
            _build_convolution(narrow, middle, 2),
            _build_convolution(middle, wide, 2),
        )
        self.films = nn.ModuleList(nn.Linear(config.text_width, 2 * wide) for _ in range(2))
        self.mixers = nn.ModuleList(nn.Conv2d(wide + 2, wide, 3, padding=1) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(2 * wide + config.text_width, 64), nn.SiLU(), nn.Linear(64, 1))
        self._ids: Mapping[str, int] = {word: index + 1 for index, word in enumerate(config.vocabulary)}

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return word ids [B,L] of prompts, padded with zeros. All words must be in the vocabulary."""
        rows = [torch.tensor([self._ids[word] for word in split_words(prompt)]) for prompt in prompts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)

    def can_encode(self, prompt: str) -> bool:
        """Whether the prompt has words, all of them in the vocabulary."""
        words = split_words(prompt)
        return bool(words) and all(word in self._ids for word in words)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return logits [B] of images [B,3,H,W] in [0,1] and word ids [B,L]."""
        text = self._encode_words(ids.to(images.device))
        features = self._encode_images(images)
        for film, mixer in zip(self.films, self.mixers, strict=True):
            scale, shift = film(text)[:, :, None, None].chunk(2, dim=1)
            features = features + F.silu(mixer(_add_coordinates(features)) * (1 + scale) + shift)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3)), text], dim=1)
        logits: Tensor = self.head(pooled)[:, 0]
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return features of images [B,3,H,W] without a prompt: mean and maximum of each channel, [B, 6 channels]."""
        grid = self._encode_images(images)
        return torch.cat([grid.mean((2, 3)), grid.amax((2, 3))], dim=1)

    def _encode_images(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        grid: Tensor = self.stem(_add_coordinates(images * 2 - 1))
        return grid

    def _encode_words(self, ids: Tensor) -> Tensor:
        """Return prompt features [B, text_width]: the GRU's last states, without padding."""
        lengths = (ids != PADDING).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
        _, last = self.reader(packed)
        return torch.cat([last[0], last[1]], dim=1)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    @preserved_random_state()
    def load(cls, folder: str | Path) -> JudgeNetwork:
        """Load a network that `save` wrote, in evaluation mode."""
        folder = Path(folder)
        _check_folder(folder)
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network = cls(JudgeConfig(**{**raw, "vocabulary": tuple(raw["vocabulary"])}))
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network.eval()


def _check_folder(folder: Path) -> None:
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is not the folder of a judge: {' and '.join(missing)} not found in it")


class Judge(OnDevice):
    """Probability, by a trained `JudgeNetwork`, that the image shows the prompt; or its logit, which is unbounded.

    A prompt with a word outside the network's vocabulary is an invalid row: the network has no features for it.
    """

    name = "judge"
    needs: tuple[str, ...] = ("images", "prompts")

    def __init__(
        self, path: str | Path | None = None, *, network: JudgeNetwork | None = None, output: Output = "probability"
    ) -> None:
        if (path is None) == (network is None):
            raise ValueError("a judge needs either path=FOLDER, as written by JudgeNetwork.save, or network=")
        check_choice(self.name, "output", output, get_args(Output))
        if path is not None:
            _check_folder(Path(path))
        self.path, self.output, self._network = path, output, network

    @property
    def network(self) -> JudgeNetwork:
        """The network, loaded at the first access."""
        if self._network is None:
            self._network = JudgeNetwork.load(self.path or "")
        return self._network.eval().to(self._device)

    def preload(self) -> None:
        """Load the network now."""
        _ = self.network

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]."""
        images = check_images(samples, self.name).to(self._device)
        network = self.network
        valid = torch.tensor([network.can_encode(prompt) for prompt in prompts], dtype=torch.bool)
        values = torch.zeros(len(prompts))
        if valid.any():
            encodable = [prompt for prompt in prompts if network.can_encode(prompt)]
            logits = network(images[valid.to(self._device)], network.encode(encodable))
            values[valid] = (logits.sigmoid() if self.output == "probability" else logits).float().cpu()
        return Scores(values, valid).to(samples.device)


def judge(path: str | None = None, output: Literal["probability", "logit"] = "probability") -> Judge:
    """Probability that a drawing shows its prompt, by a small network for the shapes task.

    path: folder of a network; in difrl's commands the shipped one is the default. output: probability, or logit, which is
    unbounded.
    """
    return Judge(path, output=output)


def split_words(prompt: str) -> list[str]:
    """Return the words of a prompt, in lower case and without full stops and commas."""
    return prompt.lower().replace(".", " ").replace(",", " ").split()


def _build_convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())


def _add_coordinates(features: Tensor) -> Tensor:
    """Append x and y of every cell, in [-1,1], as two channels: [B,C,H,W] to [B,C+2,H,W]."""
    rows = torch.linspace(-1, 1, features.shape[2], device=features.device, dtype=features.dtype)
    columns = torch.linspace(-1, 1, features.shape[3], device=features.device, dtype=features.dtype)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    coordinates = torch.stack([x, y]).expand(len(features), -1, -1, -1)
    return torch.cat([features, coordinates], dim=1)
