"""Published weights by hub id, folder or file. What exists only as a pickle is read as tensors, never executed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def find_file(source: str, filename: str, revision: str | None = None) -> Path:
    """A file of published weights: ``source`` is that file, a folder that holds ``filename``, or a hub id."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / filename).is_file():
            raise FileNotFoundError(f"the folder {path} holds no {filename}; give the file itself, or a folder with it")
        return path / filename
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no file or folder {source}; give one, or a hub id such as owner/name")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, filename, revision=revision))
    except Exception as error:  # the hub's own errors are many, and all of them mean this
        raise FileNotFoundError(
            f"cannot fetch {filename} of {source} from the hub: {error}. Without a network give the path of the file"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: safetensors, or a pickle of nothing but tensors, where ``state_dict`` is opened."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Without the error's own words: torch's advise to run the code.
        raise ValueError(
            f"cannot read {path} as tensors alone: it is damaged, or it holds code, which is never run"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds {type(content).__name__}, expected tensors by name")
    return dict(content)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Give ``module`` the weights that were read from ``source``: all that it has, of its shapes, and no others."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    shapes = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if shapes or found.keys() != expected.keys():
        raise ValueError(
            f"the weights in {source} are not those of {type(module).__name__}: "
            f"missing {a_few(expected.keys() - found.keys())}; unexpected {a_few(found.keys() - expected.keys())}; "
            f"of another shape {a_few(shapes)}"
        )
    module.load_state_dict(dict(tensors))


def a_few(names: Iterable[str]) -> str:
    """The first names in alphabetical order, and how many there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f", … ({len(names)} in all)" if len(names) > 3 else "") if names else "none"
