"""The adapter that a run continues from (`model.lora.warm_start`): its files, its weights, and its copy in the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from difrl.config import LoraConfig, RunConfig
from difrl.policies.base_reference import REFERENCE
from difrl.policies.errors import ModelError
from difrl.policies.weight_files import check_weight_file
from difrl.runtime.files import atomic_write
from difrl.runtime.quiet_libraries import silenced_libraries
from rewards.sources import explain_missing

KEY = "model.lora.warm_start"
KEPT = "warm-start"
"""The folder of the copy, in a run folder."""


@dataclass(frozen=True)
class AdapterFormat:
    """The files of an adapter: of each row the first pattern that a folder has."""

    noun: str
    files: tuple[tuple[str, ...], ...]
    others: str = "no other files"
    """Pattern of files that some adapters have beside these: of denoisers beside the first."""


DIFFUSERS_LORA = AdapterFormat(
    "a LoRA of diffusers (pytorch_lora_weights.safetensors)",
    (("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "*.safetensors", "*.bin"),),
    others="*_lora_weights.safetensors",
)
PEFT_LORA = AdapterFormat(
    "a LoRA of PEFT (adapter_config.json and adapter_model.safetensors)",
    (("adapter_config.json",), ("adapter_model.safetensors", "adapter_model.bin")),
)
FORMATS = {"forward": DIFFUSERS_LORA, "reverse": DIFFUSERS_LORA, "tokens": PEFT_LORA}
"""likelihood.kind -> format."""


def find_adapter_files(path: str, format: AdapterFormat) -> list[Path]:
    """Return the files of the adapter at a local path or hub id. ModelError: there is none, or a damaged one."""
    place = Path(path)
    if not place.exists():
        if problem := explain_missing(path):
            raise ModelError(f"{KEY}: {problem}; expected the folder or hub id of {format.noun}")
        place = _fetch(path, format)
    if place.is_file():
        if len(format.files) > 1:
            raise ModelError(f"{KEY}: {path!r} is a file, expected the folder of {format.noun}")
        files = [place]
    else:
        files = [_find_file(place, patterns, format) for patterns in format.files]
        files += [file for file in sorted(place.glob(format.others)) if file.is_file() and file not in files]
    for file in files:
        check_weight_file(file, KEY)
    return files


def _fetch(path: str, format: AdapterFormat) -> Path:
    """Download the adapter of a hub id, without the folders beside it. Return its folder in the hub's cache."""
    patterns = [pattern for patterns in format.files for pattern in patterns]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub library has many error classes, all with this meaning
        raise ModelError(
            f"{KEY}: {path!r} is not a local folder, and cannot be fetched from the hub: {error}; check the name, the network "
            "and `hf auth login`"
        ) from error


def _find_file(folder: Path, patterns: tuple[str, ...], format: AdapterFormat) -> Path:
    for pattern in patterns:
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ModelError(f"{KEY}: {folder} holds several adapters ({names}); give the path of one of the files")
        if found:
            return found[0]
    raise ModelError(f"{KEY}: {folder} has no {patterns[0]}, expected the folder of {format.noun}{_advice(folder)}")


def _advice(folder: Path) -> str:
    if (folder / "config.yaml").is_file():
        finished = (folder / "model").is_dir()
        return "; it is the folder of a run" + (
            f", whose result is {folder / 'model'}" if finished else " with no result"
        )
    if any((folder / name).is_file() for name in ("model_index.json", "config.json", REFERENCE)):
        return "; it is a whole model, which model.path takes"
    if any((folder / name).is_file() for name in ("adapter_config.json", "pytorch_lora_weights.safetensors")):
        return "; it is an adapter for a model of the other kind"
    return ""


def load_warm_start(path: str, format: AdapterFormat, load_adapter: Callable[[str], list[str]]) -> None:
    """Load an adapter onto a model. ModelError: it cannot be read, or does not fit the model.

    load_adapter: a function of a path that returns the names of tensors that are not in both the adapter and the model.
    """
    files = find_adapter_files(path, format)
    place = str(files[0] if len(files) == 1 else files[0].parent)
    try:
        with silenced_libraries():
            surplus = load_adapter(place)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()
        raise ModelError(
            f"{KEY}: {path!r} cannot be loaded as {format.noun} for this model: {' '.join(reason[:3])}; expected an adapter "
            "that was trained on the same model"
        ) from error
    if surplus:
        raise ModelError(
            f"{KEY}: the tensors of {path!r} are not those of this model's layers: {len(surplus)} are on one side only, such as "
            f"{surplus[0]}; expected an adapter that was trained on the same model"
        )


def keep_warm_start(config: RunConfig) -> None:
    """Copy the adapter that a run continues from into its folder."""
    if (path := config.model.lora.warm_start) is None:
        return
    folder = config.output_dir / KEPT
    files = find_adapter_files(path, FORMATS[config.likelihood.kind])
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was started here and left no step
    folder.mkdir(parents=True)
    for file in files:
        with atomic_write(folder / file.name) as aside:
            shutil.copyfile(file, aside)


def with_kept_warm_start(config: RunConfig, folder: Path) -> RunConfig:
    """Return the recipe of an existing run with the copy of the adapter that it started from.

    Runs of earlier versions have no copy. Where the adapter itself is gone too, their result takes its place: it has the
    same modules and strength, and a checkpoint replaces its weights.
    """
    path = config.model.lora.warm_start
    if path is None:
        return config
    places = [folder / KEPT, Path(path), folder / "model"]
    kept = next((str(place) for place in places if place.exists()), path)
    # Without the other keys of the section: what they said of the adapter was checked when the run began.
    model = config.model.model_copy(update={"lora": LoraConfig(warm_start=kept)})
    return config.model_copy(update={"model": model})
