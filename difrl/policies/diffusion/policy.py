"""A pipeline of diffusers under training.

    rollout      prompts → condition → samplers.rollout → images and recorded steps (sampling.py)
    likelihoods  decisions → outputs under old weights and anchors, without gradient → output of θ, with gradient

The family (families/) adapts the pipeline, and the kind (likelihoods.py) defines the decisions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from difrl.data.modality import Item
from difrl.data.prompts import Prompt
from difrl.data.rollout import Content, Rollout
from difrl.data.videos import Videos
from difrl.policies.base import TRAINED, Decisions, GuidanceSettings, NoiseKey, batches
from difrl.policies.diagnosis import Setting
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.guidance import build_guidance
from difrl.policies.diffusion.likelihoods import DenoiserEvaluation, LikelihoodKind, ReverseEvaluation
from difrl.policies.diffusion.noising import ModelAccess
from difrl.policies.diffusion.prompt_encoder import PromptEncoder, validate_images
from difrl.policies.diffusion.sampling import Sampling, decode, draw
from difrl.policies.errors import ModelError
from difrl.policies.evaluation import StoredEvaluation
from difrl.policies.importance_sampling import correct_rollout
from difrl.policies.references import ReferenceSet
from difrl.policies.rollout_precision import quantized
from difrl.policies.snapshots import CURRENT, Snapshots
from difrl.policies.trained_policy import ModelFiles, TrainedPolicy
from samplers import Condition, Denoiser, classifier_free


@dataclass(frozen=True)
class DenoiserInputs:
    """N decisions that count, as the denoiser takes them."""

    flat: Mapping[str, Tensor]
    """`Decisions.flat`."""
    condition: Condition
    """The condition of each decision."""


class DiffusionPolicy(TrainedPolicy[DenoiserInputs, DenoiserEvaluation]):
    """A policy over a diffusers pipeline. Built by difrl.policies.diffusion.load."""

    module_name = "denoiser"

    def __init__(
        self,
        family: Family,
        kind: LikelihoodKind,
        sampling: Sampling,
        evaluation_sampling: Sampling,
        snapshots: Snapshots,
        reference_set: ReferenceSet,
        prompts: PromptEncoder,
        files: ModelFiles,
    ) -> None:
        super().__init__(snapshots, reference_set, files)
        self.family, self.process, self.kind, self.prompts = family, family.process, kind, prompts
        self.sampling, self.evaluation_sampling = sampling, evaluation_sampling

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.family.denoiser
        return module

    @property
    def device(self) -> torch.device:
        return self.family.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prompts.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.prompts.dtype = dtype

    @property
    def sampler(self) -> str:
        return self.sampling.snapshot

    @property
    def setting(self) -> Setting:
        own = self.sampling.guidance if self.kind.guided else 1.0
        others = {1.0, self.sampling.guidance, self.evaluation_sampling.guidance} - {own}
        return Setting("guidance", "rollout.guidance", own, sorted(others))

    def denoiser(self, snapshot: str = CURRENT, guidance: float = 1.0) -> Denoiser:
        """Return the model under a snapshot's weights and classifier-free guidance. Only `current` has gradients."""

        def evaluate(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.evaluations += x_t.shape[0]
            gradient = torch.is_grad_enabled() and snapshot == CURRENT
            timestep = self.process.timestep(t).float()
            # Trained weights are float32 whatever the dtype of the frozen ones; autocast runs them in the latter. Each is
            # used once in a pass, so a cache of the casts would be a second copy of the model for nothing.
            half = self.dtype != torch.float32
            autocast = torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=False)
            with self.snapshots.use(snapshot), torch.set_grad_enabled(gradient), autocast:
                return self.family.call(x_t.to(self.dtype), timestep, condition.tensors).float()

        return classifier_free(evaluate, guidance, self.family.blend)

    def validate_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ModelError unless the prompts have input images just if the model needs them. Log how many texts are cut."""
        validate_images(self.family, prompts)
        self.prompts.warn_of_cut(prompts)

    def encode_prompts(self, prompts: Sequence[Prompt], start: float = 0.0) -> None:
        references = {*self.reference_set.references.values(), *self.reference_set.reward_anchors.values()}
        guidances = {self.sampling.guidance, self.evaluation_sampling.guidance, self.setting.value}
        guidances |= {r.guidance for r in references if r.guidance is not None}
        self.prompts.encode_ahead(prompts, guidances != {1.0}, start)

    def validate_items(self, items: Sequence[Item], places: Sequence[str]) -> None:
        """Accept every image: `replay_data` compares their size with the model's."""

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        sampling = self.sampling
        denoiser = self.denoiser(sampling.snapshot, sampling.guidance)
        with self.snapshots.use(sampling.snapshot):  # once, not once a step: it may have to come from the CPU
            with quantized(self.module, sampling.precision, self.dtype):
                replay_data = draw(denoiser, self.prompts, prompts, samples, key, sampling)
            replay_data["weights"] = self.sampler_fingerprint().expand(len(prompts))
            rollout = Rollout(tuple(prompts), groups, samples, replay_data)
            if sampling.correction is not None:
                rollout = self._correct(rollout, key, sampling.correction)
        return rollout.with_content(decode(self.family, replay_data["latents"], sampling.batch))

    @torch.no_grad()
    def _correct(self, rollout: Rollout, key: NoiseKey, most: float) -> Rollout:
        """Record the network's own ℓ and means of the steps that it drew in another precision, with importance weights."""
        decisions = self.decisions(rollout, key)

        def evaluate(rows: slice, step: int) -> tuple[Tensor, Tensor]:
            part = decisions.select(rows, slice(step, step + 1))
            with self.using(self.sampler) as model:
                found = model(self.prepare(rollout.select(rows), part, [None]), None)
            assert isinstance(found, ReverseEvaluation)
            return found.logp, found.transition.mean

        # As in a rollout: one step of a batch at a time.
        rows = list(batches(len(rollout), self.sampling.batch))
        steps = [zip(*(evaluate(part, step) for part in rows), strict=True) for step in range(decisions.mask.shape[1])]
        logp, mean = (torch.stack(one, dim=1) for one in zip(*(map(torch.cat, step) for step in steps), strict=True))
        if "mean" in rollout.replay_data:
            rollout = replace(rollout, replay_data={**rollout.replay_data, "mean": mean})
        return correct_rollout(rollout, decisions.mask, logp, most)

    def reference(self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, snapshot: str) -> Rollout:
        sampling = replace(self.sampling, snapshot=snapshot, branching=replace(self.sampling.branching, size=1))
        with self.snapshots.use(snapshot), quantized(self.module, sampling.precision, self.dtype):
            drawn = draw(self.denoiser(snapshot, sampling.guidance), self.prompts, prompts, samples, key, sampling)
        content = decode(self.family, drawn["latents"], sampling.batch)
        return Rollout(tuple(prompts), samples, samples, {}).with_content(content)

    def evaluation(
        self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, guidance: GuidanceSettings = TRAINED
    ) -> Rollout:
        sampling = self.evaluation_sampling
        guided = build_guidance(self.denoiser, sampling.guidance, guidance, sampling.grid, self.family.blend)
        drawn = draw(guided.denoiser, self.prompts, prompts, samples, key, sampling)
        content = decode(self.family, drawn["latents"], sampling.batch)
        measures = guided.measures(len(prompts))
        return Rollout(tuple(prompts), samples, samples, {}, measures=measures).with_content(content)

    def replay_data(self, prompts: Sequence[Prompt], content: Content) -> dict[str, Tensor]:
        """Return the latents of images or videos. Raise ModelError for another size than the model is sampled at."""
        if isinstance(content, Videos):
            parts = [frames for _, frames in content.batches()]
        else:
            assert isinstance(content, Tensor)
            parts = [content[rows] for rows in batches(len(content), self.sampling.batch)]
        return {"latents": torch.cat([encode_recorded(self.family, part, self.sampling.shape) for part in parts])}

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        model = ModelAccess(self.denoiser, lambda drawn: self.prompts(drawn.prompts, False), self.sampling.batch)
        return self.kind.decisions(rollout, key, model)

    def prepare(self, rollout: Rollout, decisions: Decisions, settings: Iterable[float | None]) -> DenoiserInputs:
        own = self.setting.value
        condition = self.prompts(rollout.prompts, any((guidance or own) != 1 for guidance in settings))
        return DenoiserInputs(decisions.flat(), condition.select(decisions.mask.nonzero()[:, 0]))

    @contextmanager
    def using(self, snapshot: str) -> Iterator[Callable[[DenoiserInputs, float | None], DenoiserEvaluation]]:
        def evaluate(inputs: DenoiserInputs, guidance: float | None) -> DenoiserEvaluation:
            denoiser = self.denoiser(snapshot, guidance or self.setting.value)
            output = denoiser(inputs.flat["x_t"], inputs.flat["t"], inputs.condition)
            return self.kind.evaluate(output, inputs.flat)

        with self.snapshots.use(snapshot):
            yield evaluate

    def restore(self, stored: StoredEvaluation, inputs: DenoiserInputs, setting: float | None) -> DenoiserEvaluation:
        assert stored.output is not None
        return self.kind.evaluate(stored.output.to(stored.logp.device), inputs.flat)

    @torch.no_grad()
    def recompute_logprobs(
        self,
        rollout: Rollout,
        decisions: Decisions,
        *,
        together: int | None = None,
        snapshot: str | None = None,
        setting: float | None = None,
    ) -> Tensor:
        if together is None:
            inputs = self.prepare(rollout, decisions, [setting])
            with self.using(snapshot or self.sampler) as model:
                return decisions.unflat(model(inputs, setting).logp)
        guidance = setting or self.setting.value
        condition = self.prompts(rollout.prompts, guidance != 1)
        denoiser = self.denoiser(snapshot or self.sampler, guidance)
        x_t, t, (rows, columns) = decisions.tensors["x_t"], decisions.tensors["t"], decisions.mask.shape
        output = torch.empty_like(x_t)
        # As in a rollout: one decision of `together` samples at a time.
        for start, column in itertools.product(range(0, rows, together), range(columns)):
            # A batch that is not full is filled up with rows again, so that all have one shape.
            index = torch.arange(start, start + together, device=self.device) % rows
            own = slice(min(together, rows - start))
            output[index[own], column] = denoiser(x_t[index, column], t[index, column], condition.select(index))[own]
        return decisions.unflat(self.kind.evaluate(output[decisions.mask], decisions.flat()).logp)


def encode_recorded(family: Family, images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the latents of images or videos from a file. Raise ModelError unless they have the shape of the model's samples."""
    noun = "images" if images.ndim == 4 else "videos"
    if images.ndim == 5 and images.shape[1] != family.inputs["num_frames"]:
        raise ModelError(
            f"the {noun} of data.train have {images.shape[1]} frames, and the samples of the run "
            f"{family.inputs['num_frames']}; cut the videos, or set rollout.frames: {images.shape[1]}"
        )
    try:
        latents = family.encode_images(images)
    except ValueError:  # a size that the model cannot take at all
        latents = None
    if latents is None or tuple(latents.shape[1:]) != shape:
        (height, width), sampled = images.shape[-2:], family.size
        raise ModelError(
            f"the {noun} of data.train have {width} × {height} pixels, and the model is sampled at {sampled[1]} × {sampled[0]}; "
            f"resize them, or set rollout.width: {width} and rollout.height: {height}"
        )
    return latents
