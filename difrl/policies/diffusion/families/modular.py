"""A family for every pipeline that diffusers cuts into blocks: its modular pipeline drives it, so a model needs no code here.

The blocks of a modular pipeline fall into three parts around the denoising loop::

    encode    text_encoder, vae_encoder, …        prompt and input image → their embeddings
    prepare   denoise.… before the loop           embeddings → latents, times, ids, masks, distilled guidance
    (loop)    before_denoiser, denoiser           latents at a time → output of the model
    finish    denoise.… after the loop, decode    latents → images or videos

difrl runs each part by itself. Of the loop it runs the blocks up to the denoiser, at any time and with gradients.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from PIL import Image
from torch import Tensor, nn

from difrl.policies.diffusion.families.base import Family, find_device, read_index
from difrl.policies.diffusion.families.block_interface import check_interface
from difrl.policies.diffusion.families.meta_parts import build_meta_parts
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

log = logging.getLogger(__name__)

LENGTH, SHAPE, NUMBER, LISTED = ".length", ".shape", ".number", ".listed"
"""Ends of names of conditions: the length of an entry of a list, the shape of a tensor that no mask covers, a plain number, the
only tensor of a list of input images.

Conditions of a batch are padded to the longest. The blocks get lists and tensors without their padding.
"""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that its blocks and its files do not give."""

    reason: str
    """Reason why they are needed, and their source."""
    lora_targets: Sequence[str] | None = None
    """Default targets, where they are not all linear layers of attention."""
    blend: Blend = extrapolate
    """Classifier-free guidance."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Inputs of the pipeline that differ from its defaults."""
    pads: bool = True
    """False if rows with masked padding would not be what each is alone."""
    decodes_one: bool = False
    """True if the autoencoder decodes one sample at a time."""
    guided_encoding: bool = False
    """True if the blocks encode a prompt only together with a negative one."""
    optional: Sequence[str] = ()
    """Parts that a folder need not name, beside those that the class calls optional."""
    marks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Key of model_index.json that diffusers ignores -> inputs of a pipeline where it is true."""


WITHOUT_T5 = "_pretrained_without_t5"
"""Key of model_index.json, true for a model that has never seen tokens of T5, not even zeros in their place."""
BLOCKS = {
    "ErnieImagePipeline": "ernie-image",
    "HunyuanVideo15Pipeline": "hunyuan-video-1.5",
    "HunyuanVideo15ImageToVideoPipeline": "hunyuan-video-1.5",
}
"""Class of a pipeline -> name of its blocks, where diffusers 0.42 has no entry in its own table."""
MODELS: Mapping[str, ModelFacts] = {
    "StableDiffusion3ModularPipeline": ModelFacts(
        "adapters of runs made before the generic family have these targets; without T5 the pipeline appends zeros in the "
        "place of its tokens (arXiv:2403.03206), which a model without T5 from the start has never seen",
        lora_targets=(
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ),
        optional=("text_encoder_3", "tokenizer_3"),
        marks={WITHOUT_T5: {"max_sequence_length": 0}},
    ),
    **dict.fromkeys(
        ("QwenImageModularPipeline", "QwenImageEditModularPipeline"),
        ModelFacts(
            "the pipelines scale the guided output to the norm of the conditional one", blend=extrapolate_keeping_norm
        ),
    ),
    "WanModularPipeline": ModelFacts("diffusers 0.42 fails to encode a prompt without guidance", guided_encoding=True),
    "HunyuanVideo15ModularPipeline": ModelFacts(
        "as Wan; the attention mask of the autoencoder has no axis for heads, so that it fits a batch of one",
        guided_encoding=True,
        decodes_one=True,
    ),
    "QwenImage21ModularPipeline": ModelFacts(
        "a cache of keys would be one of older weights, without gradient; latents follow the padded text",
        inputs={"use_kv_cache": False},
        pads=False,
    ),
}
"""Class of a modular pipeline -> facts about it and its subclasses. A pipeline without an entry needs none."""


def find_facts(cls: type[Any] | None) -> ModelFacts:
    """Return the facts about a modular pipeline."""
    classes = () if cls is None else cls.__mro__
    return next((MODELS[one.__name__] for one in classes if one.__name__ in MODELS), ModelFacts(""))


def find_modular_class(index: Mapping[str, Any]) -> type[ModularPipeline] | None:
    """Return the modular pipeline of a model_index.json or modular_model_index.json, or None if diffusers has none for it."""
    name = index["_class_name"]
    own = getattr(diffusers, name, None)
    if isinstance(own, type) and issubclass(own, ModularPipeline):
        return own
    blocks = BLOCKS.get(name) or _get_model(name)
    build_name = None if blocks is None else MODULAR_PIPELINE_MAPPING.get(blocks)
    return None if build_name is None else getattr(diffusers, build_name(index))


@dataclass(frozen=True)
class _Cut:
    """The blocks of a pipeline, cut at its denoising loop."""

    blocks: Any
    encode: Sequence[str]
    """Names of the blocks that make the conditions of a prompt."""
    prepare: Sequence[str]
    """Names of the blocks that prepare the loop."""
    loop: Any
    forward: Sequence[Any]
    """Blocks of the loop up to the denoiser."""
    finish: Sequence[str]
    """Names of the blocks after the loop."""

    @property
    def conditions(self) -> list[str]:
        """Names of the results of `encode` that later blocks may need."""
        steps = self.blocks.sub_blocks
        used = [
            {p.name for step in part for p in steps[step].inputs}
            for part in (self.encode, [*self.prepare, *self.finish])
        ]
        within = used[0] - used[1] - {p.name for p in self.loop.inputs}
        made = [out.name for step in self.encode for out in steps[step].intermediate_outputs]
        return [name for name in made if name not in within and not name.startswith("negative_")]

    @property
    def parts(self) -> set[str]:
        """Names of the parts that these blocks use."""
        steps = [self.blocks.sub_blocks[name] for name in (*self.encode, *self.prepare, *self.finish)]
        return {spec.name for block in [*steps, self.loop] for spec in block.expected_components}

    @property
    def made(self) -> str:
        """`images` or `videos`, or the names of other results."""
        made = {out.name for step in self.finish for out in self.blocks.sub_blocks[step].intermediate_outputs}
        return next((name for name in ("images", "videos") if name in made), " and ".join(sorted(made)))


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
        blocks,
        # Blocks that rewrite a prompt are left out: rewards score samples of the prompt as it is.
        encode=[step for step in before if not step.startswith(("denoise.", "prompt_"))],
        prepare=[step for step in before if step.startswith("denoise.")],
        loop=loop,
        forward=list(loop.sub_blocks.values())[: inner.index("denoiser") + 1],
        finish=after,
    )


class _OneSide(Tensor):
    """Times that lie on one side of every value that a block compares them with. Results of other operations are plain."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __ge__(self, other: Any) -> Any:
        return self.is_meta or bool((self.as_subclass(Tensor) >= other).all())


class _Decoding(Exception):
    """The latents [B, ...] that blocks gave to the autoencoder."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


class ModularFamily(Family):
    """A pipeline that its modular pipeline drives. The classic pipeline loads and saves the parts, where there is one."""

    def __init__(self, pipeline: DiffusionPipeline | ModularPipeline) -> None:
        super().__init__(pipeline)
        name = type(pipeline).__name__
        if isinstance(pipeline, ModularPipeline):
            self.modular = pipeline
        else:
            cls = find_modular_class({**pipeline.config, "_class_name": name})
            if cls is None:
                raise ModelError(f"model.path: diffusers has no modular pipeline for {name}")
            self.modular = _assemble(cls, pipeline.components, config_dict=dict(pipeline.config))
        self.modular.update_components(scheduler=self.scheduler)
        check_interface(self.modular)
        self.facts = facts = find_facts(type(self.modular))
        self._cuts = {False: _cut(self.modular.blocks.get_execution_blocks(prompt=""), name)}
        workflows = self.modular.blocks._workflow_map or {}
        takes_text_alone = not workflows or any(workflow.startswith("text2") for workflow in workflows)
        self.needs_image = "image" in self._cuts[False].blocks.required_inputs or not takes_text_alone
        if self.needs_image or not {"image_conditioned", "image2video"}.isdisjoint(workflows):
            cut = _cut(self.modular.blocks.get_execution_blocks(prompt="", image=True), name)
            # Some blocks keep latents of the image as they are, which kernels do not. Others need parts of another pipeline.
            keeps_latents = any(parameter.name == "conditioning_mask" for parameter in cut.loop.inputs)
            if not keeps_latents and all(getattr(self.modular, part, None) is not None for part in cut.parts):
                self._cuts[True] = cut
        self.takes_image = True in self._cuts
        cut = self._cuts[self.needs_image]
        denoiser = cut.loop.sub_blocks["denoiser"]
        self.denoiser_names = [
            spec.name
            for spec in denoiser.expected_components
            if isinstance(pipeline.components.get(spec.name), nn.Module)
        ]
        self.medium = cut.made
        if self.medium not in ("images", "videos") or not self.denoiser_names:
            raise ModelError(
                f"model.path: {name} makes {self.medium} with {len(self.denoiser_names)} denoisers; expected a pipeline with "
                "at least one that makes images or videos of prompts"
            )
        self.lora_targets = facts.lora_targets or _find_attention_layers(self.denoisers[self.denoiser_names[0]])
        self.blend, self.defaults = facts.blend, {**facts.inputs}
        for key, inputs in facts.marks.items():
            self.defaults |= inputs if pipeline.config.get(key) else {}
        self._condition: Mapping[str, Tensor] | None = None
        self._empty: dict[str, Tensor] | None = None

    @classmethod
    def load(
        cls, path: str, dtype: torch.dtype, revision: str | None, quantization: Mapping[str, Any] | None = None
    ) -> Self:
        index = read_index(path, revision)
        if issubclass(cls.get_pipeline_class(index), DiffusionPipeline):
            return super().load(path, dtype, revision, quantization)
        settings = {"pretrained_model_name_or_path": path, "modular_config_dict": index}
        modular = _assemble(cls.get_pipeline_class(index), {}, **settings)
        names = _find_needed_parts(modular, index)
        for name in names:
            place = modular.get_component_spec(name).pretrained_model_name_or_path
            if place is None:
                raise ModelError(f"model.path: {path} names no place of its {name}, and its blocks need it")
            if str(place) != path:
                log.warning("the %s of %s is loaded from %s, as its index says", name, path, place)
        modular.load_components(names, dtype=dtype, revision=revision, quantization_config=dict(quantization or {}))
        if missing := [name for name in names if getattr(modular, name) is None]:
            raise ModelError(f"model.path: {path} has no {missing[0]} that can be loaded, and its blocks need it")
        family, specs = cls(modular), {name: modular.get_component_spec(name) for name in names}
        sources = {
            name: (str(spec.pretrained_model_name_or_path), spec.subfolder or "", spec.revision or revision)
            for name, spec in specs.items()
        }
        family._drop_encoders(sources, dtype, index)
        return family

    @classmethod
    def build_skeleton(cls, path: str, revision: str | None) -> Self:
        index = read_index(path, revision)
        if issubclass(cls.get_pipeline_class(index), DiffusionPipeline):
            return super().build_skeleton(path, revision)
        build = cls.get_pipeline_class(index)
        settings = {"pretrained_model_name_or_path": path, "modular_config_dict": index}
        modular, parts = build(**settings), dict[str, Any]()
        for name in _find_needed_parts(modular, index):
            spec = modular.get_component_spec(name)
            place, folder = str(spec.pretrained_model_name_or_path), spec.subfolder
            parts[name] = build_meta_parts(place, spec.revision, {folder: index[name][:2]}, [])[folder]
        return cls(_assemble(build, parts, **settings))

    @classmethod
    def get_pipeline_class(cls, index: Mapping[str, Any]) -> type[Any]:
        found: type[Any] = getattr(diffusers, index["_class_name"])
        return found

    @classmethod
    def index_keys(cls, index: Mapping[str, Any]) -> Sequence[str]:
        return list(find_facts(find_modular_class(index)).marks)

    @classmethod
    def part_overrides(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the parts that the folder does not have, which diffusers refuses to load otherwise."""
        absent = [name for name, part in index.items() if isinstance(part, list | tuple) and list(part) == [None, None]]
        optional = [
            *cls.get_pipeline_class(index)._optional_components,
            *find_facts(find_modular_class(index)).optional,
        ]
        return dict.fromkeys([*absent, *(name for name in optional if name not in index)])

    @property
    def owners(self) -> list[Any]:
        return [self.pipeline, self.modular]

    def with_inputs(self, inputs: Mapping[str, Any]) -> Self:
        family = super().with_inputs(inputs)
        family._condition = family._empty = None
        known = {parameter.name for cut in self._cuts.values() for parameter in cut.blocks.inputs}
        if unknown := set(family.inputs) - known - {"height", "width", "num_frames"}:
            raise ValueError(
                f"model.inputs: {type(self.pipeline).__name__} has no input {min(unknown)!r}; expected some of "
                f"{', '.join(sorted(name for name in known if name))}"
            )
        if "guidance_scale" in family.inputs and not self.takes_guidance:
            raise ValueError(
                f"model.inputs.guidance_scale: found {family.inputs['guidance_scale']}, and this model takes no guidance as an "
                "input (guidance_embeds in its config); remove it"
            )
        return family

    @property
    def lora_pipeline(self) -> Any:
        return self.pipeline if hasattr(self.pipeline, "load_lora_weights") else self.modular

    @cached_property
    def scheduler(self) -> Scheduler:
        scheduler = self.pipeline.scheduler
        # Other schedulers of such models scale their input by the step, which is not known at an arbitrary time.
        return scheduler if _is_flow(scheduler) else DDIMScheduler.from_config(scheduler.config, clip_sample=False)

    @property
    def takes_guidance(self) -> bool:
        """Whether guidance is a number that the denoiser reads, as in FLUX.1 dev."""
        return any(denoiser.config.get("guidance_embeds") for denoiser in self.denoisers.values())

    @property
    def guides(self) -> bool:
        return any(name.startswith("guider") for name in self.modular.components)

    @property
    def process(self) -> Process:
        scheduler = self.scheduler
        if _is_flow(scheduler):
            return FlowMatching(scheduler.config.num_train_timesteps)
        return VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def tokenizers(self, max_sequence_length: int | None) -> dict[str, tuple[Any, int]]:
        (default,) = {
            p.default for p in self._cuts[self.needs_image].blocks.inputs if p.name == "max_sequence_length"
        } or {None}
        longest = {"max_sequence_length": default, **self.defaults, **self.inputs}["max_sequence_length"]
        longest = longest if max_sequence_length is None else max_sequence_length
        found = super().tokenizers(max_sequence_length)
        return {name: (part, min(limit, longest or limit)) for name, (part, limit) in found.items()}

    def encoding_inputs(self, with_image: bool) -> Mapping[str, Any]:
        cut = self._cuts[with_image]
        read = {p.name for step in cut.encode for p in cut.blocks.sub_blocks[step].inputs}
        return {name: value for name, value in self.inputs.items() if name in read or with_image}

    @torch.no_grad()
    def encode_prompt(self, text: str, image: Image.Image | None, max_sequence_length: int | None) -> dict[str, Tensor]:
        cut = self._cuts[image is not None]
        given = {"prompt": text, "image": image, "max_sequence_length": max_sequence_length}
        state = self._state(cut, {name: value for name, value in given.items() if value is not None})
        self._run(cut, cut.encode, state, guided=self.facts.guided_encoding)
        return _pack({name: state.get(name) for name in cut.conditions}, self.facts.pads)

    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        if condition is not self._condition:  # the latest is kept: a rollout calls the denoiser many times
            self._condition, self._states = condition, dict[tuple[int, ...], Any]()
            alike = [condition[name].flatten(1) for name in condition if name.endswith((SHAPE, NUMBER))]
            self._alike = [tuple(row) for row in torch.cat(alike, 1).tolist()] if alike else [()] * len(x_t)
        if not self._alike[0] and len(self.denoiser_names) == 1:
            return self._call(x_t, timestep, condition, tuple(range(len(x_t))))
        sides: dict[bool, dict[tuple[int, ...], list[int]]] = {True: defaultdict(list), False: defaultdict(list)}
        for row, (side, kind) in enumerate(zip(self._find_sides(timestep), self._alike, strict=True)):
            sides[side][kind].append(row)
        groups = [rows for kinds in sides.values() for rows in kinds.values()]
        outputs, idle = list[Tensor](), list[Tensor]()
        for (side, kinds), count in zip(sides.items(), self.equal_calls(list(map(len, sides.values()))), strict=True):
            outputs += [self._call(x_t[rows], timestep[rows], condition, tuple(rows)) for rows in kinds.values()]
            for _ in range(count - len(kinds)):
                last = timestep.new_full((1,), side * self.scheduler.config.num_train_timesteps)
                idle.append(0 * self._call(x_t[:1], last, condition, (0,)).sum())  # zero, and part of the graph
        order = torch.tensor([row for rows in groups for row in rows], device=x_t.device)
        return sum(idle, torch.cat(outputs)[order.argsort()])

    def _find_sides(self, timestep: Tensor) -> list[bool]:
        """Return for each row whether its time is that of the first denoiser of several."""
        if len(self.denoiser_names) == 1 or timestep.is_meta:  # a time without a value, for the count of a cost
            return [True] * len(timestep)
        boundary = self.modular.config.boundary_ratio * self.scheduler.config.num_train_timesteps
        return [bool(time >= boundary) for time in timestep.tolist()]

    def _call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor], rows: tuple[int, ...]) -> Tensor:
        """Return the output for rows that are alike."""
        state = self._prepare(condition, rows)
        state.latents = x_t.float()  # blocks give the time the dtype of the latents, and half precision would round it
        if len(self.denoiser_names) > 1:
            timestep = timestep.as_subclass(_OneSide)
        for block in self._cut_of(condition).forward:
            with_gradient: Any = inspect.unwrap(type(block).__call__)  # under its no_grad
            with_gradient(block, self.modular, state, i=0, t=timestep)
        output: Tensor = state.noise_pred
        state.latents = state.noise_pred = None  # the state is kept, and must not keep the graph of this call
        return output

    def latent_shape(self) -> tuple[int, ...]:
        if (self.medium == "videos") != ("num_frames" in self.inputs):
            expected = "set the number of frames" if self.medium == "videos" else "remove it"
            raise ValueError(f"rollout.frames: {type(self.pipeline).__name__} makes {self.medium}; {expected}")
        template = self._template(1)
        shape = tuple(template.get("latents").shape[1:])
        for name, key in (("height", "height"), ("width", "width"), ("num_frames", "frames")):
            found, expected = self.inputs.get(name), template.get(name)
            if found is not None and expected is not None and expected != found:
                raise ValueError(
                    f"rollout.{key}: found {found}, and this model makes {expected} of it; set that number"
                )
        if len(shape) > 2 or self.medium == "images":
            self._check_size(shape, {name: self.inputs.get(name) or template.get(name) for name in ("height", "width")})
        return shape

    def _check_size(self, shape: tuple[int, ...], sizes: Mapping[str, int | None]) -> None:
        """Raise ValueError for a size in pixels that the latents do not have, or of which they have too many."""
        known = {name: size for name, size in sizes.items() if size is not None}
        if len(known) < 2:
            return
        positions = shape[0] if len(shape) == 2 else shape[-2] * shape[-1]
        pixels = math.isqrt(math.prod(known.values()) // positions)  # side of a position
        unit = pixels * (1 if len(shape) == 2 else self.patch_size)
        largest = self.denoisers[self.denoiser_names[0]].config.get("pos_embed_max_size")
        for name, size in known.items():
            if size % unit:
                raise ValueError(f"rollout.{name}: found {size} pixels, expected a multiple of {unit} for this model")
            if largest is not None and size > largest * unit:
                raise ValueError(
                    f"rollout.{name}: found {size} pixels, expected at most {largest * unit}: the model has no positions for "
                    "more (pos_embed_max_size)"
                )

    @property
    def size(self) -> tuple[int, int]:
        template = self._template(1)
        height, width = (self.inputs.get(name) or template.get(name) for name in ("height", "width"))
        return height, width

    @property
    def patch_size(self) -> int:
        size = self.denoisers[self.denoiser_names[0]].config.get("patch_size", 1)
        return size if isinstance(size, int) else int(size[-1])

    def sequence_length(self, latent_shape: Sequence[int]) -> int:
        return latent_shape[0] if len(latent_shape) == 2 else super().sequence_length(latent_shape)

    def build_grid(self, steps: int) -> Grid:
        if not _is_flow(self.scheduler):
            return super().build_grid(steps)
        self._template(1, num_inference_steps=steps)
        grid = Grid(self.modular.scheduler.sigmas.clone())
        if grid.steps != steps:
            raise ValueError(
                f"rollout.steps: found {steps}, and {type(self.pipeline).__name__} draws in {grid.steps} steps of its own "
                f"(sample_sigmas); set {grid.steps}, and eval.steps too"
            )
        return grid

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] or videos [B, F, 3, H, W] of latents [B, ...], float32; transparent ones on white."""
        if self.facts.decodes_one and len(latents) > 1:
            return torch.cat([self.decode(one[None]) for one in latents])
        cut, state = self._cuts[self.needs_image], self._template(len(latents))
        state.set("latents", latents.to(self.pipeline.vae.dtype))
        samples: Tensor = self._run(cut, cut.finish, state).get(self.medium)
        colors: Tensor
        colors, alpha = samples.float().split([3, samples.shape[-3] - 3], dim=-3)
        return colors * alpha + 1 - alpha if alpha.numel() else colors

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [B, ...] of images or videos, float32: the mean of the autoencoder's posterior.

        The blocks scale and reorder latents before the autoencoder decodes them. A few latents show how.
        """
        height, width = images.shape[-2:]
        known = (height, width) == self.size  # its empty prompt is encoded already
        family = self if known else self.with_inputs({**self.inputs, "height": height, "width": width})
        shape, vae = family.latent_shape(), self.pipeline.vae
        if self.device.type == "meta":
            return torch.zeros(len(images), *shape)
        index = torch.arange(torch.Size(shape).numel(), device=vae.device).reshape(1, *shape)
        high, low, zero, one = (
            family._find_decoded(probe.float()) for probe in (index // 2048, index % 2048, index * 0, index * 0 + 1)
        )
        high, low = (((digit - zero) / (one - zero)).round().long().flatten() for digit in (high, low))
        x = images.to(vae.device, vae.dtype) * 2 - 1
        if vae.config.get("in_channels") == 4:  # with an opaque alpha
            x = nn.functional.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)
        if zero.ndim == 5:  # frames follow channels
            x = x[:, :, None] if x.ndim == 4 else x.transpose(1, 2)
        parts = x.split(1) if self.facts.decodes_one else [x]
        mean = torch.cat([vae.encode(part).latent_dist.mode() for part in parts]).float()
        found = ((mean - zero) / (one - zero)).flatten(1)
        return torch.empty_like(found).index_copy_(1, 2048 * high + low, found).reshape(-1, *shape)

    def _find_decoded(self, latents: Tensor) -> Tensor:
        """Return the tensor that the autoencoder would decode for latents [1, ...]."""
        vae = self.pipeline.vae

        def capture(z: Tensor, *_: Any, **__: Any) -> Any:
            raise _Decoding(z)

        vae.decode = capture
        try:
            self.decode(latents)
        except _Decoding as decoding:
            return decoding.latents.float()
        finally:
            del vae.decode
        raise ModelError(f"{type(self.pipeline).__name__} decodes without its vae; train on `rows: prompts`")

    def _cut_of(self, condition: Mapping[str, Tensor]) -> _Cut:
        """Return the blocks that made these conditions: those with an input image if a condition comes from one."""
        names = {name.removesuffix(LISTED) for name in condition if not name.endswith((LENGTH, SHAPE, NUMBER))}
        return next(cut for _, cut in sorted(self._cuts.items()) if names <= set(cut.conditions))

    def _template(self, count: int, **inputs: Any) -> PipelineState:
        """Return the state before the loop for `count` empty prompts, for what depends on no prompt."""
        cut = self._cuts[self.needs_image]
        if self._empty is None:
            height, width = (self.inputs.get(name) or 256 for name in ("height", "width"))
            image = Image.new("RGB", (width, height)) if self.needs_image else None
            device = _find_device(self.modular)
            self._empty = {name: value.to(device) for name, value in self.encode("", image, None).items()}
        conditions = {name: value.repeat_interleave(count, dim=0) for name, value in self._empty.items()}
        return self._run(cut, cut.prepare, self._state(cut, {**_unpack(conditions), **inputs}))

    @torch.no_grad()
    def _prepare(self, condition: Mapping[str, Tensor], rows: tuple[int, ...]) -> Any:
        """Return the state of the loop for some rows of these conditions, which are alike."""
        cut = self._cut_of(condition)
        if rows not in self._states:
            whole = len(rows) == len(self._alike)
            chosen = condition if whole else {name: value[list(rows)] for name, value in condition.items()}
            state = self._run(cut, cut.prepare, self._state(cut, _unpack(chosen)))
            # The loop's own preamble may add to its state, so it runs with a step that keeps the state and does nothing.
            loop, kept = copy.copy(cut.loop), list[Any]()

            def keep(modular: Any, block_state: Any, **_: Any) -> tuple[Any, Any]:
                block_state.noise_pred = None
                kept.append(block_state)
                return modular, block_state

            loop.loop_step = keep
            loop.set_progress_bar_config(disable=True)
            loop(self.modular, state)
            self._states[rows] = kept[0]
        self._switch_guiders(False)  # the policy guides
        return self._states[rows]

    def _state(self, cut: _Cut, values: Mapping[str, Any]) -> PipelineState:
        settings = {"output_type": "pt", "num_inference_steps": 2, **self.defaults, **self.inputs}
        if {"height", "width"} <= settings.keys():
            settings.setdefault("max_area", settings["height"] * settings["width"])
        state, given = PipelineState(), {"generator": torch.Generator().manual_seed(0), **settings, **values}
        for parameter in cut.blocks.inputs:
            if parameter.name:
                state.set(parameter.name, given.get(parameter.name, parameter.default), parameter.kwargs_type)
        kinds = {
            out.name: out.kwargs_type for block in cut.blocks.sub_blocks.values() for out in block.intermediate_outputs
        }
        for name, value in values.items():
            state.set(name, value, kinds.get(name))
        for parameter in cut.loop.inputs:  # of guiders, which are off
            if parameter.required and parameter.name.startswith("negative_"):
                positive = parameter.name.removeprefix("negative_")
                state.set(parameter.name, values.get(positive), kinds.get(positive))
        return state

    @torch.no_grad()
    def _run(self, cut: _Cut, names: Sequence[str], state: PipelineState, guided: bool = False) -> PipelineState:
        self._switch_guiders(guided)
        for name in names:
            _, state = cut.blocks.sub_blocks[name](self.modular, state)
        return state

    def _switch_guiders(self, on: bool) -> None:
        for name, part in self.modular.components.items():
            if name.startswith("guider"):
                part.enable() if on else part.disable()


def _assemble(cls: type[ModularPipeline], parts: Mapping[str, Any], **settings: Any) -> ModularPipeline:
    """Build a modular pipeline of parts."""
    members: dict[str, Any] = {"_execution_device": property(_find_device)}
    pixels = getattr(parts.get("vae"), "spatial_compression_ratio", None)
    if pixels is not None and hasattr(cls, "vae_scale_factor_spatial"):
        # diffusers 0.42 counts the stages of Wan's autoencoder, and forgets its patches.
        members["vae_scale_factor_spatial"] = pixels
    cls = type(cls.__name__, (cls,), members)
    modular = cls(**settings)
    modular.update_components(**{name: part for name, part in parts.items() if part is not None})
    return modular


def _find_device(modular: ModularPipeline) -> torch.device:
    """Return the device on which blocks make tensors."""
    device = find_device(modular)
    # Blocks read values of tensors, which those on the meta device do not have.
    return torch.device("cpu") if device.type == "meta" else device


def _find_needed_parts(modular: ModularPipeline, index: Mapping[str, Any]) -> list[str]:
    """Return the names of the parts of an index that blocks need, without those that rewrite prompts."""
    cut = _cut(modular.blocks.get_execution_blocks(prompt=""), type(modular).__name__)
    return sorted(name for name in cut.parts if isinstance(index.get(name), list | tuple))


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


def _pack(found: Mapping[str, Any], pads: bool) -> dict[str, Tensor]:
    """Return the results of blocks for one prompt as tensors [1, ...] that can be padded. Pictures and settings are left out."""
    conditions = dict[str, Tensor]()
    for name, value in found.items():
        if isinstance(value, list) and all(isinstance(one, Tensor) for one in value):
            (one,) = value  # of prompts, without an axis for the batch, or of the input images of all prompts
            prompts = {name: one[None], name + LENGTH: torch.tensor([len(one)])}
            conditions |= prompts if one.ndim < 3 else {name + LISTED: one}
        elif isinstance(value, int) and not isinstance(value, bool):
            conditions[name + NUMBER] = torch.tensor([[value]])
        elif isinstance(value, Tensor):
            conditions[name] = value
    masks = {tuple(value.shape) for name, value in conditions.items() if pads and "mask" in name}
    for name, value in list(conditions.items()):
        if value.ndim > 1 and name + LENGTH not in conditions and tuple(value.shape[:2]) not in masks:
            conditions[name + SHAPE] = torch.tensor([value.shape[1:]])
    return conditions


def _unpack(condition: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the conditions of rows that are alike as the blocks have them, without padding where no mask covers it."""
    plain = dict[str, Any]()
    for name, value in condition.items():
        if name.endswith(NUMBER):
            plain[name.removesuffix(NUMBER)] = int(value[0])
        elif (lengths := condition.get(name + LENGTH)) is not None:
            plain[name] = [row[:length] for row, length in zip(value, lengths.tolist(), strict=True)]
        elif not name.endswith((LENGTH, SHAPE)):
            shapes = condition.get(name + SHAPE)
            sizes = [] if shapes is None else shapes[0].tolist()
            whole = value[(slice(None), *(slice(size) for size in sizes))]
            plain |= {name.removesuffix(LISTED): [whole]} if name.endswith(LISTED) else {name: whole}
    return plain
