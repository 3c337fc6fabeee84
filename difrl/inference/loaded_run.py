"""Opening a finished or running run, or a plain model, to sample from it and to evaluate it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, GuidanceSettings, NoiseKey, Policy
from difrl.policies.errors import ModelError
from difrl.policies.load import is_language_model, load_policy
from difrl.policies.model_paths import LANGUAGE_MODEL, resolve
from difrl.reporting.inference_defaults import read_inference_defaults
from difrl.training import checkpoint


@dataclass(frozen=True)
class LoadedRun:
    """A model to sample from; a run can be sampled at any RLG weight, a plain model at 1 alone."""

    policy: Policy
    config: RunConfig
    step: int
    """Steps of training behind the weights; 0 for a plain model."""
    is_run: bool = True
    steering: GuidanceSettings = TRAINED
    """Guidance of a call that gives none: for a run, that of its inference.json."""

    @property
    def of_texts(self) -> bool:
        """Whether it writes texts; else it makes images."""
        return self.config.likelihood.kind == "tokens"

    def sample(
        self,
        prompts: Sequence[Prompt | str],
        *,
        per_prompt: int = 1,
        rlg: float | None = None,
        seed: int = 0,
    ) -> Rollout:
        """`per_prompt` samples of each prompt, prompt by prompt; the same seed gives the same noise at every weight."""
        asked = [Prompt(p, {}, None, 1.0) if isinstance(p, str) else p for p in prompts]
        self.policy.validate_prompts(asked)
        repeated = [p for p in asked for _ in range(per_prompt)]
        return self.policy.evaluation(
            repeated, torch.arange(len(repeated)), NoiseKey(seed, 0, "sample"), self.guidance_at(rlg)
        )

    def with_guidance(self, first_steps: int | None, adaptive: float | None) -> LoadedRun:
        """With other settings of its steering; None leaves one as it is."""
        now = self.steering
        first = now.first_steps if first_steps is None else first_steps
        threshold = now.adaptive if adaptive is None else adaptive
        return replace(self, steering=replace(now, first_steps=first, adaptive=threshold))

    def guidance_at(self, rlg: float | None) -> GuidanceSettings:
        """The steering at an RLG weight; None: the default one."""
        steering = self.steering if rlg is None else replace(self.steering, rlg=rlg)
        if steering.rlg != 1 and not self.is_run:
            raise ModelError(
                f"RLG at weight {steering.rlg:g} blends a trained model with the one it was trained from, and "
                f"{self.config.model.path} is a plain model; give a run folder, or leave the weight at 1"
            )
        return steering


def open_run(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    step: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
) -> LoadedRun:
    """Opens a run folder (the checkpoint of its result, or that of `step`) or a model (hub id, folder, shipped name).

    steps, guidance: how images are drawn; max_new_tokens, temperature: how texts are. Default: as the run does.
    """
    place = _device() if device is None else device
    folder = Path(path)
    is_run = (folder / "config.yaml").is_file()
    config = read_config(folder / "config.yaml") if is_run else _plain(str(path))
    config = _drawn_as(
        config, {"steps": steps, "guidance": guidance}, {"max_new_tokens": max_new_tokens, "temperature": temperature}
    )
    config = _drawn_here(config)
    policy = load_policy(config, place, keep_base=is_run)
    if not is_run:
        return LoadedRun(policy, config, 0, is_run=False)
    saved = checkpoint.find_result(folder) if step is None else checkpoint.checkpoint_folder(folder, step)
    if saved is None:
        raise checkpoint.CheckpointError(
            f"{folder} has no checkpoint yet; let the run reach checkpoint.every or its end"
        )
    done = int(checkpoint.read_state(saved)["step"])
    checkpoint.load_trained(policy.parameters, saved)
    return LoadedRun(policy, config, done, steering=_chosen(folder))


def _drawn_here(config: RunConfig) -> RunConfig:
    """Without another engine, which draws the samples of training alone."""
    generation = config.generation.model_copy(update={"engine": "transformers"})
    return config.model_copy(update={"generation": generation})


def _chosen(folder: Path) -> GuidanceSettings:
    found = read_inference_defaults(folder)
    return TRAINED if found is None else GuidanceSettings(found.rlg, found.first_steps, found.adaptive)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _plain(path: str) -> RunConfig:
    """The recipe under which a plain model is opened: of it only the model and how it is sampled are used."""
    return (_plain_text if is_language_model(path) else _plain_images)(ModelConfig(path=path, train="full"))


def _plain_images(model: ModelConfig) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(train="shapes:train", evaluation="shapes:eval"),
        rewards=[RewardConfig(name="geneval")],
        watch=[RewardConfig(name="judge")],
        likelihood=ForwardLikelihood(kind="forward"),
        objective=ClippedObjective(kind="clipped"),
    )


def _plain_text(model: ModelConfig) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(train="arithmetic:train", evaluation="arithmetic:eval"),
        rewards=[RewardConfig(name="math")],
        generation=_said_by_the_model(model.path),
        likelihood=TokensLikelihood(kind="tokens"),
        objective=ClippedObjective(kind="clipped"),
    )


def _said_by_the_model(path: str) -> GenerationConfig:
    """How long the model's own generation_config.json lets completions be, where there is one that says it."""
    from transformers import GenerationConfig as Own

    try:
        most = Own.from_pretrained(resolve(path, LANGUAGE_MODEL)).max_new_tokens
    except OSError:
        most = None
    return GenerationConfig() if most is None else GenerationConfig(max_new_tokens=most)


Said = Mapping[str, int | float | None]
"""What was asked for by name; None: as it is."""


def _drawn_as(config: RunConfig, of_images: Said, of_texts: Said) -> RunConfig:
    texts = config.likelihood.kind == "tokens"
    said, theirs, own = (of_images, "image", "a language") if texts else (of_texts, "language", "an image")
    if given := [name for name, value in said.items() if value is not None]:
        raise ModelError(
            f"{config.model.path} is {own} model, and {' and '.join(given)} {'are' if given[1:] else 'is'} of {theirs} models; "
            f"leave {'them' if given[1:] else 'it'} out"
        )
    return _with(
        config,
        eval={"steps": of_images["steps"], "temperature": of_texts["temperature"]},
        rollout={"guidance": of_images["guidance"]},
        generation={"max_new_tokens": of_texts["max_new_tokens"]},
    )


def _with(config: RunConfig, **sections: Said) -> RunConfig:
    said = {name: {k: v for k, v in values.items() if v is not None} for name, values in sections.items()}
    return config.model_copy(update={n: getattr(config, n).model_copy(update=values) for n, values in said.items()})
