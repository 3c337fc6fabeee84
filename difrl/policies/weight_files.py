"""Weight files of local models, checked by their headers: nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from difrl.policies.errors import ModelError

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the text that git leaves in the place of a large file that was not downloaded."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.msgpack", "*.h5", "*.gguf")
Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""


def check_weight_file(file: Path, key: str) -> Shapes:
    """Return the shapes of a safetensors file; {} for other files. ModelError: the file is cut off, or not there at all.

    key: the key of the recipe that names the model, for messages.
    """
    try:
        with file.open("rb") as handle:
            start = handle.read(len(LFS_POINTER))
    except OSError as error:
        raise ModelError(f"{key}: {file} cannot be read ({error.strerror})") from error
    if start == LFS_POINTER:
        raise ModelError(
            f"{key}: {file} is a pointer of git-lfs, expected weights; run `git lfs pull`, or download the file again"
        )
    if not start:
        raise ModelError(f"{key}: {file} is empty, expected weights; copy or download it again")
    if file.suffix != ".safetensors":
        # torch writes archives, whose list of contents is at the end.
        if start.startswith(b"PK") and not is_zipfile(file):
            raise ModelError(
                f"{key}: {file} is damaged or cut off ({file.stat().st_size} bytes); copy or download it again"
            )
        return {}
    try:
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{key}: {file} is damaged or cut off ({error}, {file.stat().st_size} bytes); copy or download it again"
        ) from error


def check_weights(folder: Path, names: Sequence[str], module: nn.Module, key: str) -> None:
    """Raise ModelError unless a folder holds whole weights for a module, which may be on the meta device.

    names: the files that the loader looks for, by preference; an index of several files has the same name and .index.json.
    Loaders rename some tensors. Shapes are compared where names are equal, and a parameter is missing only if all names are.
    """
    state = module.state_dict()
    # bitsandbytes packs weights into bytes of another shape.
    own = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.dtype != torch.uint8}
    found = set[str]()
    for file in _find_weight_files(folder, names, key):
        for name, shape in check_weight_file(file, key).items():
            found.add(name)
            if own.get(name, shape) != shape:
                raise ModelError(
                    f"{key}: {name} has the shape {list(shape)} in {file}, and {list(own[name])} by config.json; copy or "
                    "download the model again"
                )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    given = {
        id(parameters[name]) for name in found & parameters.keys()
    }  # one name of several that share a tensor is enough
    missing = sorted(name for name, p in parameters.items() if id(p) not in given)
    if found and found <= state.keys() and missing:
        raise ModelError(
            f"{key}: the weights in {folder} lack {len(missing)} tensors that config.json describes, such as {missing[0]}, and "
            "would be filled with random numbers; copy or download the model again"
        )


def _find_weight_files(folder: Path, names: Sequence[str], key: str) -> list[Path]:
    for name in names:
        if (file := folder / name).is_file():
            return [file]
        if (index := folder / f"{name}.index.json").is_file():
            return _find_shards(index, key)
    others = sorted(file.name for pattern in _WEIGHTS for file in folder.glob(pattern))
    found = f"only {', '.join(others[:3])}" if others else "no weights"
    advice = "copy or download the model again"
    if any(file.endswith(".safetensors") for file in others):
        advice = (
            "download the standard variant, or load this one in Python (variant=…) and save it with save_pretrained"
        )
    elif others:
        advice = "download the safetensors files, or load these in Python and save them with save_pretrained"
    raise ModelError(f"{key}: {folder} holds {found}, expected {' or '.join(names)}; {advice}")


def _find_shards(index: Path, key: str) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{key}: {index} cannot be read ({error}); copy or download it again") from error
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise ModelError(
            f"{key}: {index.parent} lacks {absent[0]}, one of {len(names)} files of {index.name}; download it again"
        )
    return [index.parent / name for name in names]
