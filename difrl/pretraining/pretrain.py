"""The command `difrl pretrain FILE`: train a shipped model from scratch.

The file's `architecture` decides its other keys. Every model is trained in stages that write checkpoints into `work`
(difrl/pretraining/stages.py). A finished stage is loaded instead of repeated, so the command can be killed and run again at
any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from difrl.config.load import load_mapping, read_model
from difrl.config.yaml_source import ConfigError
from difrl.pretraining.images import ImagesConfig, pretrain_images
from difrl.pretraining.text import TextConfig, pretrain_text
from difrl.runtime.lock import lock_folder


class ModelKind(NamedTuple):
    """Keys of a file of configs/pretrain, and the function that it starts."""

    config: type[ImagesConfig] | type[TextConfig]
    run: Callable[[Any], None]


IMAGE_KIND, TEXT_KIND = ModelKind(ImagesConfig, pretrain_images), ModelKind(TextConfig, pretrain_text)
MODEL_KINDS: Mapping[str, ModelKind] = {
    "tiny-sd3": IMAGE_KIND,
    "tiny-sd": IMAGE_KIND,
    "tiny-wan": IMAGE_KIND,
    "tiny-lm": TEXT_KIND,
}


def pretrain(path: Path | str, overrides: Sequence[str] = ()) -> None:
    """Train the model that a file describes, and write its folder."""
    name = load_mapping(path, overrides).get("architecture")
    kind = MODEL_KINDS.get(str(name))
    if kind is None:
        raise ConfigError(f"{path}: architecture is {name!r}, expected one of {', '.join(MODEL_KINDS)}")
    config = read_model(kind.config, path, overrides)
    with lock_folder(config.work):
        kind.run(config)
