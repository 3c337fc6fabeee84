"""Published weights by hub id, folder or file. Of pickles only the tensors are read; their code never runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.sources import resolve_source


def find_file(source: str, filename: str, revision: str | None = None) -> Path:
    """Return the path of a file of published weights.

    ``source`` is that file, a folder that contains ``filename``, or a hub id, from which ``filename`` is downloaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / filename).is_file():
            raise FileNotFoundError(f"the folder {path} has no {filename}; give the file itself, or a folder with it")
        return path / filename
    resolve_source(source)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, filename, revision=revision))
    except Exception as error:  # the hub library has many error classes, all with this meaning
        raise FileNotFoundError(
            f"cannot fetch {filename} of {source} from the hub: {error}. Without a network give the path of the file"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name: safetensors, or a pickle of tensors alone (at the top or in ``state_dict``)."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message is left out: it recommends to run the code.
        raise ValueError(
            f"cannot read {path} as tensors alone: it is damaged, or it contains code, which is never run"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is a {type(content).__name__}, expected tensors by name")
    return dict(content)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load ``tensors``, read from ``source``, into ``module``. Raise ValueError unless names and shapes are the module's."""
    if problem := describe_differences(tensors, module.state_dict()):
        raise ValueError(f"the weights in {source} are not those of {type(module).__name__}: {problem}")
    module.load_state_dict(dict(tensors))


def describe_differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return the differences between two sets of tensors in names and shapes, for a message; an empty string if none."""
    reshaped = [
        (name, found[name].shape, value.shape)
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    return join_differences(expected.keys() - found.keys(), found.keys() - expected.keys(), reshaped)


def join_differences(
    missing: Collection[str],
    unexpected: Collection[str],
    reshaped: Collection[tuple[str, Sequence[int], Sequence[int]]],
) -> str:
    """Return these names of tensors for a message; `reshaped` has the shapes found and expected."""
    if not (missing or unexpected or reshaped):
        return ""
    shapes = [f"{name} {list(found)} instead of {list(expected)}" for name, found, expected in reshaped]
    return (
        f"missing {_first_names(missing)}; unexpected {_first_names(unexpected)}; "
        f"of another shape {_first_names(shapes)}"
    )


def _first_names(names: Collection[str]) -> str:
    """Return the first three names in alphabetical order, and the number of all if there are more."""
    if not names:
        return "none"
    return ", ".join(sorted(names)[:3]) + (f", … ({len(names)} in all)" if len(names) > 3 else "")
