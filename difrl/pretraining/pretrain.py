"""`difrl pretrain FILE`: makes a shipped model from scratch.

The file's `architecture` says which; what else the file may say depends on it. Every model is trained in stages that
checkpoint into `work` (training.py), and a stage that has finished is loaded instead of repeated, so the command can be killed
and given again at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from difrl.config.load import load_mapping, read_model
from difrl.config.yaml_source import ConfigError
from difrl.pretraining.images import ImagesConfig, pretrain_images
from difrl.pretraining.text import TextConfig, pretrain_text


class Kind(NamedTuple):
    """What a file of configs/pretrain may say, and what it starts."""

    config: type[BaseModel]
    run: Callable[[Any], None]


IMAGES, TEXT = Kind(ImagesConfig, pretrain_images), Kind(TextConfig, pretrain_text)
KINDS: Mapping[str, Kind] = {"tiny-sd3": IMAGES, "tiny-sd": IMAGES, "tiny-lm": TEXT}


def pretrain(path: Path | str, overrides: Sequence[str] = ()) -> None:
    """Trains what a file describes and writes its folder."""
    name = load_mapping(path, overrides).get("architecture")
    kind = KINDS.get(str(name))
    if kind is None:
        raise ConfigError(f"{path}: architecture is {name!r}, expected one of {', '.join(KINDS)}")
    kind.run(read_model(kind.config, path, overrides))
