"""Open a run, finished or not, or a plain model, to sample from it and to evaluate it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from difrl.config import (
    ClippedObjective,
    DataConfig,
    ForwardLikelihood,
    GenerationConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    TokensLikelihood,
)
from difrl.config.load import read_config
from difrl.config.schema.base import check_path
from difrl.data.prompts import Prompt, check_images
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, GuidanceSettings, NoiseKey, Policy
from difrl.policies.errors import ModelError
from difrl.policies.load import is_language_model, load_policy
from difrl.policies.model_paths import LANGUAGE_MODEL, resolve
from difrl.reporting.inference_defaults import read_inference_defaults
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.paths import expand_user
from difrl.runtime.progress import phase
from difrl.training import checkpoint


@dataclass(frozen=True)
class LoadedRun:
    """A model to sample from. A run can be sampled at any RLG weight, a plain model only at 1."""

    policy: Policy
    config: RunConfig
    step: int
    """Number of training steps behind the weights; 0 for a plain model."""
    is_run: bool = True
    guidance: GuidanceSettings = TRAINED
    """Settings of calls that give none: for a run, those of its inference.json."""

    @property
    def makes_texts(self) -> bool:
        """True for a language model, False for an image generator."""
        return self.config.likelihood.kind == "tokens"

    def sample(
        self,
        prompts: Sequence[Prompt | str],
        *,
        image: Path | str | Sequence[Path | str] | None = None,
        per_prompt: int = 1,
        rlg: float | None = None,
        seed: int = 0,
    ) -> Rollout:
        """Draw `per_prompt` samples of each prompt, prompt by prompt. The same seed gives the same noise at every weight.

        image: the file of the input image of all prompts, or a file for each prompt, for models that edit or animate it.
        """
        given = [Prompt(p, {}) if isinstance(p, str) else p for p in prompts]
        if image is not None:
            given = with_images(given, [image] if isinstance(image, Path | str) else image)
        self.policy.validate_prompts(given)
        repeated = [p for p in given for _ in range(per_prompt)]
        key, guidance = NoiseKey(seed, 0, "sample"), self.guidance_at(rlg)
        with phase("sampling", total=len(repeated)):
            return self.policy.evaluation(repeated, torch.arange(len(repeated)), key, guidance)

    def with_guidance(self, first_steps: int | None, adaptive: float | None) -> LoadedRun:
        """Return the run with other settings; None keeps one as it is."""
        changes = {"first_steps": first_steps, "adaptive": adaptive}
        return replace(self, guidance=replace(self.guidance, **_given(changes)))

    def guidance_at(self, rlg: float | None) -> GuidanceSettings:
        """Return the guidance at an RLG weight; None: at the default one."""
        guidance = self.guidance if rlg is None else replace(self.guidance, rlg=rlg)
        if guidance.rlg != 1 and not self.is_run:
            raise ModelError(
                f"RLG at weight {guidance.rlg:g} blends a trained model with the one it was trained from, and "
                f"{self.config.model.path} is a plain model; give a run folder, or leave the weight at 1"
            )
        return guidance


def with_images(prompts: Sequence[Prompt], images: Sequence[Path | str]) -> list[Prompt]:
    """Return the prompts with input images: one image for all prompts, one prompt for all images, or one each.

    Raise ModelError if the numbers differ, and DataFileError if an image is refused.
    """
    if len(prompts) != len(images) and 1 not in (len(prompts), len(images)):
        raise ModelError(
            f"{len(images)} images and {len(prompts)} prompts, expected one image for all prompts, or one each"
        )
    files = [expand_user(image).absolute() for image in images] * (len(prompts) if len(images) == 1 else 1)
    repeated = list(prompts) * (len(files) if len(prompts) == 1 else 1)
    given = [replace(prompt, image=file) for prompt, file in zip(repeated, files, strict=True)]
    check_images(given)
    return given


def open_run(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    step: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> LoadedRun:
    """Open a run folder (the checkpoint of its result, or that of `step`) or a model (hub id, folder, shipped name).

    steps, guidance, height, width: for drawing images and videos. frames: number of frames of a video.
    max_new_tokens, temperature: for drawing texts. Default: those of the run.
    """
    folder = expand_user(path)
    is_run = os.path.isfile(folder / "config.yaml")
    config = read_config(folder / "config.yaml") if is_run else plain_recipe(str(path))
    images, texts = (
        {"steps": steps, "guidance": guidance, "frames": frames, "height": height, "width": width},
        {"max_new_tokens": max_new_tokens, "temperature": temperature},
    )
    is_language = config.likelihood.kind == "tokens"
    surplus, kinds = (images, ("a language", "image")) if is_language else (texts, ("an image", "language"))
    if names := list(_given(surplus)):
        be, them = ("are", "them") if len(names) > 1 else ("is", "it")
        raise ModelError(
            f"{config.model.path} is {kinds[0]} model, and {' and '.join(names)} {be} of {kinds[1]} models; leave {them} out"
        )
    changes: dict[str, dict[str, Any]] = {
        "eval": {"steps": steps, "temperature": temperature},
        "rollout": {
            "guidance": guidance,
            "frames": frames,
            "height": height,
            "width": width,
            "steps": None if is_run else steps,
        },  # steps of a run determine its window
        # Another engine draws the samples of training only.
        "generation": {"max_new_tokens": max_new_tokens, "engine": "transformers"},
    }
    config = config.model_copy(
        update={name: getattr(config, name).model_copy(update=_given(values)) for name, values in changes.items()}
    )
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(config, place, keep_base=is_run, run=folder if is_run else None)
    if not is_run:
        return LoadedRun(policy, config, 0, is_run=False)
    done = load_result(policy, config, folder, step)
    chosen = read_inference_defaults(folder)
    default = TRAINED if chosen is None else GuidanceSettings(chosen.rlg, chosen.first_steps, chosen.adaptive)
    return LoadedRun(policy, config, done, guidance=default)


def load_result(policy: Policy, config: RunConfig, folder: Path, step: int | None = None) -> int:
    """Load the weights of a run's result, or those of a step. Return the number of training steps behind them."""
    saved = checkpoint.find_result(folder) if step is None else checkpoint.checkpoint_folder(folder, step)
    if saved is None:
        raise checkpoint.CheckpointError(
            f"{folder} has no checkpoint yet; let the run reach checkpoint.every or its end"
        )
    layout = policy.snapshots.layout
    checkpoint.load_trained(layout, saved, DistributedContext(), snapshot=config.eval.snapshot)
    return int(checkpoint.read_state(saved)["step"])


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def plain_recipe(path: str) -> RunConfig:
    """Return a recipe for a plain model, in which only the model and its sampling matter."""
    try:
        path = check_path(path)
    except ValueError as error:
        raise ModelError(f"the model to open: {error}") from error
    model, objective = ModelConfig(path=path, train="full"), ClippedObjective(kind="clipped")
    if not is_language_model(path):
        return RunConfig(
            model=model,
            data=DataConfig(train="shapes:train", evaluation="shapes:eval"),
            rewards=[RewardConfig(name="geneval")],
            watch=[RewardConfig(name="judge")],
            likelihood=ForwardLikelihood(kind="forward"),
            objective=objective,
        )
    from transformers import GenerationConfig as ModelGenerationConfig

    generation = GenerationConfig()
    with suppress(OSError):  # not every model has a generation_config.json
        most = ModelGenerationConfig.from_pretrained(resolve(path, LANGUAGE_MODEL)).max_new_tokens
        generation = generation if most is None else GenerationConfig(max_new_tokens=most)
    return RunConfig(
        model=model,
        data=DataConfig(train="arithmetic:train", evaluation="arithmetic:eval"),
        rewards=[RewardConfig(name="math")],
        generation=generation,
        likelihood=TokensLikelihood(kind="tokens"),
        objective=objective,
    )
