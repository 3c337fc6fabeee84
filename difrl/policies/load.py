"""Loading of a policy of either modality, by the likelihood of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import AutoConfig

from difrl.config import RunConfig
from difrl.policies.base import Policy
from difrl.policies.base_reference import REFERENCE
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from difrl.policies.language.load import load_language_policy
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.model_paths import LANGUAGE_MODEL, MODULAR_INDEX, PIPELINE, check_source, find_local
from difrl.policies.trainable import check_adapter
from difrl.policies.warm_start import with_kept_warm_start
from difrl.runtime.progress import phase

LOADERS: Mapping[str, Callable[..., DiffusionPolicy | LanguagePolicy]] = {
    "forward": load_diffusion_policy,
    "reverse": load_diffusion_policy,
    "tokens": load_language_policy,
}
"""likelihood.kind -> loader."""


def load_policy(
    config: RunConfig, device: torch.device | str = "cpu", *, keep_base: bool = False, run: Path | None = None
) -> Policy:
    """Load the policy of a run before its first step.

    keep_base: keep the pretrained weights also where no anchor needs them. run: the folder of a run with a checkpoint, whose
    adapter is taken as the run has it.
    """
    started = config if run is None else with_kept_warm_start(config, run)
    with phase(f"loading {config.model.path}"):
        policy = LOADERS[config.likelihood.kind](started, device, keep_base=keep_base)
    if run is None:
        check_adapter(policy.module, config.model.lora)
    return policy


def is_language_model(path: str) -> bool:
    """Return whether a folder, a shipped name or a hub id holds a language model of transformers, not a diffusers pipeline."""
    place = find_local(path)
    if place is None:
        return _is_language_model_on_hub(path)
    if any((place / name).is_file() for name in (REFERENCE, MODULAR_INDEX)):
        return False
    found = [format for format in (PIPELINE, LANGUAGE_MODEL) if (place / format.marker).is_file()]
    if not found:
        raise ModelError(
            f"{path!r} holds neither {PIPELINE.marker} (a diffusers pipeline) nor {LANGUAGE_MODEL.marker} (a language model of "
            "transformers); give the folder of a model, or of a run (with its config.yaml)"
        )
    return found[0] is LANGUAGE_MODEL


def _is_language_model_on_hub(path: str) -> bool:
    check_source(path)
    try:
        DiffusionPipeline.load_config(path)
    except OSError as first:
        try:
            AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as second:
            raise ModelError(
                f"{path!r} can be opened neither as a diffusers pipeline ({_line(first)}) nor as a language model of "
                f"transformers ({_line(second)}); check the name, the network and `hf auth login`"
            ) from second
        return True
    return False


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
