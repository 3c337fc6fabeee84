"""Embeddings of prompts on the disk, so that a resumed run and the next run of a recipe encode nothing.

    ~/.cache/difrl/embeddings/3f/3f91….safetensors    the embeddings of one prompt with its input image

The name of a file is a digest of all that its content depends on, so a file is never out of date. The folder can be
removed at any time. If all files take more than `ROOM` when a model is loaded, those that were not used for longest are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from difrl.policies.source_digests import Source, digest_source
from difrl.runtime.files import digest_file
from difrl.runtime.paths import cache_folder

ROOM = 20 * 2**30
"""Bytes of embeddings on the disk. With T5 at 256 tokens a text takes 2 to 4 MB."""
CHECKSUM = "sha256"


@dataclass(frozen=True)
class EmbeddingFiles:
    """Embeddings by the encoders of one model."""

    folder: Path
    model: str
    """Digest of the encoders, and of the code that calls them."""

    def find(self, text: str, image: Image | None, settings: Mapping[str, Any], device: torch.device) -> Path:
        """Return the file for a prompt. A CPU's results depend on its number of threads, in their last bits."""
        where = torch.get_num_threads() if device.type == "cpu" else torch.cuda.get_device_name(device)
        pixels = None if image is None else [image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()]
        content = [self.model, text, pixels, dict(settings), device.type, where]
        name = hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, file: Path) -> dict[str, Tensor] | None:
        """Return the embeddings in a file; None if there is no such file or it is damaged."""
        try:
            with safe_open(file, "pt") as handle:
                found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                whole = (handle.metadata() or {}).get(CHECKSUM) == _digest_tensors(found)
            os.utime(file)
        except (OSError, SafetensorError, ValueError):
            return None
        return found if whole else None

    def write(self, file: Path, embeddings: Mapping[str, Tensor]) -> None:
        """Write a file aside and rename it, so that other processes may write and read it at the same time.

        A full disk, or a folder that must not be written to, is no error: the prompt is encoded again in the next run.
        """
        tensors = {name: value.contiguous() for name, value in embeddings.items()}
        with suppress(OSError, SafetensorError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as aside:
                save_file(tensors, Path(aside) / file.name, {CHECKSUM: _digest_tensors(tensors)})
                os.replace(Path(aside) / file.name, file)


def open_embedding_files(
    sources: Iterable[Source], settings: Sequence[Any], code: Iterable[Path]
) -> EmbeddingFiles | None:
    """Open the cache for a model. None: there is none, or the content of the model's files is not known.

    Args:
      sources: places of the parts that embeddings depend on.
      settings: further settings that they depend on.
      code: files of the code that computes them.
    """
    place = cache_folder()
    if place is None:
        return None
    try:
        digests = [digest_source(source) for source in sorted(set(sources), key=str)]
        versions = [torch.__version__, diffusers.__version__, transformers.__version__]
        content = [digests, versions, [digest_file(file) for file in code], *settings]
        prune(place / "embeddings", ROOM)
    except OSError:
        return None
    return EmbeddingFiles(place / "embeddings", hashlib.sha256(json.dumps(content).encode()).hexdigest())


def prune(folder: Path, room: int) -> None:
    """Remove the files that were not used for longest until the others take at most `room` bytes."""
    files = []
    for file in folder.rglob("*.safetensors"):
        with suppress(FileNotFoundError):  # another process removed it
            status = file.stat()
            files.append((status.st_mtime, status.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= room:
            return
        file.unlink(missing_ok=True)
        total -= size


def _digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
