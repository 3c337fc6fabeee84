"""A family for every pipeline that diffusers cuts into blocks: its modular pipeline drives it, so a model needs no code here.

The blocks of a modular pipeline fall into three parts around the denoising loop::

    encode    text_encoder, …                     prompt → its embeddings
    prepare   denoise.… before the loop           embeddings → latents, times, ids, masks, distilled guidance
    (loop)    before_denoiser, denoiser           latents at a time → output of the model
    finish    denoise.… after the loop, decode    latents → images

difrl runs each part by itself. Of the loop it runs the blocks up to the denoiser, at any time and with gradients.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.modular_pipelines.modular_pipeline import (
    MODULAR_PIPELINE_MAPPING,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    PipelineState,
)
from diffusers.pipelines.auto_pipeline import _get_model
from torch import Tensor, nn

from difrl.policies.diffusion.families.base import Family
from difrl.policies.diffusion.families.block_interface import check_interface
from difrl.policies.errors import ModelError
from samplers import (
    Blend,
    FlowMatching,
    Grid,
    Process,
    Scheduler,
    VariancePreserving,
    extrapolate,
    extrapolate_keeping_norm,
)

LENGTH = ".length"
"""End of the name of a condition that holds the lengths of another one, which is padded."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that its blocks and its files do not give."""

    reason: str
    """Reason why they are needed, and their source."""
    blocks: str | None = None
    """Name of the blocks, where diffusers has no entry for the pipeline in its own table."""
    lora_targets: Sequence[str] | None = None
    """Default targets, where they are not all linear layers of attention."""
    blend: Blend = extrapolate
    """Classifier-free guidance."""


MODELS: Mapping[str, ModelFacts] = {
    "ErnieImagePipeline": ModelFacts("diffusers 0.42 maps no blocks to the pipeline", blocks="ernie-image"),
    "HunyuanVideo15Pipeline": ModelFacts("diffusers 0.42 maps no blocks to the pipeline", blocks="hunyuan-video-1.5"),
    **dict.fromkeys(
        ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        ModelFacts(
            "the pipelines scale the guided output to the norm of the conditional one", blend=extrapolate_keeping_norm
        ),
    ),
}
"""Class of a pipeline -> facts about it. A pipeline without an entry needs none."""
NO_FACTS = ModelFacts("")


def find_modular_class(index: Mapping[str, Any]) -> type[ModularPipeline] | None:
    """Return the modular pipeline of a model_index.json, or None if diffusers has none for it."""
    name = index["_class_name"]
    blocks = MODELS.get(name, NO_FACTS).blocks or _get_model(name)
    build_name = None if blocks is None else MODULAR_PIPELINE_MAPPING.get(blocks)
    return None if build_name is None else getattr(diffusers, build_name(index))


@dataclass(frozen=True)
class _Cut:
    """The blocks of a pipeline, cut at its denoising loop."""

    encode: Sequence[str]
    """Names of the blocks that make the conditions of a prompt."""
    prepare: Sequence[str]
    """Names of the blocks that prepare the loop."""
    loop: Any
    forward: Sequence[Any]
    """Blocks of the loop up to the denoiser."""
    finish: Sequence[str]
    """Names of the blocks after the loop."""
    denoiser_parts: Sequence[str]
    """Names of the parts that the denoiser uses."""
    made: frozenset[str]
    """Names of the results."""


def _cut(blocks: Any, name: str) -> _Cut:
    """Cut the blocks of a pipeline. Raise ModelError unless they have one denoising loop."""
    steps = blocks.sub_blocks
    loops = [step for step, block in steps.items() if isinstance(block, LoopSequentialPipelineBlocks)]
    if len(loops) != 1 or "denoiser" not in steps[loops[0]].sub_blocks:
        raise ModelError(f"model.path: {name} has {len(loops)} denoising loops, expected one with a denoiser")
    order, loop = list(steps), steps[loops[0]]
    before, after = order[: order.index(loops[0])], order[order.index(loops[0]) + 1 :]
    inner = list(loop.sub_blocks)
    return _Cut(
        # Blocks that rewrite a prompt are left out: rewards score samples of the prompt as it is.
        encode=[step for step in before if not step.startswith(("denoise.", "prompt_"))],
        prepare=[step for step in before if step.startswith("denoise.")],
        loop=loop,
        forward=list(loop.sub_blocks.values())[: inner.index("denoiser") + 1],
        finish=after,
        denoiser_parts=[spec.name for spec in loop.sub_blocks["denoiser"].expected_components],
        made=frozenset(out.name for step in after for out in steps[step].intermediate_outputs),
    )


class ModularFamily(Family):
    """A pipeline that its modular pipeline drives. The classic pipeline loads and saves the parts."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__(pipeline)
        name = type(pipeline).__name__
        facts = MODELS.get(name, NO_FACTS)
        cls = find_modular_class({**pipeline.config, "_class_name": name})
        if cls is None:
            raise ModelError(f"model.path: diffusers has no modular pipeline for {name}")
        if any(part.device == torch.device("meta") for part in self.modules):
            # Blocks make tensors on the device of the parts, and read values of them, which meta tensors do not have.
            cls = type(cls.__name__, (cls,), {"_execution_device": torch.device("cpu")})
        self.modular = cls(config_dict=dict(pipeline.config))
        parts = {name: part for name, part in pipeline.components.items() if part is not None}
        self.modular.update_components(**{**parts, "scheduler": self.scheduler})
        check_interface(self.modular)
        self.blocks = self.modular.blocks.get_execution_blocks(prompt="")
        self.cut = _cut(self.blocks, name)
        modules = [part for part, value in pipeline.components.items() if isinstance(value, nn.Module)]
        trained = [part for part in self.cut.denoiser_parts if part in modules]
        reasons = {
            f"has {len(trained)} denoisers": len(trained) != 1,
            f"makes {' and '.join(sorted(self.cut.made))}": "images" not in self.cut.made,
            "needs an image": "image" in self.blocks.required_inputs,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ModelError(
                f"model.path: {name} {' and '.join(found)}; expected a pipeline with one denoiser that makes images of prompts"
            )
        self.denoiser_name = trained[0]
        self.lora_targets = facts.lora_targets or _find_attention_layers(self.denoiser)
        self.blend = facts.blend
        self._prepared: tuple[Mapping[str, Tensor], Any] | None = None
        self._empty: dict[str, Tensor] | None = None

    @classmethod
    def get_pipeline_class(cls, index: Mapping[str, Any]) -> type[DiffusionPipeline]:
        found: type[DiffusionPipeline] = getattr(diffusers, index["_class_name"])
        return found

    @classmethod
    def part_overrides(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the optional parts that the folder does not have, which diffusers refuses to load otherwise."""
        optional = cls.get_pipeline_class(index)._optional_components
        return {name: None for name in optional if index.get(name, (None, None))[0] is None}

    def resized(self, height: int | None, width: int | None) -> Self:
        family = super().resized(height, width)
        family._prepared = None
        return family

    @cached_property
    def scheduler(self) -> Scheduler:
        scheduler = self.pipeline.scheduler
        # Other schedulers of such models scale their input by the step, which is not known at an arbitrary time.
        return scheduler if _is_flow(scheduler) else DDIMScheduler.from_config(scheduler.config, clip_sample=False)

    @property
    def guides(self) -> bool:
        return any(name.startswith("guider") for name in self.modular.components)

    @property
    def process(self) -> Process:
        scheduler = self.scheduler
        if _is_flow(scheduler):
            return FlowMatching(scheduler.config.num_train_timesteps)
        return VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str], max_sequence_length: int | None) -> dict[str, Tensor]:
        (text,) = texts
        lengths = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        state = self._run(self.cut.encode, self._state({"prompt": [text], **lengths}))
        declared = [out.name for name in self.cut.encode for out in self.blocks.sub_blocks[name].intermediate_outputs]
        found = {name: state.get(name) for name in declared if not name.startswith("negative_")}
        conditions = dict[str, Tensor]()
        for name, value in found.items():
            if isinstance(value, list):  # one tensor a prompt, of its own length
                (value,) = value
                conditions[name + LENGTH] = torch.tensor([len(value)])
                value = value[None]
            if value is not None:
                conditions[name] = value
        return conditions

    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        # In float32: blocks give the time the dtype of the latents, and half precision would round it.
        state = self._prepare(condition)
        state.latents = x_t.float()
        for block in self.cut.forward:
            with_gradient: Any = inspect.unwrap(type(block).__call__)  # under its no_grad
            with_gradient(block, self.modular, state, i=0, t=timestep)
        output: Tensor = state.noise_pred
        state.latents = state.noise_pred = None  # the state is kept, and must not keep the graph of this call
        return output

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        family = self.resized(height, width)
        template = family._run(self.cut.prepare, family._state(self._unconditional(1)))
        for name, expected in (("height", height), ("width", width)):
            if expected is not None and template.get(name) != expected:
                raise ValueError(
                    f"rollout.{name}: found {expected} pixels, and this model draws {template.get(name)}; set that number"
                )
        return tuple(template.get("latents").shape[1:])

    def sequence_length(self, latent_shape: Sequence[int]) -> int:
        return latent_shape[0] if len(latent_shape) == 2 else super().sequence_length(latent_shape)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [B, ...] of images, float32: the mean of the autoencoder's posterior.

        Raise ModelError for a pipeline without a workflow that starts from an image.
        """
        if "image2image" not in self.modular.blocks.available_workflows:
            raise ModelError(
                f"{type(self.pipeline).__name__} has no blocks that encode images; train on `rows: prompts`"
            )
        steps = self.modular.blocks.get_workflow("image2image").sub_blocks
        vae = self.pipeline.vae
        state = self._state(
            {**self._unconditional(len(images)), "image": images.to(vae.device, vae.dtype), "batch_size": len(images)}
        )
        encode = vae.encode

        def encode_to_mean(x: Tensor, **settings: Any) -> Any:
            found = encode(x)
            found.latent_dist.sample = lambda generator=None: found.latent_dist.mode()
            return found

        vae.encode = encode_to_mean
        try:
            for name, block in steps.items():
                if name.startswith("vae_encoder") or name.endswith("additional_inputs"):
                    _, state = block(self.modular, state)
        finally:
            del vae.encode
        latents: Tensor = state.get("image_latents")
        return latents.float()

    def build_grid(self, steps: int) -> Grid:
        if not _is_flow(self.scheduler):
            return super().build_grid(steps)
        self._run(self.cut.prepare, self._state({**self._unconditional(1), "num_inference_steps": steps}))
        return Grid(self.modular.scheduler.sigmas.clone())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        state = self._run(self.cut.prepare, self._state(self._unconditional(len(latents))))
        state.set("latents", latents.to(self.pipeline.vae.dtype))
        images: Tensor = self._run(self.cut.finish, state).get("images")
        return images.float()

    def _unconditional(self, count: int) -> dict[str, Any]:
        """Return the conditions of `count` empty prompts, for what depends on no prompt."""
        if self._empty is None:
            self._empty = self.encode_prompts([""], None)
        return _unpad({name: value.repeat_interleave(count, dim=0) for name, value in self._empty.items()})

    @torch.no_grad()
    def _prepare(self, condition: Mapping[str, Tensor]) -> Any:
        """Return the state of the loop for these conditions. The latest is kept: a rollout calls the denoiser many times."""
        if self._prepared is None or self._prepared[0] is not condition:
            state = self._run(self.cut.prepare, self._state(_unpad(condition)))
            # The loop's own preamble may add to its state, so it runs with a step that keeps the state and does nothing.
            loop, kept = copy.copy(self.cut.loop), list[Any]()

            def keep(modular: Any, block_state: Any, **_: Any) -> tuple[Any, Any]:
                block_state.noise_pred = None
                kept.append(block_state)
                return modular, block_state

            loop.loop_step = keep
            loop.set_progress_bar_config(disable=True)
            loop(self.modular, state)
            self._prepared = condition, kept[0]
        self._disable_guiders()  # the policy guides
        return self._prepared[1]

    def _state(self, values: Mapping[str, Any]) -> PipelineState:
        settings = {"output_type": "pt", "num_inference_steps": 2, "height": self.height, "width": self.width}
        state, given = PipelineState(), {"generator": torch.Generator().manual_seed(0), **settings, **values}
        for parameter in self.blocks.inputs:
            if parameter.name:
                state.set(parameter.name, given.get(parameter.name, parameter.default), parameter.kwargs_type)
        kinds = {
            out.name: out.kwargs_type for block in self.blocks.sub_blocks.values() for out in block.intermediate_outputs
        }
        for name, value in values.items():
            state.set(name, value, kinds.get(name))
        return state

    @torch.no_grad()
    def _run(self, names: Sequence[str], state: PipelineState) -> PipelineState:
        self._disable_guiders()
        for name in names:
            _, state = self.blocks.sub_blocks[name](self.modular, state)
        return state

    def _disable_guiders(self) -> None:
        for name, part in self.modular.components.items():
            if name.startswith("guider"):
                part.disable()


def _is_flow(scheduler: Scheduler) -> bool:
    return not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("prediction_type") == "flow_prediction"


def _find_attention_layers(denoiser: nn.Module) -> list[str]:
    """Return the linear layers of attention as ends of names, such as attn.to_q, or as names where an end fits others too."""
    layers = dict[str, str]()
    for name, module in denoiser.named_modules():
        if "Attention" in type(module).__name__:
            for inner, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    layers[f"{name}.{inner}"] = f"{name.rpartition('.')[2]}.{inner}"
    others = [name for name, _ in denoiser.named_modules() if name not in layers]
    return sorted({name if any(o.endswith(f".{end}") for o in others) else end for name, end in layers.items()})


def _unpad(condition: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the conditions as the blocks have them: those with lengths as lists of single ones."""
    plain: dict[str, Any] = {name: value for name, value in condition.items() if not name.endswith(LENGTH)}
    for name in plain:
        if (lengths := condition.get(name + LENGTH)) is not None:
            plain[name] = [row[:length] for row, length in zip(plain[name], lengths.tolist(), strict=True)]
    return plain
