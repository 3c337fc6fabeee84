"""The contract between a policy and a pipeline of diffusers: encode prompts, call the denoiser, decode latents."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline, PipelineQuantizationConfig
from diffusers.models.modeling_utils import get_parameter_device
from peft import get_peft_model_state_dict
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from difrl.policies.diffusion.embedding_files import EmbeddingFiles, open_embedding_files
from difrl.policies.diffusion.families.encoders import Encoders
from difrl.policies.diffusion.families.meta_parts import build_meta_encoders, build_meta_parts
from difrl.policies.diffusion.families.unscaled_lora import describe_unscaled_lora, get_unscaled_lora, sort_header
from difrl.policies.errors import LOADING_ERRORS, ModelError
from difrl.policies.source_digests import Source
from samplers import Blend, Grid, Process, Scheduler, extrapolate

LORA_FILE = "{}_lora_weights.safetensors"
"""Name of the file with the adapter of a denoiser beside the first, such as transformer_2, for load_lora_weights' weight_name."""


def read_index(path: str, revision: str | None) -> dict[str, Any]:
    """Return the model_index.json of a pipeline, or the modular_model_index.json of one that has no other. OSError if neither."""
    try:
        return dict(DiffusionPipeline.load_config(path, revision=revision))
    except OSError as error:
        try:
            return dict(ModularPipeline.load_config(path, revision=revision))
        except OSError:
            raise error from None


def _of_each(name: str) -> Callable[..., None]:
    """Return a method that calls the method of this name of every part."""

    def call(self: nn.ModuleDict, *args: Any, **kwargs: Any) -> None:
        for part in self.values():
            getattr(part, name)(*args, **kwargs)

    return call


def find_device(pipeline: Any) -> torch.device:
    """Return the device on which prompts are encoded: that of the autoencoder, as denoisers may be elsewhere between passes.

    diffusers' own search visits every module of a model.
    """
    modules = [part for part in pipeline.components.values() if isinstance(part, ModelMixin)]
    vae = getattr(pipeline, "vae", None)
    device: torch.device = next((vae or modules[0]).parameters()).device
    return device


def _to_cpu(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU: a view may keep alive more than itself. Those of a skeleton have no values."""
    return {name: value if value.is_meta else value.cpu().clone() for name, value in conditions.items()}


class Denoisers(nn.ModuleDict):
    """Several denoisers of a pipeline, which are trained as one module."""

    add_adapter = _of_each("add_adapter")
    disable_adapters = _of_each("disable_adapters")
    enable_adapters = _of_each("enable_adapters")
    enable_gradient_checkpointing = _of_each("enable_gradient_checkpointing")
    enable_xformers_memory_efficient_attention = _of_each("enable_xformers_memory_efficient_attention")
    set_attention_backend = _of_each("set_attention_backend")


class Family(ABC):
    """A pipeline behind one interface. A family holds no weights of its own; images are [B, 3, H, W] in [0, 1].

    What is not abstract fits pipelines with an image autoencoder `vae` and a denoiser whose config has `in_channels` and
    `sample_size`.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_names: Sequence[str]
    """Names of the pipeline's parts that are trained."""
    lora_targets: Sequence[str] = ()
    """Suffixes of the linear modules that LoRA adapts by default."""
    blend: Blend = staticmethod(extrapolate)
    """Classifier-free guidance of the pipeline."""
    takes_image: bool = False
    """True if a prompt may have an input image."""
    needs_image: bool = False
    """True if every prompt must have one."""
    inputs: Mapping[str, Any] = {}
    """Inputs of the pipeline beside the prompt, such as height and width in pixels. Others have the pipeline's defaults."""
    encoders: Encoders
    """The parts that only prompts need."""
    embedding_files: EmbeddingFiles | None = None
    """The cache of conditions on the disk, if there is one."""

    equal_calls: Callable[[Sequence[int]], Sequence[int]] = staticmethod(lambda counts: counts)
    """Number of calls of each kind that this process needs -> the number that it must make: the largest of any process where
    weights are sharded, since a call then takes all processes."""

    def __init__(self, pipeline: DiffusionPipeline | ModularPipeline) -> None:
        self.pipeline: Any = pipeline
        self.encoders = Encoders([pipeline], {})

    @classmethod
    def load(
        cls, path: str, dtype: torch.dtype, revision: str | None, quantization: Mapping[str, Any] | None = None
    ) -> Self:
        """Load the pipeline at a hub id or folder on the CPU, with weights in `dtype`. Encoders load when a prompt is encoded.

        quantization: name of a part -> its configuration of diffusers.
        """
        index = read_index(path, revision)
        pipeline_class, settings = cls.get_pipeline_class(index), cls.part_overrides(index)
        encoders = build_meta_encoders(path, revision, {k: v for k, v in index.items() if k not in settings})
        for part in encoders.values():
            nn.Module.to(part, dtype)
        if quantization:
            settings["quantization_config"] = PipelineQuantizationConfig(quant_mapping=dict(quantization))
        pipeline = pipeline_class.from_pretrained(
            path, dtype=dtype, revision=revision, use_safetensors=True, **settings, **encoders
        )
        family = cls._with_index(pipeline, index)
        family._drop_encoders({name: (path, name, revision) for name in index}, dtype, index)
        return family

    def _drop_encoders(self, sources: Mapping[str, Source], dtype: torch.dtype, index: Mapping[str, Any]) -> None:
        """Drop the weights of encoders until a prompt has to be encoded, and open the cache of what they return.

        sources: those of all parts. index: the pipeline's settings.
        """
        parts = self.pipeline.components.items()
        models = {name: type(part) for name, part in parts if isinstance(part, PreTrainedModel)}

        def load(name: str) -> PreTrainedModel:
            place, folder, revision = sources[name]
            settings = {"subfolder": folder, "revision": revision, "dtype": dtype, "use_safetensors": True}
            try:
                part = models[name].from_pretrained(place, **settings)
            except LOADING_ERRORS as error:
                raise ModelError(
                    f"model.path: the {name} of {place!r} cannot be loaded ({type(error).__name__}: {error}), and a prompt has "
                    "to be encoded; copy or download the model again"
                ) from error
            return part.requires_grad_(False).eval()

        self.encoders = Encoders(self.owners, {name: partial(load, name) for name in models})
        self.encoders.drop()
        if models:
            found = [name for name, part in self.pipeline.components.items() if part is not None and name in sources]
            used = [sources[name] for name in found if name not in self.denoiser_names]
            code = [Path(inspect.getfile(cls)) for cls in type(self).__mro__ if issubclass(cls, Family)]
            self.embedding_files = open_embedding_files(used, [str(dtype), dict(index)], code)

    @classmethod
    def build_skeleton(cls, path: str, revision: str | None) -> Self:
        """Build the same pipeline on the meta device, without weights and tokenizers, to count its cost."""
        index = read_index(path, revision)
        settings = cls.part_overrides(index)
        parts = build_meta_parts(path, revision, index, settings)
        build = cls.get_pipeline_class(index)
        # Settings of the pipeline choose its blocks, such as is_distilled.
        own = {name: index[name] for name in inspect.signature(build).parameters if name in index and name not in parts}
        return cls._with_index(build(**{**parts, **own, **settings}), index)

    @classmethod
    def _with_index(cls, pipeline: DiffusionPipeline, index: Mapping[str, Any]) -> Self:
        pipeline.register_to_config(**{key: index[key] for key in cls.index_keys(index) if key in index})
        return cls(pipeline)

    @classmethod
    def index_keys(cls, index: Mapping[str, Any]) -> Sequence[str]:
        """Return the keys of model_index.json that diffusers ignores and this family reads. A saved pipeline keeps them."""
        return ()

    @classmethod
    def get_pipeline_class(cls, index: Mapping[str, Any]) -> type[DiffusionPipeline]:
        """Return the class of the pipeline of a model_index.json."""
        return cls.pipeline_class

    @classmethod
    def part_overrides(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parts, by name, that replace those of model_index.json (`index`); None leaves a part out."""
        return {}

    def with_inputs(self, inputs: Mapping[str, Any]) -> Self:
        """Return the family with other inputs, over the same pipeline; None is the pipeline's default.

        Raise ValueError for an input that the pipeline does not have.
        """
        family = copy.copy(self)
        family.inputs = {name: value for name, value in inputs.items() if value is not None}
        return family

    @property
    def denoisers(self) -> dict[str, ModelMixin]:
        """The parts that are trained, by name."""
        return {name: getattr(self.pipeline, name) for name in self.denoiser_names}

    @cached_property
    def denoiser(self) -> Any:
        """The module that is trained: the denoiser, or all of them as one."""
        parts = self.denoisers
        return Denoisers(parts) if len(parts) > 1 else parts[self.denoiser_names[0]]

    @property
    def owners(self) -> list[Any]:
        """The pipelines that hold the parts as attributes."""
        return [self.pipeline]

    @property
    def modules(self) -> list[nn.Module]:
        """The parts of the pipeline that have weights."""
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    @property
    def resident(self) -> list[nn.Module]:
        """The parts that stay on the device while samples are drawn and learnt from: all but the encoders of prompts."""
        return [part for part in self.modules if not isinstance(part, PreTrainedModel)]

    @property
    def device(self) -> torch.device:
        """The device on which the denoiser runs."""
        device: torch.device = get_parameter_device(self.denoiser)
        return device

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler from which the times of a run are taken."""
        return self.pipeline.scheduler

    @property
    def guides(self) -> bool:
        """Whether the pipeline has classifier-free guidance of its own. If not, guidance was distilled into its model."""
        return True

    @property
    def distilled(self) -> bool:
        """Whether the pipeline's files call its model distilled to few steps. Some distilled models are not called so."""
        return bool(self.pipeline.config.get("is_distilled") or self.pipeline.config.get("sample_sigmas"))

    @property
    @abstractmethod
    def process(self) -> Process:
        """The corruption process that the model was trained with."""

    @abstractmethod
    def encode_prompt(self, text: str, image: Image | None, max_sequence_length: int | None) -> dict[str, Tensor]:
        """Return the conditions of the denoiser for a text and its input image: name -> [1, ...].

        The image is None unless the family takes one.
        """

    def encoding_inputs(self, with_image: bool) -> Mapping[str, Any]:
        """Return the inputs of the family that `encode_prompt` may depend on."""
        return self.inputs

    @torch.no_grad()
    def encode(self, text: str, image: Image | None, max_sequence_length: int | None) -> dict[str, Tensor]:
        """Return the conditions of `encode_prompt` on the CPU, from the disk if they were computed before."""
        encoders, files = self.encoders, self.embedding_files
        if files is None or encoders.adapted:
            with encoders.at_hand(find_device(self.pipeline)):
                return _to_cpu(self.encode_prompt(text, image, max_sequence_length))
        settings = {"max_sequence_length": max_sequence_length, **self.encoding_inputs(image is not None)}
        device = find_device(self.pipeline)
        file = files.find(text, image, settings, device)
        if (found := files.read(file)) is None:
            with encoders.at_hand(device):
                found = _to_cpu(self.encode_prompt(text, image, max_sequence_length))
            files.write(file, found)
        return found

    def tokenizers(self, max_sequence_length: int | None) -> dict[str, tuple[Any, int]]:
        """Return the tokenizers of prompts by name, each with the number of tokens that its encoder reads."""
        parts = self.pipeline.components.items()
        found = {name: part for name, part in parts if name.startswith("tokenizer") and part is not None}
        found = {name: getattr(part, "tokenizer", part) for name, part in found.items()}  # that of a processor
        return {name: (part, part.model_max_length) for name, part in found.items()}

    @abstractmethod
    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the denoiser's raw output [B, ...] for states [B, ...] at its own timesteps [B]."""

    @property
    def patch_size(self) -> int:
        """Side of the square of latents that is one token of the denoiser."""
        return 1

    @property
    def size_multiple(self) -> int:
        """Number that must divide the height and the width of a latent."""
        return self.patch_size

    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent, for the inputs of the family.

        Raise ValueError for a size that the denoiser cannot take. A pipeline itself fails late, in the middle of a pass.
        """
        config, factor = self.denoiser.config, self.pipeline.vae_scale_factor
        unit = factor * self.size_multiple
        if surplus := sorted(set(self.inputs) - {"height", "width"}):
            key = "rollout.frames" if surplus[0] == "num_frames" else f"model.inputs.{surplus[0]}"
            raise ValueError(f"{key}: {type(self.pipeline).__name__} has no such input; remove it")
        sizes = {name: self.inputs.get(name) for name in ("height", "width")}
        for name, pixels in sizes.items():
            if pixels is not None and pixels % unit:
                raise ValueError(f"rollout.{name}: found {pixels} pixels, expected a multiple of {unit} for this model")
        return (config.in_channels, *(pixels // factor if pixels else config.sample_size for pixels in sizes.values()))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of samples in pixels."""
        *_, height, width = self.latent_shape()
        factor: int = self.pipeline.vae_scale_factor
        return height * factor, width * factor

    @property
    def pixels(self) -> int:
        """Number of pixels of a sample, in all of its frames."""
        height, width = self.size
        return height * width * int(self.inputs.get("num_frames", 1))

    def sequence_length(self, latent_shape: Sequence[int]) -> int:
        """Return the number of image tokens of one latent, on which dynamically shifted schedules depend."""
        return (latent_shape[-2] // self.patch_size) * (latent_shape[-1] // self.patch_size)

    def build_grid(self, steps: int) -> Grid:
        """Return the times at which the pipeline calls its denoiser in a run of `steps`, for the inputs of the family."""
        shape = self.latent_shape()
        return Grid.from_scheduler(self.scheduler, self.process, steps, sequence_length=self.sequence_length(shape))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents [B, ...], float32."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [B, ...] of images, float32: the mean of the autoencoder's posterior."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents: Tensor = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mean
        scaled: Tensor = (latents.float() - shift) * vae.config.scaling_factor
        return scaled

    @property
    def lora_pipeline(self) -> Any:
        """The pipeline whose methods read and write adapters."""
        return self.pipeline

    def load_lora(self, path: str, adapter: str) -> list[str]:
        """Load an adapter onto the denoiser, and onto text encoders if it has weights for them. These stay frozen.

        Return the names of tensors that only the file or only the pipeline has afterwards.
        """
        first, *others = self.denoiser_names
        places = {first: {}, **{name: {"weight_name": LORA_FILE.format(name)} for name in others}}
        in_file, loaded = set[str](), set[str]()
        for name, place in places.items():
            found = type(self.lora_pipeline).lora_state_dict(path, **place)
            weights = found[0] if isinstance(found, tuple) else found  # some return kohya's alphas too
            if any(key.partition(".")[0] in self.encoders.loaders for key in weights):
                self.encoders.keep()
            into = {f"load_into_{name}": True} if place else {}
            self.lora_pipeline.load_lora_weights(path, adapter_name=adapter, **place, **into)
            in_file |= {f"{name}:{key}" for key in weights if "lora" in key and not key.endswith(".alpha")}
        for name, part in self.adapted_parts().items():
            if name not in self.denoiser_names:
                part.requires_grad_(False)
            loaded |= {f"{name}.{key}" for key in get_peft_model_state_dict(part, adapter_name=adapter)}
        # Names of other formats than PEFT's are converted, so only their number is compared.
        return [] if len(in_file) == len(loaded) else sorted(in_file - loaded) or sorted(loaded - in_file)

    def save_lora(self, folder: Path) -> None:
        """Write the adapter for the pipeline's own load_lora_weights, with alpha = rank: its scale is in the weights.

        The file has a place for alpha in its header only, which many readers ignore. They take alpha = rank.
        """
        first, *others = self.denoiser_names
        files = dict[str | None, Mapping[str, nn.Module]]()
        files[None] = {name: part for name, part in self.adapted_parts().items() if name not in others}
        files |= {LORA_FILE.format(name): {first: self.denoisers[name]} for name in others}
        for file, parts in files.items():
            layers = {f"{name}_lora_layers": get_unscaled_lora(part) for name, part in parts.items()}
            metadata = {f"{name}_lora_adapter_metadata": describe_unscaled_lora(part) for name, part in parts.items()}
            type(self.lora_pipeline).save_lora_weights(folder, weight_name=file, **layers, **metadata)
        for path in folder.glob("*.safetensors"):
            sort_header(path)

    def save(self, folder: Path) -> None:
        """Write the pipeline for from_pretrained. Its encoders must have their weights."""
        self.pipeline.save_pretrained(str(folder), safe_serialization=True)

    def adapted_parts(self) -> dict[str, nn.Module]:
        """Return the parts of the pipeline that have an adapter, by name."""
        parts = {**self.denoisers, **self.pipeline.components}
        return {name: part for name, part in parts.items() if getattr(part, "peft_config", None)}
